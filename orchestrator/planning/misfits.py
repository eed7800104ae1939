"""What a node asks for, or is foreseen to need, and a machine does not have."""

from __future__ import annotations

from collections.abc import Iterator

from bigpipe.fit import Cure, Misfit, fits
from bigpipe.machine import Machine
from bigpipe.orchestrator.contract import Forecast
from bigpipe.orchestrator.launch import executor
from bigpipe.orchestrator.recipe import Node, ResourcesSpec
from bigpipe.sizes import counted, exact_size, format_size


def asked_misfits(machine: Machine, asked: ResourcesSpec) -> Iterator[Misfit]:
    """What a stage's `resources` ask for that the machine does not have."""
    if asked.ram is not None and not fits(asked.ram, machine.memory):
        yield Misfit(_ram(asked.ram, machine), Cure({"resources.ram": exact_size(machine.memory)}))
    if asked.cpus is not None and not fits(asked.cpus, machine.cpus):
        cause = f"asks for {asked.cpus} CPUs; {machine.name} has {machine.cpus}"
        yield Misfit(cause, Cure({"resources.cpus": machine.cpus}))
    if asked.gpus is not None and not fits(asked.gpus, len(machine.gpus)):
        cause = f"asks for {counted(asked.gpus, 'GPU')}; {machine.name} has {len(machine.gpus)}"
        yield Misfit(cause, Cure({"resources.gpus": len(machine.gpus)}))
    if asked.gpu_memory is not None:
        yield from _gpu_memory(machine, asked.gpu_memory, asked.gpus)


def _gpu_memory(machine: Machine, size: int, gpus: int | None) -> Iterator[Misfit]:
    """Each GPU that is asked for must have it; that there are too few is told already."""
    sizes, count = sorted((gpu.memory for gpu in machine.gpus), reverse=True), 1 if gpus is None else gpus
    if gpus is None and not sizes:
        yield Misfit(f"asks for {format_size(size)} of GPU memory; {machine.name} has no GPU", "leave out gpu_memory")
    elif 0 < count <= len(sizes) and not fits(size, there := sizes[count - 1]):
        with_it = sum(fits(size, each) for each in sizes)
        told = (
            f" on each of {counted(count, 'GPU')}; {with_it} here with as much" if with_it else "; no GPU here has it"
        )
        yield Misfit(
            f"asks for {format_size(size)} of GPU memory{told}", Cure({"resources.gpu_memory": exact_size(there)})
        )


def foreseen_misfits(machine: Machine, asked: ResourcesSpec, forecast: Forecast) -> Iterator[str]:
    """What was forecast, where `resources` do not say it, and the machine does not have. Of GPUs nothing is said where
    the kind itself has found misfits."""
    if asked.ram is None and not fits(forecast.ram or 0, machine.memory):
        yield _ram(forecast.ram or 0, machine)
    if forecast.misfits:
        return
    vram = forecast.vram or {}
    if asked.gpus is None and not fits(len(vram), len(machine.gpus)):
        yield f"needs {counted(len(vram), 'GPU')}; {machine.name} has {len(machine.gpus)}"
    for gpu in machine.gpus:
        if not fits(needed := vram.get(gpu.index, 0), gpu.memory):
            size, there = format_size(needed), format_size(gpu.memory)
            yield f"needs {size} on GPU {gpu.index} ({gpu.name}), which has {there}"


def takes_any_gpus(node: Node, forecast: Forecast) -> bool:
    """Return whether a node may take all the GPUs that it sees: ranks of which nobody foresees what they use."""
    return forecast.vram is None and executor(node.kind.runs_in).takes_launch


def _ram(needed: int, machine: Machine) -> str:
    return f"needs {format_size(needed)} of RAM; {machine.name} has {format_size(machine.memory)}"
