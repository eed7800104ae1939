"""The two ends of a handover, in one process: what a second attempt may say, and what goes to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigpipe.errors import StageFailed
from bigpipe.passing import Handover, Inlet, OpenInlet, OpenOutlet, Outlet

A, B = ("a" * 64, 3), ("b" * 64, 3)
HEADS = {"file": (b"x", 3), "other": (b"y", 3)}


@pytest.fixture
def outlet(tmp_path: Path) -> OpenOutlet:
    """Has announced two files."""
    (tmp_path / "out" / "inner").mkdir(parents=True)
    for name in ("config.json", "file"):  # that one is not the file to come
        (tmp_path / "out" / "inner" / name).write_text("{}")
    Handover.make(tmp_path / "handover", lets_go=False)
    return again(tmp_path)


def again(tmp_path: Path) -> OpenOutlet:
    """A further attempt's end of the same handover."""
    outlet = OpenOutlet(tmp_path / "handover", tmp_path / "out")
    outlet.announce(HEADS)
    return outlet


def test_what_is_announced_and_all_else_is_seen_by_the_other_end(outlet: OpenOutlet, tmp_path: Path) -> None:
    inlet = OpenInlet(tmp_path / "handover", "a/consumer@x=1/2")
    assert inlet.arriving
    assert inlet.heads == HEADS
    assert {path.name: path.read_text() for path in (inlet.folder / "inner").iterdir()} == {
        "config.json": "{}",
        "file": "{}",
    }
    (outlet.out / "file").write_text("abc")
    outlet.finished("file", *A)
    assert inlet.sha256("file") == A[0]
    assert (inlet.folder / "file").read_text() == "abc"
    inlet.taken("file")
    assert outlet.handover.arrived().keys() == {"file", "inner/config.json", "inner/file"}


def test_a_second_attempt_announces_the_same(outlet: OpenOutlet, tmp_path: Path) -> None:
    again(tmp_path)
    with pytest.raises(StageFailed, match="announced other files"):
        OpenOutlet(tmp_path / "handover", tmp_path / "out").announce({"file": (b"x", 4)})


def test_a_second_attempt_gives_the_same_bytes(outlet: OpenOutlet, tmp_path: Path) -> None:
    outlet.finished("file", *A)
    again(tmp_path).finished("file", *A)
    with pytest.raises(StageFailed, match="file has other bytes"):
        again(tmp_path).finished("file", *B)


def test_ends_with_nobody_behind_them(tmp_path: Path) -> None:
    outlet, inlet = Outlet(), Inlet(tmp_path)
    outlet.announce(HEADS)
    outlet.begin("file")
    outlet.finished("file", *A)
    inlet.wait("file")
    inlet.taken("file")
    assert (outlet.waited_for, outlet.lets_go, inlet.arriving, inlet.heads) == (False, False, False, {})
    assert list(tmp_path.iterdir()) == []
