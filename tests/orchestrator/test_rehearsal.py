"""What a plan foresees: who would run, how sure that is, and who follows whom."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

import bigpipe
from bigpipe.errors import ManifestError, UsageError
from bigpipe.machine import Machine
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.report import became_of

CHAIN = """\
version: 1
name: chain
params: {text: hello, separator: " ", last: " "}
stages:
  a: {uses: write, cache: false, with: {text: first}}
  b: {uses: join, inputs: {first: a}, cache: false, with: {separator: "${params.separator}"}}
  w: {uses: write, with: {text: "${params.text}"}}
  c: {uses: join, inputs: {first: b, second: w}, with: {separator: "${params.last}"}}
"""


def actions(plan) -> dict[str, str]:
    return {name: str(node.action) for name, node in plan.nodes.items()}


def test_dropped_bytes_are_as_sure_to_be_made_as_who_needs_them_is_to_run(workshop):
    workshop.run(CHAIN)
    assert set(actions(bigpipe.plan(workshop.manifest)).values()) == {"cached"}
    sure = bigpipe.plan(workshop.manifest, params={"last": "+"})
    assert actions(sure) == {"a": "run", "b": "run", "w": "cached", "c": "run"}
    assert sure.nodes["a"].decision.reason == "its bytes were dropped (cache: false) and b needs them"
    doubtful = bigpipe.plan(workshop.manifest, params={"text": "HELLO"})
    assert actions(doubtful) == {"a": "maybe", "b": "maybe", "w": "run", "c": "maybe"}
    assert doubtful.nodes["c"].decision.reason == "known once w is"
    assert all(doubtful.nodes[name].forecast for name in "abwc")
    workshop.run(params={"last": "+"})
    assert workshop.ran == ["a", "b", "c"]


def test_what_is_not_known_is_left_open(workshop):
    workshop.manifest.write_text("""\
version: 1
name: open
stages:
  a: {uses: write, with: {text: abC}, gates: ['detail.upper > 5', 'characters == 3']}
  b: {uses: write, when: "${stages.a.metrics.detail.upper} > 5"}
  c: {uses: write, when: "${stages.a.metrics.characters} > 5"}
  d: {uses: join, inputs: {first: c}}
