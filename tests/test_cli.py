"""The command as its users type it: output, exit codes, errors with place and cure."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.workshop import environment

import bigpipe
from bigpipe.cli import cli
from bigpipe.commandline import single
from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract.events import NodeStarted
from bigpipe.orchestrator.recipe.initial import initialise
from bigpipe.orchestrator.report import write_graph, write_report

RECIPE = """\
version: 1
name: greeting
params: {text: hello}
stages:
  a:
    uses: write
    with: {text: "${params.text}"}
  b: {uses: join, inputs: {first: a}}
"""


@pytest.fixture
def greeting(workshop):
    workshop.manifest.write_text(RECIPE)
    return workshop


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("run recipe.yaml --store --json", "--store is without its value: --json is an option"),
        ("verify --reproduce --json", "--reproduce is without its value: --json is an option"),
        ("run recipe.yaml --events --offline", "--events is without its value: --offline is an option"),
    ],
)
def test_an_option_is_nobodys_value(greeting, line: str, told: str):
    done = greeting.command(*line.split())
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"error: {told}")


def test_what_may_stand_after_an_option_may(greeting):
    assert greeting.command("run", "recipe.yaml", "--events=--json", "--offline").returncode == 0
    assert (greeting.folder / "--json").exists()
    assert "no remote store is named" in greeting.command("status", "recipe.yaml", "--remote", "--json").stderr


def test_why_of_what_is_cached_says_what_changed_when_it_was_made_and_nothing_else(greeting):
    for text in ("hello", "goodbye"):
        greeting.manifest.write_text(RECIPE.replace("hello", text))
        assert greeting.command("run", "recipe.yaml").returncode == 0
    assert "params.text hello → goodbye" in greeting.command("why", "recipe.yaml", "a").stdout
    greeting.manifest.write_text(RECIPE)
    assert greeting.command("why", "recipe.yaml", "a").stdout == "a: cached\n"


def test_a_token_is_neither_taken_nor_shown(greeting):
    token = "hf_" + "aB3" * 11
    done = greeting.command("run", "recipe.yaml", "-p", f"text=my {token}", "--json")
    assert done.returncode == 2
    assert "would be recorded" in done.stderr
    assert token not in done.stdout + done.stderr


def test_every_command_about_a_recipe_takes_its_parameters_and_can_leave_the_network_alone():
    """Also where a message asks for it: `give it one, or pass -p`, `--offline goes on with what is cached`."""
    takes = {name: {option.name for option in command.params} for name, command in cli.commands.items()}
    about = {name for name, options in takes.items() if options & {"manifest", "manifests"}}
    assert {name for name in about if "params" not in takes[name]} == set()
    assert {name for name in about if "offline" not in takes[name]} == {
        "validate", "graph", "schema",  # these ask nobody
        "push", "pull",  # these are for asking
    }  # fmt: skip


def test_a_home_that_a_shell_left_standing_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").touch()
    paths = [
        (name, option.name, option.type.convert("~/x", option, None))
        for name, command in cli.commands.items() for option in command.params
        if isinstance(option.type, click.Path)
    ]  # fmt: skip
    assert {option for _, option, _ in paths} >= {"store", "manifest", "out", "events", "key", "also", "directory"}
    assert [each for each in paths if each[2] != tmp_path / "x"] == []


def test_a_stream_is_no_path():
    for name, typed in {
        "run": ["r.yaml", "--events", "-"],
        "graph": ["-"],
        "export": ["github", "r.yaml", "-o-"],
    }.items():
        with pytest.raises(UsageError, match="no stream is read or written here"):
            cli.commands[name].make_context(name, typed)


def test_a_graph_is_not_drawn_over_its_recipe(greeting):
    done = greeting.command("graph", "recipe.yaml", "--format", "svg", "-o", "./recipe.yaml")
    assert (done.returncode, greeting.manifest.read_text()) == (2, RECIPE)
    assert "is the recipe itself" in done.stderr


@pytest.mark.parametrize("words", [("graph", "recipe.yaml", "--format", "svg"), ("export", "github", "recipe.yaml")])
@pytest.mark.parametrize("out", [".", ""])
def test_a_file_to_write_is_no_directory(greeting, words, out):
    done = greeting.command(*words, "-o", out)
    assert done.returncode == 2
    assert "is a directory" in done.stderr
    assert "name another file with -o" in done.stderr


def test_what_is_no_file_stays_what_it_is(greeting, monkeypatch):
    monkeypatch.chdir(greeting.folder)
    greeting.run()
    recipe = bigpipe.load_manifest(greeting.manifest)
    writing = {
        "pipe.svg": lambda out: write_graph(recipe, out),
        "pipe.dot": lambda out: write_graph(recipe, out, "dot"),
        "pipe.md": lambda out: write_report(["last"], out),
        "pipe": lambda out: cli.main(["export", "github", "recipe.yaml", "-o", str(out)], standalone_mode=False),
    }
    for name, write in writing.items():
        os.mkfifo(name)
        reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
        write(Path(name))
        assert os.read(reader, 10), name
        os.close(reader)
        assert Path(name).is_fifo(), name
        Path(name).unlink()
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(name)
            with pytest.raises(UsageError, match="is no file"):
                write(Path(name))
            assert Path(name).is_socket(), name


TWICE = """\
version: 1
stages:
  download: {uses: download, with: {path: model}}
  shard: {uses: shard, inputs: download, matrix: {size: [1GB, 2GB]}, with: {max_shard_size: "${matrix.size}"}}
  save: {uses: save, inputs: shard, with: {to: dist}}
  other: {uses: save, inputs: {model: download}, with: {to: dist/report}}
  apart: {uses: save, inputs: {model: download}, with: {to: elsewhere}}
