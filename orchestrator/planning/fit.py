"""Does what will run fit the machine: RAM, GPU memory, devices, disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bigpipe.orchestrator.contract.forecast import Forecast, Misfit
from bigpipe.orchestrator.recipe.graph import Node
from bigpipe.sizes import format_size, format_transfer

from .decision import Action, Decision
from .session import Session
from .sidebyside import Disk, needs_ram

__all__ = ["find_misfits", "needs_gpus", "needs_ram"]


def find_misfits(
    session: Session, decisions: Mapping[str, Decision], forecasts: Mapping[str, Forecast], disk: Disk
) -> tuple[tuple[str, Misfit], ...]:
    """Everything that will not fit, as (node name, misfit), in topological order; the disk last."""
    found: list[tuple[str, Misfit]] = []
    for node in session.nodes:
        if decisions[node.name].action in (Action.RUN, Action.MAYBE):
            forecast = forecasts[node.name]
            found += [(node.name, misfit) for misfit in (*forecast.misfits, *_memory(session, node, forecast))]
    found += _disk(session, decisions, forecasts, disk)
    return tuple(found)


def needs_gpus(node: Node, forecast: Forecast | None) -> int:
    if node.resources.gpus is not None:
        return node.resources.gpus
    return len(forecast.vram) if forecast else 0


def _memory(session: Session, node: Node, forecast: Forecast) -> list[Misfit]:
    machine, found = session.machine, []
    if (ram := needs_ram(node, forecast)) > machine.memory:
        found.append(
            Misfit(
                f"needs {format_size(ram)} of RAM; {machine.name} has {format_size(machine.memory)}",
                "give `max_memory` a smaller `cpu` and a `disk`, quantize first, or plan for another --machine",
            )
        )
    if (cpus := node.resources.cpus or 0) > machine.cpus:
        found.append(
            Misfit(f"asks for {cpus} CPUs; {machine.name} has {machine.cpus}", f"resources.cpus: {machine.cpus}")
        )
    if (gpus := needs_gpus(node, forecast)) > len(machine.gpus) and not forecast.misfits:
        found.append(
            Misfit(
                f"asks for {gpus} GPUs; {machine.name} has {len(machine.gpus)}", f"resources.gpus: {len(machine.gpus)}"
            )
        )
    by_index = {gpu.index: gpu for gpu in machine.gpus}
    for index, wanted in forecast.vram.items():
        gpu = by_index.get(index)
        if gpu is not None and wanted > gpu.memory and not forecast.misfits:
            found.append(
                Misfit(
                    f"needs {format_size(wanted)} on GPU {index} ({gpu.name}), which has {format_size(gpu.memory)}",
                    f"max_memory: {{{index}: {format_size(gpu.memory * 0.9).replace(' ', '')}}} leaves room; "
                    "the rest goes to cpu and disk",
                )
            )
    limit = node.resources.gpu_memory
    if limit is not None and machine.gpus and limit > max(gpu.memory for gpu in machine.gpus):
        found.append(
            Misfit(f"asks for {format_size(limit)} of GPU memory; no GPU here has it", "lower resources.gpu_memory")
        )
    return found


def _disk(
    session: Session, decisions: Mapping[str, Decision], forecasts: Mapping[str, Forecast], disk: Disk
) -> list[tuple[str, Misfit]]:
    peak, free = disk.peak, session.machine.disk_free
    if peak <= free:
        return []
    other = Disk(replace(session, side_by_side=not session.side_by_side), decisions, forecasts).peak
    cure = f"free {format_transfer(peak - free)}"
    if other <= free:
        how = "with `--jobs 1`" if session.side_by_side else "without `--jobs 1`"
        cure += f", or run {how}: that needs {format_transfer(other)}"
    elif best := _droppable(session, forecasts):
        cure += f", or `cache: false` on {best} ({format_transfer(forecasts[best].write_bytes or 0)})"
    return [(disk.where, Misfit(f"needs {format_transfer(peak)} of disk; {format_transfer(free)} are free", cure))]


def _droppable(session: Session, forecasts: Mapping[str, Forecast]) -> str:
    """The largest artifact that is kept though others are made of it; "" where there is none."""
    sizes = {
        node.name: forecasts[node.name].write_bytes or 0
        for node in session.nodes
        if node.cache and node.name in forecasts and session.consumers(node.name)
    }
    best = max(sizes, key=lambda name: sizes[name], default="")
    return best if best and sizes[best] else ""
