"""What a model's files set going is watched from outside, and named where it takes more than it may."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from subprocess import PIPE

import pytest

from bigpipe.errors import InvalidCheckpoint
from bigpipe.orchestrator.contract import Bounded, LogLine
from bigpipe.orchestrator.launch.bounds import Bounds
from bigpipe.trust import Limits, took_too_long

GROWS = """
import sys
print("ready", flush=True)
sys.stdin.readline()
taken = b"x" * 2**26
print("taken", flush=True)
sys.stdin.readline()
"""


def begun(number: int = 0, **limits: float) -> Bounded:
    return Bounded("n", "the tokenizer", os.getpid(), number, **{"seconds": 60, "memory": 2**40, **limits})


def test_other_events_are_no_business_of_it():
    assert not Bounds(Limits()).take(LogLine("n", "x"))


def test_too_many_seconds():
    bounds = Bounds(Limits(seconds=0.01))
    assert bounds.take(begun(seconds=0.01))
    sum(range(2_000_000))
    with pytest.raises(InvalidCheckpoint, match=r"the tokenizer takes more than 0\.01 s") as caught:
        bounds.check()
    assert "trust: {limits: {seconds: 0.02}}" in caught.value.cure


def test_who_waits_for_a_processor_may_wait_ten_times_as_long():
    assert [took_too_long(elapsed, busy, 2) for elapsed, busy in [(1, 1), (3, 0.9), (3, 1.1), (19, 0), (21, 0)]] == [
        False, False, True, False, True,
    ]  # fmt: skip
    bounds = Bounds(Limits())
    bounds.take(begun(seconds=0.2))
    time.sleep(0.3)
    bounds.check()


def test_too_many_bytes():
    """In a process of its own: of one that has grown old, the kernel may take back as much as is taken here."""
    bounds = Bounds(Limits(memory=2**20))
    with subprocess.Popen([sys.executable, "-c", GROWS], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        bounds.take(replace(begun(memory=2**20), pid=process.pid))
        bounds.check()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(InvalidCheckpoint, match=r"the tokenizer takes more than 1\.0 MiB") as caught:
            bounds.check()
        process.stdin.close()
    assert "trust: {limits: {memory: 2MiB}}" in caught.value.cure


def test_a_process_of_another_machine_is_not_taken_for_one_here():
    bounds = Bounds(Limits(), range(2))
    assert bounds.take(replace(begun(memory=1, seconds=0.001), rank=2))
    taken = b"x" * 2**24
    sum(range(2_000_000))
    bounds.check()
    assert len(taken) == 2**24


def test_what_has_come_to_its_end_is_free():
    bounds = Bounds(Limits())
    bounds.take(begun(1, seconds=0.001))
    bounds.take(begun(2))
    bounds.take(Bounded("n", "the tokenizer", os.getpid(), 1))
    time.sleep(0.01)
    bounds.check()
