"""What `dispatch` plans: the placement, computed from headers and the architecture alone, and what loading it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bigpipe.bigmodel.adapters import Attachment
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.execution import cast_bytes
from bigpipe.bigmodel.footprint import capped_length
from bigpipe.bigmodel.formats import Agreement, computable
from bigpipe.bigmodel.placement import Placement, PlacementRequest, find_misfits, place_model
from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.fit import Misfit
from bigpipe.orchestrator.stage import Forecast, ForecastContext, StageContext
from bigpipe.sizes import format_size

from .dispatch import DispatchParams
from .library import about, sources_of
from .placed import computed_in, memory_here, read_placement
from .ranked import CUDA_BASE
from .wired import agreed, attached, require_class, single_model

PROCESS = 600 * 2**20
"""Bytes of a process that has imported torch, transformers and bitsandbytes, and holds no model."""


def forecast(params: DispatchParams, ctx: ForecastContext) -> Forecast:
    if ctx.artifact is not None:
        return _described(read_placement(ctx.artifact))
    model = single_model(ctx)
    request = request_of(params)
    if model is not None:
        require_class(model)
    if model is None or not model.says_class:
        misfits = find_misfits(request, None, ctx.machine)
        return _unplaced(("the placement: the model's headers are not known yet",), misfits)
    with about("inputs.model"):
        computable(model)
    unknown = () if model.tensors is not None else ("the model's stored sizes: taken from its config",)
    try:
        agreement = agreed(model, sources_of(ctx))
        beside = attached(ctx, model)
        attempt = placing_of(model, agreement, ctx, beside)
        placement = attempt(request)
    except DoesNotFit as error:
        return _unplaced(unknown, find_misfits(request, None, ctx.machine, attempt) or (Misfit.of(error),))
    except UsageError as error:
        if not (ctx.trust.remote_code and (model.config or {}).get("auto_map")):
            raise
        return _unplaced((f"the placement, until the trusted code is here: {error.cause}",))
    return _described(
        placement,
        compute_dtype=computed_in(model, placement, ctx),
        sequence_length=capped_length(agreement.architecture, params.sequence_length),
        write_bytes=4096 + 64 * len(placement.device_map),
        ram=None if params.verify == "none" else _ram(placement, beside) + _cast(params, model, placement, ctx),
        vram={device: need.total for device, need in placement.needs.items() if isinstance(device, int)},
        unknown=unknown,
        misfits=find_misfits(request, placement, ctx.machine, attempt),
    )


def _unplaced(unknown: tuple[str, ...], misfits: tuple[Misfit, ...] = ()) -> Forecast:
    return Forecast(download_bytes=0, unknown=unknown, misfits=misfits)


def request_of(params: DispatchParams) -> PlacementRequest:
    return PlacementRequest(**params.model_dump(exclude={"verify"}))


def placing_of(
    model: ModelDescription,
    agreement: Agreement,
    ctx: ForecastContext | StageContext,
    beside: Attachment | None,
) -> Callable[[PlacementRequest], Placement]:
    def attempt(request: PlacementRequest) -> Placement:
        held = beside.nbytes if beside else {}
        placed = place_model(model, agreement.architecture, request, ctx.machine, memo=ctx.memo, beside=held)
        total = f"adapter: {format_size(sum(held.values()))} beside the weights, where these compute"
        return replace(placed, explanation=(*placed.explanation, *agreement.notes, *([total] if beside else ())))

    return attempt


def _ram(placement: Placement, beside: Attachment | None) -> int:
    """Of the process that loads it and lets it compute once."""
    return PROCESS + (CUDA_BASE if placement.gpus else 0) + _passing(placement) + _resident(placement, beside)


def _cast(params: DispatchParams, model: ModelDescription, placement: Placement, ctx: ForecastContext) -> int:
    """Bytes of RAM that weights fill which are held in another dtype than they are stored in, where the CPU computes
    and a dtype is asked for. Others are windows into their files."""
    if params.dtype is None or placement.gpus:
        return 0
    return min(cast_bytes(model, params.dtype), placement.weights.get("cpu", 0), memory_here(placement, ctx).cast)


def _passing(placement: Placement) -> int:
    """Bytes of RAM that one forward fills with what does not stay there: two layers, and on a CPU experts that stay."""
    passing = max(placement.streaming.values(), default=0)
    return passing if placement.gpus else 2 * passing + placement.kept_experts


def _resident(placement: Placement, beside: Attachment | None) -> int:
    """Bytes of RAM that an adapter fills, where the CPU computes."""
    return sum(beside.nbytes.values()) if beside and placement.gpus == 0 else 0


def predicted_weights(placement: Placement) -> dict[str, int]:
    return {str(device): need.weights for device, need in placement.needs.items() if need.weights}


def _described(
    placement: Placement,
    *,
    write_bytes: int = 0,
    compute_dtype: str | None = None,
    sequence_length: int | None = None,
    **known: Any,
) -> Forecast:
    """compute_dtype, sequence_length: None where the record of the run tells it."""
    predicted = predicted_weights(placement)
    metrics = {"predicted": predicted, "streamed_bytes_per_token": placement.streamed_bytes_per_token}
    metrics |= {"compute_dtype": compute_dtype} if compute_dtype else {}
    labels = {device: f"cuda:{device}" if device.isdecimal() else device for device in predicted}
    return Forecast(
        download_bytes=0,
        write_bytes=write_bytes,
        metrics=metrics | ({"sequence_length": sequence_length} if sequence_length else {}),
        output=placement,
        details=(*placement.picture().splitlines(), *placement.told),
        summary=", ".join(f"{labels[device]} {format_size(size)}" for device, size in predicted.items()),
        **known,
    )
