"""Commands about one model without a recipe: the options of a kind, the recipe that does the same, the same key."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from support.models import make_checkpoint

from bigpipe.commandline.single import SINGLES, _fields, single
from bigpipe.orchestrator.recipe import Single, load_stage, stage_kinds

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "without-a-recipe.md").read_text(encoding="utf-8")


@pytest.fixture
def placed(workshop):
    shutil.copytree(ROOT / "models" / "quickstart", workshop.folder / "model")
    return workshop


def test_the_commands_of_the_page_work(placed):
    commands = re.findall(r"^\$ bigpipe (.*?)$", PAGE, re.MULTILINE)
    assert len(commands) == 5
    for line in commands:
        done = placed.command(*shlex.split(line))
        assert done.returncode == 0, (line, done.stderr)
    made = placed.folder
    assert (
        json.loads((made / "dist/nf4/config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    )
    assert not (made / "dist/nf4/config.json").is_symlink()
    assert (made / "dist/sharded/model.safetensors.index.json").exists()
    assert (made / "placement/placement.json").exists()


@pytest.mark.parametrize(
    "line", ["shard ./model --max-shard-size 100kB", "quantize model --scheme int8 --skip-modules lm_head -o dist/x"]
)
def test_the_recipe_that_is_printed_has_the_same_keys(placed, line):
    done = json.loads(placed.command(*line.split(), "--json").stdout)
    assert done["status"] == "succeeded"
    placed.manifest.write_text(placed.command(*line.split(), "--print-recipe").stdout)
    again = json.loads(placed.command("run", "recipe.yaml", "--json").stdout)
    assert {name: node["status"] for name, node in again["nodes"].items()} == dict.fromkeys(done["nodes"], "cached")
    assert {name: node["key"] for name, node in again["nodes"].items()} == {
        name: node["key"] for name, node in done["nodes"].items()
    }


def test_no_recipe_is_printed_that_would_be_refused(placed):
    done = placed.command("quantize", "model", "--scheme", "int9", "--print-recipe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: --scheme int9: 'int9' is not one of its values",
        "  did you mean 'int8'?",
    ]


def test_a_misspelt_directory_is_told_where_the_hub_cannot_be_asked(placed):
    done = placed.command("estimate", "modle", HF_ENDPOINT="http://127.0.0.1:9")
    assert "and there is no directory modle here" in done.stderr
    assert "did you mean 'model'?" in done.stderr
    assert (
        "there is no directory" not in placed.command("estimate", "org/other", HF_ENDPOINT="http://127.0.0.1:9").stderr
    )


def fields(command: str, *arguments: str):
    """What these options are as fields of the kind."""
    made = single(command)
    context = made.make_context(command, ["model", *arguments])
    return _fields(command, context.params)


@pytest.mark.parametrize(
    ("command", "arguments", "meant"),
    [
        ("shard", "--max-shard-size 2GB", {"max_shard_size": "2GB"}),
        ("quantize", "--scheme nf4 --bnb-4bit-use-double-quant", {"scheme": "nf4", "bnb_4bit_use_double_quant": True}),
        ("quantize", "--load-in-8bit --llm_int8_threshold 4", {"load_in_8bit": True, "llm_int8_threshold": 4}),
        ("quantize", "--skip-modules a --skip-modules 7", {"skip_modules": ["a", "7"]}),
        ("place", "--max-memory 0=22GiB --max-memory cpu=1GiB", {"max_memory": {"0": "22GiB", "cpu": "1GiB"}}),
        ("place", "--device-map auto", {"device_map": "auto"}),
        ("place", "--device-map =cpu --device-map h.0=0", {"device_map": {"": "cpu", "h.0": 0}}),
        ("generate", "--prompts Hello", {"task": "text-generation", "prompts": ["Hello"]}),
        ("generate", "--prompts *.none", {"task": "text-generation", "prompts": ["*.none"]}),
        ("generate", f"--prompts {__file__}", {"task": "text-generation", "prompts": __file__}),
        ("generate", "--prompts a.jsonl.", {"task": "text-generation", "prompts": ["a.jsonl."]}),
        ("finetune", "--data not-there.jsonl --eval-data none.CSV --max-steps 1",
         {"data": "not-there.jsonl", "eval_data": "none.CSV", "max_steps": 1}),
        ("finetune", "--data one --data two", {"data": ["one", "two"]}),
        ("generate", "--task scoring --prompts a=b", {"task": "scoring", "prompts": ["a=b"]}),
        ("generate", "--prompts a --generation do_sample=true --generation top_p=0.5",
         {"task": "text-generation", "prompts": ["a"], "generation": {"do_sample": True, "top_p": 0.5}}),
    ],
)  # fmt: skip
def test_options_are_the_fields_of_the_kind(command, arguments, meant):
    assert fields(command, *arguments.split()) == meant


def test_a_value_that_is_nested_too_deeply_is_a_text():
    assert fields("generate", "--max-new-tokens", deep := "[" * 20_000)["max_new_tokens"] == deep


def test_every_kind_that_is_here_has_its_options():
    offered = [name for name in SINGLES if single(name).offered]
    assert {"quantize", "shard", "place", "generate", "merge"} <= {*offered}
    for name in offered:
        shown = CliRunner().invoke(single(name), ["--help"]).output
        for field in load_stage(SINGLES[name][0]).params.model_fields:
            assert f"--{field.replace('_', '-')}" in shown, (name, field)
    assert "--adapter" in CliRunner().invoke(single("merge"), ["--help"]).output
    assert {kind for kind, _ in SINGLES.values()} & {*stage_kinds()} == {SINGLES[name][0] for name in offered}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "quantize model --scheme int9",
            "error: --scheme int9: 'int9' is not one of its values\n  did you mean 'int8'?",
        ),
        ("quantize model", "error: bigpipe quantize: quantize needs --scheme\n  add `--scheme …`\n"),
        ("quantize model --scheme nf4 --load-in-8bit", "scheme nf4 contradicts --load-in-8bit"),
        ("quantize model --scheme int8 --skip-modules h.9", "error: --skip-modules h.9: --skip-modules names modules"),
        ("quantize model --scheme int8 --trust a/b", "error: --trust a/b: 'a/b' is not a module name"),
        ("quantize ./nowhere --scheme int8", "error: ./nowhere: the directory ./nowhere is not there"),
        ("quantize model --scheme int8 --revision v1", "error: --revision v1: model is a directory"),
        ("quantize model --scheme int8 -o hf://x", "error: -o hf://x: hf://x does not name a repository"),
        ("shard model --max-shard-size 5", "error: --max-shard-size 5: 5 has no unit\n  write 5GB"),
        ("place model --max-memory cpu=8", "error: --max-memory cpu=8: 8 has no unit"),
        (
            "place model --max-memory 77=8GiB --max-memory cpu=8GiB",
            "error: --max-memory 77=8GiB: --max-memory names GPU",
        ),
        ("place model --max-memory 77=8GiB --max-memory cpu=8GiB", "give --max-memory 77=0"),
        ("generate model --prompts hi --generation top_q=1", "error: --generation top_q=1: `generate` has no argument"),
        ("generate model --prompts hi --prompts no --max-new-tokens a", "error: --max-new-tokens a: 'a' where a whole"),
        ("finetune model --data a.jsonl", "error: bigpipe finetune: either --max-steps or --num-train-epochs says"),
        ("merge model --adapter ./none", "error: --adapter ./none: the directory ./none is not there"),
        ("place model --device-map a --device-map b", "a b is more than one value"),
        ("merge model", "Missing option '--adapter'"),
        ("finetune model --data rows.jsonl --max-steps 1", "there is no file rows.jsonl"),
        ("finetune model --data a.jsonl --data b.jsonl --max-steps 1", "a.jsonl is a file, and there are 2 values"),
        ("shard nothing-like-it --dtype float16 --offline", "nothing-like-it"),
    ],
)
def test_what_is_wrong_is_told(placed, line, says):
    done = placed.command(*line.split())
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not re.search(r"bigpipe \w+:\d", done.stderr), "a line of a recipe that nobody wrote"


def test_a_result_that_stays_in_the_store_is_named_with_what_takes_it_out(placed):
    done = placed.command("quantize", "model", "--scheme", "int8", "--store", "my store")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    named = re.fullmatch(r"in the store: (.*); as files of yours: bigpipe (get quantize DIR --store 'my store')", last)
    assert named, last
    assert json.loads((placed.folder / named[1] / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    assert placed.command(*shlex.split(named[2])).returncode == 0
    assert (placed.folder / "DIR" / "config.json").exists()
    taken = placed.command("quantize", "model", "--scheme", "int8", "--store", "my store", "-o", "dist")
    assert "in the store" not in taken.stdout


def test_what_was_typed_is_in_the_answer_for_programs_too(placed):
    told = json.loads(placed.command("shard", "model", "--max-shard-size", "5", "--json").stdout)
    [error] = told["errors"]
    assert error["cause"] == "--max-shard-size 5: 5 has no unit"
    assert (error["file"], error["line"], error["column"]) == (None, None, None)
    annotated = placed.command("shard", "model", "--max-shard-size", "5", GITHUB_ACTIONS="true")
    assert "::error" not in annotated.stderr


def test_several_adapters_are_all_wired(placed):
    line = "merge model --adapter ./one --adapter ./two --weights 0.5 --weights 0.25 --print-recipe"
    stages = yaml.safe_load(placed.command(*line.split()).stdout)["stages"]
    merge = stages["merge"]
    assert merge["with"]["weights"] == [0.5, 0.25]
    assert [stages[name]["with"] for name in merge["inputs"]["adapter"]] == [{"path": "./one"}, {"path": "./two"}]
    alone = yaml.safe_load(placed.command(*line.split()[:4], "--print-recipe").stdout)["stages"]
    assert alone["merge"]["inputs"] == {"model": "download", "adapter": "adapter"}


def test_names_of_others_are_texts_in_the_recipe(tmp_path):
    from bigpipe.orchestrator.recipe import load_recipe

    make_checkpoint(tmp_path / "${x}: [y]")
    asked = Single(
        name="shard", kind="shard", models={"model": str(tmp_path / "${x}: [y]")}, fields={"dtype": "float16"},
        to="a: b #c",
    )  # fmt: skip
    recipe = load_recipe(tmp_path / "recipe", text=asked.manifest())
    assert recipe.nodes["download"].params.path == str(tmp_path / "${x}: [y]")
    assert recipe.nodes["save"].params.to == "a: b #c"


def test_what_is_there_already_is_told_with_the_options_there_are(placed):
    (placed.folder / "there").mkdir()
    (placed.folder / "there" / "mine.txt").write_text("mine")
    done = placed.command("shard", "model", "-o", "there")
    assert done.returncode == 2
    assert "is there already, with 1 file that bigpipe did not write" in done.stderr
    assert "choose another destination with -o" in done.stderr
    assert "overwrite" not in done.stderr
