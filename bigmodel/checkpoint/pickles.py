"""The restricted reader of torch zip files: tensors as byte ranges, and nothing is ever run or imported.

A `.bin` is a zip file with `NAME/data.pkl`, a pickle of the state dict, and `NAME/data/KEY`, the raw bytes of each
storage (torch/serialization.py). `PickleMachine` runs the few opcodes `torch.save` writes on inert values of its own; a
global is looked up in a list of names and never resolved to an object of Python's. torch.load is not called, here or
anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .bytesource import ByteSource
from .picklemachine import PickleMachine, Tensor
from .tensors import FETCH_AGAIN, Contents, TensorInfo, View, find_aliases, invalid, itemsize, tensor_nbytes
from .zipfiles import ZipEntry, data_offset, read_directory, read_entry

MAX_PICKLE = 32 * 2**20
"""Bytes of data.pkl. A state dict takes about 150 per tensor."""


def read_torch_file(source: ByteSource, file: Path, *, placed: bool = True) -> Contents:
    """Return the tensors in the order of the state dict, and aliases. Raise InvalidCheckpoint with place and cure.

    Not placed: only three short ranges are read, so over HTTP too; offsets are then -1 and there are no views.
    Names of the same elements of one storage are one tensor, and the first is kept: it is the embedding, which the
    state dict names before the head that is tied to it, and what transformers' save_pretrained keeps.
    """
    entries = _entries(source)
    _check_byte_order(source, entries.get("byteorder"))
    pickled = entries["data.pkl"]
    if pickled.size > MAX_PICKLE:
        raise invalid(source.name, f"its data.pkl has {pickled.size} bytes, more than {MAX_PICKLE}", FETCH_AGAIN)
    tensors = _state_dict(source, PickleMachine(read_entry(source, pickled), source.name).run())
    for name, tensor in tensors.items():
        _check_tensor(source, name, tensor, entries.get(f"data/{tensor.storage.key}"))
    tied = find_aliases({name: _place(tensor) for name, tensor in tensors.items()})
    starts = _data_starts(source, entries, tensors) if placed else {}
    return Contents({name: _stored(name, tensors[name], file, starts) for name in tensors if name not in tied}, tied)


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    if 0 in tensor.shape:
        return None
    # The stride of a dimension of size 1 moves nothing, and torch lets it be anything.
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    return tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape, strides


def _entries(source: ByteSource) -> dict[str, ZipEntry]:
    entries = read_directory(source)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise invalid(source.name, "has no single data.pkl, as torch writes it", "give a file from torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in entries:
        cure = "where you trust it: torch.save(torch.jit.load(path).state_dict(), 'pytorch_model.bin')"
        raise invalid(source.name, "is a TorchScript program, not a state dict", cure)
    return {name.removeprefix(folder): entry for name, entry in entries.items() if name.startswith(folder)}


def _check_byte_order(source: ByteSource, order: ZipEntry | None) -> None:
    if order is None:
        return  # files from before torch 2.1 are little-endian
    value = read_entry(source, order) if order.size <= 16 else b"?"
    if value != b"little":
        cure = "on a machine of today: torch.save(torch.load(path, weights_only=True), path)"
        raise invalid(source.name, f"its byte order is {value[:16].decode('ascii', 'replace')!r}", cure)


def _state_dict(source: ByteSource, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise invalid(source.name, "holds no state dict", "save model.state_dict(), not the model")
    wrong = [name for name, value in state.items() if not (isinstance(value, Tensor) and isinstance(name, str))]
    if wrong:
        raise invalid(source.name, f"its entry {str(wrong[0])[:200]!r} is not a tensor", _tensors_alone(state))
    return state


def _tensors_alone(state: dict[Any, Any]) -> str:
    """How to save what a training program left as a state dict: its tensors, or, where it has more of them, a part."""
    loaded = "torch.load(path, weights_only=True)"
    parts = _parts(state)
    if parts and max(map(_count, parts.values())) > _count(state):
        first, *others = parts
        return f"save what is inside alone: torch.save({loaded}{first}, path)" + "".join(
            f", or {o}" for o in others[:5]
        )
    if _count(state):
        return f"save its tensors alone: torch.save({{k: v for k, v in {loaded}.items() if torch.is_tensor(v)}}, path)"
    return "save tensors only"


def _count(state: dict[Any, Any]) -> int:
    return sum(isinstance(value, Tensor) for value in state.values())


def _parts(state: dict[Any, Any]) -> dict[str, dict[Any, Any]]:
    """The dicts with tensors that lie least deep in another, by what is written behind it to reach them."""
    level, seen = {"": state}, {id(state)}
    while level:
        below = {}
        for path, holder in level.items():
            for name, value in holder.items():
                if isinstance(value, dict) and id(value) not in seen:  # a dict may hold itself
                    seen.add(id(value))
                    below[f"{path}[{name if isinstance(name, int) else name[:40]!r}]"] = value
        if found := {path: inner for path, inner in below.items() if _count(inner)}:
            return found
        level = below
    return {}


def _check_tensor(source: ByteSource, name: str, tensor: Tensor, entry: ZipEntry | None) -> None:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if entry is None:
        raise invalid(source.name, f"its storage {storage.key[:40]!r} is missing", FETCH_AGAIN, tensor=name)
    refused = partial(invalid, source.name, cure=FETCH_AGAIN, tensor=name, offset=entry.header)
    if storage.nbytes != entry.size:
        raise refused(f"its storage should have {storage.nbytes} bytes and has {entry.size}")
    if len(shape) != len(strides) or min((*shape, *strides, tensor.offset), default=0) < 0:
        raise refused("its shape and strides do not fit")
    nbytes, width = tensor_nbytes(tensor.dtype, shape), itemsize(tensor.dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if nbytes and (last + 1) * width > storage.nbytes:
        raise refused("reaches beyond the end of its storage")
    if nbytes > storage.nbytes:
        cause = f"shows the same elements several times (strides {strides[:9]})"
        raise refused(cause, cure="save it again after .contiguous()")


def _data_starts(source: ByteSource, entries: Mapping[str, ZipEntry], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Storage key → where its bytes begin."""
    found = [(key, entries[f"data/{key}"]) for key in {tensor.storage.key for tensor in tensors.values()}]
    return {key: data_offset(source, entry) for key, entry in sorted(found, key=lambda named: named[1].header)}


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
        if size != 1 and stride != expected:
            return 0 in tensor.shape
        expected *= size
    return True
