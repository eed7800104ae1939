"""How `distributed-infer` does it: the library's exactly-once inference, one process per rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.execution import loaded
from bigpipe.bigmodel.formats import computable
from bigpipe.bigmodel.inference import (
    Batching,
    Bound,
    Columns,
    Output,
    Record,
    compute_share,
    merge_results,
    plain_result,
    plan_work,
)
from bigpipe.bigmodel.placement import Placement, Work, limit_here
from bigpipe.bigmodel.tasks import (
    TASKS,
    Answerer,
    Row,
    Task,
    TaskOptions,
    find_task,
    own_arguments,
    refuse_arguments,
    response,
    sequences_of,
)
from bigpipe.errors import StageFailed, UsageError
from bigpipe.modules import foreign, keywords_of, missing_name
from bigpipe.orchestrator.stage import CheckContext, StageContext, StageResult

from .distributed_infer import InferMetrics, InferParams
from .inference_needs import check_output, rows_of, together_of
from .library import about, sources_of, tell_pace
from .placed import computed_in, told_limit
from .ranked import (
    alone,
    check_weights,
    load_on_rank,
    placement_of,
)
from .wired import agreed, attached, require_class, single_model


def check(params: InferParams, ctx: CheckContext) -> None:
    """Prompts, task and trust, before anything is downloaded. A module of the user's is imported by workers alone."""
    check_output(params)
    if params.micro_batches is not None and "placement" not in ctx.inputs:
        cause = "micro_batches go together through streamed layers, and without a placement none is streamed"
        raise UsageError(cause, "wire inputs: placement to a dispatch, or leave it out", field="micro_batches")
    model = single_model(ctx)
    if model is not None:
        with about("inputs.model"):
            require_class(model)
            computable(model)
        check_weights(model, ctx)
    attached(ctx, model)
    if params.task not in TASKS:
        with about("task"):
            ctx.trust.require_module(params.task, f"task {params.task}")
            if wrong := missing_name(params.task, ctx.base):
                raise UsageError(f"task {params.task}: {wrong}", "correct the name, or the module")
        refuse_arguments(params.task, keywords_of(params.task, ctx.base), _given(params))
    read_through(params, model, ctx)


def read_through(params: InferParams, model: ModelDescription | None, ctx: CheckContext) -> None:
    """All prompts once, as far as the task may be asked here."""
    rows: Iterable[Row] = rows_of(params, ctx.base)
    sources, columns = sources_of(ctx), Columns()
    if params.task in TASKS:
        task = find_task(params.task, sources)
        rows = task.checked(params.generation, rows, model, sources, params.max_new_tokens)
        rows = task.answerable(rows, params.max_errors)
    with about("prompts"):
        for row in rows:
            if params.output_format == "parquet":
                columns.add(row.index, {"prompt": row.prompt})


def _given(params: InferParams) -> tuple[str, ...]:
    """The arguments that somebody wrote for the task."""
    return (*(("max_new_tokens",) if "max_new_tokens" in params.model_fields_set else ()), *params.generation)


def prepare(params: InferParams, ctx: StageContext) -> None:
    """Checks what only a worker may import, and shares out what no earlier attempt has finished."""
    sources, model = sources_of(ctx), describe_checkpoint(ctx.input("model"))
    task = find_task(params.task, sources)
    if not (task.makes_tokens or task.heeds_length):
        refuse_arguments(params.task, (), {"max_new_tokens"}.intersection(_given(params)))

    def together(batching: Batching) -> int:
        return together_of(params, model, placement_of(ctx), batching, ctx).count

    share_out(params, ctx, task, model, together)


def share_out(
    params: InferParams, ctx: StageContext, task: Task, model: ModelDescription,
    together: Callable[[Batching], int] = lambda batching: 1,
) -> None:  # fmt: skip
    """Check every row, and cut what no earlier attempt has finished into the queues of ranks."""
    rows = task.checked(params.generation, rows_of(params, ctx.base), model, sources_of(ctx), params.max_new_tokens)
    plan = plan_work(
        ctx.scratch, rows, partial(task.length, params.generation), ranks=ctx.launch.num_processes,
        batch_size=params.batch_size, batch_tokens=params.batch_tokens, split=params.split, pad=params.apply_padding,
        together=together, lost=ctx.lost, max_errors=params.max_errors,
    )  # fmt: skip
    if plan.finished:
        ctx.log(f"{plan.finished} of {len(plan.chunks)} batches were finished before")


