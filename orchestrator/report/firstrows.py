"""The first rows of a `results` artifact, however they are written: lines of JSON or Parquet, one file or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

from bigpipe.files import Damaged, open_regular, parse_json
from bigpipe.orchestrator.contract import Json
from bigpipe.tables import as_text


def first_results(folder: Path, limit: int) -> Iterator[tuple[str, str]]:
    """Yield prompt and text of the first rows of results. A row without a text says its error, or itself; a line that
    is no row is all text."""
    for row in islice(chain.from_iterable(map(_rows, _files(folder))), limit):
        found = row if isinstance(row, dict) else {"text": row}
        yield as_text(found.get("prompt", "")), as_text(found.get("text", found.get("error", found)))


def _files(folder: Path) -> list[Path]:
    names = ("results.jsonl", "results-*-of-*.jsonl", "results.parquet", "results-*-of-*.parquet")
    return next(filter(None, (sorted(folder.glob(name)) for name in names)), [])


def _rows(path: Path) -> Iterator[Json]:
    with suppress(OSError, Damaged), open_regular(path, links=True) as file:
        if path.suffix == ".parquet":
            if find_spec("pyarrow") is None:
                yield f"{path.name}: to look into it needs pyarrow: pip install 'bigpipe-ml[parquet]'"
                return
            import pyarrow as arrow
            import pyarrow.parquet as parquet

            with suppress(arrow.ArrowException):
                for batch in parquet.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=16):
                    yield from batch.to_pylist()
            return
        for line in file:
            try:
                yield parse_json(line)
            except ValueError:
                yield line.decode("utf-8", "replace")
