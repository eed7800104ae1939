"""Inference over ranks, killed: every record once, none lost, at most one chunk repeated for each kill."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import psutil
import pytest
from support.commanding import left_of
from support.launching import TESTS, wait_for
from support.models import make_checkpoint

from bigpipe.bigmodel.inference import read_log

SLOW = """
import os, time
def answer(model, rows, **options):
    begun = os.open(__file__ + ".begun", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(begun, b"." * len(rows))  # a byte for each row that is computed, whether or not it is written down
    os.close(begun)
    time.sleep(0.05)
    return [{"length": len(row["prompt"]), "seed": row["seed"]} for row in rows]
"""
KILLS = int(os.environ.get("BIGPIPE_TEST_KILLS", "300"))
RECORDS, CHUNK, RANKS = 1000, 4, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


@pytest.mark.fault
@pytest.mark.timeout(3 * 3600)
def test_kills_lose_and_repeat_nothing(tmp_path: Path, model: Path, seed: int) -> None:
    """A rank, the launcher or the command is killed while it starts or works. Ranks are replaced; what ended is taken
    up at another world size. Once all records are there, another thousand begins, until there were enough kills."""
    draw = random.Random(seed)  # noqa: S311
    kills = rounds = repeated = 0
    while kills < KILLS:
        folder, rounds = tmp_path / f"round-{rounds}", rounds + 1
        folder.mkdir()
        (folder / "mytasks.py").write_text(SLOW)
        prompts = [f"prompt {rounds} {number}" for number in range(RECORDS)]
        (folder / "fields.json").write_text(
            json.dumps({"task": "mytasks:answer", "prompts": prompts, "batch_size": CHUNK})
        )
        before, done = kills, False
        while not done:
            ranks = draw.randint(1, RANKS)
            killed, done = _live(folder, model, ranks, draw if kills < KILLS else None)
            kills += killed
            assert left_of(folder) == [], "a process outlived its command by 10 s"
        lines = [json.loads(line) for line in (folder / "work" / "out" / "results.jsonl").read_text().splitlines()]
        assert lines == [{"index": i, "prompt": p, "length": len(p), "seed": i} for i, p in enumerate(prompts)]
        again = (folder / "mytasks.py.begun").stat().st_size - RECORDS
        assert again <= CHUNK * (kills - before)
        repeated += again
    print(f"{kills} kills in {rounds} rounds of {RECORDS} records, {repeated} of them computed again")  # noqa: T201


@pytest.mark.parametrize("victim", ["command", "launch"])
def test_what_ranks_have_under_way_is_written_down_whoever_dies(tmp_path: Path, model: Path, victim: str) -> None:
    (tmp_path / "mytasks.py").write_text(SLOW.replace("0.05", "1.0"))
    fields = {"task": "mytasks:answer", "prompts": [f"prompt {number}" for number in range(40)], "batch_size": CHUNK}
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    ranks = [tmp_path / "work" / "scratch" / f"rank-{rank}" for rank in range(2)]
    with _command(tmp_path, model, len(ranks)) as process:
        wait_for(lambda: all(_begun(rank) for rank in ranks), 60)
        command = psutil.Process(process.pid)
        launcher = next(child for child in command.children() if child.cmdline()[-1] == "launch")
        (command if victim == "command" else launcher).kill()
        process.communicate(timeout=60)
    assert left_of(tmp_path) == []
    for rank in ranks:
        assert 0 < len(_begun(rank)) < 40 // CHUNK
        assert [record.index for record in read_log(rank / "records.jsonl")] == list(chain(*_begun(rank)))


def _begun(rank: Path) -> list[list[int]]:
    """The rows of each batch."""
    log = rank / "begun.jsonl"
    return list(map(json.loads, log.read_text().splitlines())) if log.exists() else []


def _command(folder: Path, model: Path, ranks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "support.inferring", folder, model, str(ranks), folder / "fields.json"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _live(folder: Path, model: Path, ranks: int, draw: random.Random | None) -> tuple[int, bool]:
    """Start the command and kill somebody, and again; return how often that was done, and whether it ended well."""
    with _command(folder, model, ranks) as process:
        assert process.stdout is not None
        killed = 0
        if draw is not None:
            if draw.random() < 0.5:  # while it starts
                time.sleep(draw.uniform(0, 6))
            elif _await_progress(process):
                time.sleep(draw.uniform(0, 1.5))
            killed += _kill_somebody(process, draw)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        while draw is not None and not _ended(process, draw.uniform(1, 10)):  # a rank that was killed is replaced
            killed += _kill_somebody(process, draw)
        return killed, process.wait(timeout=600) == 0


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def _await_progress(process: subprocess.Popen[bytes]) -> bool:
    """Has something been finished? Returns once it has, or will not."""
    assert process.stdout is not None
    events = map(json.loads, process.stdout)
    return any(event["event"] == "progress" and event["done"] for event in events)


def _kill_somebody(process: subprocess.Popen[bytes], draw: random.Random) -> bool:
    """Return whether somebody was there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        command = psutil.Process(process.pid)
        if process.poll() is None:
            draw.choice([command, *command.children(recursive=True)]).kill()
            return True
    return False
