"""The two kinds of weight file as what surrounds the tensors' bytes. Every position is known before the first byte."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigpipe.bigmodel.checkpoint import (
    END,
    END64,
    ENTRY,
    LOCAL,
    LOCATOR64,
    STORAGE_CLASSES,
    encode_header,
    encode_torch_head,
    layout_key,
)

from .plans import PlannedTensor, ShardPlan

METADATA = {"format": "pt"}
"""Tells other tools that names and shapes are torch's."""


class SafetensorsFile:
    """A file that holds these tensors in this order."""

    checksums = False

    def __init__(self, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str] = METADATA) -> None:
        self.tensors = tensors
        self.head = encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata)
        self.announced = self.head
        self.size = len(self.head) + sum(tensor.nbytes for tensor in tensors)

    def after(self, name: str, crc: int) -> bytes:
        return b""

    def tail(self, crcs: Mapping[str, int]) -> bytes:
        return b""


ALIGNMENT = 64
"""Where storages begin in a torch file, so that they can be mapped."""
_WIDE = 0xFFFFFFFF
_DEFERRED, _UTF8 = 0x0008, 0x0800
"""Zip flags: sizes and CRC follow the data; the name is UTF-8."""
BYTE_ORDER, VERSION = b"little", b"3\n"


@dataclass(frozen=True, slots=True)
class _Record:
    """A file in a zip file, stored as it is."""

    path: bytes
    at: int
    """Where its local header begins."""
    size: int

    @property
    def local(self) -> bytes:
        """The local header, padded by an extra field so that the data after it is aligned."""
        padding = -(self.at + LOCAL.size + len(self.path) + 4) % ALIGNMENT
        return (
            LOCAL.pack(b"PK\x03\x04", 0, self._flags, 0, 0, 0, 0, 0, 0, len(self.path), 4 + padding)
            + self.path
            + struct.pack("<2sH", b"FB", padding)
            + b"Z" * padding
        )

    @property
    def end(self) -> int:
        return self.at + len(self.local) + self.size + len(self.descriptor(0))

    @property
    def _flags(self) -> int:
        return _UTF8 | (_DEFERRED if self.size else 0)

    def whole(self, content: bytes) -> bytes:
        return self.local + content + self.descriptor(zlib.crc32(content))

    def descriptor(self, crc: int) -> bytes:
        """What follows the data."""
        if self.size == 0:
            return b""
        form = "<4sLQQ" if self.at >= _WIDE or self.size >= _WIDE else "<4sLLL"
        return struct.pack(form, b"PK\x07\x08", crc, self.size, self.size)

    def entry(self, crc: int) -> bytes:
        """The entry in the directory at the end of the file."""
        wide = [value for value in (self.size, self.size, self.at) if value >= _WIDE]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, at, lengths = min(self.size, _WIDE), min(self.at, _WIDE), (len(self.path), len(extra))
        fixed = ENTRY.pack(b"PK\x01\x02", 0, 0, self._flags, 0, 0, 0, crc, size, size, *lengths, 0, 0, 0, 0, at)
        return fixed + self.path + extra