"""


def test_destinations_that_two_nodes_share_are_told_by_validate(workshop):
    workshop.manifest.write_text(TWICE)
    done = workshop.command("validate", "recipe.yaml")
    told = re.findall(r"^(\S+): error\[BP106\]: (\S+) would write.*; (.*)$", done.stderr, re.MULTILINE)
    assert [(place, node) for place, node, _ in told] == [
        ("recipe.yaml:5:48", "save@size=2GB"), ("recipe.yaml:6:61", "other")
    ]  # fmt: skip
    assert "dist/${matrix.size}" in told[0][2]
    workshop.manifest.write_text(TWICE.replace("to: dist}", 'to: "dist/${matrix.size}"}'))
    assert workshop.command("validate", "recipe.yaml").returncode == 0


def test_help_of_every_command_has_an_example(workshop):
    listing = workshop.command("--help").stdout
    commands = [line.split()[0] for line in listing.split("Commands:")[1].splitlines() if line.strip()]
    assert len(commands) == 28 + sum(one.offered for one in single.COMMANDS)
    assert {"quantize", "shard", "place", "generate", "merge"} < {*commands}
    for command in ("run", "plan", "verify"):
        assert "Example: bigpipe" in workshop.command(command, "--help").stdout


def test_run_prints_a_table_on_stdout_and_talks_on_stderr(greeting):
    done = greeting.command("run", "recipe.yaml")
    assert done.returncode == 0
    assert "succeeded" in done.stdout
    assert "a" in done.stderr
    again = greeting.command("run", "recipe.yaml")
    assert again.stdout.count("cached") == 2


def test_why_says_which_value_changed_and_where(greeting):
    greeting.command("run", "recipe.yaml")
    asked = greeting.command("why", "recipe.yaml", "a", "-p", "text=bye")
    assert "params.text hello → bye   (recipe.yaml:7:" in asked.stdout
    greeting.command("run", "recipe.yaml", "-p", "text=bye")
    after = greeting.command("why", "recipe.yaml", "a", "-p", "text=bye")
    assert "cached" in after.stdout
    assert "params.text hello → bye" in after.stdout


def test_status_exit_code(greeting):
    assert greeting.command("status", "recipe.yaml", "--exit-code").returncode == 10
    greeting.command("run", "recipe.yaml")
    assert greeting.command("status", "recipe.yaml", "--exit-code").returncode == 0
    stale = greeting.command("status", "recipe.yaml", "--exit-code", "-p", "text=good bye")
    cure = stale.stderr.strip().splitlines()[-1].strip()
    assert cure == f"bigpipe run {greeting.manifest} -p 'text=good bye'"
    assert greeting.json("status", "recipe.yaml")["nodes"]["b"] == {"action": "cached", "reason": "", "shared": None}


def test_plan_as_json(greeting):
    plan = greeting.json("plan", "recipe.yaml")
    assert plan["schema"] == "bigpipe.plan/1"
    assert plan["fits"] is True
    assert plan["nodes"]["a"]["forecast"]["metrics"] == {"characters": 5}
    assert plan["nodes"]["b"]["action"] == "run"


def test_plan_for_another_machine(greeting):
    machine = greeting.json("plan", "recipe.yaml")["machine"]
    (greeting.folder / "small.json").write_text(json.dumps({**machine, "name": "small", "memory": 10}))
    done = greeting.command("plan", "recipe.yaml", "--machine", "small.json")
    assert done.returncode == 4
    assert "small has 10 B" in done.stderr


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("version: 1\nname: x\nstages:\n  a: {uses: write, with: {txt: hi}}\n", 2, "did you mean 'text'"),
        ("version: 1\nname: x\nstages:\n  a: {uses: flaky, with: {fatal: true}}\n", 6, "buy another toy"),
        ("version: 1\nname: x\nstages:\n  a: {uses: write, with: {misfit: true}}\n", 4, "-p device=cpu"),
        ("version: 1\nname: x\nstages:\n  a: {uses: write, gates: ['characters > 9']}\n", 3, "characters > 9: 5"),
        ("version: 1\nname: x\nstages:\n  a: {uses: flaky, with: {times: 9}}\n", 75, "the toy is tired"),
    ],
)
def test_exit_codes(workshop, text, code, message):
    workshop.manifest.write_text(text)
    done = workshop.command("run", "recipe.yaml")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_usage_errors_exit_with_2(workshop):
    for arguments in (["run", "nothing.yaml"], ["run"], ["nonsense"], ["show", "20990101"], ["run", "x", "-p", "y"]):
        done = workshop.command(*arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr


def test_an_unknown_node_is_named_with_what_it_could_have_been(greeting):
    done = greeting.command("run", "recipe.yaml", "bb")
    assert done.returncode == 2
    assert "did you mean 'b'" in done.stderr


def test_annotations_for_github(workshop):
    workshop.manifest.write_text("version: 1\nname: x\nstages:\n  a: {uses: write, with: {txt: hi}}\n")
    done = workshop.command("validate", "recipe.yaml", GITHUB_ACTIONS="true")
    assert "::error file=recipe.yaml,line=4,col=" in done.stderr


LOOKED_INTO = """\
import sys
sys.addaudithook(lambda event, given: event == "os.scandir" and print(given[0]))
from bigpipe.orchestrator.commands import validate
from pathlib import Path
assert not validate([Path("recipe.yaml")])
"""


def test_validate_looks_into_no_directory_that_a_recipe_names(workshop):
    """It may be a home, or a disk: walking through it would take minutes."""
    workshop.manifest.write_text("version: 1\nname: x\nstages:\n  a: {uses: download, with: {path: ..}}\n")
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_INTO],
        cwd=workshop.folder, env=environment(workshop.folder), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(workshop.folder.parent) not in done.stdout.splitlines()
    assert str(workshop.folder / "..") not in done.stdout.splitlines()


def test_graph_formats(greeting):
    assert "first: a" in greeting.command("graph", "recipe.yaml").stdout
    assert 'n0["a"]' in greeting.command("graph", "recipe.yaml", "--format", "mermaid").stdout
    assert '"a" -> "b";' in greeting.command("graph", "recipe.yaml", "--format", "dot").stdout


def test_looking_back(greeting):
    greeting.command("run", "recipe.yaml")
    greeting.command("run", "recipe.yaml", "-p", "text=bye")
    assert "text = bye" in greeting.command("show").stdout
    runs = greeting.json("ls")["runs"]
    assert [run["status"] for run in runs] == ["succeeded", "succeeded"]
    difference = greeting.command("diff", runs[0]["run"], runs[1]["run"]).stdout
    assert "params.text hello → bye" in difference
    assert greeting.command("log", "last", "a").returncode == 0


def test_gc_keeps_what_the_recipe_names(greeting):
    greeting.command("run", "recipe.yaml")
    greeting.command("run", "recipe.yaml", "-p", "text=bye")
    assert greeting.json("gc", "--older-than", "0d", "--dry-run")["freed"]
    greeting.command("gc", "--older-than", "0d", "--yes")
    assert greeting.command("run", "recipe.yaml", "-p", "text=bye").stdout.count("cached") == 2
    assert greeting.command("verify").returncode == 0


def test_verify_finds_a_changed_byte_and_repair_makes_it_again(greeting):
    result = greeting.json("run", "recipe.yaml")
    path = (greeting.folder / result["nodes"]["b"]["path"] / "text").resolve()
    path.chmod(0o600)
    path.write_text("hullo")
    path.chmod(0o400)
    done = greeting.command("verify")
    assert done.returncode == 6
    assert "damaged" in done.stdout
    greeting.command("verify", "--repair")
    assert greeting.command("run", "recipe.yaml").returncode == 0
    assert greeting.command("verify").returncode == 0


def test_lock_check_and_locked_runs(greeting):
    assert greeting.command("lock", "recipe.yaml").returncode == 0
    assert greeting.command("lock", "recipe.yaml", "--check").returncode == 0
    assert greeting.command("run", "recipe.yaml", "--locked").returncode == 0
    assert greeting.command("lock", "recipe.yaml", "--check", "-p", "text=bye").returncode == 10
    refused = greeting.command("run", "recipe.yaml", "--locked", "-p", "text=bye")
    assert refused.returncode == 10
    assert "hello → bye" in refused.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_onto_a_full_disk_is_an_error_and_no_traceback(workshop):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "bigpipe", "kinds"], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=environment(workshop.folder),
        )  # fmt: skip
    assert done.returncode == 6
    assert done.stderr.startswith("error: the disk is full: /dev/full: ")


def test_a_run_goes_on_when_nobody_reads_what_it_says(greeting):
    """As in `bigpipe run recipe.yaml 2>&1 | head -1`."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml"], cwd=greeting.folder, stdout=subprocess.DEVNULL,
        stderr=writing, env=environment(greeting.folder),
    )  # fmt: skip
    os.close(writing)
    os.close(reading)
    assert process.wait(60) == 0
    assert {item["action"] for item in greeting.json("status", "recipe.yaml")["nodes"].values()} == {"cached"}


