"""How `distributed-infer` does it with a pipeline of diffusers: each rank holds the whole of it, on a GPU of its own or
in RAM, and the rows are shared out as those of any task."""

from __future__ import annotations

import math
from dataclasses import replace

from bigpipe.bigmodel.checkpoint import CASTABLE, ModelDescription, itemsize
from bigpipe.bigmodel.footprint import runtime_of
from bigpipe.bigmodel.hub import describe_pipeline
from bigpipe.bigmodel.inference import Bound
from bigpipe.bigmodel.tasks import computing_dtype, find_task, load_pipeline
from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult

from .distributed_infer import InferParams
from .inference_needs import batching_of, check_output, rows_of, work_of
from .inferring import answerer, merged, read_through, share, share_out
from .library import about, sources_of
from .ranked import CUDA_BASE, RANK_BASE, local_rank, misfits_of_gpus
from .wired import wired_pipeline

UNKNOWN = "what drawing takes besides the weights is not foreseen"


def check(params: InferParams, ctx: CheckContext) -> None:
    """Prompts, pipeline and task, before anything is downloaded."""
    check_output(params)
    model = wired_pipeline(ctx, params.task)
    with about("inputs.model"):
        find_task(params.task, sources_of(ctx)).check_model(model, params.generation, sources_of(ctx))
    read_through(params, model, ctx)


def forecast(params: InferParams, ctx: ForecastContext) -> Forecast:
    try:
        batching, model = batching_of(params, rows_of(params, ctx.base)), wired_pipeline(ctx, params.task)
    except UsageError as error:
        return Forecast(unknown=(error.cause,))
    gpus, local = len(ctx.machine.gpus), ctx.launch.local_processes
    dtype = computing_dtype(model, params.dtype, bool(gpus))
    known = Forecast(
        download_bytes=0,
        metrics={"prompts": batching.rows, "compute_dtype": dtype},
        summary=work_of(params, batching, ctx.launch.num_processes),
        details=(UNKNOWN,),
        misfits=misfits_of_gpus(int(bool(gpus)), ctx),
    )
    if model.tensors is None:
        return known
    weights = _weights(model, dtype)
    if gpus:
        vram = dict.fromkeys(range(local), weights + runtime_of(len(model.tensors)).high)
        return replace(known, ram=(RANK_BASE + CUDA_BASE + _cast(model, dtype)) * local, vram=vram)
    return replace(known, ram=(RANK_BASE + weights) * local, vram={})


def _weights(model: ModelDescription, dtype: str) -> int:
    """Bytes of all parts, cast to `dtype`."""
    stored = (model.tensors or {}).values()
    return sum(math.prod(shape) * itemsize(dtype if found in CASTABLE else found) for found, shape in stored)


def _cast(model: ModelDescription, dtype: str) -> int:
    """Bytes of what is stored in another dtype than `dtype`: it is cast in RAM before the whole goes to a GPU. What is
    stored as it is computed stays a window of its file."""
    stored = (model.tensors or {}).values()
    return sum(math.prod(shape) * itemsize(dtype) for found, shape in stored if found in CASTABLE and found != dtype)


def prepare(params: InferParams, ctx: StageContext) -> None:
    """Checks every row, and shares out what no earlier attempt has finished."""
    share_out(params, ctx, find_task(params.task, sources_of(ctx)), describe_pipeline(ctx.input("model")))


def run(params: InferParams, ctx: StageContext) -> StageResult:
    """One rank."""

    def bind() -> Bound:
        import torch

        gpu, path = torch.cuda.is_available(), ctx.input("model")
        dtype = computing_dtype(describe_pipeline(path), params.dtype, gpu)
        device = f"cuda:{local_rank(ctx)}" if gpu else "cpu"
        return Bound(answerer(params, ctx, load_pipeline(path, dtype, device, ctx.bounded)))

    return share(params, ctx, bind)


def finish(params: InferParams, ctx: StageContext) -> StageResult:
    """Merges by index: every row once, or the stage fails."""
    model = describe_pipeline(ctx.input("model"))
    return StageResult(*merged(params, ctx, computing_dtype(model, params.dtype, bool(ctx.machine.gpus))))
