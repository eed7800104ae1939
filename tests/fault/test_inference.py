"""Inference over ranks, killed: every record once, none lost, none repeated but a chunk per rank that was killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.commanding import left_of
from support.launching import TESTS
from support.models import make_checkpoint

from bigpipe.bigmodel.inference import read_log

SLOW = """
import time
def answer(model, rows, **options):
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
    kills = rounds = 0
    while kills < KILLS:
        folder, rounds = tmp_path / f"round-{rounds}", rounds + 1
        folder.mkdir()
        (folder / "mytasks.py").write_text(SLOW)
        prompts = [f"prompt {rounds} {number}" for number in range(RECORDS)]
        (folder / "fields.json").write_text(
            json.dumps({"task": "mytasks:answer", "prompts": prompts, "batch_size": CHUNK})
        )
        redone, done = 0, False
        while not done:
            ranks = draw.randint(1, RANKS)
            killed, lost, done = _live(folder, model, ranks, draw if kills < KILLS else None)
            kills, redone = kills + killed, redone + lost
            assert left_of(folder) == [], "a process outlived its command by 10 s"
        lines = [json.loads(line) for line in (folder / "work" / "out" / "results.jsonl").read_text().splitlines()]
        assert lines == [{"index": i, "prompt": p, "length": len(p), "seed": i} for i, p in enumerate(prompts)]
        logs = (folder / "work" / "scratch").glob("rank-*/records.jsonl")
        assert len([record for log in logs for record in read_log(log)]) <= RECORDS + CHUNK * redone
    print(f"{kills} kills in {rounds} rounds of {RECORDS} records")  # noqa: T201


def _live(folder: Path, model: Path, ranks: int, draw: random.Random | None) -> tuple[int, int, bool]:
    """Start the command and kill somebody, and again; return how often that was done, how many batches that may have
    cost, and whether it ended well. A rank's death costs the batch that it had, as the others write theirs down; that
    of the command or the launcher, which takes all ranks along, one of each."""
    command = [sys.executable, "-m", "support.inferring", folder, model, str(ranks), folder / "fields.json"]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        killed = lost = 0

        def kill() -> None:
            nonlocal killed, lost
            victim = _kill_somebody(process, draw)
            killed += victim is not None
            lost += 0 if victim is None else 1 if victim == "rank" else ranks

        if draw is not None:
            if draw.random() < 0.5:  # while it starts
                time.sleep(draw.uniform(0, 6))
            elif _await_progress(process):
                time.sleep(draw.uniform(0, 1.5))
            kill()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        while draw is not None and not _ended(process, draw.uniform(1, 10)):  # a rank that was killed is replaced
            kill()
        return killed, lost, process.wait(timeout=600) == 0


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def _await_progress(process: subprocess.Popen[bytes]) -> bool:
    """Has something been finished? Returns once it has, or will not."""
    assert process.stdout is not None
    events = map(json.loads, process.stdout)
    return any(event["event"] == "progress" and event["done"] for event in events)


def _kill_somebody(process: subprocess.Popen[bytes], draw: random.Random) -> str | None:
    """Return the last word of what started it; None where nobody was there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        command = psutil.Process(process.pid)
        if process.poll() is None:
            victim = draw.choice([command, *command.children(recursive=True)])
            started = victim.cmdline()
            victim.kill()
            return started[-1] if started else ""
    return None
