"""What `finetune` needs: steps, the adapter that will come of them, and the memory of a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription, describe_adapter
from bigpipe.bigmodel.footprint import Budget, Workload
from bigpipe.bigmodel.formats import computable
from bigpipe.bigmodel.tasks import Row
from bigpipe.bigmodel.training import (
    Lora,
    Training,
    TrainingMemory,
    check_adapter,
    computing_dtype,
    foreseen_adapter,
    input_column_of,
    parameters_of,
    read_data,
    stored_beside,
    training_memory,
)
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext
from bigpipe.sizes import counted

from .finetune import FinetuneParams
from .library import about, sources_of
from .ranked import CUDA_BASE, misfits_of_gpus
from .wired import agreed, single_model, wired_adapters

RANK_BASE = 490 * 2**20
"""Bytes of a rank that has imported torch, transformers and peft and holds no model, with what kernels keep: 454 to
548 MiB were seen (`benchmarks/finetune.py`)."""
OF_A_ROW, OF_A_TOKEN = 1024, 4
"""Bytes that a rank keeps of each row, with what holds it, and of each token that it learns."""


def forecast(params: FinetuneParams, ctx: ForecastContext) -> Forecast:
    """Steps, parameters of the adapter and its bytes are known; memory as far as headers are."""
    try:
        rows, others = rows_of(params, ctx.base)
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    ranks, training = ctx.launch.num_processes, training_of(params)
    steps = training.steps(len(rows), ranks)
    known: dict[str, Any] = {"steps": steps}
    work = f"{counted(steps, 'step')} over {counted(len(rows), 'row')}, {counted(ranks, 'rank')}"
    found, misfits = foreseen(params, ctx), misfits_of_gpus(int(bool(ctx.machine.gpus)), ctx)
    if found is None:
        unknown = ("memory: the tensors of the model or the adapter are not known yet",)
        return Forecast(download_bytes=0, metrics=known, summary=work, unknown=unknown, misfits=misfits)
    model, adapter = found
    architecture, gpu = agreed(model, sources_of(ctx)).architecture, bool(ctx.machine.gpus)
    count, adapted = parameters_of(adapter)
    dtype = computing_dtype(model, gpu, params.dtype)
    longest = max(row.nbytes for row in rows)
    given = max(len(row.data[column].encode()) for row in rows) if (column := input_of(params)) else 0
    memory = training_memory(model, architecture, count, training, dtype, longest, gpu=gpu, given=given)
    lengths = (min(training.max_length, row.nbytes) for row in (*rows, *others))
    held = sum(OF_A_ROW + OF_A_TOKEN * tokens for tokens in lengths)
    local, runtime = ctx.launch.local_processes, Budget(architecture, dtype, Workload()).runtime.high
    return Forecast(
        download_bytes=0,
        write_bytes=4 * count + stored_beside(adapter),
        ram=(RANK_BASE + CUDA_BASE + held) * local if gpu else _ram(memory, local) + held * local,
        vram=dict.fromkeys(range(local), memory.own + runtime) if gpu else {},
        metrics=known | {"trainable_parameters": count},
        summary=f"{work}; {count:,} parameters on {counted(adapted, 'module')}",
        output=describe_adapter(ctx.artifact) if ctx.artifact else adapter,
        details=(f"each rank: {memory.told()}",),
        misfits=misfits,
    )


def _ram(memory: TrainingMemory, ranks: int) -> int:
    """Weights that are windows count, though they are page cache: every step reads all of them."""
    return memory.windows + (RANK_BASE + memory.own) * ranks


def foreseen(params: FinetuneParams, ctx: CheckContext) -> tuple[ModelDescription, AdapterDescription] | None:
    """The model, and the adapter that will come of it; None where one of them is not known yet. Raise UsageError and
    InvalidCheckpoint for an adapter that training does not go on from."""
    model, wired = single_model(ctx), wired_adapters(ctx)
    if (
        model is None
        or model.tensors is None
        or model.config is None
        or len(wired) < len(ctx.inputs.get("adapter", ()))
    ):
        return None
    with about("inputs.model"):
        computable(model)
        architecture = agreed(model, sources_of(ctx)).architecture
    if not wired:
        return model, foreseen_adapter(model, architecture, training_of(params), sources_of(ctx))
    with about("inputs.adapter"):
        check_adapter(wired[0], model, architecture, ctx.memo)
    return model, wired[0]


def rows_of(params: FinetuneParams, base: Path) -> tuple[list[Row], list[Row]]:
    given = input_of(params)
    rows = read_data(params.data, params.column, given, base, limit=params.limit)
    others = params.eval_data
    if others is None:
        return rows, []
    return rows, read_data(others, params.column, given, base, "eval_data", params.limit)


def input_of(params: FinetuneParams) -> str:
    return input_column_of(params.task, params.input_column)


def training_of(params: FinetuneParams) -> Training:
    fields = params.model_dump(include=set(Training.__dataclass_fields__) - {"lora"})
    lora = params.lora.model_dump()
    targets = lora.pop("target_modules")
    return Training(
        **fields, lora=Lora(**lora, target_modules=tuple(targets) if isinstance(targets, list) else targets)
    )
