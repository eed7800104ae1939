"""`bigpipe diff` of runs and of lock files: what differs, for people, programs and pull requests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.workshop import environment

from bigpipe.errors import UsageError
from bigpipe.orchestrator import report

SAY = """
import json
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult

class SayParams(Params):
    word: str
    times: int = 1

class SayMetrics(Metrics):
    letters: int
    inner: dict[str, float]
    timeline: dict[str, dict[str, float]]

def run(params, context):
    held = bytearray(params.times * 64 * 2**20)
    rows = [("hello", params.word), ("same", "always")]
    lines = [json.dumps({"prompt": prompt, "text": text}) + "\\n" for prompt, text in rows]
    (context.out / "results.jsonl").write_text("".join(lines) * params.times)
    (context.out / "placement.json").write_text(json.dumps({"device_map": {"layer": params.word}}))
    return StageResult(SayMetrics(letters=len(params.word), inner={"half": 0.5},
                                  timeline={"0": {"began": params.times, "ended": 2.0 * params.times}}))

SAY = Stage(kind="say", version=1, params=SayParams, metrics=SayMetrics, inputs={}, output="results", run=run,
            forecast=lambda params, context: Forecast(), reviewed=("placement.json",))
"""
RECIPE = """\
version: 1
name: talk
trust: {modules: [say]}
params: {word: four, times: 1}
stages:
  say: {uses: "say:SAY", with: {word: "${params.word}", times: "${params.times}"}, gates: ["letters < 5"]}
  idle: {uses: write, with: {text: the same}}
