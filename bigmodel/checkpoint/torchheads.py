"""What a torch file will hold, told before it has come: names, dtypes, shapes, and which of them share their bytes.

A safetensors file begins with that. A torch file ends with it, so it is told in words of our own: JSON, of which the
same tensors always give the same bytes. Where the bytes of a tensor lie is known only once the file is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .bytesource import ByteSource
from .pickles import read_torch_file, read_torch_pickle, unique_tensors
from .tensors import TensorInfo, tensor_nbytes

Tensors = Mapping[str, tuple[str, Sequence[int]]]
"""Stored name → (torch dtype name, shape), in the order of the state dict."""


def encode_torch_head(tensors: Tensors, tied: Mapping[str, str]) -> bytes:
    """tied: alias → stored name."""
    listed = [[name, dtype, list(shape)] for name, (dtype, shape) in tensors.items()]
    return json.dumps({"tensors": listed, "tied": dict(tied)}, sort_keys=True).encode()


def read_torch_head(source: ByteSource) -> bytes:
    """From the zip directory and the pickle: three short ranges, so over HTTP too. Raises InvalidCheckpoint."""
    kept, tied = unique_tensors(read_torch_pickle(source).tensors)
    return encode_torch_head({name: (tensor.dtype, tensor.shape) for name, tensor in kept.items()}, tied)


def decode_torch_head(content: bytes, file: Path) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """As `read_torch_file`, but the tensors' places are not known: offset -1 and no view."""
    told = json.loads(content)
    tensors = tuple(
        TensorInfo(name, dtype, tuple(shape), file, -1, tensor_nbytes(dtype, shape))
        for name, dtype, shape in told["tensors"]
    )
    return tensors, told["tied"]


def places_as_told(source: ByteSource, file: Path, content: bytes) -> Mapping[str, TensorInfo] | None:
    """Where the tensors of a file that has come lie, by name; None where it holds others than was told."""
    tensors, tied = read_torch_file(source, file)
    found = encode_torch_head({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, tied)
    return {tensor.name: tensor for tensor in tensors} if found == content else None
