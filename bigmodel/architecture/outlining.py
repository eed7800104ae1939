"""A model's outline from the names and shapes of its stored tensors, where its class is unknown or may not run.

Less than the class would tell: buffers that no checkpoint holds are missing, and what must not be split is guessed from
numbering (`model.layers.7` is a block). Whoever uses an outline says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from bigpipe.bigmodel.checkpoint import Tensors
from bigpipe.errors import InvalidCheckpoint

from .structure import OUTLINED, Architecture, ModuleSpec, TensorSpec, named_classes

BUFFERS = re.compile(r"(running_mean|running_var|num_batches_tracked|inv_freq|position_ids|attn\.bias|masked_bias)$")
EMBEDDING = re.compile(r"(^|[._])(wte|wpe|tok_embeddings|\w*embed(ding)?s?(_tokens|_positions|_in)?)$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|proj_out)$")
BLOCK = "Block"
DEEPEST = 64
"""Dots in a name. Real models have a dozen; a hostile one would make a tree of any size."""


def outline(
    tensors: Tensors, config: Mapping[str, Any] | None = None, tied: Mapping[str, str] | None = None
) -> Architecture:
    """Return the module tree that the names spell. Raise InvalidCheckpoint for names that are too deep."""
    own: dict[str, list[TensorSpec]] = {"": []}
    tree: dict[str, Any] = {}
    for name, (dtype, shape) in tensors.items():
        *path, _ = name.split(".")
        if len(path) > DEEPEST:
            raise InvalidCheckpoint(f"tensor {name[:80]!r}… lies {len(path)} modules deep", "do not use this model")
        reduce(lambda node, part: node.setdefault(part, {}), path, tree)
        floating, buffer = "float" in dtype, bool(BUFFERS.search(name))  # floats follow the model's dtype
        spec = TensorSpec(name, shape, "float32" if floating else dtype, buffer, True, not floating)
        own.setdefault(".".join(path), []).append(spec)
    modules = tuple(_modules("", tree, own))
    names = [module.name for module in modules]
    class_name = next(iter(named_classes(config or {})), "Model")
    return Architecture(
        class_name=class_name,
        modules=modules,
        no_split=(BLOCK,),
        tied=tuple((kept, alias) for alias, kept in (tied or {}).items()),
        input_embedding=next((name for name in names if EMBEDDING.search(name)), None),
        output_embedding=next((name for name in names if HEAD.search(name)), None),
        config=dict(config or {}),
        library=OUTLINED,
        generates=any(word in class_name for word in ("CausalLM", "LMHead", "ConditionalGeneration")),
    )


def _modules(name: str, tree: Mapping[str, Any], own: Mapping[str, Sequence[TensorSpec]]) -> Iterator[ModuleSpec]:
    """Parents before children, numbered ones by their numbers: safetensors keep names in the order of letters."""
    parts = sorted(tree, key=lambda part: (not part.isdecimal(), int(part) if part.isdecimal() else 0))
    children = {f"{name}.{part}" if name else part: tree[part] for part in parts}
    tensors = tuple(own.get(name, ()))
    matrix = any(t.name.endswith(".weight") and len(t.shape) == 2 and t.floating for t in tensors)
    linear = matrix and not children and not EMBEDDING.search(name)
    kind = BLOCK if _is_block(name) else "Linear" if linear else "Module"
    yield ModuleSpec(name, kind, tuple(children), tensors, linear)
    for child, below in children.items():
        yield from _modules(child, below, own)


def _is_block(name: str) -> bool:
    """The outermost numbered module on its path: an entry of the list of layers."""
    *parents, last = name.split(".")
    return last.isdecimal() and not any(part.isdecimal() for part in parents)
