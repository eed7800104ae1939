"""How `distributed-infer` does it: the library's exactly-once inference, one process per rank."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint
from bigpipe.bigmodel.execution import as_placement, loaded
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.formats import computable
from bigpipe.bigmodel.inference import RESULTS, Bound, assign, chunked, compute_share, merge_results, plan_work
from bigpipe.bigmodel.placement import Placement, Together, Work, batches_together, limit_here
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import TASKS, Row, Task, TaskOptions, find_task, read_prompts, refuse_arguments
from bigpipe.errors import StageFailed, UsageError
from bigpipe.modules import foreign, keywords_of, missing_name
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted

from .distributed_infer import InferMetrics, InferParams
from .library import about, agreed, attached, computed_in, require_class, single_model, sources_of, told_limit
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

LONGEST = 2**16
"""Tokens of a task that makes as many as it needs: cut to the model's positions."""


def check(params: InferParams, ctx: CheckContext) -> None:
    """Prompts, task and trust, before anything is downloaded. A module of the user's is imported by workers alone."""
    with about("prompts"):
        rows = _rows(params, ctx.base)
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
        return
    sources = sources_of(ctx)
    find_task(params.task, sources).check(params.generation, rows, model, sources, params.max_new_tokens)


def _rows(params: InferParams, base: Path) -> list[Row]:
    return read_prompts(params.prompts, params.column, base, params.template)


def _given(params: InferParams) -> tuple[str, ...]:
    """The arguments that somebody wrote for the task."""
    return (*(("max_new_tokens",) if "max_new_tokens" in params.model_fields_set else ()), *params.generation)


def forecast(params: InferParams, ctx: ForecastContext) -> Forecast:
    try:
        rows = _rows(params, ctx.base)
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    ranks, batches = ctx.launch.num_processes, _batches(params, _lengths(params, rows))
    counts = [sum(len(batches[batch]) for batch in share) for share in assign(range(len(batches)), ranks)]
    spread = f" ({' + '.join(map(str, counts))})" if params.split == "static" and 1 < ranks <= 8 else ""
    work = f"{counted(len(rows), 'prompt')} in {counted(len(batches), 'batch', 'es')} over {counted(ranks, 'rank')}"
    placement, placed = ctx.described("placement", Placement), ctx.input("placement")
    told: dict[str, int | str] = {"prompts": len(rows)}
    together, model, at_work, held = Together(), single_model(ctx), 0, 0
    with suppress(UsageError):  # said where it is checked, or once the trusted code is here
        together = _together(params, model, placement, rows, ctx)
        at_work = _at_work(params, model, placement, rows, ctx)
        held = sum(beside.nbytes.values()) if (beside := attached(ctx, model)) else 0
        told["micro_batches"] = together.count
        if model is not None and model.tensors is not None and (placement or placed is None):
            told["compute_dtype"] = computed_in(model, placement or alone(ctx.machine), ctx, params.dtype)
    said = f"{counted(together.count, 'batch', 'es')} at once through the streamed layers: {together.why}"
    known = Forecast(
        download_bytes=0,
        ram=_ram(params, ctx, placement, together.more + at_work + held),
        metrics=told,
        summary=work + spread,
        details=(said,) if together.count > 1 else (),
    )
    if placed is not None and placed.misfits:  # said where it is placed
        return known
    each = placement.gpus if placement else int(bool(ctx.machine.gpus))
    return replace(
        known,
        vram=_vram(placement, ctx.launch.local_processes, together.more + held),
        misfits=misfits_of_gpus(each, ctx),
    )


def _ram(params: InferParams, ctx: ForecastContext, placement: Placement | None, beside: int) -> int | None:
    """Of all ranks here. beside: what the batches of a rank take besides the weights, on a CPU."""
    model, local = single_model(ctx), ctx.launch.local_processes
    if model is None or model.tensors is None:
        return None
    if ctx.machine.gpus:
        return (RANK_BASE + CUDA_BASE) * local
    return (RANK_BASE + held_in_ram(model, placement or as_placement(None), params.dtype, ctx) + beside) * local


def _at_work(
    params: InferParams, model: ModelDescription | None, placement: Placement | None, rows: list[Row],
    ctx: ForecastContext,
) -> int:  # fmt: skip
    """What a forward of the largest batch takes besides the weights, on a CPU; 0: of a function nobody knows."""
    if model is None or model.tensors is None or params.task not in TASKS:
        return 0
    dtype = computed_in(model, placement or alone(ctx.machine), ctx, params.dtype)
    found = Budget(agreed(model, sources_of(ctx)).architecture, dtype, _workload(params, rows))
    return found.cpu.bytes - found.counts.loaded


def _workload(params: InferParams, rows: list[Row]) -> Workload:
    """Of the largest batch: a token rarely has less than a byte. Beams and several texts count as rows."""
    texts = max(params.generation.get("num_beams") or 1, params.generation.get("num_return_sequences") or 1)
    task = find_task(params.task, Sources()) if params.task in TASKS else None
    lengths = _lengths(params, rows)
    new = LONGEST if task is not None and task.own_length else params.max_new_tokens
    if task is not None and not task.makes_tokens:
        new = 0
    shapes = [(len(batch), max(lengths[row] for row in batch) + new) for batch in _batches(params, lengths)]
    count, length = max(shapes, key=math.prod)
    if not new:
        return Workload(batch_size=count, sequence_length=length, all_logits=True)
    return Workload(batch_size=count * texts, sequence_length=length, output_length=new)


