"""The two kinds of weight file as what surrounds the tensors' bytes. Every position is known before the first byte."""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence

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


class TorchZip:
    """A file as torch.save writes it (zip64, stored, 64-byte aligned), with the pickle written opcode by opcode.

    tensors: in the order of their bytes. size: bytes of the whole file. head: what stands before the first tensor.
    announced: what is told of it to those who wait for it, as `arrivals.read_head` reads it from the file. checksums:
    whether `after` and `tail` need the CRC-32 of the tensors.
    """

    checksums = True

    def __init__(self, plan: ShardPlan) -> None:
        self.tensors = plan.tensors
        self._prefix = plan.file.rpartition(".")[0]
        self._entries: list[tuple[str, int, int, int]] = []  # name, local header, size, CRC
        self._keys = {tensor.name: str(number) for number, tensor in enumerate(plan.tensors)}
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._aliases = plan.aliases
        head = bytearray()
        for name, content in (("data.pkl", pickle_state_dict(plan, self._keys)), ("byteorder", b"little")):
            head += self._whole(name, content, len(head))
        self.offsets: dict[str, int] = {}
        self._headers: dict[str, tuple[int, bytes]] = {}
        at = len(head)
        for tensor in plan.tensors:
            header = self._local(self._storage(tensor.name), at, tensor.nbytes)
            self._headers[tensor.name] = at, header
            self.offsets[tensor.name] = at + len(header)
            at += len(header) + tensor.nbytes + len(_descriptor(at, tensor.nbytes, 0))
        self._end = at
        names = [tensor.name for tensor in plan.tensors]
        self._next = dict(itertools.pairwise(names))
        self.head = bytes(head) + (self._headers[names[0]][1] if names else b"")
        self.size = at + len(self.tail(dict.fromkeys(names, 0)))

    def after(self, name: str, crc: int) -> bytes:
        """What follows the bytes of this tensor."""
        following = self._next.get(name)
        return _descriptor(self._headers[name][0], self._tensors[name].nbytes, crc) + (
            self._headers[following][1] if following else b""
        )

    @property
    def announced(self) -> bytes:
        return encode_torch_head(
            {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}, self._aliases
        )

    def _storage(self, name: str) -> str:
        return f"data/{self._keys[name]}"

    def tail(self, crcs: Mapping[str, int]) -> bytes:
        """What ends the file."""
        version = b"3\n"
        records = (
            self._local("version", self._end, len(version)) + version + _descriptor(self._end, 2, zlib.crc32(version))
        )
        entries = [
            *self._entries,
            *(
                (self._storage(name), self._headers[name][0], self._tensors[name].nbytes, crcs[name])
                for name in self._headers
            ),
            ("version", self._end, len(version), zlib.crc32(version)),
        ]
        start = self._end + len(records)
        directory = b"".join(self._directory_entry(*entry) for entry in entries)
        return records + directory + _directory_end(len(entries), len(directory), start)

    def _whole(self, name: str, content: bytes, at: int) -> bytes:
        crc = zlib.crc32(content)
        self._entries.append((name, at, len(content), crc))
        return self._local(name, at, len(content)) + content + _descriptor(at, len(content), crc)

    def _local(self, name: str, at: int, size: int) -> bytes:
        """A local header, padded by an extra field so that the data after it is aligned."""
        path = f"{self._prefix}/{name}".encode()
        padding = -(at + LOCAL.size + len(path) + 4) % ALIGNMENT
        flags = _UTF8 | (_DEFERRED if size else 0)
        return (
            LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(path), 4 + padding)
            + path
            + struct.pack("<2sH", b"FB", padding)
            + b"Z" * padding
        )

    def _directory_entry(self, name: str, at: int, size: int, crc: int) -> bytes:
        path = f"{self._prefix}/{name}".encode()
        wide = [value for value in (size, size, at) if value >= _WIDE]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        small, low = min(size, _WIDE), min(at, _WIDE)
        flags = _UTF8 | (_DEFERRED if size else 0)
        return (
            ENTRY.pack(b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc, small, small, len(path), len(extra), 0, 0, 0, 0, low)
            + path
            + extra
        )


def _descriptor(header: int, size: int, crc: int) -> bytes:
    if size == 0:
        return b""
    form = "<4sLQQ" if header >= _WIDE or size >= _WIDE else "<4sLLL"
    return struct.pack(form, b"PK\x07\x08", crc, size, size)


def _directory_end(count: int, size: int, start: int) -> bytes:
    end = start + size
    return (
        END64.pack(b"PK\x06\x06", END64.size - 12, 0x031E, 45, 0, 0, count, count, size, start)
        + LOCATOR64.pack(b"PK\x06\x07", 0, end, 1)
        + END.pack(b"PK\x05\x06", 0, 0, *[min(count, 0xFFFF)] * 2, min(size, _WIDE), min(start, _WIDE), 0)
    )


def pickle_state_dict(plan: ShardPlan, keys: Mapping[str, str]) -> bytes:
    """The pickle (protocol 2) of a dict of tensors: what torch.save writes, each global spelt out where it is used.

    `keys` maps tensors to storages; an alias uses the storage of its tensor. Number formats that came after typed
    storages (uint16, float8) use torch's untyped form.
    """
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
