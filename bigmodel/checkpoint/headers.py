"""The safetensors container: headers read and validated to the byte, headers written.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length N, N bytes of JSON that start
with `{` and may end in spaces, then the data. The JSON is `{"name": {"dtype", "shape", "data_offsets": [begin, end]},
"__metadata__": {str: str}}`; offsets count from the end of the header. The ranges must cover the data without holes or
overlaps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from .bytesource import ByteSource
from .files import unique_keys
from .tensors import FETCH_AGAIN, SAFETENSORS_DTYPES, SAFETENSORS_NAMES, Contents, TensorInfo, invalid, tensor_nbytes

MAX_HEADER = 32 * 2**20
"""Bytes. The safetensors library takes 100 MB; the largest models have 100,000 tensors, which take about 12."""
MAX_TENSORS = 250_000
MAX_ENTRY = 65_536
"""Bytes of one tensor's entry. Real ones have about 100; the limit keeps hostile lists out of memory."""
MAX_METADATA = 8 * 2**20
MAX_DIMENSIONS = 64

_SPACE = re.compile(r"[ \t\n\r]*")
_SIZE = "(?:0|[1-9][0-9]{0,17})"
_USUAL_ENTRY = re.compile(
    rf'"([^"\\\x00-\x1f]*)":{{"dtype":"(\w+)","shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,63}})?)\],'
    rf'"data_offsets":\[({_SIZE}),({_SIZE})\]}}',
    re.ASCII,
)
"""An entry as the safetensors library writes it; others are JSON too, but three times slower to read."""

Entry = tuple[str, list[int], int, int]
"""Name of the dtype, shape, begin and end: one tensor's description, not yet compared with itself."""


