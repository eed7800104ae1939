"""The text that a model is evaluated on, from files: texts as they stand, or rows with a column."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigpipe.bigmodel.tasks import READERS, Wording, named_files, read_rows, require_writable, textless
from bigpipe.errors import UsageError
from bigpipe.files import read_file

SEPARATOR = "\n\n"
"""Between rows and between files, as in transformers' guide to perplexity."""
LARGEST = 2**30
"""Bytes of a text file."""


DATA = Wording("data", "row")


def read_texts(data: str, column: str, base: Path) -> str:
    """Return the texts of the files that a path or glob (relative to `base`) names, in their order, joined by a blank
    line. Files of rows (`.jsonl .json .csv .tsv .parquet` and so on) give the text under `column` of each row; any
    other file is a text, taken as it stands. Raise UsageError that names file and row."""
    text = SEPARATOR.join(part for _, part, _ in _parts(data, column, base))
    if not text.strip():
        raise UsageError(f"{data} holds no text", "give a file with some", field="data")
    return text


def place_in(data: str, column: str, base: Path, character: int) -> str:
    """Return where a character of what `read_texts` gives stands: `text.txt:12`, `rows.jsonl:7`."""
    begin, place = 0, data
    for place, part, whole in _parts(data, column, base):
        if character < begin + len(part) + len(SEPARATOR):
            line = part.count("\n", 0, max(0, character - begin)) + 1
            return f"{place}:{line}" if whole else place
        begin += len(part) + len(SEPARATOR)
    return place


def _parts(data: str, column: str, base: Path) -> Iterator[tuple[str, str, bool]]:
    """(place, text, whether it is a whole file) of each text."""
    with _about_data():
        for path in named_files(data, base, DATA):
            if path.suffix.lower() == ".txt" or path.suffix.lower() not in READERS:
                yield str(path), _whole(path), True
            else:
                rows = read_rows(path, column, DATA)
                yield from ((place, _text_of(row, column, place), False) for place, row in rows)


def _text_of(row: object, column: str, place: str) -> str:
    if not isinstance(row, dict):
        raise UsageError(f"{place}: a row is an object with {column!r}, or a text", "write one object per line")
    if column not in row:
        there = ", ".join(map(repr, row)) or "nothing"
        cure = "set `column` to the one with the text"
        raise UsageError(f"{place}: there is no {column!r}, only {there}", cure, field="column")
    text = row[column]
    if not isinstance(text, str):
        cause, cure = textless(column, text)
        raise UsageError(f"{place}: {cause}", cure)
    require_writable({column: text}, place)
    return text


def _whole(path: Path) -> str:
    try:
        return read_file(path, LARGEST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", "give a file in UTF-8") from error


@contextmanager
def _about_data() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.field = error.field or "data"
        raise
