"""How `evaluate` does it: windows of a text through one or two models, one process per rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.evaluation import (
    bind,
    conclude,
    prepare as prepare_windows,
    read_texts,
    tokens_in,
    write_report,
)
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.formats import computable
from bigpipe.bigmodel.inference import Bound, compute_share, peak_of
from bigpipe.bigmodel.placement import Placement
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted, format_size

from .evaluate import EvaluateMetrics, EvaluateParams
from .evaluation_needs import PORTS, Sides, question, sides_of, together_of, tokens_at_most, with_memory, workload
from .library import about, sources_of, tell_pace
from .ranked import check_weights, load_on_rank, placement_of
from .wired import attached, require_class, single_model

REPORT_BYTES = 64 * 2**10


def check(params: EvaluateParams, ctx: CheckContext) -> None:
    """Text, windows, and that both models read it alike, as far as configs and side files tell."""
    _read(params, ctx)
    models = {port: single_model(ctx, port) for port in PORTS if port in ctx.inputs}
    for port, model in models.items():
        if model is not None:
            with about(f"inputs.{port}"):
                require_class(model)
                computable(model)
            check_weights(model, ctx)
    _refuse_baseline_fields(params, ctx)
    model = models["model"]
    attached(ctx, model)
    if model is not None and model.says_class:
        question(params).check(model, models.get("baseline"), sources_of(ctx))


def _read(params: EvaluateParams, ctx: CheckContext | StageContext) -> str:
    try:
        return read_texts(params.data, params.column, ctx.base)
    except UsageError as error:
        if error.field not in params.model_fields_set:  # a default stands nowhere
            error.field = "data"
        raise


def _refuse_baseline_fields(params: EvaluateParams, ctx: CheckContext) -> None:
    if params.per_layer and "baseline" not in ctx.inputs:
        cause = "per_layer compares modules with a baseline's, and none is wired"
        raise UsageError(cause, "wire inputs: baseline to the model it was made from", field="per_layer")


def forecast(params: EvaluateParams, ctx: ForecastContext) -> Forecast:
    try:
        text = _read(params, ctx)
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    most = f", the first {params.max_tokens:,} tokens" if params.max_tokens else ""
    told = f"{format_size(len(text.encode()))} of text{most} over {counted(ctx.launch.num_processes, 'rank')}"
    known = Forecast(download_bytes=0, write_bytes=REPORT_BYTES, summary=told)
    with suppress(UsageError):  # said where it is checked, or once the trusted code is here
        return with_memory(params, ctx, known, tokens_at_most(params, text))
    return known


def _wired(params: EvaluateParams, ctx: StageContext, tokens: int) -> tuple[Sides, Workload]:
    """The models with where they go, and what a batch of windows is to them. tokens: of the text, at most."""
    models = [describe_checkpoint(ctx.input(port)) for port in PORTS if port in ctx.inputs]
    work = workload(params, models, ctx, tokens)
    return sides_of(params, models, placement_of(ctx), work, ctx), work


def prepare(params: EvaluateParams, ctx: StageContext) -> None:
    """Reads the text as tokens, and shares out the windows that no earlier attempt has finished."""
    sides, work = _wired(params, ctx, tokens_at_most(params, _read(params, ctx)))
    plan = prepare_windows(
        ctx.scratch, question(params), ctx.input("model"), ctx.input("baseline") if len(sides) > 1 else None, ctx.base,
        sources_of(ctx), ranks=ctx.launch.num_processes, together=together_of(params, sides, work, ctx).count,
        bounded=ctx.bounded,
    )  # fmt: skip
    if plan.finished:
        ctx.log(f"{plan.finished} of {counted(len(plan.chunks), 'batch', 'es')} were finished before")


def run(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """One rank: its windows, in their order."""

    def bound() -> Bound:
        placement = placement_of(ctx)
        sides = _wired(params, ctx, tokens_in(ctx.scratch))[0] if placement else []
        wheres: Sequence[Placement | None] = [where for _, where in sides] or [None, None]
        ports = [port for port in PORTS if port in ctx.inputs]
        models = [load_on_rank(ctx, params.dtype, where, port) for port, where in zip(ports, wheres, strict=False)]
        return bind(ctx.scratch, question(params), *models)

    compute_share(
        ctx.scratch, ctx.rank, ctx.world_size, bound,
        progress=tell_pace(ctx, "windows", "evaluating"),
        log=lambda text: ctx.log(text, detail=True),
    )  # fmt: skip
    return StageResult(EvaluateMetrics.model_construct())


def finish(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Adds up all windows, in their order."""
    found = conclude(ctx.scratch, question(params), describe_checkpoint(ctx.input("model")), sources_of(ctx))
    about_it = params.model_dump(mode="json")
    files = write_report(found, {"with": about_it}, ctx.out)
    for line in (ctx.out / "report.txt").read_text().splitlines():
        ctx.log(line)
    metrics = {**found.metrics(), "peak": peak_of(ctx.scratch)}
    return StageResult(EvaluateMetrics.model_validate(metrics), files)
