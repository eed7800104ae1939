"""`dispatch`: which part of a model goes where, tried out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bigpipe.orchestrator.stage import (
    Bytes,
    Json,
    Machine,
    Metrics,
    Params,
    Planning,
    Port,
    Size,
    Stage,
    UsageError,
    late,
)


def _known(device: int | str) -> int | str:
    from bigpipe.bigmodel.placement import devices_of

    try:
        devices_of(device)
    except UsageError as error:
        raise ValueError(f"{error.cause}; {error.cure}") from None
    return device


DeviceName = Annotated[int | str, AfterValidator(_known)]
Mode = Literal["auto", "balanced", "balanced_low_0", "sequential", "optimal"]


class DispatchParams(Params):
    device_map: Mode | Annotated[dict[str, DeviceName], Field(min_length=1)] = "auto"
    """A mode (`optimal`: the fewest predicted seconds per token; the others as in accelerate), or {prefix: GPU number |
    cpu | disk}: the longest prefix decides, "" is the rest."""
    max_memory: dict[DeviceName, Size] | None = None
    """Bytes of weights and buffers per device: `0: 22GiB`, `1-7: 46GiB`, `cpu: 48GiB`, `disk: 200GiB`."""
    no_split_module_classes: list[str] | None = None
    """Blocks that stay on one device; null: the model's own."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """What weights are loaded as; null: as stored."""
    compute_dtype: Literal["auto", "stored", "float32", "float16", "bfloat16"] = "auto"
    """What a CPU computes in, with weights cast at each use. `auto`: where layers are streamed from plain halves,
    float32 if this CPU, measured once, is that much faster with batches of batch_size; else as loaded."""
    special_dtypes: dict[str, Literal["float64", "float32", "float16", "bfloat16"]] = Field(default_factory=dict)
    """Parameter name → dtype."""
    batch_size: int = Field(1, ge=1)
    """Of the generation that room is kept for."""
    sequence_length: int = Field(2048, ge=1)
    """With batch_size, what is kept free for where max_memory is left out."""
    verify: Literal["forward", "load", "none"] = "forward"
    """How the placement is tried out: loaded and run once, loaded, or not at all."""


class DispatchMetrics(Metrics):
    predicted: dict[str, Bytes]
    """Bytes of weights and buffers by device: a GPU's number, cpu, disk."""
    measured: dict[str, Bytes] = Field(default_factory=dict)
    """The same of the loaded model; empty with `verify: none`."""
    compute_dtype: str = ""
    """What is computed in: of `auto`, what was chosen."""
    load_seconds: float = 0.0
    """What building and filling the model took, without imports."""
    streamed_bytes_per_token: Bytes = 0
    """Stored bytes that one token moves from RAM or disk to where it computes."""
    sequence_length: int
    """Tokens that room is kept for: those asked for, at most what the model's positions allow."""
    bound_by: str = ""
    """Where layers are streamed: what bounds decoding batch_size texts, `bandwidth`, `compute` or `memory`."""
    limit_tokens_per_second: float | None = None
    """Where layers are streamed: what such steps give at the most, at the measured speeds of this machine."""


def facts(params: DispatchParams, machine: Machine) -> Mapping[str, Json]:
    if params.max_memory is not None or not isinstance(params.device_map, str):
        return {}
    return {"gpus": [[gpu.name, gpu.memory] for gpu in machine.gpus], "memory": machine.memory}


def settled(params: DispatchParams) -> Stage[DispatchParams]:
    """`optimal` weighs by speeds that were measured. So does the dtype of weights that a CPU streams, of which caps and
    maps without a GPU do not say which CPU it is: the key then holds nothing of the machine."""
    named = {str(device) for device, size in (params.max_memory or {}).items() if size}
    named |= set(map(str, params.device_map.values())) if isinstance(params.device_map, dict) else set()
    anywhere = bool(named) and named <= {"cpu", "disk"}
    chosen = anywhere and params.compute_dtype == "auto" and params.dtype is None
    return replace(STAGE, reproducible=False) if chosen or params.device_map == "optimal" else STAGE


LOADED = ("measured", "load_seconds")
"""What begins with one of these is measured on the loaded model."""


def unmeasured(params: DispatchParams, ports: Collection[str], metric: str) -> tuple[str, str] | None:
    if metric.startswith(LOADED) and params.verify == "none":
        return "the loaded model", "write `verify: load` under `with`, or leave `verify` out"
    return None


def warms(params: DispatchParams) -> tuple[str, ...]:
    modules = ("bigpipe.plugins.dispatching", "accelerate", "transformers.modeling_utils")
    return () if params.verify == "none" else modules


STAGE = Stage(
    kind="dispatch",
    version=11,
    params=DispatchParams,
    metrics=DispatchMetrics,
    inputs={"model": Port("checkpoint"), "adapter": Port("adapter", optional=True)},
    output="placement",
    reviewed=("placement.json",),
    run=late("bigpipe.plugins.dispatching:run"),
    forecast=late("bigpipe.plugins.dispatch_needs:forecast"),
    planning=Planning(check=late("bigpipe.plugins.dispatching:check"), facts=facts, heeds_code=True),
    packages=("torch", "transformers", "accelerate"),
    settled=settled,
    unmeasured=unmeasured,
    smoke=late("bigpipe.plugins.smoking:dispatch"),
    warms=warms,
    title="Decides what goes on which GPU, in RAM and on disk, and tries it out.",
)
