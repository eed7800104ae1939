"""How `finetune` does it: the library's training, one process per rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import describe_adapter, describe_checkpoint
from bigpipe.bigmodel.training import (
    TrainedAdapter,
    Work,
    check_adapter,
    check_model,
    check_rows,
    finish_ranks,
    foreseen_adapter,
    require_peft,
    require_sound_reader,
    sounds_of,
    train_rank,
)
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, StageContext, StageResult

from .finetune import FinetuneMetrics, FinetuneParams, Losses
from .library import about, downloads_of, sources_of
from .ranked import local_rank
from .training_needs import foreseen, input_of, rows_of, training_of
from .wired import require_class, single_model

POINTS = 200
"""Of the curve that is recorded."""


def check(params: FinetuneParams, ctx: CheckContext) -> None:
    """Rows, model, modules and adapter, before anything is downloaded."""
    require_peft()
    rows, others = rows_of(params, ctx.base)
    check_rows(rows, params.batch_size, params.gradient_accumulation_steps, ctx.launch.num_processes)
    if params.task == "speech-seq2seq":
        require_sound_reader(sounds_of([*rows, *others], input_of(params), ctx.base))
    if "adapter" in ctx.inputs and "lora" in params.model_fields_set:
        cause = "lora says the shape of a new adapter, and the one that is wired has its own"
        raise UsageError(cause, "leave it out", field="lora")
    model = single_model(ctx)
    if model is not None:
        with about("inputs.model"):
            require_class(model)
            architecture = check_model(params.task, model, [*rows, *others], sources_of(ctx))
        if architecture is not None and "adapter" not in ctx.inputs:
            with about("lora.target_modules"):
                foreseen_adapter(model, architecture, training_of(params), sources_of(ctx))
    foreseen(params, ctx)


def leads_to(params: FinetuneParams, base: Path) -> Sequence[Path]:
    """The sounds that rows name: they are as much the data as the rows are."""
    if params.task != "speech-seq2seq":
        return ()
    rows, others = rows_of(params, base)
    return sounds_of([*rows, *others], input_of(params), base)


def prepare(params: FinetuneParams, ctx: StageContext) -> None:
    """Checks again what is known now that the model is here."""
    rows, others = rows_of(params, ctx.base)
    model, sources = describe_checkpoint(ctx.input("model")), sources_of(ctx)
    architecture = check_model(params.task, model, [*rows, *others], sources)
    if architecture is not None and "adapter" not in ctx.inputs:
        with about("lora.target_modules"):
            foreseen_adapter(model, architecture, training_of(params), sources)
    elif architecture is not None:
        with about("inputs.adapter"):
            check_adapter(describe_adapter(ctx.input("adapter")), model, architecture, sources.memo)


def run(params: FinetuneParams, ctx: StageContext) -> StageResult:
    """One rank."""
    rows, others = rows_of(params, ctx.base)
    origin = _origin(ctx)
    work = Work(
        model=ctx.input("model"),
        training=training_of(params),
        rows=rows,
        eval_rows=others,
        input_column=input_of(params),
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
        work, ctx.scratch, rank=ctx.rank, ranks=ctx.world_size, local_rank=local_rank(ctx),
        progress=tell, log=ctx.log,
    )  # fmt: skip
    return StageResult(FinetuneMetrics())


def _origin(ctx: StageContext) -> Mapping[str, Any]:
    """The repository that the model came from by the nearest download, and its commit."""
    downloads = [node for node in downloads_of(ctx, ctx.input("model")) if node.params.get("repo")]
    return {"repo": downloads[-1].params["repo"], "commit": downloads[-1].metrics.get("commit")} if downloads else {}


def finish(params: FinetuneParams, ctx: StageContext) -> StageResult:
    """What all ranks measured, and the adapter that rank 0 wrote."""
    made = finish_ranks(ctx.scratch, ctx.out, ctx.launch.num_processes)
    return StageResult(metrics_of(made), made.files)


def metrics_of(made: TrainedAdapter) -> FinetuneMetrics:
    losses = list(enumerate(made.losses, 1))
    every = max(1, -(-(len(losses) - 1) // (POINTS - 1)))
    curve = [[step, loss] for step, loss in (*losses[:-1:every], losses[-1])]
    return FinetuneMetrics(
        loss=Losses(first=made.losses[0], last=made.losses[-1], curve=curve),
        eval_loss=made.eval_loss,
        steps=made.steps,
        trainable_parameters=made.trainable_parameters,
        tokens_per_second=made.tokens_per_second,
        peak=made.peak,
    )
