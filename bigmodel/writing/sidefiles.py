"""What travels with the weights: configs, tokenizer, licence, code of custom classes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import Checkpoint
from bigpipe.files import copy_file, link, make_directory, write_file


def carry_side_files(
    checkpoint: Checkpoint, out: Path, *, config: Mapping[str, Any] | None = None, linked: bool = False
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
        make_directory(target.parent)
        if config is not None and name == Path("config.json"):
            continue
        if linked and checkpoint.inlet is None:
            link(os.path.abspath(extra), target)
        else:
            written[str(name)] = copy_file(extra, target)
    if config is not None:
        written["config.json"] = write_file(out / "config.json", encode_config(config))
    return written


def encode_config(config: Mapping[str, Any]) -> bytes:
    """A config as transformers writes it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def config_with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of a model whose weights are now of this dtype: it and its parts state it, as transformers does."""
    # `torch_dtype` is what transformers before 5 wrote; parts are text_config, vision_config, encoder and the like
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    parts = {key: config_with_dtype(value, dtype) for key, value in kept.items() if _is_part(key, value)}
    return {**kept, **parts, "dtype": dtype}


def _is_part(key: str, value: Any) -> bool:
    """A config in a config. A vocabulary may hold such words as well, but as numbers."""
    telling = ("model_type", "dtype", "torch_dtype")
    nested = isinstance(value, Mapping) and any(isinstance(value.get(name), str) for name in telling)
    return nested and key != "quantization_config"
