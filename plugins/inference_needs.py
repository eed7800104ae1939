"""What `distributed-infer` needs: its batches, how many go together, and the memory of a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.execution import as_placement
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.formats import format_of
from bigpipe.bigmodel.inference import Batching, assign
from bigpipe.bigmodel.placement import Device, Placement, Together, batches_together, beyond_headroom
from bigpipe.bigmodel.tasks import (
    TASKS,
    Prompts,
    Requests,
    Row,
    built_in,
    own_arguments,
    request_reader,
    require_fetched,
    require_pyarrow,
    sequences_of,
)
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import Forecast, ForecastContext, StageContext
from bigpipe.sizes import counted

from .distributed_infer import InferParams
from .library import about, sources_of
from .placed import computed_in
from .ranked import (
    CUDA_BASE,
    RANK_BASE,
    UNSIZED,
    alone,
    held_in_ram,
    misfits_of_gpus,
    misfits_of_unplaced,
    on_its_gpu,
)
from .wired import agreed, attached, single_model, untaken_tokenizer

LONGEST = 2**16
"""Tokens of a task that makes as many as it needs: cut to the model's positions."""


RESULTS = "size of the results: they are not made yet"
"""What no forecast of answers can know."""


def forecast(params: InferParams, ctx: ForecastContext) -> Forecast:
    try:
        batching = batching_of(params, rows_of(params, ctx.base))
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    placement, placed = ctx.described("placement", Placement), ctx.input("placement")
    told: dict[str, int | str] = {"prompts": batching.rows}
    together, model, at_work, held = Together(), single_model(ctx), 0, 0
    beyond: Mapping[Device, int] = {}
    with suppress(UsageError):  # said where it is checked, or once the trusted code is here
        placement = on_its_gpu(model, params.dtype, ctx) if placed is None else placement
        together = together_of(params, model, placement, batching, ctx)
        at_work = _at_work(params, model, placement, batching, ctx)
        beyond = _beyond(params, model, placement, batching, ctx)
        held = sum(beside.nbytes.values()) if (beside := attached(ctx, model)) else 0
        told["micro_batches"] = together.count
        if model is not None and model.tensors is not None and (placement or placed is None):
            told["compute_dtype"] = computed_in(model, placement or alone(ctx.machine), ctx, params.dtype)
    said = f"{counted(together.count, 'batch', 'es')} at once through the streamed layers: {together.why}"
    each = placement.gpus if placement else int(bool(ctx.machine.gpus))
    ram = _ram(params, ctx, placement, each, together.more + at_work + held)
    known = Forecast(
        download_bytes=0,
        ram=ram,
        unknown=(RESULTS, *((UNSIZED,) if ram is None else ())),
        metrics=told,
        summary=work_of(params, batching, ctx.launch.num_processes),
        details=(*([said] if together.count > 1 else []), *untaken_tokenizer(ctx)),
    )
    if placed is not None and placed.misfits:  # said where it is placed
        return known
    vram = _vram(placement, ctx, beyond, together.more + held)
    if placed is not None:
        return replace(known, vram=vram, misfits=misfits_of_gpus(each, ctx) if placement else ())
    misfits = misfits_of_gpus(each, ctx) or misfits_of_unplaced(vram or {}, ctx)
    return replace(known, vram=vram if params.task in TASKS or not each else None, misfits=misfits)


def work_of(params: InferParams, batching: Batching, ranks: int) -> str:
    """Return what there is to do, in words."""
    counts = map(sum, assign(batching.sizes, ranks))
    spread = f" ({' + '.join(map(str, counts))})" if params.split == "static" and 1 < ranks <= 8 else ""
    batches = counted(len(batching.sizes), "batch", "es")
    return f"{counted(batching.rows, 'prompt')} in {batches} over {counted(ranks, 'rank')}{spread}"


def check_output(params: InferParams) -> None:
    """Raise UsageError where what writes the results is not installed."""
    if params.output_format == "parquet":
        with about("output_format"):
            require_pyarrow("output_format: parquet", "write lines of JSON")


def _ram(params: InferParams, ctx: ForecastContext, placement: Placement | None, each: int, beside: int) -> int | None:
    """Of all ranks here. each: GPUs of a rank. beside: what its batches take besides the weights, on a CPU."""
    model, local = single_model(ctx), ctx.launch.local_processes
    if model is None or model.tensors is None:
        return None
    if each:
        return (RANK_BASE + CUDA_BASE) * local
    return (RANK_BASE + held_in_ram(model, placement or as_placement(None), params.dtype, ctx) + beside) * local


