"""The clock does not matter: days and years off, or set back while a run goes on: the same keys, and no lock is stolen.

libfaketime answers in the kernel's place (`apt install faketime`): to the command and the processes it forks. What
files are marked with stays the kernel's time, as on a network drive whose server has another clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.workshop import Workshop, environment

RECIPE = """\
version: 1
name: clock
params: {seconds: 0.5}
stages:
  nap: {uses: sleep, with: {seconds: "${params.seconds}", tag: clock}}
  pour: {uses: pour, needs: [nap], with: {count: 3}}
  sip: {uses: sip, inputs: {first: pour}}
"""
SHIFTS = ["+1d", "-1d", "+10y", "-10y"]


def fake_clock(told: Path, shift: str) -> dict[str, str]:
    """The environment of a process whose clock is off by what the file `told` says at every moment."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime: apt install faketime")
    told.write_text(f"{shift}\n")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(told),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def start(workshop: Workshop, clock: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--json", *options],
        cwd=workshop.folder, env={**environment(workshop.folder), **clock}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> dict[str, tuple[str, str, str]]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    nodes = json.loads(out.splitlines()[-1])["nodes"]
    return {name: (node["status"], node["key"], node["digest"]) for name, node in nodes.items()}


def test_the_fake_clock_is_one(tmp_path):
    clock = fake_clock(tmp_path / "clock", "-10y")
    asked = [sys.executable, "-c", "import time; print(time.time())"]
    said = subprocess.run(asked, env={**os.environ, **clock}, capture_output=True, text=True, check=True).stdout
    assert float(said) < time.time() - 9 * 365 * 86400


@pytest.mark.parametrize(
    ("shift", "others"), [("-10y", 1), *(pytest.param(shift, 3, marks=pytest.mark.fault) for shift in SHIFTS)]
)
def test_keys_and_hits_are_those_of_any_other_clock(workshop, shift, others):
    workshop.manifest.write_text(RECIPE)
    clock = fake_clock(workshop.folder / "clock", shift)
    first = ended(start(workshop, clock))
    for other in ({}, clock, fake_clock(workshop.folder / "other", "+20y"))[:others]:
        again = ended(start(workshop, other))
        assert {status for status, _, _ in again.values()} == {"cached"}
        assert {name: facts[1:] for name, facts in again.items()} == {name: facts[1:] for name, facts in first.items()}
    assert sorted(workshop.ran) == ["nap", "pour", "sip"]
    (workshop.folder / "store" / "keys").rename(workshop.folder / "keys")
    assert {name: facts[1:] for name, facts in ended(start(workshop, {})).items()} == {
        name: facts[1:] for name, facts in first.items()
    }


@pytest.mark.fault
@pytest.mark.parametrize(("before", "later"), [("+1d", "-10y"), ("-10y", "+10y"), ("+0", "-1d")])
def test_a_clock_that_is_set_while_a_run_holds_its_lock(workshop, before, later):
    """The other run waits, whatever time it is there, and finds the work done."""
    workshop.manifest.write_text(RECIPE)
    clock = fake_clock(workshop.folder / "clock", before)
    holder = start(workshop, clock, "-p", "seconds=3")
    deadline = time.monotonic() + 60
    while not workshop.ran and time.monotonic() < deadline:
        time.sleep(0.05)
    waiting = [
        start(workshop, fake_clock(workshop.folder / f"clock-{shift}", shift), "-p", "seconds=3")
        for shift in (before, later)
    ]
    time.sleep(1)
    (workshop.folder / "clock").write_text(f"{later}\n")
    told = [ended(process) for process in (holder, *waiting)]
    assert {name: facts[1:] for name, facts in told[0].items()} == {name: facts[1:] for name, facts in told[1].items()}
    assert sorted(workshop.ran) == ["nap", "pour", "sip"]
