"""How `finetune` does it: the library's training, one process per rank."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.adapters import bind
from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription, describe_adapter, describe_checkpoint
from bigpipe.bigmodel.tasks import Row
from bigpipe.bigmodel.training import (
    Lora,
    TrainedAdapter,
    Training,
    TrainingMemory,
    Work,
    check_model,
    check_rows,
    computing_dtype,
    finish_ranks,
    foreseen_adapter,
    input_column_of,
    parameters_of,
    read_data,
    require_peft,
    require_sound_reader,
    sounds_of,
    train_rank,
    training_memory,
)
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted

from .finetune import FinetuneMetrics, FinetuneParams, Losses
from .library import about, sources_of
from .ranked import CUDA_BASE
from .wired import agreed, require_class, single_model, wired_adapters

RANK_BASE = 490 * 2**20
"""Bytes of a rank that has imported torch, transformers and peft and holds no model, with what kernels keep: 454 to
548 MiB were seen (`benchmarks/finetune.py`)."""
POINTS = 200
"""Of the curve that is recorded."""


def check(params: FinetuneParams, ctx: CheckContext) -> None:
    """Rows, model, modules and adapter, before anything is downloaded."""
    require_peft()
    rows, others = _rows(params, ctx.base)
    check_rows(rows, params.batch_size, params.gradient_accumulation_steps, ctx.launch.num_processes)
    if params.task == "speech-seq2seq":
        require_sound_reader(sounds_of([*rows, *others], _input(params), ctx.base))
    if "adapter" in ctx.inputs and "lora" in params.model_fields_set:
        cause = "lora says the shape of a new adapter, and the one that is wired has its own"
        raise UsageError(cause, "leave it out", field="lora")
    model = single_model(ctx)
    if model is not None:
        with about("inputs.model"):
            require_class(model)
            architecture = check_model(params.task, model, rows, sources_of(ctx))
        if architecture is not None and "adapter" not in ctx.inputs:
            with about("lora.target_modules"):
                foreseen_adapter(model, architecture, _training(params), sources_of(ctx))
    _foreseen(params, ctx)


def _foreseen(params: FinetuneParams, ctx: CheckContext) -> tuple[ModelDescription, AdapterDescription] | None:
    """The model, and the adapter that will come of it; None where one of them is not known yet. Raise UsageError for an
    adapter that was made for another model."""
    model, wired = single_model(ctx), wired_adapters(ctx)
    if (
        model is None
        or model.tensors is None
        or model.config is None
        or len(wired) < len(ctx.inputs.get("adapter", ()))
    ):
        return None
    with about("inputs.model"):
        architecture = agreed(model, sources_of(ctx)).architecture
    if not wired:
        return model, foreseen_adapter(model, architecture, _training(params), sources_of(ctx))
    with about("inputs.adapter"):
        bind(wired[0], model, architecture, ctx.memo)
    return model, wired[0]


def _rows(params: FinetuneParams, base: Path) -> tuple[list[Row], list[Row]]:
    given = _input(params)
    rows = read_data(params.data, params.column, given, base)
    others = params.eval_data
    return rows, [] if others is None else read_data(others, params.column, given, base, "eval_data")


def _input(params: FinetuneParams) -> str:
    return input_column_of(params.task, params.input_column)


def _training(params: FinetuneParams) -> Training:
    fields = params.model_dump(include=set(Training.__dataclass_fields__) - {"lora"})
    lora = params.lora.model_dump()
    targets = lora.pop("target_modules")
    return Training(
        **fields, lora=Lora(**lora, target_modules=tuple(targets) if isinstance(targets, list) else targets)
    )


def leads_to(params: FinetuneParams, base: Path) -> Sequence[Path]:
    """The sounds that rows name: they are as much the data as the rows are."""
    if params.task != "speech-seq2seq":
        return ()
    rows, others = _rows(params, base)
    return sounds_of([*rows, *others], _input(params), base)


def forecast(params: FinetuneParams, ctx: ForecastContext) -> Forecast:
    """Steps, parameters of the adapter and its bytes are known; memory as far as headers are."""
    try:
        rows, _ = _rows(params, ctx.base)
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    ranks, training = ctx.launch.num_processes, _training(params)
    steps = training.steps(len(rows), ranks)
    known: dict[str, Any] = {"steps": steps}
    work = f"{counted(steps, 'step')} over {counted(len(rows), 'row')}, {counted(ranks, 'rank')}"
    found = _foreseen(params, ctx)
    if found is None:
        unknown = ("memory: the tensors of the model or the adapter are not known yet",)
        return Forecast(download_bytes=0, metrics=known, summary=work, unknown=unknown)
    model, adapter = found
    architecture, gpu = agreed(model, sources_of(ctx)).architecture, bool(ctx.machine.gpus)
    count, adapted = parameters_of(adapter)
    dtype = computing_dtype(model, gpu, params.dtype)
    longest = max(row.nbytes for row in rows)
    memory = training_memory(model, architecture, count, training, dtype, longest, gpu=gpu)
    local = ctx.launch.local_processes
    return Forecast(
        download_bytes=0,
        write_bytes=4 * count,
        ram=(RANK_BASE + CUDA_BASE) * local if gpu else _ram(memory, local),
        vram={rank: memory.own for rank in range(local)} if gpu else {},
        metrics=known | {"trainable_parameters": count},
        summary=f"{work}; {count:,} parameters on {counted(adapted, 'module')}",
        output=describe_adapter(ctx.artifact) if ctx.artifact else adapter,
        details=(f"each rank: {memory.told()}",),
    )


def _ram(memory: TrainingMemory, ranks: int) -> int:
    """Weights that are windows count, though they are page cache: every step reads all of them."""
    return memory.windows + (RANK_BASE + memory.own) * ranks


def prepare(params: FinetuneParams, ctx: StageContext) -> None:
    """Checks again what is known now that the model is here."""
    rows, _ = _rows(params, ctx.base)
    model, sources = describe_checkpoint(ctx.input("model")), sources_of(ctx)
    architecture = check_model(params.task, model, rows, sources)
    if architecture is not None and "adapter" not in ctx.inputs:
        with about("lora.target_modules"):
            foreseen_adapter(model, architecture, _training(params), sources)


def run(params: FinetuneParams, ctx: StageContext) -> StageResult:
    """One rank."""
    rows, others = _rows(params, ctx.base)
    origin = _origin(ctx)
    work = Work(
        model=ctx.input("model"),
        training=_training(params),
        rows=rows,
        eval_rows=others,
        input_column=_input(params),
        adapter=ctx.input("adapter") if "adapter" in ctx.inputs else None,
        dtype=params.dtype,
        base_model=origin.get("repo"),
        revision=origin.get("commit"),
        sources=sources_of(ctx),
        bounded=ctx.bounded,
    )

    def tell(done: int, total: int, words: str) -> None:
        if ctx.rank == 0:  # all ranks are at the same step
            ctx.progress(done, total, "steps", "training", words)

    train_rank(
        work, ctx.scratch, rank=ctx.rank, ranks=ctx.world_size, local_rank=int(os.environ.get("LOCAL_RANK", ctx.rank)),
        progress=tell, log=ctx.log,
    )  # fmt: skip
    return StageResult(FinetuneMetrics())


def _origin(ctx: StageContext) -> Mapping[str, Any]:
    """The repository of the model that came by the nearest download, and its commit."""
    downloads = [node for node in ctx.lineage if node.kind == "download" and node.params.get("repo")]
    return {"repo": downloads[-1].params["repo"], "commit": downloads[-1].metrics.get("commit")} if downloads else {}


def finish(params: FinetuneParams, ctx: StageContext) -> StageResult:
    """What all ranks measured, and the adapter that rank 0 wrote."""
    made = finish_ranks(ctx.scratch, ctx.out, ctx.launch.num_processes)
    return StageResult(metrics_of(made), made.files)


def metrics_of(made: TrainedAdapter) -> FinetuneMetrics:
    losses = list(enumerate(made.losses, 1))
    every = max(1, -(-len(losses) // POINTS))
    curve = [[step, loss] for step, loss in (*losses[:-1:every], losses[-1])]
    return FinetuneMetrics(
        loss=Losses(first=made.losses[0], last=made.losses[-1], curve=curve),
        eval_loss=made.eval_loss,
        steps=made.steps,
        trainable_parameters=made.trainable_parameters,
        tokens_per_second=made.tokens_per_second,
        peak=made.peak,
    )
