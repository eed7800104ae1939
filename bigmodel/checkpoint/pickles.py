"""The restricted reader of torch zip files: tensors as byte ranges, and nothing is ever run or imported.

A `.bin` is a zip file with `NAME/data.pkl`, a pickle of the state dict, and `NAME/data/KEY`, the raw bytes of each
storage (torch/serialization.py). `PickleMachine` runs the few opcodes `torch.save` writes on inert values of its own; a
global is looked up in a list of names and never resolved to an object of Python's. torch.load is not called, here or
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bytesource import ByteSource
from .picklemachine import PickleMachine, Tensor
from .tensors import FETCH_AGAIN, Contents, TensorInfo, View, invalid, itemsize
from .zipfiles import ZipEntry, data_offset, read_directory, read_entry

MAX_PICKLE = 32 * 2**20
"""Bytes of data.pkl. A state dict takes about 150 per tensor."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What the zip directory and the pickle of a torch file say."""

    prefix: str
    entries: Mapping[str, ZipEntry]
    tensors: Mapping[str, Tensor]
    """In the order of the state dict, aliases included."""


def read_torch_pickle(source: ByteSource) -> TorchFile:
    """Return what the directory and `data.pkl` say: three short ranges, no tensor data. Works over HTTP.

    Raise InvalidCheckpoint with file, entry or tensor, and cure.
    """
    entries = read_directory(source)
    prefix = _prefix(source, entries)
    _check_byte_order(source, entries, prefix)
    pickled = entries[f"{prefix}/data.pkl"]
    if pickled.size > MAX_PICKLE:
        raise invalid(source.name, f"its data.pkl has {pickled.size} bytes, more than {MAX_PICKLE}", FETCH_AGAIN)
    state = PickleMachine(read_entry(source, pickled), source.name).run()
    tensors = _state_dict(source, state)
    for name, tensor in tensors.items():
        _check_tensor(source, name, tensor, entries.get(f"{prefix}/data/{tensor.storage.key}"))
    return TorchFile(prefix, entries, tensors)


def read_torch_file(source: ByteSource, file: Path, *, placed: bool = True) -> Contents:
    """Return the tensors in the order of the state dict, and aliases (see `unique_tensors`).

    Not placed: only three short ranges are read, so over HTTP too; offsets are then -1 and there are no views.
    """
    torch_file = read_torch_pickle(source)
    kept, tied = unique_tensors(torch_file.tensors)
    starts = _data_starts(source, torch_file) if placed else {}
    return Contents({name: _stored(name, tensor, file, starts) for name, tensor in kept.items()}, tied)


def unique_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state dict that are stored, and the aliases (alias → stored name).

    Names of the same elements of one storage are one tensor, and the first is kept: it is the embedding, which the
    state dict names before the head that is tied to it, and what transformers' save_pretrained keeps.
    """
    first: dict[tuple[Any, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if math.prod(tensor.shape) == 0:
            continue  # tensors without elements share nothing
        place = (tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape, _telling_strides(tensor))
        if first.setdefault(place, name) != name:
            tied[name] = first[place]
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _telling_strides(tensor: Tensor) -> tuple[int, ...]:
    # The stride of a dimension of size 1 moves nothing, and torch lets it be anything.
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def _prefix(source: ByteSource, entries: Mapping[str, ZipEntry]) -> str:
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise invalid(source.name, "has no single data.pkl, as torch writes it", "give a file from torch.save")
    prefix = pickles[0].removesuffix("/data.pkl")
    if f"{prefix}/constants.pkl" in entries:
        raise invalid(
            source.name, "is a TorchScript program, not a state dict",
            "where you trust it: torch.save(torch.jit.load(path).state_dict(), 'pytorch_model.bin')",
        )  # fmt: skip
    return prefix


def _check_byte_order(source: ByteSource, entries: Mapping[str, ZipEntry], prefix: str) -> None:
    order = entries.get(f"{prefix}/byteorder")
    if order is None:
        return  # files from before torch 2.1 are little-endian
    value = read_entry(source, order) if order.size <= 16 else b"?"
    if value != b"little":
        raise invalid(
            source.name, f"its byte order is {value[:16].decode('ascii', 'replace')!r}",
            "on a machine of today: torch.save(torch.load(path, weights_only=True), path)",
        )  # fmt: skip


def _state_dict(source: ByteSource, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise invalid(source.name, "holds no state dict", "save model.state_dict(), not the model")
    for name, value in state.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            continue
        inner = isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())
        cure = f"save what is inside alone: torch.save(torch.load(path, weights_only=True)[{str(name)[:40]!r}], path)"
        raise invalid(
            source.name, f"its entry {str(name)[:200]!r} is not a tensor", cure if inner else "save tensors only",
        )  # fmt: skip
    return state


def _check_tensor(source: ByteSource, name: str, tensor: Tensor, entry: ZipEntry | None) -> None:
    storage = tensor.storage
    if entry is None:
        raise invalid(source.name, f"its storage {storage.key[:40]!r} is missing", FETCH_AGAIN, tensor=name)
    if storage.nbytes != entry.size:
        raise invalid(
            source.name, f"its storage should have {storage.nbytes} bytes and has {entry.size}",
            FETCH_AGAIN, tensor=name, offset=entry.header,
        )  # fmt: skip
    if len(tensor.shape) != len(tensor.strides) or min((*tensor.shape, *tensor.strides, tensor.offset), default=0) < 0:
        raise invalid(source.name, "its shape and strides do not fit", FETCH_AGAIN, tensor=name)
    elements = math.prod(tensor.shape)
    reach = (
        tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    )
    if elements and reach * itemsize(tensor.dtype) > storage.nbytes:
        raise invalid(
            source.name, "reaches beyond the end of its storage", FETCH_AGAIN, tensor=name, offset=entry.header
        )
    if elements * itemsize(tensor.dtype) > storage.nbytes:
        raise invalid(
            source.name, f"shows the same elements several times (strides {tensor.strides[:9]})",
            "save it again after .contiguous()", tensor=name,
        )  # fmt: skip


def _data_starts(source: ByteSource, torch_file: TorchFile) -> dict[str, int]:
    """Storage key → where its bytes begin."""
    prefix = f"{torch_file.prefix}/data/"
    wanted = {tensor.storage.key for tensor in torch_file.tensors.values()}
    ordered = sorted(torch_file.entries.values(), key=lambda entry: entry.header)
    limits = [entry.header for entry in ordered[1:]] + [source.size]
    return {
        entry.name.removeprefix(prefix): data_offset(source, entry, limit)
        for entry, limit in zip(ordered, limits, strict=True)
        if entry.name.startswith(prefix) and entry.name.removeprefix(prefix) in wanted
    }


def _stored(name: str, tensor: Tensor, file: Path, starts: Mapping[str, int]) -> TensorInfo:
    if tensor.storage.key not in starts:
        return TensorInfo(name, tensor.dtype, tensor.shape, file, -1)
    offset = starts[tensor.storage.key] + tensor.offset * itemsize(tensor.dtype)
    if _is_contiguous(tensor):
        return TensorInfo(name, tensor.dtype, tensor.shape, file, offset)
    return TensorInfo(name, tensor.dtype, tensor.shape, file, -1, View(offset, tensor.strides))


def _is_contiguous(tensor: Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return 0 in tensor.shape
        expected *= size
    return True
