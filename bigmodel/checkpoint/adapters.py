"""Adapters in peft's own files: `adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin`.

Only what is stored is read here, by the readers of a model's weights; what it means is `bigmodel.adapters`' affair.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.errors import InvalidCheckpoint

from .bytesource import FileSource
from .choosing import ADAPTER_CONFIG, choose_weights, tokenizer_files
from .contents import read_contents
from .files import MAX_CONFIG, check_file, read_json
from .tensors import TensorInfo, Tensors, invalid

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which peft looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDescription:
    """What is known of an adapter without its weights: what one stage's forecast tells the next."""

    config: Mapping[str, Any]
    """Contents of `adapter_config.json`."""
    tensors: Tensors | None
    """As they are named in the file. None: not known."""
    where: str = "the adapter"
    """What to call it in errors: its folder, or repository."""
    brings_tokenizer: bool = False
    """Do a tokenizer and its chat template lie beside it, with which it was trained?"""

    @property
    def base_model(self) -> str | None:
        """The name of the model that it was trained on, as its config has it: a note, which nothing is decided by."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter whose file is open to be read: its tensors are byte ranges, as those of a `Checkpoint`."""

    path: Path
    file: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def described(self) -> AdapterDescription:
        outline = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        brings = bool(self.tokenizer)
        return AdapterDescription(config=self.config, tensors=outline, where=str(self.path), brings_tokenizer=brings)

    @property
    def tokenizer(self) -> list[str]:
        """The relative paths of a tokenizer beside it, and of its chat templates; none where it has none of its own."""
        files = (path for path in (*self.path.glob("*"), *self.path.glob("*/*")) if path.is_file())
        return tokenizer_files(path.relative_to(self.path).as_posix() for path in files)


def adapter_weights(names: Collection[str]) -> str | None:
    """Return the file of an adapter's weights among the names of one folder; None where they are no adapter of peft's,
    or a model too."""
    if ADAPTER_CONFIG not in names or choose_weights(names, "the folder") is not None:
        return None
    return next((name for name in ADAPTER_WEIGHTS if name in names), None)


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter's directory; only headers are read. Raise InvalidCheckpoint for what is none, or is damaged."""
    path = Path(path)
    names = os.listdir(path) if path.is_dir() else []
    weights = next((name for name in ADAPTER_WEIGHTS if name in names), None)
    if ADAPTER_CONFIG not in names or weights is None:
        lacks = ADAPTER_CONFIG if ADAPTER_CONFIG not in names else " or ".join(ADAPTER_WEIGHTS)
        raise InvalidCheckpoint(f"{path}: is no adapter: there is no {lacks}", "give a folder that peft saved one in")
    check_file(path / weights, path)
    with FileSource(path / weights) as source:
        contents = read_contents(source, path / weights)
    aliases = {alias: contents.tensors[kept] for alias, kept in contents.tied.items()}
    config = read_json(path / ADAPTER_CONFIG, path, MAX_CONFIG)
    return Adapter(path, path / weights, config, {**contents.tensors, **aliases})


def describe_adapter(path: str | Path) -> AdapterDescription:
    """Describe an adapter's directory from its header. Raise as `open_adapter`."""
    return open_adapter(path).described


def require_tensors(adapter: AdapterDescription) -> Tensors:
    """Return its tensors. Raise InvalidCheckpoint where there are none."""
    if not adapter.tensors:
        raise invalid(adapter.where, "holds no tensors", "fetch it again, or save it anew with peft")
    return adapter.tensors
