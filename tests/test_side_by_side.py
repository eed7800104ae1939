"""The tests themselves: any number of workers gives the same numbers, and none of them takes the cores of another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigpipe.machine import cores, detect

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src"
ONE = """
import os, pytest

@pytest.mark.parametrize("name", "abcd")
def test_it(seed, name):
    told = [name, seed, os.environ.get("OMP_NUM_THREADS", ""), "PYTHONDONTWRITEBYTECODE" in os.environ]
    open("told", "a").write(" ".join(map(str, told)) + "\\n")
"""


def run(folder: Path, *arguments: str, **environ: str) -> tuple[list[list[str]], str]:
    """What each test was told, in order of their names, and what was printed."""
    folder.mkdir()
    (folder / "test_one.py").write_text(ONE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join(map(str, (TESTS, SOURCE)))
    kept_out = ("BIGPIPE_SEED", "OMP_NUM_THREADS", "PYTEST_ADDOPTS")
    around = {name: value for name, value in os.environ.items() if name not in kept_out and "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", *arguments],
        cwd=folder, env={**around, "PYTHONPATH": paths, **environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(line.split() for line in (folder / "told").read_text().splitlines()), done.stdout


def test_workers_repeat_what_a_seed_gave_and_share_out_the_cores(tmp_path: Path) -> None:
    told, said = run(tmp_path / "many", "-n", "2", PYTHONDONTWRITEBYTECODE="1")
    (seed,) = [line.removeprefix("BIGPIPE_SEED=") for line in said.splitlines() if "BIGPIPE_SEED" in line]
    again, _ = run(tmp_path / "one", BIGPIPE_SEED=seed)
    assert [each[:2] for each in told] == [each[:2] for each in again]
    assert len({number for _, number, *_ in told}) == 4
    assert {tuple(each[2:]) for each in told} == {(str(max(1, cores() // 2)), "False")}


def test_there_is_a_worker_for_each_core_and_none_without_memory(request: pytest.FixtureRequest) -> None:
    here = detect(Path.cwd())
    workers = request.config.hook.pytest_xdist_auto_num_workers(config=request.config)
    assert 1 <= workers <= here.cpus
    assert workers in (here.cpus, 1) or workers <= here.memory // (2 << 30)
