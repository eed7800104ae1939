"""What kinds share that run models on ranks: where an unplaced model goes, its memory, and how a rank loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from bigpipe.allocator import keep_freed_blocks
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.execution import as_placement, cast_bytes, loading_dtype
from bigpipe.bigmodel.placement import Placement, PlacementRequest, place_model
from bigpipe.fit import Cure, Misfit, fits
from bigpipe.machine import Machine
from bigpipe.orchestrator.stage import CheckContext, ForecastContext, StageContext
from bigpipe.sizes import counted, format_size

from .library import sources_of
from .placed import load_placed, memory_here, read_placement
from .wired import agreed, agreed_here

if TYPE_CHECKING:
    import torch

UNSIZED = "memory: the tensors of the model are not known yet"
CUDA_BASE = 3 * 2**30
"""Bytes of CUDA's libraries and pinned buffers in a rank that has GPUs: a bound."""
RANK_BASE = 500 * 2**20
"""Bytes of a rank that has imported torch and transformers and holds no model."""


def check_weights(model: ModelDescription, ctx: CheckContext) -> None:
    """Raise InvalidCheckpoint where config and weights do not belong together."""
    if model.tensors is not None and model.says_class:
        agreed_here(model, ctx)


def alone(machine: Machine) -> Placement:
    """Where nobody placed it: all of it on the first GPU, else in RAM."""
    return as_placement({"": 0 if machine.gpus else "cpu"})


def on_its_gpu(
    model: ModelDescription | None, dtype: str | None, ctx: ForecastContext | StageContext
) -> Placement | None:
    """Return where a model goes that nobody placed on a machine with GPUs, and what it needs there: room is kept for a
    token, beyond which a batch takes more. None without a GPU, or where its tensors are not known."""
    if not ctx.machine.gpus or model is None or model.tensors is None:
        return None
    request = PlacementRequest(device_map=alone(ctx.machine).device_map, dtype=dtype, sequence_length=1)
    return place_model(model, agreed(model, sources_of(ctx)).architecture, request, ctx.machine, memo=ctx.memo)


def placement_of(ctx: StageContext) -> Placement | None:
    return read_placement(ctx.input("placement")) if "placement" in ctx.inputs else None


def held_in_ram(model: ModelDescription, placement: Placement, dtype: str | None, ctx: ForecastContext) -> int:
    """Return bytes of RAM that a rank without GPUs fills with a model. Weights that are windows into their files are
    page cache, and not counted."""
    if dtype:
        placement = replace(placement, compute_dtype=None)
    memory = memory_here(placement, ctx, ctx.launch.local_processes)
    cast = cast_bytes(model, loading_dtype(model, placement, memory, dtype))
    ring = max(placement.streaming.values(), default=0) if placement.compute_dtype else 0
    return min(cast, memory.cast) + ring + memory.experts


def misfits_of_gpus(each: int, ctx: ForecastContext) -> tuple[Misfit, ...]:
    """each: GPUs of a rank."""
    local, there = ctx.launch.local_processes, len(ctx.machine.gpus)
    if fits(each * local, there):
        return ()
    cause = f"{counted(local, 'rank')} with {counted(each, 'GPU')} each need {each * local}, and there are {there}"
    ranks = there // each * ctx.launch.num_machines
    return (Misfit(cause, Cure({"launch.num_processes": ranks}) if ranks else "place the model on cpu and disk"),)


def misfits_of_unplaced(vram: Mapping[int, int], ctx: ForecastContext) -> tuple[Misfit, ...]:
    """vram: what ranks take of the GPUs that they hold a whole model on, as nobody placed it."""
    for gpu in ctx.machine.gpus:
        if not fits(needed := vram.get(gpu.index, 0), gpu.memory):
            there = f"GPU {gpu.index} ({gpu.name}), which has {format_size(gpu.memory)}"
            cure = "wire inputs: placement to a dispatch, which places it on several devices; or quantize it first"
            return (Misfit(f"needs {format_size(needed)} on {there}", cure),)
    return ()


def load_on_rank(
    ctx: StageContext, dtype: str | None, placement: Placement | None = None, port: str = "model"
) -> torch.nn.Module:
    """Return the model on a port, on the rank's share of the machine. placement: None is the first GPU, else RAM, and
    memory that nobody limits."""
    import torch

    anywhere = as_placement({"": 0 if torch.cuda.is_available() else "cpu"})
    ranks = os.environ.get("LOCAL_WORLD_SIZE", ctx.world_size)
    model = load_placed(placement or anywhere, ctx, dtype=dtype, rank=local_rank(ctx), ranks=int(ranks), port=port)
    if placement is None:
        keep_freed_blocks()
    return model


def local_rank(ctx: StageContext) -> int:
    """Return which of this machine's ranks this one is."""
    return int(os.environ.get("LOCAL_RANK", ctx.rank))
