"""The union of all ranks' records as results, in the order of the rows: lines of JSON or Parquet, in one file or in
several, and the files that rows name beside them. The same bytes, whoever computed what, and few rows in memory at a
time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from bigpipe.bigmodel.tasks import Row
from bigpipe.errors import StageFailed
from bigpipe.files import FileWriter, copy_file, hash_file, make_folders, share_name
from bigpipe.redaction import mask, redact_json
from bigpipe.sizes import counted

from .columns import Columns, columns_of
from .lines import strict, to_line
from .records import FAILED, MISSING, Found, Record, check_errors
from .resultfiles import kept_file
from .workfolder import WorkPlan, gather, peak_of, timeline_of, times

Format = Literal["jsonl", "parquet"]
RESULTS = "results"
GROUP_ROWS, GROUP_BYTES = 2**14, 2**23
"""Of a row group of Parquet, at most: rows, and characters of JSON."""
Result = dict[str, Any]
Written = dict[str, tuple[str, int]]
"""Name of a file → (hex sha256, bytes)."""


def plain_result(row: Row, record: Record) -> Result:
    """Return a row of results: the row's index and prompt, and what the task gave. Records are masked already."""
    own = {"index": row.index, "prompt": redact_json(row.prompt, mask)}
    return {**own, **record.payload, **own}


@dataclass(frozen=True, slots=True)
class Output:
    """How results are written."""

    format: Format = "jsonl"
    rows_per_file: int | None = None
    """None: all in one."""
    result: Callable[[Row, Record], Result] = plain_result
    """What stands for a row, as a JSON object."""

    def names(self, rows: int) -> list[str]:
        """Return the names of the files that so many rows fill: `results.jsonl`, or `results-00001-of-00004.jsonl` …"""
        if self.rows_per_file is None:
            return [f"{RESULTS}.{self.format}"]
        count = -(-rows // self.rows_per_file)
        return [f"{RESULTS}-{number:05}-of-{count:05}.{self.format}" for number in range(1, count + 1)]


def merge_results(
    folder: Path, out: Path, *, max_errors: int = 0, output: Output = Output()
) -> tuple[dict[str, Any], Written]:
    """Write the results of the plan in `folder` to `out`: one for each row, in their order.

    Return what came of it, and the files: `prompts`, `errors`, `tokens`, `prompt_tokens`; `micro_batches`, chunks under
    way at once; `tokens_per_second` and `idle` as `times` has them; `peak`, bytes by device, of the rank that took
    most. Raise StageFailed where a row has no record, more than `max_errors` rows failed, a row does not go into the
    columns of Parquet, or a file is not what its record says.
    """
    plan = WorkPlan.read(folder)
    with Found(plan.rows, folder) as found:
        if missing := found.count(MISSING):
            first = next(found.rows(MISSING))
            raise StageFailed(f"{counted(missing, 'prompt')} without a result, the first is {first}", "run it again")
        check_errors(found.count(FAILED), max_errors, map(found.__getitem__, found.rows(FAILED)), plan.rows)
        results = _Results(plan, found, out, output)
        files = _write(out, results, len(plan.rows), output)
        return {
            "prompts": len(plan.rows), "errors": found.count(FAILED), "tokens": results.tokens,
            "prompt_tokens": results.read, "micro_batches": plan.together,
            **times(found.busy, plan.ranks, results.tokens), "timeline": timeline_of(folder), "peak": peak_of(folder),
        }, files | results.files  # fmt: skip


@dataclass(slots=True)
class _Results:
    """A JSON object for each row. What is counted is of the last iteration."""

    plan: WorkPlan
    found: Found
    out: Path
    output: Output
    tokens: int = 0
    read: int = 0
    files: Written = field(default_factory=dict)

    def __iter__(self) -> Iterator[Result]:
        self.tokens = self.read = 0
        for row, record in gather(self.plan.rows, self.found):
            self.tokens += record.tokens
            self.read += record.read
            for name, digest, size in record.files:
                if name not in self.files:
                    _take(kept_file(self.found.folder(row.index), digest), self.out / name, row.index, digest)
                    self.files[name] = (digest, size)
            yield self.output.result(row, record)


def _take(source: Path, target: Path, index: int, digest: str) -> None:
    """Let a file that a rank wrote be one of the results'; it stays where it is for whoever merges again."""
    make_folders(target.parent)
    target.unlink(missing_ok=True)
    try:
        is_whole = (hash_file(target) if share_name(source, target) else copy_file(source, target)[0]) == digest
    except FileNotFoundError:
        is_whole = False
    if not is_whole:
        cause = f"prompt {index}: {source} is not what was written: its sha256 is another, or it is gone"
        raise StageFailed(cause, "run it again after `bigpipe gc`, which drops what was begun")


class HashedFile:
    """A file that is written from its beginning to its end, and hashed meanwhile. Also what pyarrow writes to."""

    def __init__(self, path: Path) -> None:
        self._file = FileWriter(path)
        self._digest = hashlib.sha256()
        self._size = 0
        self._waiting = bytearray()
        self.closed = False

    def write(self, data: Any) -> int:
        self._waiting += data
        if len(self._waiting) >= 2**20:
            self.flush()
        return len(data)

    def flush(self) -> None:
        self._digest.update(self._waiting)
        self._file.write(self._waiting, self._size)
        self._size += len(self._waiting)
        self._waiting.clear()

    def tell(self) -> int:
        return self._size + len(self._waiting)

    def settle(self) -> tuple[str, int]:
        """Give the file its name; return its (hex sha256, size)."""
        self.flush()
        self._file.settle()
        return self._digest.hexdigest(), self._size

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.__exit__(kind, error, trace)


def _write(out: Path, results: _Results, count: int, output: Output) -> Written:
    if output.format == "jsonl":
        return _write_files(out, results, count, output, _write_lines)
    try:
        first = columns_of(islice(results, GROUP_ROWS))
        return _write_files(out, results, count, output, partial(_write_table, columns=first))
    except _Wider:
        return _write_files(out, results, count, output, partial(_write_table, columns=columns_of(results)))


class _Wider(Exception):
    """A row needs other columns than those before it."""


def _write_files(
    out: Path, results: _Results, count: int, output: Output, write: Callable[[HashedFile, Iterable[Result]], None]
) -> Written:
    rows, written = iter(results), {}
    try:
        for name in output.names(count):
            with HashedFile(out / name) as file:
                write(file, islice(rows, min(output.rows_per_file or count, count)))
                written[name] = file.settle()
        next(rows, None)  # to its end, where it has counted all
    except BaseException:
        for name in written:
            (out / name).unlink()
        raise
    return written


def _write_lines(file: HashedFile, rows: Iterable[Result]) -> None:
    for row in rows:
        file.write((strict(row) + "\n").encode())


def _write_table(file: HashedFile, rows: Iterable[Result], columns: Columns) -> None:
    """Raise _Wider for rows that do not go into these columns as they are."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = columns.schema()
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _groups(rows):
            if columns_of(group, columns) != columns:
                raise _Wider
            writer.write_table(arrow.Table.from_pylist(group, schema=schema), row_group_size=GROUP_ROWS)


def _groups(rows: Iterable[Result]) -> Iterator[list[Result]]:
    group: list[Result] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(to_line(row))
        if len(group) >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