class TorchZip:
    """A file as torch.save writes it (zip64, stored, 64-byte aligned), with the pickle written opcode by opcode.

    tensors: in the order of their bytes. size: bytes of the whole file. head: what stands before the first tensor.
    announced: what is told of it to those who wait for it, as `arrivals.read_head` reads it from the file. checksums:
    whether `after` and `tail` need the CRC-32 of the tensors.
    """

    checksums = True

    def __init__(self, plan: ShardPlan) -> None:
        self.tensors = plan.tensors
        self._aliases = plan.aliases
        keys = {tensor.name: str(number) for number, tensor in enumerate(plan.tensors)}
        pickled = pickle_state_dict(plan, keys)
        sizes = {"data.pkl": len(pickled), "byteorder": len(BYTE_ORDER)}
        sizes |= {f"data/{keys[tensor.name]}": tensor.nbytes for tensor in plan.tensors} | {"version": len(VERSION)}
        records: list[_Record] = []
        for name, size in sizes.items():
            path = f"{plan.file.rpartition('.')[0]}/{name}".encode()
            records.append(_Record(path, records[-1].end if records else 0, size))
        self.head = records[0].whole(pickled) + records[1].whole(BYTE_ORDER) + records[2].local
        self._pickled_crc = zlib.crc32(pickled)
        self._records = records
        names = [tensor.name for tensor in plan.tensors]
        self._following = dict(zip(names, itertools.pairwise(records[2:]), strict=True))
        self.size = records[-1].at + len(records[-1].local) + len(self.tail(dict.fromkeys(keys, 0)))

    def after(self, name: str, crc: int) -> bytes:
        """What follows the bytes of this tensor: the header of the next record among it."""
        record, following = self._following[name]
        return record.descriptor(crc) + following.local

    @property
    def announced(self) -> bytes:
        return encode_torch_head({tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}, self._aliases)

    def tail(self, crcs: Mapping[str, int]) -> bytes:
        """What ends the file."""
        end, version = self._records[-1].end, zlib.crc32(VERSION)
        sums = [self._pickled_crc, zlib.crc32(BYTE_ORDER), *(crcs[tensor.name] for tensor in self.tensors), version]
        directory = b"".join(record.entry(crc) for record, crc in zip(self._records, sums, strict=True))
        count, size, after = len(self._records), len(directory), end + len(directory)
        return b"".join((
            VERSION, self._records[-1].descriptor(version), directory,
            END64.pack(b"PK\x06\x06", END64.size - 12, 0x031E, 45, 0, 0, count, count, size, end),
            LOCATOR64.pack(b"PK\x06\x07", 0, after, 1),
            END.pack(b"PK\x05\x06", 0, 0, *[min(count, 0xFFFF)] * 2, min(size, _WIDE), min(end, _WIDE), 0),
        ))  # fmt: skip


def pickle_state_dict(plan: ShardPlan, keys: Mapping[str, str]) -> bytes:
    """The pickle (protocol 2) of a dict of tensors: what torch.save writes, each global spelt out where it is used.
    `keys` maps tensors to storages; an alias uses the storage of its tensor. Number formats that came after typed
    storages (uint16, float8) use torch's untyped form."""
    shapes = {tensor.name: tensor for tensor in plan.tensors}
    shapes.update({alias: shapes[name] for alias, name in plan.aliases.items()})
    items = (_pickle_tensor(name, tensor, keys[tensor.name]) for name, tensor in shapes.items())
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _pickle_tensor(name: str, tensor: PlannedTensor, key: str) -> bytes:
    storage = STORAGE_CLASSES.get(tensor.dtype)
    kind = f"torch\n{storage}" if storage else "torch.storage\nUntypedStorage"
    count = math.prod(tensor.shape) if storage else tensor.nbytes
    rebuild = "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3"
    return b"".join(
        (
            _text(name), f"ctorch._utils\n{rebuild}\n(".encode(),
            b"(", _text("storage"), f"c{kind}\n".encode(), _text(key), _text("cpu"), _number(count), b"tQ",
            _number(0), _numbers(tensor.shape), _numbers(_strides(tensor.shape)), b"\x89",
            b"ccollections\nOrderedDict\n)R", b"" if storage else f"ctorch\n{tensor.dtype}\n".encode(), b"tR",
        )
    )  # fmt: skip


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    if value < 0x100:
        return b"K" + bytes([value])
    if value < 0x8000_0000:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return strides[::-1][: len(shape)]


Container = SafetensorsFile | TorchZip


def container(plan: ShardPlan, metadata: Mapping[str, str] = METADATA) -> Container:
    """Return the file of a plan; safetensors in that library's order, for files byte for byte as its own."""
    if plan.format == "bin":
        return TorchZip(plan)
    return SafetensorsFile(sorted(plan.tensors, key=lambda tensor: layout_key(tensor.name, tensor.dtype)), metadata)
