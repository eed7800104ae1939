"""Ranks that die are replaced, with what is unfinished; a prompt that they die of is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.inferring import start
from support.models import make_checkpoint

from bigpipe.orchestrator.contract.events import LogLine

KILLING = """
import os, signal, time
from pathlib import Path

def answer(model, rows, once=None):
    for row in rows:
        if row["prompt"] == "poison" and not (once and Path(once).exists()):
            if once:
                Path(once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return [{"length": len(row["prompt"])} for row in rows]
"""
PROMPTS = ["a", "bb", "poison", "dddddd", "ee", "f"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "opt", dtype="float16")


def answered(folder: Path, model: Path, ranks: int, **fields: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The results, and the lines that were told."""
    (folder / "mytasks.py").write_text(KILLING)
    lines: list[str] = []

    def report(event: Any) -> None:
        if isinstance(event, LogLine) and not event.detail:
            lines.append(event.line)

    start(folder, model, ranks, report, task="mytasks:answer", prompts=PROMPTS, batch_size=2, **fields)
    text = (folder / "work" / "out" / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()], lines


def test_a_rank_that_dies_is_replaced_and_its_batch_is_computed_again(tmp_path: Path, model: Path) -> None:
    found, lines = answered(tmp_path, model, 2, generation={"once": str(tmp_path / "died")})
    assert found == [{"index": i, "prompt": text, "length": len(text)} for i, text in enumerate(PROMPTS)]
    told = [line for line in lines if "started again" in line]
    assert len(told) == 1
    assert "was ended by SIGKILL; the ranks are started again (1 of 3)" in told[0]


def test_a_prompt_that_kills_its_rank_three_times_is_an_error_in_its_place(tmp_path: Path, model: Path) -> None:
    found, lines = answered(tmp_path, model, 1, max_errors=1)
    wanted: list[dict[str, Any]] = [{"index": i, "prompt": p, "length": len(p)} for i, p in enumerate(PROMPTS)]
    wanted[2] = {"index": 2, "prompt": "poison", "error": "RankDied: its rank was ended by SIGKILL, 3 times"}
    assert found == wanted
    assert len([line for line in lines if "started again" in line]) == 3
