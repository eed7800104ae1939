"""Checkpoints as the world lays them out: real files of tiny models, each with what is right to do with it.

    @layout("equal")
    def one_file(folder): ...

`LAYOUTS` of the package holds them by name. The verdicts:

    equal             bigpipe and transformers read the same tensors
    both refuse       neither reads it
    bigpipe refuses   transformers reads it, with numbers nobody saved or with a risk; `because` says which
    bigpipe reads     transformers has no way to read it; the maker returns the model that was saved
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from support.models import make_checkpoint

Verdict = Literal["equal", "both refuse", "bigpipe refuses", "bigpipe reads"]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    make: Callable[[Path], Any]
    verdict: Verdict
    because: str = ""
    """Why bigpipe does otherwise than transformers."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained`: variant, subfolder."""
    below: str = ""
    """What bigpipe is given of the folder."""
    own: Callable[[], type[Any]] | None = None
    """A class that transformers does not have."""
    dtype: str | None = "float32"
    """What is asked of both. None: each its own choice."""


LAYOUTS: dict[str, Layout] = {}


def layout(verdict: Verdict, **fields: Any) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Register a maker under its name."""

    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        LAYOUTS[make.__name__] = Layout(make=make, verdict=verdict, **fields)
        return make

    return register


def weights(folder: Path, name: str = "model.safetensors") -> Tensors:
    return load_file(folder / name)


def take(folder: Path) -> Tensors:
    """The tensors of every safetensors file; the files and their index are taken away."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}
    for file in (*files, *folder.glob("*.safetensors.index.json")):
        file.unlink()
    return tensors


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """With parts of their names replaced, each once, in order."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new, 1)
        found[name] = tensor
    return found


def write(folder: Path, tensors: Tensors, name: str = "model.safetensors", **metadata: str) -> None:
    save_file(tensors, folder / name, metadata or {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; None takes one away."""
    file = folder / "config.json"
    config = {**json.loads(file.read_bytes()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def llama(folder: Path, **changes: Any) -> Tensors:
    """A llama in one file; its tensors."""
    make_checkpoint(folder, "llama", tokenizer=False, **changes)
    return weights(folder)


def shards(folder: Path, tensors: Tensors, number: int = 3, stem: str = "model", suffix: str = "") -> dict[str, str]:
    """Write numbered shards in place of the one file, without an index; the weight map of one."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    weight_map = {}
    names = sorted(tensors)
    for part in range(number):
        name = f"{stem}-{part + 1:05d}-of-{number:05d}{suffix}.safetensors"
        held = names[part::number]
        write(folder, {tensor: tensors[tensor] for tensor in held}, name)
        weight_map |= dict.fromkeys(held, name)
    return weight_map


def index(folder: Path, weight_map: Mapping[str, str], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