def run(params: InferParams, ctx: StageContext) -> StageResult:
    """One rank: chunk after chunk of its queue, several at once where layers are streamed."""

    def bind() -> Bound:
        model = load_on_rank(ctx, params.dtype, placement_of(ctx))
        return Bound(answerer(params, ctx, model), partial(loaded(model).stream.together, model))

    return share(params, ctx, bind)


def answerer(params: InferParams, ctx: StageContext, model: Any) -> Answerer:
    """What answers batches of the stage's task with a loaded model."""
    options = TaskOptions(
        arguments=params.generation, max_new_tokens=params.max_new_tokens, seed=params.seed, bounded=ctx.bounded
    )
    sources = sources_of(ctx)
    with foreign(f"task {params.task} cannot be used", "mend it, or see the log", StageFailed):
        return find_task(params.task, sources).bind(model, ctx.input("model"), options, sources)


def share(params: InferParams, ctx: StageContext, bind: Callable[[], Bound]) -> StageResult:
    """Answer what falls to this rank."""
    compute_share(
        ctx.scratch, ctx.rank, ctx.world_size, bind, max_errors=params.max_errors,
        progress=tell_pace(ctx, "prompts", "inferring"),
        log=lambda text: ctx.log(text, detail=True), warn=ctx.log,
    )  # fmt: skip
    return StageResult(InferMetrics())


def finish(params: InferParams, ctx: StageContext) -> StageResult:
    """Merges by index: every row once, or the stage fails."""
    model, placement = describe_checkpoint(ctx.input("model")), placement_of(ctx) or alone(ctx.machine)
    metrics, written = merged(params, ctx, computed_in(model, placement, ctx, params.dtype))
    return StageResult(_with_limit(params, metrics, model, placement, ctx), written)


def merged(
    params: InferParams, ctx: StageContext, dtype: str
) -> tuple[InferMetrics, Mapping[str, tuple[str, int]]]:  # fmt: skip
    """Write the results of all ranks, every row once; return metrics and files. dtype: what was computed in."""
    output = Output(params.output_format, params.rows_per_file, _RESULTS[params.row_format])
    summary, written = merge_results(ctx.scratch, ctx.out, max_errors=params.max_errors, output=output)
    return InferMetrics(**summary, compute_dtype=dtype), written


def _response(row: Row, record: Record) -> dict[str, Any]:
    return response(row, record.payload, record.read, record.tokens)


_RESULTS = {"prompts": plain_result, "openai-batch": _response}


def _with_limit(
    params: InferParams, metrics: InferMetrics, model: ModelDescription, placement: Placement, ctx: StageContext
) -> InferMetrics:
    """Where layers are streamed and the task tells what it read."""
    if not placement.streamed_bytes_per_token or not metrics.prompt_tokens:
        return metrics
    task = find_task(params.task, sources_of(ctx))
    asked = task.settled(params.generation)
    work = Work(
        rows=metrics.prompts,
        read=metrics.prompt_tokens,
        told=metrics.tokens,
        made=metrics.tokens if task.makes_tokens or task.heeds_length else 0,
        headless=task.headless,
        batch_size=params.batch_size,
        sequences=sequences_of(asked, own_arguments(model)[0]),
        together=metrics.micro_batches,
    )
    architecture = agreed(model, sources_of(ctx)).architecture
    limit = limit_here(placement, architecture, model, metrics.compute_dtype, work, ctx.machine, ctx.memo)
    if limit is None:
        return metrics
    share = metrics.tokens_per_second / limit.tokens_per_second
    ctx.log(f"{metrics.tokens_per_second:.3g} tokens/s are {share:.0%} of the limit: {limit.describe()}")
    return metrics.model_copy(update={**told_limit(limit), "share_of_limit": round(share, 4)})
