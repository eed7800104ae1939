"""Where a baseline goes, beside the model that is compared with it, and how many batches share a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, text_config
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.placement import Device, Placement, PlacementRequest, Together, batches_together, place_model
from bigpipe.errors import DoesNotFit
from bigpipe.machine import Machine

from .measures import AT_A_TIME

WAITING = 2**28
"""Bytes of a baseline's logits that wait for the model's, where several batches go through a stream together."""
ENDLESS = 2**60
SLICES = 8
"""Tensors, float32, as large as what is worked on at a time: logits of both models, their logarithms and products."""


@dataclass(frozen=True, slots=True)
class Known:
    """A model that has been looked at."""

    model: ModelDescription
    architecture: Architecture


def place_pair(
    placement: Placement, own: Known, baseline: Known, work: Workload, machine: Machine, memo: Path | None = None
) -> tuple[Placement, Placement]:
    """Return where a placed model and its baseline go. Each device's cap is for both: the baseline has what the model
    leaves of it. Where that is too little, as where the model itself fills it, each has half of every cap. What does
    not fit is streamed from the files that exist. Without caps the baseline lies as the model does. Raise DoesNotFit
    where halves are too little."""
    caps = {device: cap for device, cap in placement.max_memory.items() if cap and device != "disk"}
    kept = PlacementRequest(
        device_map="auto" if caps else placement.device_map,
        dtype=placement.dtype,
        batch_size=work.batch_size,
        sequence_length=work.sequence_length,
    )

    def placed(known: Known, request: PlacementRequest, memory: Mapping[Any, int]) -> Placement:
        # What is streamed is read where it lies, so that the disk has no cap
        within = replace(request, max_memory={**memory, "disk": ENDLESS} if memory else None)
        return place_model(known.model, known.architecture, within, machine, memo=memo)

    try:
        return placement, placed(
            baseline, kept, {device: cap - _held(placement, device) for device, cap in caps.items()}
        )
    except DoesNotFit:
        if not caps:
            raise
    halves = {device: cap // 2 for device, cap in caps.items()}
    anew = replace(
        kept,
        compute_dtype=placement.compute_dtype or "stored",
        special_dtypes=placement.special_dtypes,
        no_split_module_classes=placement.no_split_module_classes,
    )
    try:
        return placed(own, anew, halves), placed(baseline, kept, halves)
    except DoesNotFit as error:
        cause = f"a model and its baseline do not fit side by side, each in half of max_memory: {error.cause}"
        raise DoesNotFit(cause, "give the placement a larger max_memory", field="inputs.baseline") from error


def _held(placement: Placement, device: Device) -> int:
    """What a cap counts: weights and buffers, and the room for layers that are streamed."""
    need = placement.needs.get(device)
    return need.weights + need.streaming if need else placement.weights.get(device, 0)


def together_windows(
    placements: list[tuple[Placement, Architecture, str]], work: Workload, machine: Machine, processes: int, memo: Path
) -> Together:
    """Return how many batches of windows go through streamed layers together, and what each holds while it waits: of a
    pair also the baseline's logits. placements: of each model, with what it is and the dtype that it computes in."""
    found = [
        batches_together(placement, architecture, work, dtype, machine, processes=processes, memo=memo, caching=False)
        for placement, architecture, dtype in placements
        if placement.streamed_bytes_per_token
    ]
    if not found:
        return Together()
    logits = logits_bytes(placements[0][1], work) if len(placements) > 1 else 0
    most = max(each.count for each in found)
    count = min(most, max(1, WAITING // logits)) if logits else most
    return Together(count, max(each.size for each in found) + logits)


def logits_bytes(architecture: Architecture, work: Workload) -> int:
    """Of one batch, float32."""
    size = text_config(architecture.config).get("vocab_size")
    return 4 * work.batch_size * work.sequence_length * (size if isinstance(size, int) else 0)


def at_work(models: list[tuple[Architecture, str]], work: Workload) -> int:
    """Return bytes of a batch on a CPU besides the weights: of the larger forward, the baseline's logits that wait, and
    what comparing takes. models: what each is, and the dtype that it computes in."""
    budgets = [Budget(architecture, dtype, work) for architecture, dtype in models]
    forward = max(budget.cpu.bytes - budget.counts.loaded for budget in budgets)
    return forward + comparing(models[0][0], work, len(models))


def comparing(architecture: Architecture, work: Workload, models: int) -> int:
    """Return bytes that the numbers of a batch take besides its forwards: of what is worked on at a time, and of the
    baseline's logits that wait, where there are two models."""
    return SLICES * 4 * AT_A_TIME + (logits_bytes(architecture, work) if models > 1 else 0)
