"""How `dispatch` does it.

The placement is computed from headers and the architecture alone, so a plan shows the one that the run will give. The
run then loads the model as placed, runs a forward, and writes down what each device holds beside what was predicted.
"""

from __future__ import annotations

import json
import time

from bigpipe.bigmodel.adapters import attachment
from bigpipe.bigmodel.checkpoint import describe_adapter, describe_checkpoint
from bigpipe.bigmodel.footprint import capped_length
from bigpipe.bigmodel.placement import Placement, Work, limit_here
from bigpipe.errors import first_few
from bigpipe.files import write_file
from bigpipe.orchestrator.stage import CheckContext, StageContext, StageResult
from bigpipe.sizes import format_size

from .dispatch import DispatchMetrics, DispatchParams
from .dispatch_needs import placing_of, predicted_weights, request_of
from .library import sources_of
from .placed import PLACEMENT, computed_in, load_placed, told_limit
from .wired import agreed, attached, single_model

PICTURE = "placement.txt"
MEASURED = {"load_seconds", "compute_dtype", "bound_by", "limit_tokens_per_second"}
"""Metrics that are no part of the placement."""


def check(params: DispatchParams, ctx: CheckContext) -> None:
    """Refuses an adapter for another model before anything is downloaded."""
    attached(ctx, single_model(ctx))


def run(params: DispatchParams, ctx: StageContext) -> StageResult:
    model = describe_checkpoint(ctx.input("model"))
    agreement = agreed(model, sources_of(ctx))
    beside = None
    if "adapter" in ctx.inputs:
        beside = attachment(describe_adapter(ctx.input("adapter")), model, agreement.architecture, ctx.memo)
    placement = placing_of(model, agreement, ctx, beside)(request_of(params))
    metrics = DispatchMetrics(
        predicted=predicted_weights(placement),
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
    for sentence in placement.measured:
        ctx.log(sentence, detail=True)
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
