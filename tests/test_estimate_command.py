"""`bigpipe estimate` on the command line: accelerate's spelling, both kinds of output, the verdict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bigpipe
from bigpipe.commandline.questions import estimate
from bigpipe.errors import UsageError

MODEL = str(Path(__file__).parents[1] / "models/quickstart")


def test_dtypes_may_be_listed_as_accelerate_takes_them(workshop):
    for arguments in (["--dtypes", "float16", "int8", MODEL], [MODEL, "--dtypes", "float16", "--dtypes", "int8"]):
        found = workshop.json("estimate", *arguments)
        assert found["schema"] == "bigpipe.estimate/1"
        assert found["source"] == "headers"
        assert list(found["dtypes"]) == ["float16", "int8"]


@pytest.mark.parametrize(("typed", "dtypes"), [
    ("M --dtypes int8 bf16", ["int8", "bf16"]),
    ("--dtypes HALF int8 M", ["HALF", "int8"]),
    ("--dtypes=float16 int8 M", ["float16", "int8"]),
    ("M --dtypes float17 nf4", ["float17", "nf4"]),
    ("--dtypes nf4 M --dtypes=int8", ["nf4", "int8"]),
])  # fmt: skip
def test_what_is_called_as_others_call_a_dtype_is_no_model(typed, dtypes):
    found = estimate.make_context("estimate", typed.split()).params
    assert (list(found["dtypes"]), found["models"]) == (dtypes, ("M",))


def test_a_dtype_that_others_call_otherwise_is_named():
    with pytest.raises(UsageError) as caught:
        bigpipe.estimate(MODEL, dtypes=["int8", "BF16"])
    assert caught.value.cure == "did you mean 'bfloat16'?"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_the_command_loads_neither_torch_nor_pydantic(more):
    code = (
        "import sys; from bigpipe.cli import cli; "
        f"cli(['estimate', {MODEL!r}, *{more!r}], standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_the_verdict_names_the_smallest_change(workshop):
    text = workshop.command("estimate", MODEL, "--dtypes", "float16", "--memory", "600MiB", "--batch-size", "64").stdout
    assert "no (" in text
    assert "--batch-size" in text.split("Smallest change")[1]


def test_an_unknown_model_is_four_different_errors_away_from_a_traceback(workshop):
    done = workshop.command("estimate", "nobody/nothing", "--offline")
    assert done.returncode == 75
    assert "Traceback" not in done.stderr
    assert workshop.command("estimate", MODEL, "--dtypes", "float17").returncode == 2


def test_without_its_head_the_figures_are_accelerates(workshop):
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    with init_empty_weights():
        total, (largest, _) = calculate_maximum_sizes(
            AutoModel.from_config(AutoConfig.from_pretrained(MODEL), dtype="float32")
        )
    found = workshop.json("estimate", MODEL, "--head", "none")["dtypes"]
    for dtype, share in (("float32", 1), ("float16", 2), ("int8", 4), ("int4", 8)):
        adam = max(estimate_training_usage(total, dtype).values())
        theirs = {"largest_layer": largest / share, "total_size": total / share}
        assert found[dtype]["accelerate"] == {**theirs, "training_using_adam": None if adam == -1 else adam}
    assert "Training using Adam" in workshop.command("estimate", MODEL, "--head", "none").stdout


def test_models_side_by_side_and_explained(workshop):
    text = workshop.command("estimate", MODEL, MODEL, "--compare", "--dtypes", "nf4", "--train", "lora").stdout
    assert text.splitlines()[0].startswith("2 models")
    assert text.count(MODEL) == 4 + 2  # two have notes: their 256 positions are fewer than 2048
    assert workshop.command("estimate", MODEL, "--compare").returncode == 2
    text = workshop.command("estimate", MODEL, "--explain", "--lora-targets", "q_proj,v_proj").stdout
    assert "targets q_proj, v_proj" in text
    assert len(workshop.json("estimate", MODEL, MODEL, "--compare")["estimates"]) == 2


def test_a_name_that_may_have_been_a_directory_says_that_there_is_none(workshop):
    (workshop.folder / "models/quickstart").mkdir(parents=True)
    done = workshop.command("estimate", "models/quickstrat", "--offline")
    assert "there is no directory models/quickstrat here\n  did you mean 'models/quickstart'? Else run" in done.stderr
    done = workshop.command("quantize", "models/quickstrat", "--scheme", "int8", "--offline")
    assert "there is no directory models/quickstrat here\n  did you mean 'models/quickstart'? Else run" in done.stderr
    assert "directory" not in workshop.command("estimate", "https://huggingface.co/a/b", "--offline").stderr
