"""Files of prompts, each read as its ending says: lines of JSON, JSON, tables, Parquet, and lines of text."""

from __future__ import annotations

import csv
import datetime
import errno
import io
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import UUID

from bigpipe.errors import UsageError
from bigpipe.files import read_file
from bigpipe.sizes import format_size

Found = Iterator[tuple[str, Any]]
"""(place, JSON value) of each prompt."""
LARGEST = 2**30
"""Bytes of a file that is read as a whole."""
LONGEST = 2**28
"""Characters of a line, and of a cell: a file of lines may be of any size, and is read line by line. csv's own limit is
131,072, which a prompt may well have."""
AT_A_TIME = 16
"""The part of `LARGEST` that is unpacked at a time, at most."""
TIMES = 1000
"""How many times its own size a Parquet file may unpack to, where that is more than `LARGEST`."""
ROW = 100
"""Bytes of a row besides what it holds, as Python keeps it: at least."""
SPLIT = "split it into several files, which a glob takes together"
SEPARATORS = ",;\t"
"""Of columns, as programs write them: some countries' tables have a comma in numbers."""
CONVERTED: Mapping[str, str] = {
    **dict.fromkeys((".m4a", ".aac", ".wma", ".amr", ".mp4", ".m4b", ".webm", ".mkv", ".mov"), ".wav"),
    **dict.fromkeys((".heic", ".heif", ".avif", ".jxl"), ".png"),
}
"""Ending of a sound or picture that is not read here → one that is, which other programs make of it."""


@dataclass(frozen=True, slots=True)
class Wording:
    """What errors call rows, so that they speak of what their reader has written."""

    field: str = "prompts"
    """The argument, or field of a stage, that names them."""
    row: str = "prompt"
    """One of them."""


PROMPTS = Wording()


def read_rows(path: Path, column: str, wording: Wording = PROMPTS) -> Found:
    """Yield each prompt of a file and where it stands, in their order: objects; texts and chats under `column`. The
    ending tells how to read it, in any case. Raise UsageError for an ending that is none of `READERS`, and for what is
    not as the ending says."""
    reader, said = READERS.get(path.suffix.lower()), f"{wording.field}: {path}"
    if reader is None:
        cause = f"{said} ends with {path.suffix!r}" if path.suffix else f"{said} has no ending"
        cure = how_to_convert(path) or f"name it after what it holds: {', '.join(READERS)}"
        raise UsageError(f"{cause}, and no file of {wording.row}s does", cure)
    for place, value in reader(path, wording):
        yield place, {column: value} if isinstance(value, str | list) else value


def how_to_convert(path: Path) -> str:
    """Return what to do with a sound or a picture that is not read here; nothing where it is none."""
    ending = CONVERTED.get(path.suffix.lower())
    if ending == ".wav":
        return f"convert it: ffmpeg -i {shlex.quote(path.name)} {shlex.quote(f'{path.stem}.wav')}"
    return f"convert it to {path.stem}{ending}" if ending else ""