def test_a_reporter_that_breaks_ends_the_run_and_what_runs(workshop):
    class Broken:
        started = 0

        def report(self, event):
            self.started += isinstance(event, NodeStarted)
            if self.started == 2:
                raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        workshop.run(
            "version: 1\nname: r\nstages:\n"
            "  a: {uses: sleep, with: {seconds: 60}}\n  b: {uses: sleep, with: {seconds: 61}}\n",
            reporter=Broken(),
        )
    assert {item["action"] for item in workshop.json("status", "recipe.yaml")["nodes"].values()} == {"run"}


def test_every_failure_of_a_run_is_told_with_its_node(workshop) -> None:
    stage = "  {0}: {{uses: flaky, with: {{fatal: true, times: {1}}}}}\n"
    workshop.manifest.write_text("version: 1\nstages:\n" + stage.format("one", 1) + stage.format("two", 2))
    done = workshop.command("run", "recipe.yaml", "--keep-going")
    assert done.returncode == 6
    assert re.findall(r"^error: (?:\S+: )?(one|two): the toy is broken", done.stderr, re.MULTILINE) == ["one", "two"]


def test_validate_goes_on_after_a_file_that_is_not_there(workshop) -> None:
    workshop.manifest.write_text("version: 1\nstages: {}\n")
    done = workshop.command("validate", "recipes.yml", "nowhere/recipe.yaml", "recipe.yaml")
    assert done.returncode == 2
    assert "there is no manifest recipes.yml\n  did you mean 'recipe.yaml'?" in done.stderr
    assert "  there is no folder nowhere" in done.stderr
    assert "recipe.yaml:2:9: error[" in done.stderr


