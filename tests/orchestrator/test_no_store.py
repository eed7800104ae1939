"""Looking back where there is no store: what is so is said, nothing is made, and what stands there instead is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigpipe.errors import UsageError
from bigpipe.orchestrator import report

ANSWERS: dict[str, Callable[[Path], report.Inspection]] = {
    "ls": lambda store: report.list_store(store=store),
    "ps": lambda store: report.running(store=store),
    "gc": lambda store: report.collect_garbage(False, store=store),
    "gc --dry-run": lambda store: report.collect_garbage(True, store=store),
    "verify": lambda store: report.verify_store(False, store=store),
    "verify --repair": lambda store: report.verify_store(True, store=store),
}
REFUSALS: dict[str, Callable[[Path], Any]] = {
    "show": lambda store: report.show_run("last", store=store),
    "log": lambda store: list(report.log_lines("last", None, store)),
    "log --json": lambda store: report.logged("last", None, store=store),
    "diff": lambda store: report.diff_runs("last", "last", store=store),
    "report": lambda store: report.write_report((), store.parent / "report.html", store=store),
    "get": lambda store: report.get_artifact("quantize", store.parent / "out", store=store),
    "rm": lambda store: report.remove(["quantize"], False, store=store),
}


@pytest.mark.parametrize("command", ANSWERS)
def test_a_store_that_is_not_there_holds_nothing_and_stays_away(command: str, tmp_path: Path) -> None:
    told = ANSWERS[command](tmp_path / "store")
    assert f"there is no store at {tmp_path / 'store'}: the first run makes it" in told.text
    assert told.error is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", REFUSALS)
def test_what_stands_on_a_run_says_that_the_store_is_not_there(command: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run is on record: the store .*/store is not there") as refused:
        REFUSALS[command](tmp_path / "store")
    assert "--store DIR or BIGPIPE_HOME" in refused.value.cure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [*ANSWERS, *REFUSALS])
def test_a_file_in_place_of_the_store_is_no_store(command: str, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(UsageError, match="the store is no directory"):
        (ANSWERS | REFUSALS)[command](tmp_path / "store")
    assert (tmp_path / "store").read_text() == "mine"


@pytest.mark.parametrize("command", [*ANSWERS, *REFUSALS])
def test_a_folder_with_other_things_in_it_is_no_store(command: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/thesis.tex").touch()
    with pytest.raises(UsageError, match=r"is no store: it holds thesis\.tex"):
        (ANSWERS | REFUSALS)[command](tmp_path / "store")


@pytest.mark.parametrize("act", [
    lambda store: report.show_run("", store=store),
    lambda store: list(report.log_lines("", None, store)),
    lambda store: report.remove([""], False, store=store),
    lambda store: report.get_artifact("", store.parent / "out", store=store),
    lambda store: report.get_artifact("a", store.parent / "out", run="", store=store),
], ids=["show", "log", "rm", "get", "get --run"])  # fmt: skip
def test_an_empty_name_is_nobody_s(act: Callable[[Path], Any], workshop: Any) -> None:
    """Though every name starts with it, and one run is on record."""
    workshop.run("version: 1\nstages:\n  a: {uses: write, with: {text: hello}}\n")
    with pytest.raises(UsageError, match="''"):
        act(workshop.folder / "store")
    assert report.run_ids(workshop.folder / "store")
