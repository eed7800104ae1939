"""Small things of the manifest: times, names, variables."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from bigpipe.names import did_you_mean, listed
from bigpipe.orchestrator.contract import Launch
from bigpipe.orchestrator.recipe.manifest import parse_duration, refused_variable


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), ("1h 5min 3s", 3903), (12, 12), (0.5, 0.5)],
)
def test_durations(written: str | float, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize("written", ["", " ", "5x", "m", "30m1h", "-3s", 0, -1, "0s", True, None, 1e12, "1h1h"])
def test_what_is_no_duration(written: str) -> None:
    with pytest.raises(ValueError, match=r"is not a time; write 90s|is no time to wait; it must be"):
        parse_duration(written)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(1, 59))
def test_durations_add(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "PATH", "path", "BASH_ENV",
     "DYLD_INSERT_LIBRARIES", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_CONFIG_FILE", "BIGPIPE_HOME", "GIT_SSH_COMMAND"],
)  # fmt: skip
def test_variables_that_a_manifest_may_not_set(name: str) -> None:
    assert refused_variable(name)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "HF_HOME", "MY_SETTING"])
def test_variables_that_it_may_set(name: str) -> None:
    assert not refused_variable(name)


def test_launch_knows_what_was_written() -> None:
    launch = Launch.model_validate({"num_processes": 1, "config_file": "a.yaml"})
    assert launch.model_fields_set == {"num_processes", "config_file"}
    assert launch.num_machines == 1


def test_words_for_people() -> None:
    assert (listed([]), listed("a"), listed("ab"), listed("abc", "or")) == ("", "a", "a and b", "a, b or c")
    assert did_you_mean("skip_module", ["skip_modules", "scheme"]) == "did you mean 'skip_modules'?"
    assert did_you_mean("Distributed_Infer", ["distributed-infer"]) == "did you mean 'distributed-infer'?"
    assert did_you_mean("x", ["alpha", "beta"], otherwise="it has") == "it has alpha and beta"
    assert did_you_mean("x", ["alpha", "beta"]) == ""
    assert did_you_mean("x", map(str, range(100)), otherwise="it has") == ""
