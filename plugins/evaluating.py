"""How `evaluate` does it: windows of a text through one or two models, one process per rank."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import replace

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.evaluation import (
    Known,
    Question,
    at_work,
    bind,
    conclude,
    place_pair,
    prepare as prepare_windows,
    read_texts,
    together_windows,
    write_report,
)
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.formats import computable
from bigpipe.bigmodel.inference import Bound, compute_share, peak_of
from bigpipe.bigmodel.placement import Placement
from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.fit import Misfit
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted, format_size

from .evaluate import EvaluateMetrics, EvaluateParams
from .library import about, agreed, computed_in, require_class, single_model, sources_of
from .ranked import (
    CUDA_BASE,
    RANK_BASE,
    alone,
    check_weights,
    held_in_ram,
    load_on_rank,
    misfits_of_gpus,
    placement_of,
)

PORTS = ("model", "baseline")
REPORT_BYTES = 64 * 2**10


def _question(params: EvaluateParams) -> Question:
    return Question(**params.model_dump(exclude={"dtype"}))


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
    if model is not None and model.config is not None:
        with about("inputs.model"):
            _question(params).check(model, models.get("baseline"), sources_of(ctx))


def _read(params: EvaluateParams, ctx: CheckContext) -> str:
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
        size = len(_read(params, ctx).encode())
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    most = f", the first {params.max_tokens:,} tokens" if params.max_tokens else ""
    told = f"{format_size(size)} of text{most} over {counted(ctx.launch.num_processes, 'rank')}"
    known = Forecast(download_bytes=0, write_bytes=REPORT_BYTES, summary=told)
    with suppress(UsageError):  # said where it is checked, or once the trusted code is here
        return _with_memory(params, ctx, known)
    return known


def _with_memory(params: EvaluateParams, ctx: ForecastContext, known: Forecast) -> Forecast:
    """What both models take. Nothing where one is not known yet."""
    models = [single_model(ctx, port) for port in PORTS if port in ctx.inputs]
    placed = ctx.input("placement")
    placement = ctx.described("placement", Placement)
    if any(model is None or model.tensors is None for model in models) or (placed is not None and placement is None):
        return known
    each = placement.gpus if placement else int(bool(ctx.machine.gpus))
    try:
        sides = _sides(params, [model for model in models if model is not None], placement, ctx)
    except DoesNotFit as error:
        return replace(known, misfits=(Misfit.of(error),))
    local = ctx.launch.local_processes
    held = [held_in_ram(model, where, params.dtype, ctx) for model, where in sides]
    ram = RANK_BASE + (CUDA_BASE if each else sum(held) + _at_work(params, sides, ctx))
    vram = {rank * each + gpu: size for rank in range(local) for gpu, size in _vram(sides).items()}
    return replace(known, ram=ram * local, vram=vram, misfits=misfits_of_gpus(each, ctx))


def _vram(sides: Sides) -> Counter[int]:
    """Per GPU of a rank."""
    found: Counter[int] = Counter()
    for _, where in sides:
        found.update({device: need.total for device, need in where.needs.items() if isinstance(device, int)})
    return found


Sides = list[tuple[ModelDescription, Placement]]


def _sides(
    params: EvaluateParams,
    models: list[ModelDescription],
    placement: Placement | None,
    ctx: ForecastContext | StageContext,
) -> Sides:
    """Each model with where it goes."""
    if placement is None:
        return [(model, alone(ctx.machine)) for model in models]
    known = [Known(model, agreed(model, sources_of(ctx)).architecture) for model in models]
    if len(known) == 1:
        return [(models[0], placement)]
    work = _workload(params, models[0], ctx)
    return list(zip(models, place_pair(placement, known[0], known[1], work, ctx.machine, ctx.memo), strict=True))


def _workload(params: EvaluateParams, model: ModelDescription, ctx: ForecastContext | StageContext) -> Workload:
    question = _question(params)
    return question.workload(question.windows(model, sources_of(ctx))[0])


def _at_work(params: EvaluateParams, sides: Sides, ctx: ForecastContext | StageContext) -> int:
    architectures = [agreed(model, sources_of(ctx)).architecture for model, _ in sides]
    dtypes = [computed_in(model, where, ctx, params.dtype) for model, where in sides]
    return at_work(list(zip(architectures, dtypes, strict=True)), _workload(params, sides[0][0], ctx))


def _wired(params: EvaluateParams, ctx: StageContext) -> Sides:
    models = [describe_checkpoint(ctx.input(port)) for port in PORTS if port in ctx.inputs]
    return _sides(params, models, placement_of(ctx), ctx)


def prepare(params: EvaluateParams, ctx: StageContext) -> None:
    """Reads the text as tokens, and shares out the windows that no earlier attempt has finished."""
    sources, sides = sources_of(ctx), _wired(params, ctx)
    plan = prepare_windows(
        ctx.scratch, _question(params), ctx.input("model"), ctx.input("baseline") if len(sides) > 1 else None, ctx.base,
        sources, ranks=ctx.launch.num_processes, together=_together(params, sides, ctx), bounded=ctx.bounded,
    )  # fmt: skip
    if plan.finished:
        ctx.log(f"{plan.finished} of {counted(len(plan.chunks), 'batch', 'es')} were finished before")


def _together(params: EvaluateParams, sides: Sides, ctx: StageContext) -> int:
    placed = [
        (where, agreed(model, sources_of(ctx)).architecture, computed_in(model, where, ctx, params.dtype))
        for model, where in sides
    ]
    work = _workload(params, sides[0][0], ctx)
    return together_windows(placed, work, ctx.machine, ctx.launch.local_processes, ctx.memo)


def run(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """One rank: its windows, in their order."""

    def bound() -> Bound:
        placement = placement_of(ctx)
        wheres = [where for _, where in _wired(params, ctx)] if placement else [None, None]
        ports = [port for port in PORTS if port in ctx.inputs]
        models = [load_on_rank(ctx, params.dtype, where, port) for port, where in zip(ports, wheres, strict=False)]
        return bind(ctx.scratch, _question(params), *models)

    compute_share(
        ctx.scratch, ctx.rank, ctx.world_size, bound,
        progress=lambda done, total: ctx.progress(done, total, "windows", "evaluating"),
        log=lambda text: ctx.log(text, detail=True),
    )  # fmt: skip
    return StageResult(EvaluateMetrics.model_construct())


def finish(params: EvaluateParams, ctx: StageContext) -> StageResult:
    """Adds up all windows, in their order."""
    found = conclude(ctx.scratch, _question(params), describe_checkpoint(ctx.input("model")), sources_of(ctx))
    about_it = params.model_dump(mode="json")
    files = write_report(found, {"with": about_it}, ctx.out)
    for line in (ctx.out / "report.txt").read_text().splitlines():
        ctx.log(line)
    metrics = {**found.metrics(), "peak": peak_of(ctx.scratch)}
    return StageResult(EvaluateMetrics.model_validate(metrics), files)