"""


@pytest.fixture
def talk(workshop):
    (workshop.folder / "say.py").write_text(SAY)
    workshop.manifest.write_text(RECIPE)
    return workshop


def table(markdown: str, title: str) -> list[list[str]]:
    """The rows below a heading, without the heads; empty where there is none."""
    part = markdown.partition(f"### {title}\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]


def test_two_runs_as_tables_for_a_pull_request(talk):
    one = talk.run(params={"word": "four"})
    two = talk.run(params={"word": "longer", "times": "2"})
    markdown = talk.command("diff", one.run, two.run, "--markdown").stdout
    assert markdown.startswith(f"## talk: {one.run} → {two.run}\n")
    changed = {(node, what): (before, after) for node, what, before, after in table(markdown, "What changed")}
    assert changed["recipe", "params.word"] == ("four", "longer")
    assert changed["recipe", "status"] == ("succeeded", "failed")
    assert not any(what == "key" or what.startswith("metrics") for _, what in changed)
    assert table(markdown, "Gates") == [["say", r"letters \< 5", "✓ 4", "✗ 6"]]
    written = {row[0]: row[2:] for row in table(markdown, "Bytes")}
    assert written["idle"] == ["8 B", "8 B", ""]
    assert written["say"][2].startswith("+")
    [peak] = [row for row in table(markdown, "Memory") if row[0] == "say"]
    assert peak[1] == "peak RAM"
    assert peak[4].startswith("+")
    assert table(markdown, "Metrics") == [["say", "letters", "4", "6", "+50.0%"]]
    assert table(markdown, "Texts that differ") == [["say", "hello", "four", "longer"]]


def test_runs_that_are_the_same_say_so(talk):
    one, two = talk.run(), talk.run()
    markdown = report.review(one.run, two.run, store=talk.folder / "store")
    assert table(markdown, "Metrics") == table(markdown, "Texts that differ") == []
    assert [row[-1] for row in table(markdown, "Bytes")] == ["", ""]


@pytest.fixture
def locks(talk):
    """One as it was, and one after an edit and a run."""
    assert talk.command("lock", "recipe.yaml").returncode == 0
    talk.run(check=True)
    shutil.copy(talk.folder / "recipe.yaml.lock", talk.folder / "before.lock")
    talk.manifest.write_text(RECIPE.replace("word: four", "word: five"))
    assert talk.command("lock", "recipe.yaml").returncode == 0
    talk.run(check=True)
    return talk


def test_two_locks_by_what_goes_in_and_what_came_out(locks):
    told = locks.json("diff", "before.lock", "recipe.yaml.lock")
    assert told["runs"] == ["before.lock", "recipe.yaml.lock"]
    assert told["changes"] == [{"path": "params.word", "old": "four", "new": "five"}]
    assert told["nodes"].keys() == {"say"}
    changed = {change["path"]: (change["old"], change["new"]) for change in told["nodes"]["say"]}
    assert changed["params.word"] == ("four", "five")
    assert changed["review.placement.json.device_map.layer"] == ("four", "five")
    assert "digest" in changed
    text = locks.command("diff", "before.lock", "recipe.yaml.lock").stdout
    assert "params.word four → five" in text
    markdown = locks.command("diff", "before.lock", "recipe.yaml.lock", "--markdown").stdout
    assert ["say", "params.word", "four", "five"] in table(markdown, "What goes in")
    out = {what: (before, after) for _, what, before, after in table(markdown, "What came out")}
    assert out[r"review.placement.json.device\_map.layer"] == ("four", "five")
    assert table(markdown, "Versions and machine") == []


def test_other_versions_and_nodes_are_told(locks):
    newer = (locks.folder / "recipe.yaml.lock").read_text()
    head, tools, tail = newer.replace("  idle:", "  other:").rpartition("    tools:\n")
    (locks.folder / "changed.lock").write_text(f"{head}{tools}      numpy: 0.0.1\n{tail}")
    markdown = locks.command("diff", "recipe.yaml.lock", "changed.lock", "--markdown").stdout
    assert any(row[1] == "tools.numpy" and row[3] == "0.0.1" for row in table(markdown, "Versions and machine"))
    gone = {row[1]: row[2:] for row in table(markdown, "What goes in")}
    assert gone["nodes.idle"] == ["write", "(absent)"]
    assert gone["nodes.other"] == ["(absent)", "write"]


def test_the_commands_of_the_page_on_ci(locks):
    """In a checkout whose main branch has the lock as it was."""
    page = (Path(__file__).parents[2] / "docs/how-to/a-ci-job.md").read_text(encoding="utf-8")
    shutil.move(locks.folder / "recipe.yaml.lock", locks.folder / "after.lock")
    shutil.move(locks.folder / "before.lock", locks.folder / "recipe.yaml.lock")
    own = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    for words in ("init -q", "add recipe.yaml.lock", "commit -qm one", "update-ref refs/remotes/origin/main HEAD"):
        subprocess.run(["git", *own, *words.split()], cwd=locks.folder, check=True, capture_output=True)
    shutil.move(locks.folder / "after.lock", locks.folder / "recipe.yaml.lock")
    lines = re.findall(r"^pull-request\$ (.+)$", page, re.MULTILINE)
    assert len(lines) == 2
    command = f"{sys.executable} -m bigpipe"
    script = "\n".join(lines).replace("bigpipe diff", f"{command} diff")
    where = {**environment(locks.folder), "GITHUB_STEP_SUMMARY": "review.md"}
    subprocess.run(["bash", "-ec", script], cwd=locks.folder, env=where, check=True)
    assert "| say | params.word | four | five |" in (locks.folder / "review.md").read_text()


def test_locks_that_say_the_same(locks):
    shutil.copy(locks.folder / "recipe.yaml.lock", locks.folder / "again.lock")
    done = locks.command("diff", "recipe.yaml.lock", "again.lock")
    assert done.stdout == "recipe.yaml.lock and again.lock say the same\n"
    assert "Nothing differs" in locks.command("diff", "recipe.yaml.lock", "again.lock", "--markdown").stdout


def test_what_cannot_be_compared(talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a lock file, the other is a run"):
        report.diff("last", "recipe.yaml.lock")
    with pytest.raises(UsageError, match=r"there is no lock file one\.lock"):
        report.review("one.lock", "two.lock")
    (tmp_path / "odd.lock").write_text("a: [")
    with pytest.raises(UsageError, match=r"odd\.lock is not YAML"):
        report.diff("odd.lock", "odd.lock")
    (tmp_path / "r.yaml").write_text("version: 1\nstages:\n  s: {uses: say, with: {word: one}}\n")
    with pytest.raises(UsageError, match=r"r\.yaml is a recipe, not a lock file") as told:
        report.diff("r.yaml", "r.yaml")
    assert told.value.cure == "name r.yaml.lock, which `bigpipe lock r.yaml` writes"
    assert "for people" in talk.command("diff", "last", "last", "--markdown", "--json").stdout
