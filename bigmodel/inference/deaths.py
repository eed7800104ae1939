"""Which rows were being computed as ranks died, and what follows: they are computed alone, and then given up.

rank-N/begun.jsonl   the rows of each batch that the rank began, a line each
deaths.json          row → how many deaths of ranks it was there for, and how the last one was
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigpipe.files import LogFile, parse_json, write_file

BEGUN, DEATHS = "begun.jsonl", "deaths.json"
SUSPECTED = 2
"""Deaths after which a row is computed alone."""
GIVEN_UP = 3
"""Deaths after which a row is not computed again: the last one was its own."""


@dataclass(slots=True)
class Deaths:
    """Of ranks, by the rows that were there."""

    counts: dict[int, int] = field(default_factory=dict)
    how: dict[int, str] = field(default_factory=dict)

    @property
    def suspected(self) -> set[int]:
        return {row for row, count in self.counts.items() if count >= SUSPECTED}

    @property
    def given_up(self) -> dict[int, str]:
        """Row → why, as its result says it."""
        return {
            row: f"RankDied: its rank {self.how[row]}, {count} times"
            for row, count in self.counts.items()
            if count >= GIVEN_UP
        }


def begin(log: LogFile, rows: Sequence[int]) -> None:
    """Note that these rows are about to be computed. Not synced: a power cut is nobody's fault here."""
    log.append(f"{json.dumps(list(rows))}\n".encode())


def note_deaths(folder: Path, lost: Mapping[int, str], finished: Callable[[int], bool]) -> Deaths:
    """Return the deaths so far, with those of the ranks in `lost` (and how each ended): they fall upon the rows that
    were begun and are not `finished`. Where none is lost, all is forgotten: whoever runs it again has a new try."""
    deaths = _read(folder / DEATHS) if lost else Deaths()
    for rank, how in lost.items():
        for row in {row for row in _begun(folder / f"rank-{rank}" / BEGUN) if not finished(row)}:
            deaths.counts[row] = deaths.counts.get(row, 0) + 1
            deaths.how[row] = how
    for file in folder.glob(f"rank-*/{BEGUN}"):
        file.unlink()
    write_file(folder / DEATHS, json.dumps([[row, deaths.counts[row], deaths.how[row]] for row in deaths.counts]))
    return deaths


def _read(path: Path) -> Deaths:
    found = parse_json(path.read_bytes()) if path.exists() else []
    return Deaths({row: count for row, count, _ in found}, {row: how for row, _, how in found})


def _begun(path: Path) -> Iterator[int]:
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"]\n"):
                    yield from parse_json(line)
