"""`estimate`: what a model needs in memory, per dtype, as metrics that gates can read and a report for people.

Everything is known from headers and configs, so the forecast gives the same numbers as the run: a gate on them is
decided before a byte of weights moves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, field_validator, model_validator

from bigpipe.bigmodel.formats import DTYPES, dtypes, require_dtype
from bigpipe.orchestrator.stage import (
    Bytes,
    CheckContext,
    Folder,
    Metrics,
    OneOf,
    Params,
    Pinned,
    Planning,
    Port,
    Stage,
    late,
)
from bigpipe.sizes import counted, format_size

from .revisions import pinned, reads

Dtype = Annotated[str, OneOf(dtypes, require_dtype)]
SOME = Field(min_length=1)

LIBRARIES = Literal["transformers", "diffusers", "timm"]

SHOWN = 2
"""As many dtypes are named in one line; of the others it says how many there are."""


class EstimateParams(Params):
    repo: str | None = None
    """A Hub repository, `owner/name`; left out where the port `model` is wired or `path` is given."""
    revision: str = "main"
    """A branch, a tag or a commit of `repo`."""
    path: Folder | None = None
    """A checkpoint directory, or one with a `config.json` only."""
    subfolder: str | None = None
    """The folder of the repository or directory that holds the model."""
    variant: str | None = None
    """Of the weights, as `fp16` in `model.fp16.safetensors`."""
    library_name: LIBRARIES | None = None
    """Found from the files, unless given."""
    dtypes: tuple[Dtype, ...] = Field(default=("float32", "float16", "int8", "int4"), min_length=1)
    """Plain dtypes and formats; int4 is accelerate's word for any 4-bit format, its `weights` are those of nf4."""
    head: Literal["auto", "none"] = "auto"
    """auto: the class the config names. none: the bare model, which is what accelerate counts."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences at once."""
    sequence_length: int = Field(default=2048, ge=1)
    """Tokens; capped at what the model's positions allow."""
    bnb_4bit_use_double_quant: bool = False
    """nf4, fp4 and int4 with their scales quantized too."""
    kv_dtype: Literal["float32", "float16", "bfloat16", "float8", "int8"] | None = None
    """Of cached keys and values; null: what the model computes in."""
    train: Literal["adamw", "adamw_8bit", "sgd", "lora"] | None = None
    """The optimizer that `training_high` is of; `training` always has all of them."""
    lora_rank: int = Field(default=8, ge=1)
    """Of the adapters that `training.lora` is of."""
    lora_targets: tuple[str, ...] = ()
    """The ends of the names of the linear modules that get adapters (`q_proj`); none: all but the head."""
    gradient_checkpointing: bool = False
    """Training keeps one input per layer and computes the rest again."""

    @field_validator("dtypes", mode="before", json_schema_input_type=Dtype | Annotated[tuple[Dtype, ...], SOME])
    @classmethod
    def _one_dtype(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @field_validator("lora_targets", mode="before", json_schema_input_type=str | tuple[str, ...])
    @classmethod
    def _one_target(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @model_validator(mode="after")
    def _one_source(self) -> EstimateParams:
        if self.repo is not None and self.path is not None:
            raise ValueError("repo and path are both given; keep the one that says where the model is")
        if self.repo is None and "revision" in self.model_fields_set:
            raise ValueError("revision belongs to a repo, and none is given")
        if self.repo is None and self.path is None and (self.subfolder or self.variant):
            raise ValueError("subfolder and variant choose in a repo or a path, and none is given")
        return self

    def choice(self) -> dict[str, str | None]:
        """Which files of a repository are the model."""
        return {"library": self.library_name, "variant": self.variant}


class Training(Metrics):
    """Peak bytes of a training step by optimizer; null where the dtype cannot be trained so."""

    adamw: Bytes | None
    adamw_8bit: Bytes | None
    sgd: Bytes | None
    lora: Bytes | None


class DtypeMetrics(Metrics):
    """Bytes, but for `parameters`."""

    parameters: int
    total: Bytes
    """Every float tensor at the width the dtype's name promises, and integer buffers: accelerate's Total Size."""
    largest_layer: Bytes
    """accelerate's Largest Layer."""
    weights: Bytes
    """Parameters and buffers as the loaded model holds them."""
    stored: Bytes
    """The tensors of a checkpoint written in this dtype, without headers."""
    buffers: Bytes
    """Of `weights`, what is no parameter."""
    kv_cache: Bytes
    """Keys and values of the whole batch at the whole length."""
    activations: Bytes
    """At the peak of one forward pass."""
    runtime: Bytes
    """What the device's own libraries hold: a bound."""
    inference: Bytes
    """weights + kv_cache + activations + runtime."""
    inference_high: Bytes
    """The same at the upper end of what is not exact."""
    quantizing: Bytes | None
    """Besides, while a 16-bit checkpoint is quantized as it loads; null where nothing is."""
    training: Training
    training_high: Bytes | None
    """Of the step that `train` asks for, at the upper end, with `runtime`; null without one."""


_FIELDS: dict[str, Any] = dict.fromkeys(DTYPES, (DtypeMetrics | None, None))
_FIELDS["sequence_length"] = (
    int,
    Field(description="Tokens: those asked for, at most what the model's positions allow."),
)
_FIELDS["formats"] = dict[str, DtypeMetrics], Field({}, description="Of formats that are not built in, by name.")
EstimateMetrics: type[Metrics] = create_model("EstimateMetrics", __base__=Metrics, **_FIELDS)
"""By dtype; null where it was not asked for."""


def pin(params: EstimateParams, context: CheckContext) -> Pinned | None:
    return pinned(params, context, "sizes")


def unmeasured(params: EstimateParams, ports: Collection[str], metric: str) -> tuple[str, str] | None:
    dtype, _, measured = metric.removeprefix("formats.").partition(".")
    if measured and dtype not in params.dtypes:
        return f"{dtype} among `dtypes`", f"write dtypes: [{', '.join((*params.dtypes, dtype))}]"
    if measured == "training_high" and params.train is None:
        return "`train`", "write `train: …` under `with`, the optimizer that it is of"
    return None


def result_line(metrics: Mapping[str, Any]) -> str:
    """`float16 24.8 GiB, int8 12.4 GiB to infer, 2 more dtypes`, in the order of `EstimateMetrics`."""
    budgets = {**metrics, **metrics.get("formats", {})}
    known = {dtype: found for dtype, found in budgets.items() if isinstance(found, Mapping) and "inference" in found}
    sizes = [f"{dtype} {format_size(found['inference'])}" for dtype, found in known.items()]
    more = len(sizes) - SHOWN
    text = f"{', '.join(sizes[:SHOWN])} to infer"
    return f"{text}, {counted(more, 'more dtype')}" if more > 0 else text


STAGE = Stage(
    kind="estimate",
    version=7,
    params=EstimateParams,
    metrics=EstimateMetrics,
    inputs={"model": Port("checkpoint", optional=True)},
    output="report",
    run=late("bigpipe.plugins.estimating:run"),
    forecast=late("bigpipe.plugins.estimating:forecast"),
    planning=Planning(
        check=late("bigpipe.plugins.estimating:check"),
        pin=pin,
        pin_asks=("repo", "revision"),
        reads=reads,
        heeds_code=True,
        extras=late("bigpipe.plugins.extras:of_estimate"),
    ),
    runs_in="inline",
    packages=("transformers",),
    secrets=("HF_TOKEN",),
    unmeasured=unmeasured,
    result_line=result_line,
    title="Say what a model needs in memory, per dtype, before its weights move",
)
