"""What travels with the weights: configs, tokenizer, licence, code of custom classes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint.view import Checkpoint

from .copying import copy_file
from .shards import PARTIAL, write_file


def carry_side_files(
    checkpoint: Checkpoint, out: Path, *, config: Mapping[str, Any] | None = None, link: bool = False
) -> dict[str, tuple[str, int]]:
    """Brings the side files of a checkpoint into `out`, as copies or as absolute links.

    Of a checkpoint that is still being made they are copied: its folder does not last.

    With `config`, that is written as config.json in place of the checkpoint's. Gives relative path → (hex sha256, size)
    of the files written; links are not among them.
    """
    written = {}
    for extra in checkpoint.extras:
        name = extra.relative_to(checkpoint.path)
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if config is not None and name == Path("config.json"):
            continue
        if link and checkpoint.arrivals is None:
            _link(extra, target)
        else:
            written[str(name)] = copy_file(extra, target)
    if config is not None:
        written["config.json"] = write_file(out / "config.json", encode_config(config))
    return written


def encode_config(config: Mapping[str, Any]) -> bytes:
    """A config as transformers writes it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def config_with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of a model whose weights are now of this dtype: its own `dtype` and those its parts state."""
    changed = _restate(config, dtype)
    changed.pop("torch_dtype", None)
    changed["dtype"] = dtype
    return changed


def _restate(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    # `torch_dtype` is what transformers before 5 wrote; parts are text_config, vision_config and the like.
    changed = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = dtype
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, Mapping):
            value = _restate(value, dtype)
        changed[key] = value
    return changed


def _link(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + PARTIAL)
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.abspath(source))
    partial.rename(target)
