"""What a plan foresees: who would run, how sure that is, and who follows whom."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

import bigpipe
from bigpipe.errors import UsageError
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
    with nullcontext() if head else pytest.raises(UsageError, match=r"is one of .*knows none"):
        assert set(became_of(bigpipe.load_manifest(other), "last")) == {"a"}


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
