"""A training that is killed goes on from its last state, and gives what one gives that nobody killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.models import make_checkpoint
from support.tuning import STEPS, train, write_rows

import bigpipe

pytest.importorskip("peft")
ROWS = ["the cat sat on the mat", "hello world", "paris is in france", "a cat is in paris", "on and on", "a mat!"]
KILLED_AFTER = {0: 0, 3: 0, 4: 2, 9: 4, STEPS: 8}
"""Before the first step, between two states, at a state, late, and when only the adapter is left to be written → the
step from which that attempt went on: the last state before it, of every second step."""
FAULT = pytest.mark.fault


@pytest.mark.parametrize(
    ("scheme", "kills", "goes_on"),
    [
        (None, {3: 0}, 2),
        *(pytest.param(scheme, KILLED_AFTER, STEPS, marks=FAULT) for scheme in (None, "int8", "nf4")),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, dict) else None,
)
def test_kills_change_nothing(tmp_path: Path, scheme: str | None, kills: dict[int, int], goes_on: int) -> None:
    model = make_checkpoint(tmp_path / "model", "opt")
    if scheme is not None:
        bigpipe.quantize_checkpoint(model, tmp_path / scheme, scheme=scheme)
        model = tmp_path / scheme
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    train(tmp_path / "whole", model, rows)
    begun = {step: train(tmp_path / "killed", model, rows, kill_after=step)[0] for step in kills}
    assert begun == kills
    assert train(tmp_path / "killed", model, rows)[0] == goes_on
    whole, killed = ((tmp_path / side / "rank-0" / "adapter").iterdir() for side in ("whole", "killed"))
    assert {path.name: path.read_bytes() for path in whole} == {path.name: path.read_bytes() for path in killed}
    measured = [json.loads((tmp_path / side / "rank-0" / "measured.json").read_bytes()) for side in ("whole", "killed")]
    assert measured[0]["losses"] == measured[1]["losses"]
    assert len(measured[0]["losses"]) == STEPS