def read_header(source: ByteSource, file: Path) -> Contents:
    """Return what the header of a safetensors file says. `file` is what the tensors will name as theirs.
    Raise InvalidCheckpoint with file, tensor, offset and cure."""
    if source.size < 8:
        raise invalid(file, f"has {source.size} bytes, too few for a safetensors header", FETCH_AGAIN)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER or 8 + length > source.size:
        cause = f"says its header has {length} bytes, but the file has {source.size} and a header at most {MAX_HEADER}"
        raise invalid(file, cause, FETCH_AGAIN, offset=0)
    try:
        text = source.read(8, length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(file, "the header is not UTF-8", FETCH_AGAIN, offset=8 + error.start) from None
    entries, metadata = _HeaderText(text, file).parse()
    tensors = [_tensor(name, *entry, file, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(tensors, file, 8 + length, source.size)
    return Contents({tensor.name: tensor for tensor in tensors}, metadata=metadata)


class _HeaderText:
    """Parses the header entry by entry, so that memory is bounded by what real entries need."""

    def __init__(self, text: str, file: Path) -> None:
        self.text = text
        self.file = file
        self.decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] | None = None

    def parse(self) -> tuple[dict[str, Entry], dict[str, str]]:
        if not self.text.startswith("{"):
            raise self._error("the header does not start with {", 0)
        at = self._skip(1)
        if not self.text.startswith("}", at):
            at = self._item(at)
            while not self.text.startswith("}", at):
                at = self._item(self._skip(self._expect(",", at)))
        if self._skip(at + 1) != len(self.text):
            raise self._error("there is something after the end of the header", at + 1)
        return self.entries, self.metadata or {}

    def _item(self, at: int) -> int:
        """Takes one name and its value; where the next sign after it stands."""
        usual = _USUAL_ENTRY.match(self.text, at)
        if usual and usual[1] != "__metadata__":
            name, dtype, shape, begin, end = usual.groups()
            sizes = [int(size) for size in shape.split(",")] if shape else []
            return self._keep(name, (dtype, sizes, int(begin), int(end)), at, usual.end())
        name, at = self._name(at)
        if name == "__metadata__" and self.text.startswith("null", at):
            return self._skip(at + len("null"))  # none, as safetensors reads it
        value, after = self._value(name, at)
        if name != "__metadata__":
            return self._keep(name, self._entry(name, value, at), at, after)
        if self.metadata is not None:
            raise self._error("__metadata__ stands twice in the header", at)
        if not all(isinstance(text, str) for text in value.values()):
            raise self._error("__metadata__ may hold strings only", at)
        self.metadata = value
        return self._skip(after)

    def _keep(self, name: str, entry: Entry, at: int, after: int) -> int:
        if name in self.entries:
            raise self._error("stands twice in the header", at, name)
        if len(self.entries) == MAX_TENSORS:
            raise self._error(f"the header describes more than {MAX_TENSORS} tensors", at)
        self.entries[name] = entry
        return self._skip(after)

    def _entry(self, name: str, value: dict[str, Any], at: int) -> Entry:
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if len(value) == 3 and isinstance(dtype, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2:
            return dtype, shape, offsets[0], offsets[1]
        raise self._error("its entry is not {dtype, shape, data_offsets: [begin, end]}", at, name)

    def _name(self, at: int) -> tuple[str, int]:
        if not self.text.startswith('"', at):
            raise self._error("a tensor's name is missing", at)
        name, end = self._decode(self.text, at, at)
        if not name.isascii():
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise self._error("a name is not valid Unicode", at) from None
        return name, self._skip(self._expect(":", self._skip(end)))

    def _value(self, name: str, at: int) -> tuple[dict[str, Any], int]:
        if not self.text.startswith("{", at):
            raise self._error("is not described by a JSON object", at, name)
        limit = MAX_METADATA if name == "__metadata__" else MAX_ENTRY
        if self.text.find("}", at, at + limit) < 0:
            raise self._error(f"its description is longer than {limit} bytes", at, name)
        cut = f", or its description is longer than {limit} bytes" if len(self.text) > at + limit else ""
        value, length = self._decode(self.text[at : at + limit], 0, at, cut)
        return value, at + length

    def _decode(self, text: str, start: int, place: int, cut: str = "") -> tuple[Any, int]:
        try:
            return self.decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise self._error(f"the header is not JSON: {str(error)[:200]}{cut}", place) from None

    def _skip(self, at: int) -> int:
        match = _SPACE.match(self.text, at)
        return match.end() if match else at

    def _expect(self, sign: str, at: int) -> int:
        if not self.text.startswith(sign, at):
            raise self._error(f"{sign!r} is missing", at)
        return at + 1

    def _error(self, cause: str, at: int, name: str | None = None) -> Exception:
        offset = 8 + len(self.text[:at].encode("utf-8", "replace"))
        return invalid(self.file, cause, FETCH_AGAIN, tensor=name, offset=offset)


def _tensor(name: str, dtype_name: str, shape: list[int], begin: int, end: int, file: Path, start: int) -> TensorInfo:
    dtype = SAFETENSORS_DTYPES.get(dtype_name)
    if dtype is None:
        cure = f"save it as one of {', '.join(SAFETENSORS_DTYPES)}"
        raise invalid(file, f"dtype {dtype_name[:40]!r} is not one torch has", cure, tensor=name)
    if dtype == "float4_e2m1fn_x2":
        # safetensors counts 4-bit elements, torch the bytes that hold two of them
        if not shape or shape[-1] % 2:
            raise invalid(file, f"F4 of shape {shape} does not fill whole bytes", FETCH_AGAIN, tensor=name)
        shape = [*shape[:-1], shape[-1] // 2]
    tensor = TensorInfo(name, dtype, tuple(shape), file, start + begin)
    if end - begin != tensor.nbytes:
        cause = f"{dtype} of shape {tensor.shape} takes {tensor.nbytes} bytes, but data_offsets say {end - begin}"
        raise invalid(file, cause, FETCH_AGAIN, tensor=name, offset=tensor.offset)
    return tensor


def _sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_cover(tensors: Sequence[TensorInfo], file: Path, start: int, size: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else f"leaves a hole after byte {end}"
            raise invalid(file, what, FETCH_AGAIN, tensor=tensor.name, offset=tensor.offset)
        end += tensor.nbytes
    if end != size:
        what = "is cut short" if end > size else "has bytes that belong to no tensor"
        raise invalid(file, f"{what}: {size} bytes, the header describes {end}", FETCH_AGAIN, offset=min(end, size))


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds `(name, torch dtype, shape)` in this order, padded to 8 bytes.
    Byte for byte what the safetensors library writes for the same order. Raise KeyError for a dtype it lacks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + tensor_nbytes(dtype, shape)
        stored = [*shape[:-1], shape[-1] * 2] if dtype == "float4_e2m1fn_x2" else list(shape)
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": stored, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_LAYOUT_RANK = {name: rank for rank, name in enumerate(SAFETENSORS_NAMES)}


def layout_key(name: str, dtype: str) -> tuple[int, str]:
    """Return the sort key of the safetensors library in a file: wide formats first, so that all stay aligned."""
    return _LAYOUT_RANK[dtype], name
