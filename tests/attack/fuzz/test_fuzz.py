"""Each target over the inputs that are kept; and, at full numbers, with new ones that atheris makes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attack.fuzz.kept import kept
from attack.fuzz.targets import TARGETS

SECONDS = "BIGPIPE_FUZZ_SECONDS"
TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_that_was_kept_ends_in_a_value_or_an_error_of_ours(target):
    inputs = kept(target)
    assert inputs
    for data in inputs:
        TARGETS[target](data)


@pytest.mark.attack
@pytest.mark.parametrize("target", TARGETS)
def test_new_inputs_end_in_a_value_or_an_error_of_ours(target, tmp_path):
    """600 seconds each, or as many as BIGPIPE_FUZZ_SECONDS says. BIGPIPE_SEED repeats a run."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("needs atheris: pip install 'bigpipe-ml[fuzz]'")
    seconds = os.environ.get(SECONDS, "600")
    done = subprocess.run(
        [sys.executable, "-m", "attack.fuzz.drive", target, seconds, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "support/toys")])},
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    print(done.stderr[:300])  # noqa: T201  the seed
    assert done.returncode == 0, done.stderr[-4000:]
