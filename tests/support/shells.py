"""Checkpoints that are all header: files of the true size and header, whose weights are holes on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from bigpipe.bigmodel.checkpoint import encode_header

Tensors = Iterable[tuple[str, str, tuple[int, ...]]]
SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1, "int32": 4, "int64": 8,
}  # fmt: skip


def shell(path: Path, tensors: Tensors) -> Path:
    """A sparse safetensors file; its weights read as zeros."""
    entries = list(tensors)
    header = encode_header(entries, {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes(entries))
    return path


def nbytes(tensors: Tensors) -> int:
    total = 0
    for _, dtype, shape in tensors:
        count = SIZES[dtype]
        for size in shape:
            count *= size
        total += count
    return total


def sharded(folder: Path, tensors: Tensors, limit: int) -> Mapping[str, Path]:
    """Shards of at most `limit` bytes and their index, by file name."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    for entry in tensors:
        if shards[-1] and nbytes([*shards[-1], entry]) > limit:
            shards.append([])
        shards[-1].append(entry)
    files: dict[str, Path] = {}
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = shell(folder / name, entries)
        weight_map |= dict.fromkeys((tensor for tensor, _, _ in entries), name)
    total = sum(nbytes(entries) for entries in shards)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return {**files, index.name: index}
