"""Bandwidths: measured once, remembered, plausible, and guessed where there is nothing to measure."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.placement import Speeds
from bigpipe.bigmodel.placement.speeds import measure, speeds_of
from bigpipe.machine import Machine

HERE = Machine(os.uname().nodename, cpus=1, memory=2**30, memory_available=2**30, disk_free=2**30)


def speeds_here(memo: Path) -> Speeds:
    found = speeds_of(HERE, memo)
    assert found is not None
    return found


def test_of_another_machine_nothing_is_known(tmp_path: Path) -> None:
    assert speeds_of(replace(HERE, name="elsewhere"), tmp_path) is None


def test_measured_once_and_remembered(tmp_path: Path) -> None:
    first = speeds_here(tmp_path)
    assert 1e8 < first.ram < 1e13
    assert 1e6 < first.disk < 1e12
    [file] = (tmp_path / "speeds").iterdir()
    assert not [left for left in tmp_path.iterdir() if left.is_file()]
    known = recall(file)
    remember(file, {**known, "speeds": {**known["speeds"], "ram": 123.0}})
    assert speeds_here(tmp_path).ram == 123.0


def test_another_gpu_is_measured_anew(tmp_path: Path) -> None:
    speeds_here(tmp_path)
    [file] = (tmp_path / "speeds").iterdir()
    known = recall(file)
    remember(file, {"key": [1, ["a GPU that is gone"]], "speeds": {**known["speeds"], "ram": 123.0}})
    assert speeds_here(tmp_path).ram != 123.0
    assert recall(file)["key"] == [1, []]


def test_a_damaged_memory_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "speeds").mkdir()
    speeds_here(tmp_path)
    [file] = (tmp_path / "speeds").iterdir()
    for harm in (lambda: file.write_text("{"), lambda: remember(file, {"key": [1, []], "speeds": {"warp": 9}})):
        harm()
        assert speeds_here(tmp_path).ram > 1e8
        assert recall(file)["speeds"].keys() == {"gpu", "link", "ram", "disk", "hop"}


def test_what_cannot_be_measured_keeps_its_default(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert measure(tmp_path / "file" / "in it", with_gpus=False).disk == Speeds().disk
    assert measure(tmp_path, with_gpus=False).gpu == Speeds().gpu