def _text(path: Path, wording: Wording) -> str:
    """What the file holds, without a byte-order mark."""
    try:
        return read_file(path, LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{_undecodable(path)}: this is no UTF-8", "give a file in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{wording.field}: {path} cannot be read: {error}", "give a file in UTF-8") from error


def _undecodable(path: Path) -> str:
    """Where the first line lies that is no UTF-8: file, line, and byte in it, from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"{path}:{number}:{error.start + 1}"
    return str(path)


@contextmanager
def _opened(path: Path, wording: Wording, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The file as text, without a byte-order mark. Inside, what cannot be read is a mistake that names it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, encoding="utf-8-sig", newline=newline) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
            yield file
    except UnicodeDecodeError as error:
        raise UsageError(f"{_undecodable(path)}: this is no UTF-8", "give a file in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{wording.field}: {path} cannot be read: {error}", "give a file in UTF-8") from error


def _bounded(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
        if len(line) == LONGEST:
            raise UsageError(f"{path}:{number}: the line has more than {format_size(LONGEST)}", "write shorter lines")
        yield line


def _lines(path: Path, wording: Wording) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank. Other marks that Unicode ends lines with are a prompt's own."""
    with _opened(path, wording, None) as file:
        for number, line in enumerate(_bounded(file, path), 1):
            if line.strip():
                yield f"{path}:{number}", line.removesuffix("\n")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return made


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: not JSON: {error}", "write one object per line") from error


def _json_lines(path: Path, wording: Wording) -> Found:
    for place, line in _lines(path, wording):
        yield place, _parse(line, place)


def _json(path: Path, wording: Wording) -> Found:
    """A list of prompts; one object; or objects line by line, which many tools name so."""
    text = _text(path, wording)
    if text.lstrip()[:1] == "[":
        for index, value in enumerate(_parse(text, str(path))):
            yield f"{path}[{index}]", value
        return
    try:
        yield f"{path}", json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        yield from _json_lines(path, wording)


def _table(path: Path, wording: Wording, delimiter: str) -> Found:
    """Rows of a table whose first row names the columns (RFC 4180)."""
    with _opened(path, wording, "") as file:
        lines = _bounded(file, path)
        first = next(lines, "")
        second = next(lines, "")
        _refuse_other_separator(path, [first, second], delimiter)
        rows = _cells(path, chain([first, second], lines), delimiter)
        _, head = next(rows, ("", []))
        if doubled := [name for name in head if name and head.count(name) > 1]:
            raise UsageError(f"{path}:1: two columns are named {doubled[0]!r}", "rename one")
        for place, cells in rows:
            if len(cells) != len(head):
                cause = f"{place}: {len(cells)} cells under {len(head)} names of columns"
                raise UsageError(cause, "put texts into quotes")
            yield place, _named_cells(place, head, cells)


def _refuse_other_separator(path: Path, lines: Sequence[str], delimiter: str) -> None:
    """lines: the first two. In both another sign stands as often outside of quotes, and this one nowhere."""
    bare = [re.sub(r'"[^"]*"', "", line) for line in lines]
    others = [sign for sign in SEPARATORS if len({line.count(sign) for line in bare}) == 1 and sign in bare[0]]
    if others and delimiter not in bare[0]:
        cause = f"{path}:1: its columns seem to be separated by {others[0]!r}, and not by {delimiter!r}"
        raise UsageError(cause, "save it with commas as .csv, or with tabs as .tsv")


def _named_cells(place: str, head: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """Without the columns that have no name, as a spreadsheet leaves them behind the others. One alone may hold
    something, such as the numbers of the rows."""
    if head.count("") < 2:
        return dict(zip(head, cells, strict=True))
    if lost := [cell for name, cell in zip(head, cells, strict=True) if cell and not name]:
        raise UsageError(f"{place}: {lost[0]!r:.60} stands in one of several columns without a name", "name them")
    return {name: cell for name, cell in zip(head, cells, strict=True) if name}


def _cells(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        limit = csv.field_size_limit(LONGEST)  # of the whole process: only while a row is read
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cause = f"{path}:{reader.line_num}: no row of a table: {error}"
            raise UsageError(cause, 'put cells with quotes into quotes, and double those inside: "a ""b"""') from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if cells:
            yield f"{path}:{reader.line_num}", cells


def require_pyarrow(cause: str, cure: str) -> None:
    """Raise UsageError where pyarrow is not installed. cause: what needs it. cure: what else can be done."""
    if find_spec("pyarrow") is None:
        cure = f"pip install 'bigpipe-ml[parquet]', or {cure}"
        raise UsageError(f"{cause} needs pyarrow, which is not installed", cure)


def _parquet(path: Path, wording: Wording) -> Found:
    require_pyarrow(f"{wording.field}: {path}", f"write the {wording.row}s as lines of JSON")
    try:
        import pyarrow.parquet as parquet

        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            limit = max(LARGEST, TIMES * os.fstat(file.fileno()).st_size)
            found = _rows_of_parquet(path, parquet.ParquetFile(file, pre_buffer=False), limit, wording)
            for index, row in enumerate(chain.from_iterable(found)):
                yield f"{path}[{index}]", row
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{wording.field}: {path} cannot be read: {error}", "give a Parquet file") from error


def _rows_of_parquet(path: Path, table: Any, limit: int, wording: Wording = PROMPTS) -> Iterator[list[Any]]:
    """All rows, few by few: as JSON, but for columns of bytes. A page of a few bytes may stand for any number of equal
    values: more than `limit` bytes of them, as Python keeps them, are refused."""
    groups = [table.metadata.row_group(group) for group in range(table.metadata.num_row_groups)]
    packed = [group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns)]
    widest, left = max([1, *packed]), limit - sum(packed)
    most = min(1024, max(1, min(limit, LARGEST) // AT_A_TIME // widest))
    for batch in table.iter_batches(batch_size=most) if left >= 0 else ():
        unpacked = batch.to_pylist()
        left -= len(repr(unpacked)) + ROW * len(unpacked)
        if left < 0:
            break
        yield [{name: _as_json(cell) for name, cell in row.items()} for row in unpacked]
    if left < 0:
        raise UsageError(f"{wording.field}: {path} unpacks to more than {format_size(limit)}", SPLIT)


def _as_json(value: Any, listed: bool = False) -> Any:
    """A value of Arrow: dates as ISO 8601, exact numbers as texts; without the bytes that an object holds, which JSON
    has not. listed: is it of a list? All its members have the fields of one: what is null was not there."""
    if isinstance(value, dict):
        pairs = ((name, inner) for name, inner in value.items() if not (listed and inner is None))
        return {name: _as_json(inner, listed) for name, inner in pairs if not isinstance(inner, bytes)}
    if isinstance(value, list | tuple):
        return [_as_json(inner, True) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | datetime.timedelta | UUID) else value


READERS: Mapping[str, Callable[[Path, Wording], Found]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _lines,
}
