"""Where a baseline goes, beside the model that is compared with it, and how many batches share a stream."""

from __future__ import annotations

from pathlib import Path

from bigpipe.bigmodel.architecture import Architecture, text_config
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.placement import Device, Placement, PlacementRequest, batches_together, place_model
from bigpipe.errors import DoesNotFit
from bigpipe.machine import Machine

from .measures import AT_A_TIME

WAITING = 2**28
"""Bytes of a baseline's logits that wait for the model's, where several batches go through a stream together."""
SLICES = 8
"""Tensors, float32, as large as what is worked on at a time: logits of both models, their logarithms and products."""


def beside(
    placement: Placement,
    baseline: ModelDescription,
    architecture: Architecture,
    work: Workload,
    machine: Machine,
    memo: Path | None = None,
) -> Placement:
    """Return where the baseline of a placed model goes. Each device's cap is for both: the baseline has what the model
    leaves of it, and what that cannot hold is streamed from the files that exist. Without caps it lies as the model
    does. Raise DoesNotFit where what is left is too little."""
    left: dict[int | str, int | str] = {
        device: cap - _held(placement, device) for device, cap in placement.max_memory.items() if cap
    }
    left.pop("disk", None)
    request = PlacementRequest(
        device_map="auto" if left else placement.device_map,
        max_memory={**left, "disk": 2**60} if left else None,
        dtype=placement.dtype,
        batch_size=work.batch_size,
        sequence_length=work.sequence_length,
    )
    try:
        return place_model(baseline, architecture, request, machine, memo=memo)
    except DoesNotFit as error:
        cause = f"the baseline does not fit beside the model: {error.cause}"
        raise DoesNotFit(
            cause, "give the placement a larger max_memory, which is for both", field="inputs.baseline"
        ) from error


def _held(placement: Placement, device: Device) -> int:
    """What a cap counts: weights and buffers, and the largest layer that is streamed."""
    need = placement.needs.get(device)
    return need.weights + need.streaming if need else placement.weights.get(device, 0)


def together_windows(
    placements: list[tuple[Placement, Architecture, str]], work: Workload, machine: Machine, processes: int, memo: Path
) -> int:
    """Return how many batches of windows go through streamed layers together. placements: of each model, with what it
    is and the dtype that it computes in."""
    streamed = [each for each in placements if each[0].streamed_bytes_per_token]
    if not streamed:
        return 1
    wanted = max(
        batches_together(placement, architecture, work, dtype, machine, processes=processes, memo=memo).count
        for placement, architecture, dtype in streamed
    )
    return min(wanted, max(1, WAITING // logits_bytes(streamed[0][1], work))) if len(placements) > 1 else wanted


def logits_bytes(architecture: Architecture, work: Workload) -> int:
    """Of one batch, float32."""
    size = text_config(architecture.config).get("vocab_size")
    return 4 * work.batch_size * work.sequence_length * (size if isinstance(size, int) else 0)


def at_work(models: list[tuple[Architecture, str]], work: Workload) -> int:
    """Return bytes of a batch on a CPU besides the weights: of the larger forward, the baseline's logits that wait, and
    what comparing takes. models: what each is, and the dtype that it computes in."""
    budgets = [Budget(architecture, dtype, work) for architecture, dtype in models]
    forward = max(budget.cpu.bytes - budget.counts.loaded for budget in budgets)
    return forward + SLICES * 4 * AT_A_TIME + (logits_bytes(models[0][0], work) if len(models) > 1 else 0)
