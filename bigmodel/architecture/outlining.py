"""A model's outline from the names and shapes of its stored tensors, where its class is unknown or may not run.

Less than the class would tell: buffers that no checkpoint holds are missing, and what must not be split is guessed from
numbering (`model.layers.7` is a block). Whoever uses an outline says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigpipe.errors import InvalidCheckpoint

from .structure import OUTLINED, Architecture, ModuleSpec, TensorSpec

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

BUFFERS = re.compile(r"(running_mean|running_var|num_batches_tracked|inv_freq|position_ids|attn\.bias|masked_bias)$")
EMBEDDING = re.compile(r"(^|[._])(wte|wpe|tok_embeddings|\w*embed(ding)?s?(_tokens|_positions|_in)?)$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|proj_out)$")
BLOCK = "Block"
DEEPEST = 64
"""Dots in a name. Real models have a dozen; a hostile one would make a tree of any size."""


def outline(
    tensors: Tensors, config: Mapping[str, Any] | None = None, tied: Mapping[str, str] | None = None
) -> Architecture:
    """The module tree that the names spell. Floats are taken to follow the model's dtype."""
    own: dict[str, list[TensorSpec]] = {"": []}
    for name, (dtype, shape) in tensors.items():
        if name.count(".") > DEEPEST:
            raise InvalidCheckpoint(
                f"tensor {name[:80]!r}… lies {name.count('.')} modules deep", "do not use this model"
            )
        module = name.rpartition(".")[0]
        buffer = bool(BUFFERS.search(name))
        floating = "float" in dtype
        own.setdefault(module, []).append(
            TensorSpec(name, shape, "float32" if floating else dtype, buffer, True, not floating)
        )
    children = _children(own)
    modules = tuple(_module(name, children, own) for name in _order("", children))
    names = [module.name for module in modules]
    named = (config or {}).get("architectures") or ["Model"]
    return Architecture(
        class_name=str(named[0]),
        modules=modules,
        no_split=(BLOCK,),
        tied=tuple((kept, alias) for alias, kept in (tied or {}).items()),
        input_embedding=next((name for name in names if EMBEDDING.search(name)), None),
        output_embedding=next((name for name in names if HEAD.search(name)), None),
        config=dict(config or {}),
        library=OUTLINED,
        generates=any(word in str(named[0]) for word in ("CausalLM", "LMHead", "ConditionalGeneration")),
    )


def _children(own: Mapping[str, Any]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {"": []}
    for name in own:
        parts = name.split(".") if name else []
        for depth in range(1, len(parts) + 1):
            path, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if path not in children:
                children[path] = []
                children[parent].append(path)
    return children


def _order(name: str, children: Mapping[str, list[str]]) -> list[str]:
    """Parents before children."""
    return [name, *(below for child in children[name] for below in _order(child, children))]


def _module(name: str, children: Mapping[str, list[str]], own: Mapping[str, list[TensorSpec]]) -> ModuleSpec:
    tensors = tuple(own.get(name, ()))
    matrix = next((t for t in tensors if t.name.endswith(".weight") and len(t.shape) == 2 and t.floating), None)
    linear = matrix is not None and not children[name] and not EMBEDDING.search(name)
    kind = BLOCK if _is_block(name) else "Linear" if linear else "Module"
    return ModuleSpec(name, kind, tuple(children[name]), tensors, linear)


def _is_block(name: str) -> bool:
    """The outermost numbered module on its path: an entry of the list of layers."""
    *parents, last = name.split(".")
    return last.isdecimal() and not any(part.isdecimal() for part in parents)
