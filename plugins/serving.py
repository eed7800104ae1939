"""How `distributed-infer` does it where a server holds the model: one process asks, so many questions at once, with
the same log as ranks have."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from bigpipe.bigmodel.engines import Engine, Wanted, find_engine
from bigpipe.bigmodel.inference import (
    Bound,
    Columns,
    Output,
    compute_share,
    merge_results,
    plain_result,
    plan_work,
    side_by_side,
)
from bigpipe.bigmodel.tasks import TaskOptions
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted

from .distributed_infer import InferMetrics, InferParams
from .inference_needs import RESULTS, check_output, rows_of
from .library import about, sources_of, tell_pace
from .wired import single_model

BASE = 120 * 2**20
"""Bytes of a process that asks: a bound."""
OF_A_QUESTION = 2**20
"""Bytes of a question under way, with its thread: a bound for texts of usual lengths."""


def check(params: InferParams, ctx: CheckContext) -> None:
    """Prompts, task, settings and secrets, before anything is asked."""
    check_output(params)
    engine, sources = find_engine(params.engine), sources_of(ctx)
    model = single_model(ctx) if engine.takes_model else None
    engine.check(_settings(engine, params), _wanted(params, ctx, model=model))
    task, rows = engine.find_task(params.task, sources), rows_of(params, ctx.base)
    with about("prompts"):
        columns = Columns()
        for row in task.checked(params.generation, rows, model, sources, params.max_new_tokens):
            if params.output_format == "parquet":
                columns.add(row.index, {"prompt": row.prompt})


def _settings(engine: Engine, params: InferParams) -> Any:
    return engine.settings.model_validate(params.serving)


def _wanted(params: InferParams, ctx: CheckContext | StageContext, **more: Any) -> Wanted:
    return Wanted(
        task=params.task, machine=ctx.machine, environment=ctx.environment, offline=ctx.offline, dtype=params.dtype,
        **more,
    )  # fmt: skip


def forecast(params: InferParams, ctx: ForecastContext) -> Forecast:
    try:
        count = sum(1 for _ in rows_of(params, ctx.base))
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    engine = find_engine(params.engine)
    unknown = (RESULTS, *(("RAM: the engine takes what it needs",) if engine.takes_model else ()))
    settings = _settings(engine, params)
    at_once = settings.concurrency
    return Forecast(
        download_bytes=0,
        vram=engine.holds(settings, ctx.machine),
        unknown=unknown,
        ram=None if engine.takes_model else BASE + at_once * OF_A_QUESTION,
        metrics={"prompts": count, "micro_batches": at_once},
        summary=f"{counted(count, 'prompt')} to {params.serving.get('model', params.engine)}, {at_once} at once",
    )


def run(params: InferParams, ctx: StageContext) -> StageResult:
    """Share out what no earlier attempt has finished, ask, and merge: every row once, or the stage fails."""
    engine, rows, sources = find_engine(params.engine), rows_of(params, ctx.base), sources_of(ctx)
    settings, task = _settings(engine, params), engine.find_task(params.task, sources)
    plan = plan_work(
        ctx.scratch, task.with_columns(params.generation, rows), partial(task.length, params.generation), ranks=1,
        batch_size=params.batch_size, batch_tokens=params.batch_tokens, together=lambda batching: settings.concurrency,
        max_errors=params.max_errors,
    )  # fmt: skip
    if plan.finished:
        ctx.log(f"{plan.finished} of {len(plan.chunks)} batches were finished before")
    with ExitStack() as open_here:

        def bind() -> Bound:
            assert engine.serve is not None  # noqa: S101  the kind runs so where it serves
            path = ctx.input("model") if engine.takes_model else None
            wanted = _wanted(params, ctx, path=path, folder=ctx.scratch)
            endpoint = open_here.enter_context(engine.serve(settings, wanted))
            options = TaskOptions(
                arguments=params.generation, max_new_tokens=params.max_new_tokens, seed=params.seed
            )  # fmt: skip
            return Bound(task.bind(endpoint, ctx.scratch, options, sources), side_by_side, computes=False)

        compute_share(
            ctx.scratch, 0, 1, bind, max_errors=params.max_errors,
            progress=tell_pace(ctx, "prompts", "inferring"),
            log=lambda text: ctx.log(text, detail=True), warn=ctx.log,
        )  # fmt: skip
    output = Output(params.output_format, params.rows_per_file, plain_result)
    summary, written = merge_results(ctx.scratch, ctx.out, max_errors=params.max_errors, output=output)
    return StageResult(InferMetrics(**summary), written)
