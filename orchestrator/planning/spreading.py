"""Which machine of a cluster a node is planned for, and which may run it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bigpipe.errors import DoesNotFit
from bigpipe.fit import fits
from bigpipe.orchestrator.contract import Forecast, Machine
from bigpipe.orchestrator.launch import Cluster, Host, Needs
from bigpipe.orchestrator.recipe import Node, ResourcesSpec


def planned_for(cluster: Cluster, node: Node) -> Host:
    """Return the machine that a node is planned for: one that has what its `resources` ask for, if any has; of these
    the one with the most GPUs, then the most memory. Raise DoesNotFit where none has its labels."""
    asked = node.resources
    return max(
        labelled(cluster, node),
        key=lambda host: (_has(host.machine, asked), len(host.machine.gpus), host.machine.memory, host.machine.cpus),
    )


def labelled(cluster: Cluster, node: Node) -> list[Host]:
    """Return the machines that have the labels of a node's `resources`. Raise DoesNotFit where none has."""
    wanted = node.resources.labels
    found = [host for host in cluster.hosts if wanted.items() <= dict(host.labels).items()]
    if found:
        return found
    known = sorted({f"{name}={value}" for host in cluster.hosts for name, value in host.labels.items()})
    asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
    cure = f"they have {', '.join(_of_people(known)) or 'none'}"
    error = DoesNotFit(f"{node.name}: no machine of {cluster.name} has the labels {asked}", cure)
    error.place, error.node = node.places.of("resources.labels"), node.name
    raise error


def _of_people(known: Iterable[str]) -> list[str]:
    """Without those that the cluster gives itself."""
    return [label for label in known if "/" not in label.partition("=")[0]]


def _has(machine: Machine, asked: ResourcesSpec) -> bool:
    largest = max((gpu.memory for gpu in machine.gpus), default=0)
    return (
        fits(asked.cpus or 1, machine.cpus)
        and fits(asked.gpus or 0, len(machine.gpus))
        and fits(asked.ram or 0, machine.memory)
        and fits(asked.gpu_memory or 0, largest)
    )


def needs(cluster: Cluster, node: Node, forecast: Forecast, processes: int) -> Needs:
    """Return what an attempt of a node takes on each machine. Where its key holds facts about the machine, those
    machines may run it of which the same holds. processes: on each machine."""
    asked = node.resources
    alike = _alike(labelled(cluster, node), node, planned_for(cluster, node).machine)
    ram = (forecast.ram or 0) if asked.ram is None else asked.ram
    # What fits a machine and is more than is given out there runs there alone.
    most = max((host.ram for host in alike if fits(ram, host.machine.memory)), default=ram)
    return Needs(
        cpus=asked.cpus or processes,
        gpus=len(forecast.vram or ()) if asked.gpus is None else asked.gpus,
        ram=min(ram, most),
        hosts=() if len(alike) == len(cluster.hosts) else tuple(host.id for host in alike),
    )


def _alike(hosts: Sequence[Host], node: Node, machine: Machine) -> list[Host]:
    facts = node.kind.planning.facts
    if facts is None:
        return [*hosts]
    wanted = facts(node.params, machine)
    return [host for host in hosts if facts(node.params, host.machine) == wanted]
