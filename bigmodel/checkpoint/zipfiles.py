"""The zip container of torch files: its directory, read and checked by hand.

Python's zipfile would do for a local file, but reads what it likes; this reader needs the end of the file and the
directory only (two ranges, so that it works over HTTP), and refuses whatever torch does not write: compression,
encryption, overlapping or doubled entries, several disks. Format: PKWARE APPNOTE 6.3, with zip64.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from bigpipe.errors import InvalidCheckpoint

from .bytesource import ByteSource
from .tensors import FETCH_AGAIN, invalid

MAX_DIRECTORY = 16 * 2**20
"""Bytes: room for 150,000 tensors."""
TAIL = 65_536
"""How much of the end is read to find the directory; a torch file has 98 bytes after it, and no comment."""
PADDING = 160
"""At most this much extra field is expected before the data of a small entry; torch aligns to 64."""

END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
_REFUSED_FLAGS = 0x0001 | 0x0040 | 0x2000
"""Encrypted, strongly encrypted, hidden directory."""


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One stored file. `header` is the offset of its local header; its data come after that, and end by `limit`."""

    name: str
    header: int
    size: int
    crc: int
    limit: int = 0

    @property
    def header_size(self) -> int:
        """Of the local header at least: extra fields may follow."""
        return LOCAL.size + len(self.name.encode())


def read_directory(source: ByteSource) -> dict[str, ZipEntry]:
    """Return all entries by name, in the order of their bytes. Raise InvalidCheckpoint."""
    base = max(0, source.size - TAIL)
    tail = source.read(base, source.size - base)
    start, size, count, end = _find_directory(source, base, tail)
    raw = tail[start - base :][:size] if start >= base else source.read(start, size)
    found = sorted(_entries(raw, source, start), key=lambda entry: entry.header)
    if len(found) != count:
        raise invalid(source.name, f"has {len(found)} entries and says {count}", FETCH_AGAIN, offset=end)
    entries: dict[str, ZipEntry] = {}
    for entry, limit in zip(found, [*(entry.header for entry in found[1:]), start], strict=True):
        if entry.name in entries:
            raise invalid(source.name, f"holds {entry.name[:200]!r} twice", FETCH_AGAIN, offset=entry.header)
        if entry.header + entry.header_size + entry.size > limit:
            cause = f"its entry {entry.name[:99]!r} overlaps another, or the zip directory"
            raise invalid(source.name, cause, FETCH_AGAIN, offset=entry.header)
        entries[entry.name] = ZipEntry(entry.name, entry.header, entry.size, entry.crc, limit)
    return entries


def _find_directory(source: ByteSource, base: int, tail: bytes) -> tuple[int, int, int, int]:
    """Offset, size and number of entries of the directory, and where the records after it begin."""
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < END.size:
        raise InvalidCheckpoint(f"{source.name}: is not a zip file, or is cut short", LEGACY_CURE)
    _, disk, start_disk, here, count, size, start, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail):
        raise invalid(source.name, "has bytes after its zip directory", FETCH_AGAIN, offset=base + at)
    end = base + at
    if at >= LOCATOR64.size and tail[at - LOCATOR64.size :].startswith(b"PK\x06\x07"):
        _, _, end, _ = LOCATOR64.unpack_from(tail, at - LOCATOR64.size)
        if end + END64.size > source.size:
            raise invalid(source.name, "its zip64 end record lies outside the file", FETCH_AGAIN, offset=base + at)
        record = tail[end - base :][: END64.size] if end >= base else source.read(end, END64.size)
        sign, _, _, _, disk, start_disk, here, count, size, start = END64.unpack(record)
        if sign != b"PK\x06\x06":
            raise invalid(source.name, "its zip64 end record is missing", FETCH_AGAIN, offset=end)
    if disk or start_disk or here != count or size > MAX_DIRECTORY or start + size != end:
        raise invalid(source.name, "its zip directory does not fit the file", FETCH_AGAIN, offset=end)
    return start, size, count, end


LEGACY_CURE = (
    "files from torch before 1.6 are plain pickles, which bigpipe does not run; where you trust it, load it once and "
    "save it again: torch.save(torch.load(path, weights_only=True), path)"
)


def _entries(raw: bytes, source: ByteSource, start: int) -> Iterator[ZipEntry]:
    at = 0
    while at < len(raw):
        if len(raw) - at < ENTRY.size:
            raise invalid(source.name, "its zip directory is cut short", FETCH_AGAIN, offset=start + at)
        sign, _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, header = ENTRY.unpack_from(raw, at)
        name_size, extra_size, comment_size = lengths
        names = at + ENTRY.size
        extras = names + name_size
        after = extras + extra_size + comment_size
        if sign != b"PK\x01\x02" or after > len(raw) or disk not in (0, 0xFFFF):
            raise invalid(source.name, "its zip directory is damaged", FETCH_AGAIN, offset=start + at)
        size, packed, header = _wide(raw[extras : extras + extra_size], size, packed, header)
        name = raw[names:extras].decode("utf-8", "replace")
        if method != 0 or packed != size or flags & _REFUSED_FLAGS:
            how = "encrypted" if flags & _REFUSED_FLAGS else "compressed"
            cause = f"its entry {name[:200]!r} is {how}; torch stores them as they are"
            raise invalid(source.name, cause, "save it again with torch.save", offset=start + at)
        yield ZipEntry(name, header, size, crc)
        at = after


def _wide(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The 64-bit values of the zip64 extra field (id 1), for those that read 0xFFFFFFFF, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack_from(f"<{len(field) // 8}Q", field))
            size = next(values, size) if size == 0xFFFFFFFF else size
            packed = next(values, packed) if packed == 0xFFFFFFFF else packed
            header = next(values, header) if header == 0xFFFFFFFF else header
        at += 4 + length
    return size, packed, header


def data_offset(source: ByteSource, entry: ZipEntry) -> int:
    """Return where the data of an entry begin: after its local header, which is checked."""
    return _after_header(source, entry, source.read(entry.header, entry.header_size))


def read_entry(source: ByteSource, entry: ZipEntry) -> bytes:
    """Return the data of an entry, its CRC checked; in one read, as local headers have little padding."""
    wanted = entry.header_size + PADDING + entry.size
    raw = source.read(entry.header, min(wanted, source.size - entry.header))
    begin = _after_header(source, entry, raw)
    content = raw[begin - entry.header :][: entry.size]
    if len(content) < entry.size:
        content = source.read(begin, entry.size)
    # Writers may leave the sum out (torch.serialization.set_crc32_options).
    if entry.crc and zlib.crc32(content) != entry.crc:
        raise invalid(source.name, f"its entry {entry.name[:200]!r} has a wrong CRC", FETCH_AGAIN, offset=begin)
    return content


def _after_header(source: ByteSource, entry: ZipEntry, raw: bytes) -> int:
    sign, _, flags, method, _, _, _, _, _, name_size, extra_size = LOCAL.unpack_from(raw)
    begin: int = entry.header + LOCAL.size + name_size + extra_size
    named = raw[LOCAL.size : entry.header_size] == entry.name.encode() and name_size == len(entry.name.encode())
    if sign != b"PK\x03\x04" or not named or method != 0 or flags & _REFUSED_FLAGS:
        raise invalid(source.name, f"its entry {entry.name[:99]!r} is misplaced", FETCH_AGAIN, offset=entry.header)
    if begin + entry.size > entry.limit:
        raise invalid(source.name, f"its entry {entry.name[:99]!r} overlaps another", FETCH_AGAIN, offset=begin)
    return begin
