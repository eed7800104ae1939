from __future__ import annotations

from pathlib import Path

import pytest
from support.launching import Launched, make_job

from bigpipe.errors import DoesNotFit
from bigpipe.orchestrator.events import LogLine, RankHello
from bigpipe.orchestrator.types import Launch

TWO = Launch(num_processes=2, explicit=frozenset({"num_processes"}))


def test_two_ranks_come_up_on_the_cpu_and_are_merged(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "talk"}))
    outcome = launched.run()
    assert (tmp_path / "work/scratch/plan").read_text() == "talk"
    assert (tmp_path / "work/out/merged").read_text() == "0/2 1/2"
    assert outcome.metrics["world_size"] == 2
    assert outcome.metrics["modules"] == []
    hellos = {(event.rank, event.world_size) for event in launched.of(RankHello)}
    assert hellos == {(0, 2), (1, 2)}
    printed = {event.rank for event in launched.of(LogLine) if event.line == "plain line"}
    assert printed == {0, 1}
    assert "[rank 1] plain line" in (tmp_path / "attempt/log.txt").read_text()
    assert outcome.peak_rss > 2 * 100 * 2**20


def test_one_rank_goes_the_same_way(tmp_path: Path) -> None:
    Launched(make_job(tmp_path, "RANKS")).run()
    assert (tmp_path / "work/out/merged").read_text() == "0/1"


def test_an_error_of_one_rank_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="rank 1: 20 GiB do not fit"):
        Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "fail", "rank": 1})).run()


def test_an_error_in_prepare_starts_no_rank(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the plan does not fit"):
        Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "fail-prepare"})).run()
    assert not (tmp_path / "attempt/accelerate.yaml").exists()
