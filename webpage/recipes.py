"""A first recipe for what the page was asked: short, and true to the numbers beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.footprint import Estimate
from bigpipe.fit import fits
from bigpipe.sizes import format_size

from .placements import QUANTIZED
from .questions import Question


def recipe_for(asked: Question, made: Estimate, focus: Estimate, memory: int | None) -> str:
    """Return a manifest that downloads, sizes, quantizes where that was asked, places and runs the model. Its gate is
    the memory of the GPU, where one GPU is enough."""
    local = Path(asked.model).exists()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(made.model).name).strip("-.") or "model"
    dtype, work, quantized = asked.run_in, made.workload, asked.run_in in QUANTIZED
    source = {"path": asked.model} if local else {"repo": made.model, "revision": made.revision or "main"}
    source |= {key: asked.options[key] for key in ("subfolder", "variant", "library_name") if key in asked.options}
    asked_of = {"batch_size": work.batch_size, "sequence_length": work.sequence_length}
    needed = focus[dtype].inference_high
    gates = [f"{dtype}.inference_high <= {_size(memory)}"] if memory and fits(needed, memory) else []
    model = "quantize" if quantized else "download"
    lines = [
        "version: 1",
        f"name: {_text(f'{name}-{dtype}')}",
        "stages:",
        f"  download: {{uses: download, with: {_flow(source)}}}",
        "  estimate:",
        "    uses: estimate",
        "    inputs: download",
        f"    with: {_flow({'dtypes': [dtype], **asked_of})}",
        *([f"    gates: {_flow(gates)}  # decided before any weight moves"] if gates else []),
        *([f"  quantize: {{uses: quantize, inputs: download, with: {_flow({'scheme': dtype})}}}"] if quantized else []),
        f"  dispatch: {{uses: dispatch, inputs: {model}, with: {_flow(_placed(dtype, quantized, asked_of))}}}",
        *(_generated(model, work.batch_size) if made.architecture.generates else []),
    ]
    return "\n".join(lines) + "\n"


def _placed(dtype: str, quantized: bool, asked_of: dict[str, int]) -> dict[str, Any]:
    return {"device_map": "auto", **({} if quantized else {"dtype": dtype}), **asked_of}


def _generated(model: str, batch_size: int) -> list[str]:
    given = {"task": "text-generation", "prompts": ["Hello, my name is"], "max_new_tokens": 32}
    return [
        "  generate:",
        "    uses: distributed-infer",
        f"    inputs: {{model: {model}, placement: dispatch}}",
        f"    with: {_flow({**given, 'batch_size': batch_size})}",
    ]


def _size(memory: int) -> str:
    """Whole MiB, as a recipe says it: never more than there is."""
    return f"{memory >> 20}MiB" if memory % 2**30 else format_size(memory).replace(".0 ", "").replace(" ", "")


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    """A YAML text that means itself: quoted unless it is plainly a word, `${` escaped."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value) and value.lower() not in ("null", "true", "false", "yes", "no"):
        return value
    return json.dumps(value.replace("${", "$${"))