def _at_work(
    params: InferParams, model: ModelDescription | None, placement: Placement | None, batching: Batching,
    ctx: ForecastContext,
) -> int:  # fmt: skip
    """What a forward of the largest batch takes besides the weights, on a CPU; 0: of a function nobody knows."""
    if model is None or model.tensors is None or params.task not in TASKS:
        return 0
    dtype = computed_in(model, placement or alone(ctx.machine), ctx, params.dtype)
    found = Budget(agreed(model, sources_of(ctx)).architecture, dtype, _workload(params, batching, model))
    return found.cpu.bytes - found.counts.loaded


def _beyond(
    params: InferParams, model: ModelDescription | None, placement: Placement | None, batching: Batching,
    ctx: ForecastContext,
) -> Mapping[Device, int]:  # fmt: skip
    """What the largest batch takes on each device beyond what it was placed with; of a function nobody knows."""
    if placement is None or model is None or model.tensors is None or params.task not in TASKS:
        return {}
    architecture, dtype = agreed(model, sources_of(ctx)).architecture, computed_in(model, placement, ctx, params.dtype)
    return beyond_headroom(placement, architecture, dtype, _workload(params, batching, model), format_of(model))


def _workload(params: InferParams, batching: Batching, model: ModelDescription) -> Workload:
    """Of the largest batch: a token rarely has less than a byte. Beams and several texts count as rows, also those that
    the model's own file asks for."""
    task = built_in(params.task)
    new = LONGEST if task is not None and task.own_length else params.max_new_tokens
    if task is not None and not task.makes_tokens:
        new = 0
    count, length = max(
        ((rows, longest + new) for rows, longest in batching.shapes), key=lambda each: (math.prod(each), each)
    )
    if not new:
        headless = task is not None and task.headless
        return Workload(batch_size=count, sequence_length=length, all_logits=not headless, headless=headless)
    own = own_arguments(model)[0] if task is not None else None
    asked = task.settled(params.generation) if task is not None else params.generation
    return Workload(batch_size=count * sequences_of(asked, own), sequence_length=length, output_length=new)


def batching_of(params: InferParams, rows: Iterable[Row]) -> Batching:
    """Return how rows come out in batches, by the most tokens that each may have. A task of the user's own is not
    imported here, and has no say in it."""
    task = built_in(params.task)
    if task is None:
        lengths = (max(1, row.nbytes) for row in rows)
    else:
        lengths = (task.length(params.generation, row) for row in task.with_columns(params.generation, rows))
    return Batching.of(lengths, params.batch_size, params.batch_tokens)


def _vram(
    placement: Placement | None, ctx: ForecastContext, beyond: Mapping[Device, int], more: int
) -> dict[int, int] | None:
    """Per GPU of the ranks here: its weights and what generating takes besides. beyond: what the stage's own batches
    take of each device beside that. more: on the first of each rank."""
    if placement is None:
        return None if ctx.machine.gpus else {}
    needs = {gpu: need.total + beyond.get(gpu, 0) for gpu, need in placement.needs.items() if isinstance(gpu, int)}
    if needs:
        needs[min(needs)] += more
    return {
        rank * placement.gpus + gpu: size for rank in range(ctx.launch.local_processes) for gpu, size in needs.items()
    }


def together_of(
    params: InferParams,
    model: ModelDescription | None,
    placement: Placement | None,
    batching: Batching,
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
        _workload(params, batching, model),
        computed_in(model, placement, ctx, params.dtype),
        ctx.machine,
        asked=params.micro_batches,
        processes=ctx.launch.local_processes,
        memo=ctx.memo,
        stored=format_of(model),
    )
    share = math.ceil(len(batching.sizes) / ctx.launch.num_processes)
    return replace(found, count=min(found.count, share))


def _side_by_side(task: str) -> bool:
    found = built_in(task)
    return found is not None and found.side_by_side


def rows_of(params: InferParams, base: Path) -> Prompts | Requests:
    """Return the prompts, which are read as they are gone through."""
    if params.row_format == "openai-batch":
        reader = request_reader(params.task, params.max_new_tokens)
        return Requests(Prompts(params.prompts, params.column, base, request=reader, limit=params.limit))
    return Prompts(params.prompts, params.column, base, params.template, limit=params.limit)


def leads_to(params: InferParams, base: Path) -> Sequence[Path]:
    """The files that rows name: they are as much the prompts as the rows are; of a task of the user's own nobody
    knows."""
    task = built_in(params.task)
    if task is None or task.files is None:
        return ()
    found = []
    for row in task.with_columns(params.generation, rows_of(params, base)):
        for name in task.files(row, params.generation):
            if not (base / name).is_file():
                raise row.wrong(f"there is no file {name}", "paths start at the recipe's directory")
            require_fetched(base / name, row.wrong)
            found.append(base / name)
    return found