def test_a_node_in_place_of_a_run_is_explained(workshop) -> None:
    workshop.run("version: 1\nstages:\n  a: {uses: write, with: {text: hello}}\n")
    assert workshop.command("log").returncode == 0
    assert "a is a node of it: write `last a`" in workshop.command("log", "a").stderr


def test_a_first_recipe_in_another_folder_finds_its_model(workshop):
    shutil.copytree(Path(__file__).parents[1] / "models" / "quickstart", workshop.folder / "models" / "x")
    for recipe in ("sub/r.yaml", "r.yaml"):
        assert workshop.command("init", recipe, "--model", "models/x").returncode == 0
        planned = workshop.command("plan", recipe, "download", "--json")
        assert planned.returncode == 0, planned.stderr
    assert 'path: "../models/x"\n' in (workshop.folder / "sub" / "r.yaml").read_text()


def test_a_first_recipe_of_what_is_no_model_leaves_no_file(workshop):
    refused = workshop.command("init", "new/b.yaml", "--model", "not a model!")
    assert refused.returncode == 2
    assert "--model not a model!: " in refused.stderr
    assert "'not a model!' is not the name of a repository\n  write it as owner/name\n" in refused.stderr
    assert not (workshop.folder / "new").exists()
    assert workshop.command("init", "new/b.yaml", "--model", "facebook/opt-125m").returncode == 0
    assert {path.name for path in (workshop.folder / "new").iterdir()} == {"b.yaml", "bigpipe.schema.json"}
    for folder in ("new", "x/../new"):  # one that has to be made first, too
        with pytest.raises(UsageError, match="exists"):
            initialise(workshop.folder / folder / "b.yaml", "facebook/opt-125m")
