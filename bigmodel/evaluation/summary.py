"""What all windows together say: metrics, each with its standard error.

Tokens are taken as independent of each other, as llama.cpp's perplexity does. Of a mean x̄ over n tokens the standard
error is s/√n; of exp(x̄) it is exp(x̄)·s/√n (delta method). The ratio of two perplexities is exp of the mean of the
tokens' differences, so that its error is that of the pairs, which is far smaller than those of both perplexities. Of
the 99th percentile it is half the distance between the order statistics one binomial standard deviation to its either
side; of the largest value Quenouille's and Tukey's jackknife, (n − 1)/n times the distance to the second largest, which
says how much one token decides, and no more.

Sums are exact (`math.fsum`), so they do not depend on the order in which windows came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bigpipe.errors import StageFailed
from bigpipe.sizes import counted

from .layers import LayerLoss
from .measures import unpack

PERCENTILE = 0.99


@dataclass(frozen=True, slots=True)
class Measured:
    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL divergence of the model's next-token probabilities from the baseline's, in nats, over all scored tokens."""

    mean: Measured
    p99: Measured
    max: Measured


@dataclass(frozen=True, slots=True)
class Comparison:
    """The model against its baseline."""

    baseline_perplexity: Measured
    perplexity_ratio: Measured
    """The model's over the baseline's: 1.01 is a hundredth worse."""
    kl: Divergence
    top1: Measured
    """Share of tokens at which both find the same token likeliest."""


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """A model on a text."""

    perplexity: Measured
    bits_per_byte: Measured
    """Of the UTF-8 text that the scored tokens stand for: comparable over tokenizers."""
    tokens: int
    """Scored."""
    windows: int
    comparison: Comparison | None = None
    layers: LayerLoss | None = None

    def __repr__(self) -> str:
        ratio = f", {self.comparison.perplexity_ratio.value:.4g} × the baseline's" if self.comparison else ""
        measured = f"{self.perplexity.value:.4g} ± {self.perplexity.stderr:.2g}"
        return f"<Evaluation: perplexity {measured}{ratio}, {counted(self.tokens, 'token')}>"

    def metrics(self) -> dict[str, Any]:
        """Return them by the names that gates use."""
        found: dict[str, Any] = {**_named("perplexity", self.perplexity), **_named("bits_per_byte", self.bits_per_byte)}
        found |= {"tokens": self.tokens, "windows": self.windows}
        if (against := self.comparison) is not None:
            for name in ("baseline_perplexity", "perplexity_ratio", "top1"):
                found |= _named(name, getattr(against, name))
            parts = {name: getattr(against.kl, name) for name in ("mean", "p99", "max")}
            found["kl"] = {key: value for name, part in parts.items() for key, value in _named(name, part).items()}
        return {**found, **({"layers_error": self.layers.total} if self.layers else {})}

    def as_json(self) -> dict[str, Any]:
        layers = {"per_layer": asdict(self.layers)} if self.layers else {}
        return {**self.metrics(), **layers}


def _named(name: str, measured: Measured) -> dict[str, float]:
    return {name: measured.value, f"{name}_stderr": measured.stderr}


def summarise(windows: Sequence[dict[str, Any]], text_bytes: int, layers: LayerLoss | None = None) -> Evaluation:
    """Return what came of the windows, each as `measure` gives it. text_bytes: of the text that they score. layers:
    what came of the modules, by `lose_least`. Raise StageFailed for a perplexity beyond what a float holds."""
    tokens = sum(window["tokens"] for window in windows)
    mean = _mean_of(_sum(windows, "nll"), _sum(windows, "nll_squares"), tokens)
    nats_per_bit = math.log(2)
    per_byte = tokens / (max(1, text_bytes) * nats_per_bit)
    return Evaluation(
        perplexity=_exponential(mean),
        bits_per_byte=Measured(mean.value * per_byte, mean.stderr * per_byte),
        tokens=tokens,
        windows=len(windows),
        comparison=_compare(windows, tokens) if "kl" in windows[0] else None,
        layers=layers,
    )


def _sum(windows: Sequence[dict[str, Any]], name: str) -> float:
    return math.fsum(window[name] for window in windows)


def _mean_of(total: float, squares: float, count: int) -> Measured:
    """From a sum and a sum of squares. One value has no spread that could be seen: 0."""
    mean = total / count
    variance = max(0.0, squares - count * mean * mean) / max(1, count - 1)
    return Measured(mean, math.sqrt(variance / count))


def _exponential(mean: Measured) -> Measured:
    try:
        value = math.exp(mean.value)
    except OverflowError:
        cause = f"the mean negative log-likelihood is {mean.value:.3g}, whose perplexity no float holds"
        raise StageFailed(cause, "check that the weights belong to the model and its tokenizer") from None
    return Measured(value, value * mean.stderr)


def _compare(windows: Sequence[dict[str, Any]], tokens: int) -> Comparison:
    own, other = _sum(windows, "nll"), _sum(windows, "baseline_nll")
    difference = _mean_of(own - other, _sum(windows, "differences_squares"), tokens)
    agree = _sum(windows, "agree")
    baseline = _mean_of(other, _sum(windows, "baseline_squares"), tokens)
    return Comparison(
        baseline_perplexity=_exponential(baseline),
        perplexity_ratio=_exponential(difference),
        kl=_divergence([value for window in windows for value in unpack(window["kl"])]),
        top1=_mean_of(agree, agree, tokens),
    )


def _divergence(values: list[float]) -> Divergence:
    count = len(values)
    mean = _mean_of(math.fsum(values), math.fsum(value * value for value in values), count)
    values.sort()
    gap = (values[-1] - values[-2]) * (count - 1) / count if count > 1 else 0.0
    return Divergence(mean, _percentile(values), Measured(values[-1], gap))


def _percentile(ordered: Sequence[float]) -> Measured:
    """Between order statistics linearly, as numpy's `percentile` has it."""
    last = len(ordered) - 1
    spread = math.sqrt(len(ordered) * PERCENTILE * (1 - PERCENTILE))
    low, high = (_at(ordered, PERCENTILE * last + step) for step in (-spread, spread))
    return Measured(_at(ordered, PERCENTILE * last), (high - low) / 2)


def _at(ordered: Sequence[float], place: float) -> float:
    place = min(max(place, 0.0), len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
