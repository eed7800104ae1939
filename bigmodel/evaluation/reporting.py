"""An evaluation as a report: JSON for programs, a text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigpipe.files import make_directory, write_file

from .layers import LayerLoss
from .summary import Evaluation, Measured

REPORT = "report.json"
TEXT = "report.txt"
SCHEMA = "bigpipe.evaluation/1"
SHOWN = 12
"""Modules that the text names."""


def write_report(found: Evaluation, about: Mapping[str, Any], out: Path) -> dict[str, tuple[str, int]]:
    """Write both into the directory `out`; return name → (hex sha256, size). about: what was evaluated, and how."""
    text = json.dumps({"schema": SCHEMA, **about, **found.as_json()}, indent=2, ensure_ascii=False) + "\n"
    make_directory(out)
    made = {REPORT: text, TEXT: render(found) + "\n"}
    return {name: write_file(out / name, content) for name, content in made.items()}


def render(found: Evaluation) -> str:
    """Return it as lines of text."""
    lines = [("perplexity", found.perplexity), ("bits per byte", found.bits_per_byte)]
    if (against := found.comparison) is not None:
        lines += [
            ("baseline's perplexity", against.baseline_perplexity),
            ("perplexity ratio", against.perplexity_ratio),
            ("KL divergence, mean", against.kl.mean),
            ("99th percentile", against.kl.p99),
            ("largest", against.kl.max),
            ("same top token", against.top1),
        ]
    told = [f"{found.tokens:,} tokens in {found.windows:,} windows", *(_line(*line) for line in lines)]
    return "\n".join([*told, *_of_layers(found)])


def _line(name: str, measured: Measured) -> str:
    return f"{name:>22}  {measured.value:.6g} ± {measured.stderr:.2g}"


def _of_layers(found: Evaluation) -> list[str]:
    if (layers := found.layers) is None:
        return []
    first = [f"{error:>12.3%}  {name}" for name, error in list(layers.modules.items())[:SHOWN]]
    more = len(layers.modules) - SHOWN
    return [
        f"relative error of each module's output, all together {layers.total:.3%}:",
        *first,
        *([f"{'':>12}  and {more} more"] if more > 0 else []),
        *_advice(layers),
    ]


def _advice(layers: LayerLoss) -> list[str]:
    if layers.skip_modules is None:
        return []
    skip = f"skip_modules: [{', '.join(layers.skip_modules)}]"
    if layers.left <= layers.bound:
        return [f"for {layers.bound:.3%} together, quantize with {skip}"]
    return [f"even with {skip} it would be {layers.left:.3%}, not {layers.bound:.3%}: what is not quantized loses that"]
