"""Which machine of a cluster a node is planned for, which may run it, and what it takes there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bigpipe.errors import DoesNotFit
from bigpipe.fit import fits
from bigpipe.orchestrator.contract import Forecast, Machine
from bigpipe.orchestrator.launch import Cluster, Host, Needs
from bigpipe.orchestrator.recipe import Node, ResourcesSpec

from .misfits import asked_misfits, foreseen_misfits, takes_any_gpus


def planned_for(cluster: Cluster, node: Node) -> Host:
    """Return the machine that a node is planned for, with the GPUs that it asks for: one that has what its `resources`
    ask for, if any has; of these the one with the most GPUs, then the most memory. Raise DoesNotFit where none has its
    labels."""
    asked = node.resources
    return max(
        labelled(cluster, node),
        key=lambda host: (_has(host.machine, asked), len(host.machine.gpus), host.machine.memory, host.machine.cpus),
    )


def labelled(cluster: Cluster, node: Node) -> list[Host]:
    """Return the machines that have the labels of a node's `resources`, as it would see them. Raise DoesNotFit where
    none has."""
    wanted = node.resources.labels
    found = [host for host in cluster.hosts if wanted.items() <= dict(host.labels).items()]
    if found:
        return [replace(host, machine=_with_gpus(host.machine, node.resources.gpus)) for host in found]
    known = sorted({f"{name}={value}" for host in cluster.hosts for name, value in host.labels.items()})
    asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
    cure = f"they have {', '.join(_of_people(known)) or 'none'}"
    error = DoesNotFit(f"{node.name}: no machine of {cluster.name} has the labels {asked}", cure)
    error.place, error.node = node.places.of("resources.labels"), node.name
    raise error


def _of_people(known: Iterable[str]) -> list[str]:
    """Without those that the cluster gives itself."""
    return [label for label in known if "/" not in label.partition("=")[0]]


def _with_gpus(machine: Machine, count: int | None) -> Machine:
    return machine if count is None else replace(machine, gpus=machine.gpus[:count])


def _has(machine: Machine, asked: ResourcesSpec) -> bool:
    largest = max((gpu.memory for gpu in machine.gpus), default=0)
    return (
        fits(asked.cpus or 1, machine.cpus)
        and fits(asked.gpus or 0, len(machine.gpus))
        and fits(asked.ram or 0, machine.memory)
        and fits(asked.gpu_memory or 0, largest)
    )


def able(cluster: Cluster, node: Node, forecast: Forecast) -> list[Host]:
    """Return the machines that may run a node: they have its labels, and hold what it asks for and is foreseen to need.
    Where its key holds facts about the machine, those of which the same holds. Raise DoesNotFit as `labelled`."""
    asked, facts = node.resources, node.kind.planning.facts
    found = labelled(cluster, node)
    if facts is not None:
        wanted = facts(node.params, planned_for(cluster, node).machine)
        found = [host for host in found if facts(node.params, host.machine) == wanted]
    return [
        host for host in found
        if not any(asked_misfits(host.machine, asked)) and not any(foreseen_misfits(host.machine, asked, forecast))
    ]  # fmt: skip


def needs(cluster: Cluster, node: Node, forecast: Forecast, processes: int, machines: int = 1) -> Needs:
    """Return what an attempt of a node takes on each machine, so much that as many `machines` as it runs on give it
    out. processes: on each machine. Raise DoesNotFit as `labelled`."""
    asked, facts, found = node.resources, node.kind.planning.facts, able(cluster, node, forecast)
    gpus = _gpus(node, forecast, planned_for(cluster, node).machine)
    ram = (forecast.ram or 0) if asked.ram is None else asked.ram
    cpus = asked.cpus or processes
    # What a machine holds and does not give out all of runs there alone, ranks that outnumber its CPUs too.
    shares = sorted({(min(ram, host.ram), min(cpus, host.machine.cpus)) for host in found}, reverse=True)
    given = (share for share in shares if sum(_gives(host, *share, gpus) for host in found) >= machines)
    ram, cpus = next(given, (ram, cpus))
    # Named is only who could be mistaken by what is asked of the cluster: so those that join later may run it too.
    mistaken = any(_gives(host, ram, cpus, gpus) and host not in found for host in labelled(cluster, node))
    depends = facts is not None and bool(facts(node.params, planned_for(cluster, node).machine))
    named = tuple(host.id for host in found) if mistaken or depends else ()
    return Needs(cpus=cpus, gpus=gpus, ram=ram, hosts=named, labels=asked.labels)


def _gives(host: Host, ram: int, cpus: int, gpus: int) -> bool:
    return fits(ram, host.ram) and fits(cpus, host.machine.cpus) and fits(gpus, len(host.machine.gpus))


def _gpus(node: Node, forecast: Forecast, machine: Machine) -> int:
    """As many as it asks for; else up to the last that it is foreseen to use, and so many that what its key says of the
    machine stays true where it sees no others. Of ranks of which nothing is foreseen, all."""
    if node.resources.gpus is not None:
        return node.resources.gpus
    if takes_any_gpus(node, forecast):
        return len(machine.gpus)
    least, facts = max(forecast.vram or (), default=-1) + 1, node.kind.planning.facts
    if facts is None:
        return least
    wanted = facts(node.params, machine)
    enough = (n for n in range(least, len(machine.gpus)) if facts(node.params, _with_gpus(machine, n)) == wanted)
    return next(enough, max(least, len(machine.gpus)))
