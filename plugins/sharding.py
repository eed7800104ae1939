"""How `shard` does it: plans from headers, then bytes from file to file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bigpipe.bigmodel.checkpoint import ModelDescription, describe_checkpoint, open_checkpoint, tensor_nbytes
from bigpipe.bigmodel.formats import castable
from bigpipe.bigmodel.writing import (
    WORKERS,
    ShardPlan,
    config_with_dtype,
    convert,
    plan_conversion,
    planned_bytes,
)
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.sizes import counted, format_transfer

from .shard import ShardMetrics, ShardParams

RAM = 200 * 2**20
"""Peak of the worker process at any model size: interpreter, numpy where a cast needs it, buffers for four files."""
RATE = 600 * 10**6
"""Bytes per second where nothing better is known: one core's sha256 beside an ordinary disk."""


def check(params: ShardParams, context: CheckContext) -> None:
    """Refuses what could only fail after the download: a cast of quantized weights, a dtype the format lacks."""
    for forecast in context.inputs.get("model", ()):
        if isinstance(forecast.output, ModelDescription):
            _plans(params, forecast.output)


def forecast(params: ShardParams, context: ForecastContext) -> Forecast:
    """Exact numbers of files and bytes, from the headers of the input."""
    described = context.described("model", ModelDescription)
    if described is None or described.tensors is None:
        return Forecast(ram=RAM, unknown=("number of shards: the tensors of the input are not known yet",))
    plans = _plans(params, described)
    size = planned_bytes(plans, params.format)
    return Forecast(
        download_bytes=0,
        write_bytes=size,
        ram=RAM,
        file_bytes=max(planned_bytes([plan], params.format) for plan in plans),
        works_on=_works_on(plans, described, context.machine.cpus),
        seconds=size / RATE,
        metrics={"shards": len(plans), "bytes": size},
        output=describe_checkpoint(context.artifact) if context.artifact else _described(params, described, plans),
        summary=f"{counted(len(plans), 'shard')}, +{format_transfer(size)}",
    )


def _plans(params: ShardParams, described: ModelDescription) -> list[ShardPlan]:
    if params.dtype:
        castable(described, params.dtype)
    return plan_conversion(
        described.tensors or {},
        described.tied,
        max_shard_size=params.max_shard_size,
        dtype=params.dtype,
        format=params.format,
    )


def _works_on(plans: list[ShardPlan], source: ModelDescription, cpus: int) -> int:
    """Bytes of the input that make the files written side by side."""
    tensors = source.tensors or {}
    largest = max(sum(tensor_nbytes(*tensors[tensor.name]) for tensor in plan.tensors) for plan in plans)
    return min(WORKERS, cpus, len(plans)) * largest


def _described(params: ShardParams, source: ModelDescription, plans: list[ShardPlan]) -> ModelDescription:
    return replace(
        source,
        config=_config(params, source.config),
        tensors={tensor.name: (tensor.dtype, tensor.shape) for plan in plans for tensor in plan.tensors},
        format=params.format,
        tied=source.tied if params.format == "bin" else {},
    )


def _config(params: ShardParams, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return config_with_dtype(config, params.dtype) if params.dtype and config is not None else config


def run(params: ShardParams, context: StageContext) -> StageResult:
    """Writes the weights anew and refers to the input's side files; whole shards of an earlier attempt are kept."""
    checkpoint = open_checkpoint(context.open("model"))
    saved = convert(
        checkpoint,
        context.out,
        max_shard_size=params.max_shard_size,
        dtype=params.dtype,
        format=params.format,
        linked=True,
        progress=lambda done, total: context.progress(done, total, "B", "weights"),
        journal=context.scratch / "finished",
        outlet=context.outlet,
    )
    return StageResult(ShardMetrics(shards=saved.shards, bytes=saved.bytes), saved.files)
