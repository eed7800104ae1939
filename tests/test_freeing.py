"""`rm` and `gc` as commands: they say what goes, ask, and leave what goes on alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commanding import start
from support.workshop import environment

RECIPE = """
version: 1
name: freed
params: {text: hello}
stages:
  a: {uses: write, with: {text: "${params.text}"}}
  b: {uses: write, with: {text: "${params.text} again"}, needs: [a]}
"""
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "free-space.md").read_text(encoding="utf-8")


@pytest.fixture
def ran(workshop):
    workshop.manifest.write_text(RECIPE)
    assert workshop.command("run", "recipe.yaml").returncode == 0
    return workshop


def answering(workshop, answer: str, *arguments: str) -> tuple[int, str]:
    """The command at a terminal where somebody types this."""
    own, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", *arguments], cwd=workshop.folder, env=environment(workshop.folder),
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(own, f"{answer}\n".encode())
    out, err = process.communicate(timeout=60)
    for end in (own, theirs):
        os.close(end)
    return process.returncode, out + err


def there(workshop, node: str) -> bool:
    return workshop.json("status", "recipe.yaml")["nodes"][node]["action"] == "cached"


def test_gc_asks_and_names_nodes_and_dates(ran):
    ran.manifest.write_text(RECIPE.replace("hello", "goodbye"))
    assert ran.command("run", "recipe.yaml").returncode == 0
    code, told = answering(ran, "n", "gc")
    assert code == 0
    assert re.search(r"^b +20\d\d-\d\d-\d\d \d\d:\d\d +recipe\.yaml +[\d.]+ k?B$", told, re.MULTILINE)
    assert "Free " in told
    assert "nothing was removed" in told
    assert ran.json("gc", "--dry-run")["freed_bytes"]
    code, told = answering(ran, "y", "gc")
    assert (code, "\nfreed " in told) == (0, True)
    assert ran.json("gc", "--dry-run")["freed"] == []
    assert there(ran, "b")


def test_what_a_stage_gave_that_the_recipe_has_no_more_goes(ran):
    """Also where the run after that finds everything there; the others' stays."""
    ran.manifest.write_text(RECIPE.partition("  b:")[0])
    assert ran.command("run", "recipe.yaml").returncode == 0
    freed = ran.json("gc", "--dry-run")["freed"]
    assert {each["node"] for each in freed if each["kind"] == "artifact"} == {"b"}


@pytest.mark.parametrize("command", ["gc", "rm a"])
def test_where_nobody_can_be_asked_nothing_goes(ran, command):
    refused = ran.command(*command.split())
    assert refused.returncode == 2
    assert "nobody to ask" in refused.stderr
    assert "--yes" in refused.stderr
    assert there(ran, "a")


def test_other_parameters_stay_for_a_while(ran):
    assert ran.command("run", "recipe.yaml", "-p", "text=bye").returncode == 0
    assert ran.command("gc", "--yes").returncode == 0
    assert there(ran, "a")
    assert ran.command("gc", "--yes", "--older-than", "0d").returncode == 0
    assert not there(ran, "a")
    assert "is no age" in ran.command("gc", "--older-than", "yesterday").stderr


def test_what_a_command_without_a_recipe_gave_stays_for_a_while(workshop):
    shutil.copytree(ROOT / "models" / "quickstart", workshop.folder / "model")
    assert workshop.command("shard", "model").returncode == 0
    assert workshop.command("shard", "model", "--max-shard-size", "1MB").returncode == 0  # under the same name
    kinds = {each["kind"] for each in workshop.json("gc", "--dry-run")["freed"]}
    assert not kinds & {"root", "artifact", "record", "object"}
    kinds = {each["kind"] for each in workshop.json("gc", "--dry-run", "--older-than", "0d")["freed"]}
    assert "root" in kinds


def test_of_runs_as_many_stay_as_one_says(ran):
    ran.command("run", "recipe.yaml")
    assert ran.command("gc", "--yes", "--keep-runs", "1").returncode == 0
    assert len(ran.json("ls")["runs"]) == 1


def test_what_a_node_gave_is_removed_and_made_again(ran):
    foreseen = ran.json("rm", "b", "--dry-run")
    assert there(ran, "b")
    code, told = answering(ran, "yes", "rm", "b")
    assert code == 0
    assert "Free " in told
    assert not there(ran, "b")
    assert there(ran, "a")
    assert foreseen["freed_bytes"] > 0
    assert {item["node"] for item in foreseen["freed"]} == {"b", None}
    again = json.loads(ran.command("run", "recipe.yaml", "--json").stdout)
    assert [again["nodes"][node]["status"] for node in "ab"] == ["cached", "succeeded"]


def test_runs_and_artifacts_are_named_as_ls_names_them(ran):
    listed = ran.json("ls")
    digest = next(item["digest"] for item in listed["artifacts"] if item["node"] == "a")
    run = listed["runs"][0]["run"]
    removed = ran.json("rm", digest[7:19], run[:12], "--yes")
    kinds = [item["kind"] for item in removed["freed"]]
    assert {*kinds} >= {"run", "artifact", "object", "record"}
    assert kinds.count("artifact") == 1
    left = ran.json("ls")
    assert left["runs"] == []
    assert [item["node"] for item in left["artifacts"]] == ["b"]
    assert ran.command("verify").returncode == 0


def test_what_is_named_by_nothing_or_by_several_is_refused(ran):
    ran.command("run", "recipe.yaml")
    assert "is no run and no artifact of the store, and no node" in ran.command("rm", "c", "--yes").stderr
    several = ran.command("rm", ran.json("ls")["runs"][0]["run"][:8], "--yes").stderr
    assert "could be" in several
    assert len(ran.json("ls")["runs"]) == 2


def test_what_a_run_that_goes_on_holds_stays(workshop):
    workshop.manifest.write_text(RECIPE + "  c: {uses: sleep, with: {seconds: 60}, needs: [b]}\n")
    process = start(workshop, "run", "recipe.yaml", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while "c" not in next((run["at"] for run in workshop.json("ps")["runs"]), {}):
            assert process.poll() is None
            time.sleep(0.1)
        for target in ("a", "last"):
            refused = workshop.command("rm", target, "--yes")
            assert (refused.returncode, "run" in refused.stderr) == (75, True)
        assert len(workshop.json("ls")["runs"]) == 1
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert there(workshop, "b")


def test_the_commands_of_the_page_work(ran):
    commands = re.findall(r"^\$ bigpipe (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) > 4
    for line in commands:
        done = ran.command(*line.split())
        assert done.returncode == 0, (line, done.stderr)