""")
    plan = bigpipe.plan(workshop.manifest)
    assert actions(plan) == {"a": "run", "b": "maybe", "c": "skipped", "d": "skipped"}
    assert [gate.verdict and gate.verdict.passed for gate in plan.nodes["a"].gates] == [None, True]
    assert plan.errors() == []
    assert plan.nodes["d"].decision.reason == "c is skipped"


@pytest.mark.parametrize(("head", "says"), [("", "first run"), ("name: one\n", "params.text a → b (recipe.yaml:4:33)")])
def test_recipes_are_one_where_they_say_one_name_not_where_their_files_are_called_alike(
    workshop, monkeypatch, head, says
):
    text = f"version: 1\n{head}stages:\n  a: {{uses: write, with: {{text: %s}}}}\n"
    monkeypatch.chdir(workshop.folder)
    other = Path("other", "recipe.yaml")
    other.parent.mkdir()
    other.write_text(text % "b")
    workshop.run(text % "a")
    assert bigpipe.plan(other).nodes["a"].decision.reason == says
    assert commands.why(other, "a")["a"]["reason"] == says
    with nullcontext() if head else pytest.raises(UsageError, match=r"is one of .*, not of "):
        assert set(became_of(bigpipe.load_manifest(other), "last")) == {"a"}


def test_a_recipe_is_one_by_whatever_path_it_is_named(workshop, monkeypatch):
    (workshop.folder / "sub").mkdir()
    workshop.run("version: 1\nstages:\n  a: {uses: write, with: {text: a}}\n")
    monkeypatch.chdir(workshop.folder / "sub")
    detour = Path("..", "recipe.yaml")
    assert set(became_of(bigpipe.load_manifest(detour), "last")) == {"a"}
    bigpipe.run(detour)
    assert set(became_of(bigpipe.load_manifest(workshop.manifest), "last")) == {"a"}
    assert {record.manifest for record in bigpipe.runs()} == {str(workshop.manifest)}


@pytest.mark.parametrize("spoilt", ["recipe.yaml.lock", "recipe.yaml.lock.answers.gz"])
def test_a_lock_that_git_could_not_merge_is_written_anew(workshop, spoilt):
    workshop.manifest.write_text("version: 1\nstages:\n  a: {uses: write, with: {text: a}}\n")
    lock = commands.lock(workshop.manifest)
    (workshop.folder / spoilt).write_text(f"<<<<<<< HEAD\n{lock.read_text()}=======\n>>>>>>> other\n")
    for strict in (bigpipe.plan, partial(commands.lock, check=True)):
        with pytest.raises(UsageError, match="bigpipe lock"):
            strict(workshop.manifest)
    told = []
    commands.lock(workshop.manifest, note=told.append)
    assert spoilt in told[0]
    assert told[0].endswith(": it is written anew")
    commands.lock(workshop.manifest, check=True)


def test_a_manifest_that_waits_for_a_value_is_right_as_far_as_it_can_be_told(tmp_path):
    stage = "{uses: write, retries: '${params.n}', matrix: {a: '${params.axis}'}, with: {text: '${matrix.a}'}}"
    plain, open_, wrong = (tmp_path / name for name in ("plain.yaml", "open.yaml", "wrong.yaml"))
    plain.write_text("version: 1\nstages:\n  a: {uses: write, with: {text: a}}\n")
    open_.write_text(f"version: 1\nparams: {{n: null, axis: null}}\nstages:\n  a: {stage}\n")
    wrong.write_text(open_.read_text().replace("text:", "txt:"))
    told = []
    assert commands.validate([plain, open_], note=told.append) == {}
    assert [line.partition(": ")[2] for line in told] == [
        f"the parameter '{name}' has no default: what depends on it is checked once it has one"
        for name in ("n", "axis")
    ]
    assert commands.validate([plain, open_], {"n": "1", "axis": "[x, y]"}) == {}
    assert "'m'" in commands.validate([plain, open_], {"m": "1", "n": "1", "axis": "[x]"})[plain].problems[0].cause
    assert commands.validate([open_], {"n": "1", "axis": "[[]]"}).keys() == {open_}
    (error,) = commands.validate([plain, wrong]).values()
    assert [problem.cause for problem in error.problems] == ["unknown field 'txt' in write"]


ALONE = "with: {text: 'v${params.v}'}, gates: ['characters < ${params.v}']"
VARIED = "matrix: {m: '${params.v}'}, with: {text: 'v${matrix.m}'}"


@pytest.mark.parametrize(
    ("value", "stage", "arguments", "name", "text"),
    [
        ("2.10", ALONE, {}, "a", "v2.10"),
        ("1.0", ALONE, {"v": "4.30"}, "a", "v4.30"),
        ("1.0", ALONE, {"v": "3"}, "a", "v3"),
        ("1e3", ALONE, {}, "a", "v1e3"),
        ("0x10", ALONE, {}, "a", "v0x10"),
        ("5", ALONE, {"v": "+5"}, "a", "v+5"),
        ("[1.10]", VARIED, {}, "a@m=1.10", "v1.10"),
        ("x", VARIED.replace("'${params.v}'", "[1.10]"), {}, "a@m=1.10", "v1.10"),
    ],
)
def test_a_number_stands_in_a_text_as_it_is_written(tmp_path, value, stage, arguments, name, text):
    manifest = tmp_path / "recipe.yaml"
    manifest.write_text(f"version: 1\nparams: {{v: {value}}}\nstages:\n  a: {{uses: write, {stage}}}\n")
    (node,) = bigpipe.load_manifest(manifest, params=arguments).nodes.values()
    assert (node.name, node.params.text) == (name, text)


def test_a_number_that_is_to_be_a_text_is_told_as_it_is_written(tmp_path):
    manifest = tmp_path / "recipe.yaml"
    manifest.write_text("version: 1\nparams: {v: 2.10}\nstages:\n  a: {uses: write, with: {text: '${params.v}'}}\n")
    with pytest.raises(ManifestError, match=r"put it in quotes where it is set if it is text: '2\.10'"):
        bigpipe.load_manifest(manifest)


SECRETIVE = """\
version: 1
name: secretive
secrets: [MY_KEY, HF_TOKEN]
stages:
  a: {uses: write, with: {text: a}}
  b: {uses: join, inputs: {first: a}, secrets: [HF_TOKEN, MY_KEY]}
