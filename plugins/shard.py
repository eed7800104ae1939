"""`shard`: the same weights in other files. Splits, casts and converts between safetensors and .bin, streaming."""

from __future__ import annotations

from typing import Literal

from bigpipe.orchestrator.stage import Bytes, FileSize, Metrics, Params, Passing, Planning, Port, Stage, late


class ShardParams(Params):
    max_shard_size: FileSize = 5_000_000_000
    """No file grows beyond it, unless one tensor alone does."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """What floating-point tensors become; left out, they stay as they are. Integers and booleans always do."""
    format: Literal["safetensors", "bin"] = "safetensors"
    """bin: what torch.save writes, for tools that read nothing else."""


class ShardMetrics(Metrics):
    shards: int
    bytes: Bytes
    """Of the weight files, headers included."""


STAGE = Stage(
    kind="shard",
    version=6,
    params=ShardParams,
    metrics=ShardMetrics,
    inputs={"model": Port("checkpoint")},
    output="checkpoint",
    run=late("bigpipe.plugins.sharding:run"),
    forecast=late("bigpipe.plugins.sharding:forecast"),
    planning=Planning(check=late("bigpipe.plugins.sharding:check")),
    passing=Passing(streams=True, follows="model"),
    smoke=late("bigpipe.plugins.smoking:in_several_files"),
    packages=("transformers",),
    title="Split, convert or cast a checkpoint, streaming and without torch",
)
