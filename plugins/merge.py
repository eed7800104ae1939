"""`merge`: an adapter's weights added to the model's, streamed tensor by tensor."""

from __future__ import annotations

from typing import Literal

from bigpipe.orchestrator.stage import Bytes, FileSize, Metrics, Params, Planning, Port, Stage, late


class MergeParams(Params):
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """What floating-point tensors are cast to before anything is added; left out, they stay as they are."""
    max_shard_size: FileSize = 5_000_000_000
    """No file grows beyond it, unless one tensor alone does."""
    weights: tuple[float, ...] | None = None
    """Of several adapters, one for each in their order; left out, each counts as 1."""
    combination: Literal["cat", "linear"] = "cat"
    """How several are one, as peft's `add_weighted_adapter` names it: the sum of what each would add, or the product of
    the sums of their matrices."""
    tokenizer: Literal["adapter", "model"] = "adapter"
    """Whose tokenizer and chat template the result has: the adapter's, if a whole one came with it, or the model's."""


class MergeMetrics(Metrics):
    merged: int
    """Stored tensors that were changed."""
    bytes: Bytes
    """Of the weight files, headers included."""


STAGE = Stage(
    kind="merge",
    version=6,
    params=MergeParams,
    metrics=MergeMetrics,
    inputs={"model": Port("checkpoint"), "adapter": Port("adapter", many=True)},
    output="checkpoint",
    run=late("bigpipe.plugins.merging:run"),
    forecast=late("bigpipe.plugins.merging:forecast"),
    planning=Planning(check=late("bigpipe.plugins.merging:check"), heeds_code=True),
    smoke=late("bigpipe.plugins.smoking:in_several_files"),
    packages=("torch", "transformers"),
    title="Merge adapters into a checkpoint, tensor by tensor: the bytes of peft's merge_and_unload",
)
