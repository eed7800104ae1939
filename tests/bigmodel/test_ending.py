"""A rank that gets SIGTERM, as all do where one died: it writes down what is under way, and begins nothing more."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigpipe.bigmodel.inference import plan_work, read_log
from bigpipe.bigmodel.inference.ending import FINISH_SECONDS
from bigpipe.bigmodel.inference.records import LOG
from bigpipe.bigmodel.tasks import Row

ROWS = [Row(number, text, {"prompt": text}) for number, text in enumerate("abcdef")]
RANK = """
import sys, time
from functools import partial
from pathlib import Path
from bigpipe.bigmodel.inference import Bound, compute_share, side_by_side
from bigpipe.bigmodel.tasks import Answer

def answer(rows):
    sys.stdout.write("begun\\n")
    sys.stdout.flush()
    time.sleep(float(sys.argv[2]))
    return [Answer({"text": row.prompt}) for row in rows]

lanes = {"each": side_by_side} if sys.argv[3] == "lanes" else {}
compute_share(Path(sys.argv[1]), 0, 1, lambda: Bound(answer, computes=False, **lanes))
print("through", flush=True)
"""


@contextmanager
def rank(folder: Path, seconds: float, how: str = "alone", together: int = 1) -> Iterator[subprocess.Popen[str]]:
    """At work on its first batches of two rows, each of which takes so long."""
    plan_work(folder, ROWS, lambda row: 1, ranks=1, batch_size=2, together=lambda batching: together)
    command = [sys.executable, "-c", RANK, str(folder), str(seconds), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(together):
            assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def written(folder: Path) -> list[int]:
    return [record.index for record in read_log(folder / "rank-0" / LOG)]


@pytest.mark.parametrize(("how", "together"), [("alone", 1), ("lanes", 2)])
def test_what_is_under_way_is_written_down_and_nothing_more_begins(tmp_path: Path, how: str, together: int) -> None:
    with rank(tmp_path, 1.0, how, together) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert sorted(written(tmp_path)) == list(range(2 * together))


def test_what_takes_longer_is_not_waited_for(tmp_path: Path) -> None:
    with rank(tmp_path, 60.0) as process:
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert time.monotonic() - began >= FINISH_SECONDS * 0.9
    assert written(tmp_path) == []


def test_who_is_told_more_than_once_has_as_long(tmp_path: Path) -> None:
    """The system says it where a launcher died, and so does the command."""
    with rank(tmp_path, 1.0) as process:
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.returncode == -signal.SIGTERM
    assert sorted(written(tmp_path)) == [0, 1]


def test_nothing_is_left_behind_by_a_rank_that_is_through(tmp_path: Path) -> None:
    with rank(tmp_path, 0.01) as process:
        assert process.wait(30) == 0
    assert sorted(written(tmp_path)) == [row.index for row in ROWS]
