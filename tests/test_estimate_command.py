"""`bigpipe estimate` on the command line: accelerate's spelling, both kinds of output, the verdict."""

from __future__ import annotations

from pathlib import Path

MODEL = str(Path(__file__).parents[1] / "models/quickstart")


def test_dtypes_may_be_listed_as_accelerate_takes_them(workshop):
    for arguments in (["--dtypes", "float16", "int8", MODEL], [MODEL, "--dtypes", "float16", "--dtypes", "int8"]):
        found = workshop.json("estimate", *arguments)
        assert found["schema"] == "bigpipe.estimate/1"
        assert found["source"] == "headers"
        assert list(found["dtypes"]) == ["float16", "int8"]


def test_the_verdict_names_the_smallest_change(workshop):
    text = workshop.command("estimate", MODEL, "--dtypes", "float16", "--memory", "600MiB", "--batch-size", "64").stdout
    assert "no (" in text
    assert "--batch-size" in text.split("Smallest change")[1]


def test_an_unknown_model_is_four_different_errors_away_from_a_traceback(workshop):
    done = workshop.command("estimate", "nobody/nothing", "--offline")
    assert done.returncode == 75
    assert "Traceback" not in done.stderr
    assert workshop.command("estimate", MODEL, "--dtypes", "float17").returncode == 2
