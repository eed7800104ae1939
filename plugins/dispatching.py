"""How `dispatch` does it.

The placement is computed from headers and the architecture alone, so a plan shows the one that the run will give. The
run then loads the model as placed, runs a forward, and writes down what each device holds beside what was predicted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bigpipe.bigmodel.adapters import Attachment, attachment
from bigpipe.bigmodel.checkpoint import ModelDescription, describe_adapter, describe_checkpoint
from bigpipe.bigmodel.footprint import capped_length
from bigpipe.bigmodel.formats import Agreement, computable
from bigpipe.bigmodel.placement import Placement, PlacementRequest, Work, find_misfits, limit_here, place_model
from bigpipe.errors import DoesNotFit, UsageError, first_few
from bigpipe.files import write_file
from bigpipe.fit import Misfit
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import format_size

from .dispatch import DispatchMetrics, DispatchParams
from .library import (
    PLACEMENT,
    about,
    agreed,
    attached,
    computed_in,
    load_placed,
    read_placement,
    require_class,
    single_model,
    sources_of,
    told_limit,
)

PICTURE = "placement.txt"
MEASURED = {"load_seconds", "compute_dtype", "bound_by", "limit_tokens_per_second"}
"""Metrics that are no part of the placement."""
PROCESS = 600 * 2**20
"""Bytes of a process that has imported torch, transformers and bitsandbytes, and holds no model."""


def check(params: DispatchParams, ctx: CheckContext) -> None:
    """Refuses an adapter for another model before anything is downloaded."""
    attached(ctx, single_model(ctx))


def forecast(params: DispatchParams, ctx: ForecastContext) -> Forecast:
    if ctx.artifact is not None:
        return _described(read_placement(ctx.artifact))
    model = single_model(ctx)
    request = _request(params)
    if model is not None:
        require_class(model)
    if model is None or (model.config is None and model.custom is None):
        return Forecast(
            download_bytes=0,
            unknown=("the placement: the model's headers are not known yet",),
            misfits=find_misfits(request, None, ctx.machine),
        )
    with about("inputs.model"):
        computable(model)
    unknown = () if model.tensors is not None else ("the model's stored sizes: taken from its config",)
    try:
        agreement = agreed(model, sources_of(ctx))
        beside = attached(ctx, model)
        attempt = _placing(model, agreement, ctx, beside)
        placement = attempt(request)
    except DoesNotFit as error:
        return Forecast(download_bytes=0, misfits=(Misfit.of(error),), unknown=unknown)
    except UsageError as error:
        if not (ctx.trust.remote_code and (model.config or {}).get("auto_map")):
            raise
        return Forecast(download_bytes=0, unknown=(f"the placement, until the trusted code is here: {error.cause}",))
    return _described(
        placement,
        compute_dtype=computed_in(model, placement, ctx),
        sequence_length=capped_length(agreement.architecture, params.sequence_length),
        write_bytes=4096 + 64 * len(placement.device_map),
        ram=None if params.verify == "none" else PROCESS + _passing(placement) + _resident(placement, beside),
        vram={device: need.total for device, need in placement.needs.items() if isinstance(device, int)},
        unknown=unknown,
        misfits=find_misfits(request, placement, ctx.machine, attempt),
    )


def _request(params: DispatchParams) -> PlacementRequest:
    return PlacementRequest(**params.model_dump(exclude={"verify"}))


def _placing(
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


def _passing(placement: Placement) -> int:
    """Bytes of RAM that one forward fills with what does not stay there."""
    on_cpu = placement.gpus == 0
    return 2 * max(placement.streaming.values(), default=0) + (placement.kept_experts if on_cpu else 0)


def _resident(placement: Placement, beside: Attachment | None) -> int:
    """Bytes of RAM that an adapter fills, where the CPU computes."""
    return sum(beside.nbytes.values()) if beside and placement.gpus == 0 else 0


def _predicted(placement: Placement) -> dict[str, int]:
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
    predicted = _predicted(placement)
    metrics = {"predicted": predicted, "streamed_bytes_per_token": placement.streamed_bytes_per_token}
    metrics |= {"compute_dtype": compute_dtype} if compute_dtype else {}
    labels = {device: f"cuda:{device}" if device.isdecimal() else device for device in predicted}
    return Forecast(
        download_bytes=0,
        write_bytes=write_bytes,
        metrics=metrics | ({"sequence_length": sequence_length} if sequence_length else {}),
        output=placement,
        details=(*placement.picture().splitlines(), *placement.explanation),
        summary=", ".join(f"{labels[device]} {format_size(size)}" for device, size in predicted.items()),
        **known,
    )


def run(params: DispatchParams, ctx: StageContext) -> StageResult:
    model = describe_checkpoint(ctx.input("model"))
    agreement = agreed(model, sources_of(ctx))
    beside = None
    if "adapter" in ctx.inputs:
        beside = attachment(describe_adapter(ctx.input("adapter")), model, agreement.architecture, ctx.memo)
    placement = _placing(model, agreement, ctx, beside)(_request(params))
    metrics = DispatchMetrics(
        predicted=_predicted(placement),
        compute_dtype=computed_in(model, placement, ctx),
        streamed_bytes_per_token=placement.streamed_bytes_per_token,
        sequence_length=capped_length(agreement.architecture, params.sequence_length),
    )
    work = Work(rows=params.batch_size, made=params.batch_size, batch_size=params.batch_size)
    if placement.streamed_bytes_per_token and (
        limit := limit_here(
            placement, agreement.architecture, model, metrics.compute_dtype, work, ctx.machine, ctx.memo
        )
    ):
        ctx.log(f"a decoding step: {limit.describe()}", detail=True)
        metrics = metrics.model_copy(update=told_limit(limit))
    if params.verify != "none":
        metrics = _verify(params, ctx, placement, metrics)
    told = metrics.model_dump(exclude=MEASURED)
    picture = [placement.picture(), "", *placement.explanation, ""]
    texts = {PLACEMENT: json.dumps({**placement.as_json(), **told}, indent=2) + "\n", PICTURE: "\n".join(picture)}
    return StageResult(metrics, {name: write_file(ctx.out / name, text) for name, text in texts.items()})


def _verify(
    params: DispatchParams, ctx: StageContext, placement: Placement, metrics: DispatchMetrics
) -> DispatchMetrics:
    """Loads the model as placed and, if asked to, runs it; tells where it is not as predicted."""
    import accelerate  # noqa: F401  what importing costs is not loading
    from transformers import PreTrainedModel  # noqa: F401

    from bigpipe.bigmodel.execution import forward_once, loaded

    started = time.monotonic()
    # Held as stored: what computes in another dtype is cast at each use
    model = load_placed(placement, ctx, as_stored=params.dtype is None)
    seconds = time.monotonic() - started
    state = loaded(model)
    measured = {str(home): size for home, size in state.held.items()}
    if state.unused:
        ctx.log(f"stored, and used by nothing in the model: {first_few(state.unused)}")
    if params.verify == "forward" and (reason := forward_once(model)):
        ctx.log(f"no forward was run: {reason}")
    for device in dict.fromkeys([*metrics.predicted, *measured]):
        told, held = metrics.predicted.get(device, 0), measured.get(device, 0)
        if abs(told - held) > 0.01 * max(told, held):
            ctx.log(f"{device}: {format_size(held)} of weights, {format_size(told)} were predicted")
    found = {"measured": measured, "load_seconds": round(seconds, 3), "streamed_bytes_per_token": state.streamed}
    return metrics.model_copy(update=found)
