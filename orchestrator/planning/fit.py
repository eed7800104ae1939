"""Does what will run fit the machine: RAM, GPU memory, devices, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from bigpipe.fit import Cure, Misfit, fits
from bigpipe.machine import Machine
from bigpipe.orchestrator.contract import Forecast
from bigpipe.sizes import exact_size, format_size, format_transfer

from .rehearsal import Rehearsal
from .session import Session


def find_misfits(session: Session, rehearsal: Rehearsal) -> tuple[tuple[str, Misfit], ...]:
    """Everything that will not fit, as (node name, misfit), in topological order; the disk last."""
    found: list[tuple[str, Misfit]] = []
    for node in session.nodes:
        if rehearsal.decisions[node.name].action.works:
            forecast, state = rehearsal.forecasts[node.name], rehearsal.states[node.name]
            own = machine_misfits(
                session.machine,
                forecast,
                ram=state.ram,
                cpus=node.resources.cpus or 0,
                gpus=state.gpus,
                gpu_memory=node.resources.gpu_memory,
            )
            found += [(node.name, misfit) for misfit in (*forecast.misfits, *own)]
    return (*found, *_disk(session, rehearsal))


class Demand(NamedTuple):
    """Something of which a machine must have enough."""

    needed: int
    there: int
    words: str
    """With `needed`, `there` and the name of the `machine` in it."""
    cure: Cure | str
    written: Callable[[int], str] = str


def machine_misfits(
    machine: Machine, forecast: Forecast, *, ram: int, cpus: int, gpus: int, gpu_memory: int | None
) -> list[Misfit]:
    """Return what the machine has too little of. Of GPUs nothing is said where the kind itself has found misfits."""
    found = []
    for demand in _demands(machine, forecast, ram, cpus, gpus, gpu_memory):
        if not fits(demand.needed, demand.there):
            sizes = {"needed": demand.written(demand.needed), "there": demand.written(demand.there)}
            found.append(Misfit(demand.words.format(machine=machine.name, **sizes), demand.cure))
    return found


def _demands(
    machine: Machine, forecast: Forecast, ram: int, cpus: int, gpus: int, gpu_memory: int | None
) -> Iterator[Demand]:
    cure: Cure | str = "give `max_memory` a smaller `cpu` and a `disk`, quantize first, or plan for another --machine"
    yield Demand(ram, machine.memory, "needs {needed} of RAM; {machine} has {there}", cure, format_size)
    cure = Cure({"resources.cpus": machine.cpus})
    yield Demand(cpus, machine.cpus, "asks for {needed} CPUs; {machine} has {there}", cure)
    if not forecast.misfits:
        cure = Cure({"resources.gpus": len(machine.gpus)})
        yield Demand(gpus, len(machine.gpus), "asks for {needed} GPUs; {machine} has {there}", cure)
        cure = "place less on it with `max_memory`, quantize first, or plan for another --machine"
        for gpu in machine.gpus:
            words = f"needs {{needed}} on GPU {gpu.index} ({gpu.name}), which has {{there}}"
            yield Demand(forecast.vram.get(gpu.index, 0), gpu.memory, words, cure, format_size)
    if gpu_memory is not None and machine.gpus:
        largest = max(gpu.memory for gpu in machine.gpus)
        cure = Cure({"resources.gpu_memory": exact_size(largest)})
        yield Demand(gpu_memory, largest, "asks for {needed} of GPU memory; no GPU here has it", cure, format_size)


def _disk(session: Session, rehearsal: Rehearsal) -> list[tuple[str, Misfit]]:
    peak, free, forecasts = rehearsal.peak, session.machine.disk_free, rehearsal.forecasts
    if fits(peak, free):
        return []
    other = Rehearsal(replace(session, side_by_side=not session.side_by_side), forecasts).peak
    cure = f"free {format_transfer(peak - free)}"
    if fits(other, free):
        how = "with `--jobs 1`" if session.side_by_side else "without `--jobs 1`"
        cure += f", or run {how}: that needs {format_transfer(other)}"
    elif best := _droppable(session, forecasts):
        cure += f", or `cache: false` on {best} ({format_transfer(forecasts[best].write_bytes or 0)})"
    return [(rehearsal.where, Misfit(f"needs {format_transfer(peak)} of disk; {format_transfer(free)} are free", cure))]


def _droppable(session: Session, forecasts: Mapping[str, Forecast]) -> str:
    """The largest artifact that is kept though others are made of it; "" where there is none."""
    sizes = {
        node.name: forecasts[node.name].write_bytes or 0
        for node in session.nodes
        if node.cache and node.name in forecasts and session.consumers(node.name)
    }
    best = max(sizes, key=lambda name: sizes[name], default="")
    return best if best and sizes[best] else ""
