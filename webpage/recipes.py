"""A first recipe for what the page was asked: short, and true to the numbers beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.footprint import Estimate
from bigpipe.bigmodel.formats import has_double_quant
from bigpipe.fit import fits
from bigpipe.orchestrator.recipe import as_text
from bigpipe.sizes import format_size

from .placements import QUANTIZED
from .questions import Question


def recipe_for(asked: Question, made: Estimate, focus: Estimate, memory: int | None) -> str | None:
    """Return a manifest that downloads, sizes, quantizes where that was asked and is not done yet, places and runs the
    model. Its gate is the memory of the GPU, where one GPU is enough. None for a file, and for a directory that holds
    a config alone: no recipe takes them."""
    path = Path(asked.model)
    if path.is_file() or (path.exists() and made.source == "config"):
        return None
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(made.model).name).strip("-.") or "model"
    dtype, work, stored = asked.run_in, made.workload, (made.checkpoint or {}).get("quantization")
    quantized, plain = dtype in QUANTIZED and not stored, dtype not in QUANTIZED and not stored
    source = {"path": asked.model} if path.exists() else {"repo": made.model, "revision": made.revision or "main"}
    source |= {key: asked.options[key] for key in ("variant", "library_name") if key in asked.options}
    source |= {"subfolder": made.subfolder} if made.subfolder else {}
    asked_of = {"batch_size": work.batch_size, "sequence_length": work.sequence_length}
    double = {"bnb_4bit_use_double_quant": True} if work.double_quant and has_double_quant(dtype) else {}
    counted = {"dtypes": [dtype], **asked_of, **double}
    counted |= {"kv_dtype": work.kv_dtype} if work.kv_dtype else {}
    counted |= {"head": made.head} if made.head != "auto" else {}
    placed = {"device_map": "auto", **({"dtype": dtype} if plain else {}), **asked_of}
    needed = focus[dtype].inference_high
    gates = [f"{dtype}.inference_high <= {_size(memory)}"] if memory and fits(needed, memory) else []
    model, encoded = "quantize" if quantized else "download", _flow({"scheme": dtype, **double})
    lines = [
        "version: 1",
        f"name: {as_text(name if stored else f'{name}-{dtype}')}",
        "stages:",
        f"  download: {{uses: download, with: {_flow(source)}}}",
        "  estimate:",
        "    uses: estimate",
        "    inputs: download",
        f"    with: {_flow(counted)}",
        *([f"    gates: {_flow(gates)}  # decided before any weight moves"] if gates else []),
        *([f"  quantize: {{uses: quantize, inputs: download, with: {encoded}}}"] if quantized else []),
        f"  dispatch: {{uses: dispatch, inputs: {model}, with: {_flow(placed)}}}",
        *(_generated(model, work.batch_size) if _speaks(made.architecture) else []),
    ]
    return "\n".join(lines) + "\n"


def _speaks(architecture: Architecture) -> bool:
    """Does the task text-generation take it? What hears reads no prompts."""
    hears = architecture.config.get("num_mel_bins")
    return bool(architecture.generates and architecture.output_embedding and not hears)


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
    return as_text(value) if isinstance(value, str) else json.dumps(value)
