"""How `shard` does it: plans from headers, then bytes from file to file."""

from __future__ import annotations

from bigpipe.bigmodel.checkpoint import (
    ModelDescription,
    describe_checkpoint,
    describe_opened,
    open_checkpoint,
    tensor_nbytes,
)
from bigpipe.bigmodel.formats import decoded, decoding_memory
from bigpipe.bigmodel.writing import WORKERS, Conversion, ShardPlan, convert, planned_bytes
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted, format_transfer

from .shard import ShardMetrics, ShardParams
from .wired import single_model

RAM = 200 * 2**20
"""Peak of the worker process at any model size: interpreter, numpy where a cast needs it, buffers for four files."""
RATE = 600 * 10**6
"""Bytes per second where nothing better is known: one core's sha256 beside an ordinary disk."""


def check(params: ShardParams, context: CheckContext) -> None:
    """Refuses what could only fail after the download: a cast of quantized weights, a dtype the format lacks."""
    if described := single_model(context):
        _conversion(params).of(described)


def forecast(params: ShardParams, context: ForecastContext) -> Forecast:
    """Exact numbers of files and bytes, from the headers of the input."""
    described = single_model(context)
    if described is None or described.tensors is None:
        what = "number and size of shards" + (", and memory" if params.dtype else "")
        unknown = (f"{what}: the tensors of the input are not known yet",)
        return Forecast(download_bytes=0, vram={}, ram=None if params.dtype else RAM, unknown=unknown)
    plans, output = _conversion(params).of(described)
    sizes = [planned_bytes([plan]) for plan in plans]
    return Forecast(
        download_bytes=0,
        vram={},
        write_bytes=sum(sizes),
        ram=RAM + (WORKERS * decoding_memory(described) if params.dtype else 0),
        file_bytes=max(sizes),
        works_on=_works_on(plans, decoded(described) if params.dtype else described, context.machine.cpus),
        seconds=sum(sizes) / RATE,
        metrics={"shards": len(plans), "bytes": sum(sizes)},
        output=describe_checkpoint(context.artifact) if context.artifact else output,
        summary=f"{counted(len(plans), 'shard')}, +{format_transfer(sum(sizes))}",
        details=_conversion(params).notes(described),
    )


def _conversion(params: ShardParams) -> Conversion:
    return Conversion(**params.model_dump())


def _works_on(plans: list[ShardPlan], source: ModelDescription, cpus: int) -> int:
    """Bytes of the input that make the files written side by side."""
    tensors = source.tensors or {}
    largest = max(sum(tensor_nbytes(*tensors[tensor.name]) for tensor in plan.tensors) for plan in plans)
    return min(WORKERS, cpus, len(plans)) * largest


def run(params: ShardParams, context: StageContext) -> StageResult:
    """Writes the weights anew and refers to the input's side files; whole shards of an earlier attempt are kept."""
    checkpoint = open_checkpoint(context.open("model"))
    for note in _conversion(params).notes(describe_opened(checkpoint)):
        context.log(note)
    saved = convert(
        checkpoint,
        context.out,
        _conversion(params),
        linked=True,
        progress=lambda done, total: context.progress(done, total, "B", "weights"),
        journal=context.scratch / "finished",
        outlet=context.outlet,
    )
    return StageResult(ShardMetrics(shards=saved.shards, bytes=saved.bytes), saved.files)