def _lengths(params: InferParams, rows: list[Row], task: Task | None = None) -> list[int]:
    """The most tokens of each row. task: one of the user's own, where it may be imported."""
    if task is None and params.task not in TASKS:
        return [max(1, row.nbytes) for row in rows]
    return (task or find_task(params.task, Sources())).lengths(params.generation, rows)


def _batches(params: InferParams, lengths: list[int]) -> list[list[int]]:
    """The rows of each."""
    return chunked(lengths, params.batch_size, params.batch_tokens)


def _vram(placement: Placement | None, local: int, more: int) -> dict[int, int]:
    """Per GPU of the ranks here: its weights and what generating takes besides. more: on the first of each rank."""
    if placement is None:
        return {}
    needs = {device: need.total for device, need in placement.needs.items() if isinstance(device, int)}
    if needs:
        needs[min(needs)] += more
    return {rank * placement.gpus + gpu: size for rank in range(local) for gpu, size in needs.items()}


def _together(
    params: InferParams,
    model: ModelDescription | None,
    placement: Placement | None,
    rows: list[Row],
    ctx: ForecastContext | StageContext,
) -> Together:
    """Batches of a rank that go through streamed layers together. A function of the user's only where they ask."""
    if placement is None or not placement.streamed_bytes_per_token or model is None or model.tensors is None:
        return Together()
    if params.micro_batches is None and not _side_by_side(params.task):
        return Together()
    found = batches_together(
        placement,
        agreed(model, sources_of(ctx)).architecture,
        _workload(params, rows),
        computed_in(model, placement, ctx, params.dtype),
        ctx.machine,
        asked=params.micro_batches,
        processes=ctx.launch.local_processes,
        memo=ctx.memo,
    )
    share = math.ceil(len(_batches(params, _lengths(params, rows))) / ctx.launch.num_processes)
    return replace(found, count=min(found.count, share))


def _side_by_side(task: str) -> bool:
    return task in TASKS and find_task(task, Sources()).side_by_side


def prepare(params: InferParams, ctx: StageContext) -> None:
    """Checks what only a worker may import, and shares out what no earlier attempt has finished."""
    rows = _rows(params, ctx.base)
    sources, model = sources_of(ctx), describe_checkpoint(ctx.input("model"))
    task = find_task(params.task, sources)
    if not (task.makes_tokens or task.heeds_length):
        refuse_arguments(params.task, (), {"max_new_tokens"}.intersection(_given(params)))
    task.check(params.generation, rows, model, sources, params.max_new_tokens)
    together = _together(params, model, placement_of(ctx), rows, ctx)
    plan = plan_work(
        ctx.scratch, rows, _lengths(params, rows, task), ranks=ctx.launch.num_processes, batch_size=params.batch_size,
        batch_tokens=params.batch_tokens, split=params.split, pad=params.apply_padding, together=together.count,
        lost=ctx.lost, max_errors=params.max_errors,
    )  # fmt: skip
    if plan.finished:
        ctx.log(f"{plan.finished} of {len(plan.chunks)} batches were finished before")


def run(params: InferParams, ctx: StageContext) -> StageResult:
    """One rank: chunk after chunk of its queue, several at once where layers are streamed."""

    def bind() -> Bound:
        options = TaskOptions(
            arguments=params.generation, max_new_tokens=params.max_new_tokens, seed=params.seed, bounded=ctx.bounded
        )
        sources = sources_of(ctx)
        task, model = find_task(params.task, sources), load_on_rank(ctx, params.dtype, placement_of(ctx))
        with foreign(f"task {params.task} cannot be used", "mend it, or see the log", StageFailed):
            answer = task.bind(model, ctx.input("model"), options, sources)
        return Bound(answer, partial(loaded(model).stream.together, model))

    compute_share(
        ctx.scratch, ctx.rank, ctx.world_size, bind, max_errors=params.max_errors,
        progress=lambda done, total: ctx.progress(done, total, "prompts", "inferring"),
        log=lambda text: ctx.log(text, detail=True), warn=ctx.log,
    )  # fmt: skip
    return StageResult(InferMetrics())


def finish(params: InferParams, ctx: StageContext) -> StageResult:
    """Merges by index: every row once, or the stage fails."""
    summary, written = merge_results(ctx.scratch, ctx.out, max_errors=params.max_errors)
    model, placement = describe_checkpoint(ctx.input("model")), placement_of(ctx) or alone(ctx.machine)
    metrics = InferMetrics(**summary, compute_dtype=computed_in(model, placement, ctx, params.dtype))
    return StageResult(_with_limit(params, metrics, model, placement, ctx), {RESULTS: written})


def _with_limit(
    params: InferParams, metrics: InferMetrics, model: ModelDescription, placement: Placement, ctx: StageContext
) -> InferMetrics:
    """Where layers are streamed and the task tells what it read."""
    if not placement.streamed_bytes_per_token or not metrics.prompt_tokens:
        return metrics
    work = Work(
        rows=metrics.prompts,
        read=metrics.prompt_tokens,
        made=metrics.tokens if params.task in TASKS and find_task(params.task, Sources()).makes_tokens else 0,
        batch_size=params.batch_size,
        together=metrics.micro_batches,
    )
    architecture = agreed(model, sources_of(ctx)).architecture
    limit = limit_here(placement, architecture, model, metrics.compute_dtype, work, ctx.machine, ctx.memo)
    if limit is None:
        return metrics
    share = metrics.tokens_per_second / limit.tokens_per_second
    ctx.log(f"{metrics.tokens_per_second:.3g} tokens/s are {share:.0%} of the limit: {limit.describe()}")
    return metrics.model_copy(update={**told_limit(limit), "share_of_limit": round(share, 4)})
