"""`evaluate`: how well a model foresees a text, and how far it is from the model it was made from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bigpipe.orchestrator.stage import Bytes, ContentField, Metrics, Params, Planning, Port, Ranks, Stage, late

from .library import dtype_facts


class EvaluateParams(Params):
    data: Annotated[str, ContentField("file")]
    """A file or a glob. Files of rows (`.jsonl .ndjson .json .csv .tsv .parquet`) give the text under `column`; any
    other is a text, as it stands. All are joined by blank lines."""
    column: str = "text"
    """The field of each JSON object, or the column of a table, that holds the text."""
    sequence_length: int | None = Field(None, ge=2)
    """Tokens of a window. null: as many as the model and its baseline have positions for, and 2,048 where these have
    no end."""
    stride: int | None = Field(None, ge=1)
    """Tokens between the begins of two windows, each of which scores what the ones before it did not. null: half."""
    batch_size: int = Field(1, ge=1)
    """Windows that are computed together. The same ones, whatever the number of ranks."""
    max_tokens: int | None = Field(None, ge=2)
    """How much of the text is read; null: all."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of what a model draws at random; of a batch: seed + its first window."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """What both models compute in. null: as the placement says, else as stored, as in `distributed-infer`."""
    per_layer: bool = False
    """Also what each module loses: its output's relative error against the baseline's module on the same input."""
    per_layer_bound: float | None = Field(None, ge=0)
    """The report names the `skip_modules` with which the modules' errors together would not be above it; null: half of
    what they are."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateParams:
        if self.stride is not None and self.sequence_length is not None and self.stride > self.sequence_length:
            cause = f"stride {self.stride} is above sequence_length {self.sequence_length}"
            raise ValueError(f"{cause}, so that tokens between two windows would be left out")
        if self.per_layer_bound is not None and not self.per_layer:
            raise ValueError("per_layer_bound belongs to per_layer: true")
        return self


class Divergence(Metrics):
    """Of the model's next-token probabilities from the baseline's, in nats, over all scored tokens."""

    mean: float
    mean_stderr: float
    p99: float
    p99_stderr: float
    max: float
    max_stderr: float
    """How much one token decides: a jackknife."""


class EvaluateMetrics(Metrics):
    perplexity: float
    perplexity_stderr: float
    tokens: int
    """Scored: all but the first of the text; where windows do not overlap, all but the first of each."""
    windows: int
    bits_per_byte: float
    """Of the UTF-8 text that the scored tokens stand for: comparable over tokenizers."""
    bits_per_byte_stderr: float
    baseline_perplexity: float | None = None
    """With a baseline, as all that follows but the last two."""
    baseline_perplexity_stderr: float | None = None
    perplexity_ratio: float | None = None
    """The model's over the baseline's: 1.01 is a hundredth worse."""
    perplexity_ratio_stderr: float | None = None
    kl: Divergence | None = None
    """KL divergence from the baseline."""
    top1: float | None = None
    """Share of tokens at which both find the same token likeliest."""
    top1_stderr: float | None = None
    layers_error: float | None = None
    """With per_layer: relative errors of all modules together, the root of the sum of their squares."""
    peak: dict[str, Bytes] = Field(default_factory=dict)
    """Bytes by device: a GPU's number, or `cpu` for the resident memory of the largest rank."""


AGAINST = ("baseline_perplexity", "perplexity_ratio", "kl", "top1", "layers_error")
"""What begins with one of these compares the model with its baseline."""


def unmeasured(params: EvaluateParams, ports: Collection[str], metric: str) -> tuple[str, str] | None:
    if metric.startswith(AGAINST) and "baseline" not in ports:
        return "a baseline", "wire inputs: baseline to the model it was made from"
    if metric == "layers_error" and not params.per_layer:
        return "`per_layer`", "write `per_layer: true` under `with`"
    return None


def result_line(metrics: Mapping[str, Any]) -> str:
    """`perplexity 37.31 ± 1.1, 1.0120 × the baseline's, KL 0.0123, 5,589 tokens`."""
    told = [f"perplexity {metrics['perplexity']:.4g} ± {metrics['perplexity_stderr']:.1g}"]
    if metrics.get("perplexity_ratio") is not None:
        told += [f"{metrics['perplexity_ratio']:.4f} × the baseline's", f"KL {metrics['kl']['mean']:.3g}"]
    return ", ".join([*told, f"{metrics['tokens']:,} tokens"])


STAGE = Stage(
    kind="evaluate",
    version=3,
    params=EvaluateParams,
    metrics=EvaluateMetrics,
    inputs={
        "model": Port("checkpoint"),
        "placement": Port("placement", optional=True),
        "adapter": Port("adapter", optional=True),
        "baseline": Port("checkpoint", optional=True),
    },
    output="report",
    run=late("bigpipe.plugins.evaluating:run"),
    forecast=late("bigpipe.plugins.evaluating:forecast"),
    runs_in="ranks",
    ranks=Ranks(
        prepare=late("bigpipe.plugins.evaluating:prepare"),
        finish=late("bigpipe.plugins.evaluating:finish"),
        mixes=False,
    ),
    planning=Planning(
        check=late("bigpipe.plugins.evaluating:check"),
        facts=dtype_facts,
        smaller=("batch_size", "sequence_length", "dtype"),
        heeds_code=True,
        extras=late("bigpipe.plugins.extras:of_evaluation"),
    ),
    packages=("torch", "transformers", "tokenizers", "bitsandbytes"),
    smoke=late("bigpipe.plugins.smoking:evaluate"),
    reproducible=False,
    unmeasured=unmeasured,
    result_line=result_line,
    title="Says how well a model foresees a text, and what it lost against the model it was made from.",
)
