"""Checkpoints made to hurt: each is refused with its place and a cure, at once, in little memory, and runs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attack.checkpoints import build, cases

TESTS = Path(__file__).parents[1]
SECONDS = 5


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[float, str, str, str, str]]:
    """Name of a checkpoint → what opening it gave, in one process under the watch of `attack.mutations`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = cases()
    for number, files in enumerate(found.values()):
        build(folder / f"{number:04}", files)
    done = subprocess.run(
        [sys.executable, "-m", "attack.checkpoints", str(folder)],
        env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: tuple(answer) for name, (_, *answer) in zip(found, told, strict=True)}


def test_there_are_many(answers):
    assert len(answers) >= 700


def test_each_is_refused_with_its_place_and_a_cure(answers):
    taken = {name: answer for name, answer in answers.items() if answer[2] not in ("InvalidCheckpoint", "NoWeights")}
    assert {answer[1] for answer in taken.values()} == {"a,b"}
    assert [name for name in taken if "tokenizer.json" not in name] == []  # nobody opened that one
    assert [
        name for name, (_, tensors, _, cause, cure) in answers.items() if not tensors and not (cause and cure)
    ] == []


def test_none_takes_long(answers):
    assert {name: answer[0] for name, answer in answers.items() if answer[0] > SECONDS} == {}