"""


def test_a_secret_that_is_not_set_is_told_before_anything_runs_but_to_nobody_who_need_not_run(workshop, monkeypatch):
    workshop.manifest.write_text(SECRETIVE)
    monkeypatch.setenv("MY_KEY", "")
    (error,) = bigpipe.plan(workshop.manifest).errors()
    assert (error.status, error.cause) == (5, "secrets that b lists are not set: MY_KEY")
    assert (error.place.line, error.place.column, error.node) == (6, 48, "b")
    assert bigpipe.plan(workshop.manifest, ["a"]).errors() == []
    assert bigpipe.plan(workshop.manifest, machine=Machine("box", 8, 2**36, 2**36, 2**40)).errors() == []
    assert bigpipe.plan(workshop.manifest, smoke=True).errors() == []
    monkeypatch.setenv("MY_KEY", "set-for-a-while")
    assert workshop.run().status == "succeeded"
    monkeypatch.delenv("MY_KEY")
    assert bigpipe.plan(workshop.manifest).errors() == []


FOLLOWING = """\
version: 1
name: following
params: {letter: a}
stages:
  pour: {uses: pour, with: {letter: "${params.letter}"}}
  sip: {uses: sip, inputs: {first: pour}, resources: {ram: 1GiB}}
  strain: {uses: strain, inputs: {first: pour}, resources: {ram: 900TiB}}
"""


def test_who_follows_is_foreseen_whatever_other_recipes_have_recorded(workshop):
    workshop.manifest.write_text(FOLLOWING)
    assert bigpipe.plan(workshop.manifest).followed == {"sip": "pour"}
    assert bigpipe.plan(workshop.manifest, jobs=1).followed == {}
    workshop.run(nodes=["sip"])
    doubtful = bigpipe.plan(workshop.manifest, params={"letter": "b"})
    assert actions(doubtful) == {"pour": "run", "sip": "maybe", "strain": "run"}
    assert doubtful.followed == {"sip": "pour"}


CLUMSY = """\
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult


def forecast(params, context):
    return {}["nothing"]


STAGE = Stage(
    kind="clumsy", version=1, params=Params, metrics=Metrics, inputs={}, output=None, forecast=forecast,
    run=lambda params, context: StageResult(Metrics()),
)
"""


def test_what_a_kind_raises_before_the_run_has_the_place_of_its_stage(workshop):
    (workshop.folder / "clumsy.py").write_text(CLUMSY)
    workshop.manifest.write_text(
        "version: 1\nname: c\ntrust: {modules: [clumsy]}\nstages:\n  c: {uses: 'clumsy:STAGE'}\n"
    )
    done = workshop.command("plan", "recipe.yaml")
    assert done.returncode == 6
    first, cure = done.stderr.strip().splitlines()
    assert re.search(r"recipe.yaml:5:3: c \(clumsy\): KeyError: 'nothing' \(/.*/clumsy.py:\d+\)$", first)
    assert 'return {}["nothing"]' in Path(cure.partition("the traceback is in ")[2]).read_text()
