"""The first variant that passes: tried in order, taken, told everywhere; and gates that are no failure."""

from __future__ import annotations

import json

import pytest
from support.workshop import statuses

import bigpipe
from bigpipe.errors import GateFailed

FALL = """\
version: 1
name: fall
params: {most: 3, join: "-"}
stages:
  make: {uses: write, matrix: {text: [dddd, ccc, bb]}, with: {text: "${matrix.text}"}}
  check: {uses: join, inputs: {first: make}, gates: ["characters <= ${params.most}", "parts == 1"]}
  use: {uses: join, inputs: {first: make}, first: {axis: text, of: check}, with: {separator: "${params.join}"}}
  after: {uses: join, inputs: {first: use}, with: {separator: "+"}}
"""
LEFT = "gate characters <= 3: 4"


def gist(result) -> dict[str, str]:
    return {row["value"]: row["came_to"] for row in result.tried["use"]}


def text_of(result, node: str) -> str:
    return (result.path(node) / "text").read_text()


def test_the_first_that_passes_is_taken_and_the_others_are_not_run(workshop):
    result = workshop.run(FALL)
    assert (result.exit_code, result.status) == (0, "succeeded")
    assert workshop.ran == ["make@text=dddd", "check@text=dddd", "make@text=ccc", "check@text=ccc", "use", "after"]
    assert gist(result) == {"dddd": "left", "ccc": "taken", "bb": "not run"}
    assert [text_of(result, node) for node in ("use", "after")] == ["ccc", "ccc"]
    assert statuses(result)["check@text=dddd"] == "succeeded"
    assert result.nodes["check@text=dddd"].verdict == f"left: {LEFT}"
    assert result.nodes["use"].verdict == f"takes text ccc; dddd is left: {LEFT}"
    assert [result.nodes[f"{stage}@text=bb"].reason for stage in ("make", "check")] == ["text ccc is taken"] * 2


def test_a_rerun_does_nothing_and_takes_the_same(workshop):
    first = workshop.run(FALL)
    again = workshop.run()
    assert workshop.ran == []
    assert gist(again) == gist(first)
    assert statuses(again) == {
        **dict.fromkeys(["make@text=dddd", "check@text=dddd", "make@text=ccc", "check@text=ccc"], "cached"),
        **dict.fromkeys(["use", "after"], "cached"),
        "make@text=bb": "skipped", "check@text=bb": "skipped",
    }  # fmt: skip


def test_an_edited_bound_decides_anew_without_running_what_is_known(workshop):
    workshop.run(FALL)
    assert gist(workshop.run(params={"most": "4"})) == {"dddd": "taken", "ccc": "not run", "bb": "not run"}
    assert workshop.ran == ["use", "after"]
    assert gist(workshop.run(params={"most": "2"}))["bb"] == "taken"
    assert workshop.ran == ["make@text=bb", "check@text=bb", "use", "after"]
    for most in ("3", "4", "2"):
        workshop.run(params={"most": most})
        assert workshop.ran == []


def test_none_passes(workshop):
    result = workshop.run(FALL, params={"most": "1"})
    assert (result.exit_code, result.status) == (3, "failed")
    (error,) = result.errors
    assert isinstance(error, GateFailed)
    numbers = "dddd: gate characters <= 1: 4; ccc: gate characters <= 1: 3; bb: gate characters <= 1: 2"
    assert f"recipe.yaml:7:51: use: no text passes: {numbers}" in str(error)
    assert "loosen a gate of check" in error.cure
    assert (statuses(result)["use"], statuses(result)["after"]) == ("failed", "skipped")
    with pytest.raises(GateFailed, match="no text passes"):  # known before anything runs
        workshop.run(params={"most": "1"})


def test_what_is_taken_has_the_key_of_that_variant(workshop):
    taken = workshop.run(FALL)
    picked = FALL.replace("{first: make}, first: {axis: text, of: check}", "{first: make@text=ccc}")
    result = workshop.run(picked, params={"most": "9"})
    assert result.nodes["use"].key == taken.nodes["use"].key
    assert workshop.ran == ["make@text=bb", "check@text=bb"]


@pytest.mark.parametrize("on_fail", ["stop", "continue", "skip", "warn"])
def test_a_broken_stage_is_no_verdict(workshop, on_fail):
    stages = FALL.replace("make: {uses: write", f"make: {{uses: flaky, on_fail: {on_fail}")
    stages = stages.replace("text: [dddd, ccc, bb]", "text: [true, false]").replace('{text: "$', '{fatal: "$')
    result = workshop.run(stages, params={"most": "9"})
    assert result.exit_code == 6
    assert workshop.ran == ["make@text=true"]
    assert statuses(result) == {
        "make@text=true": "failed", "make@text=false": "skipped", "check@text=true": "skipped",
        "check@text=false": "skipped", "use": "skipped", "after": "skipped",
    }  # fmt: skip


def test_a_variant_whose_turn_did_not_come_before_the_run_stopped_was_not_left(workshop):
    broken = FALL.replace("stages:\n", "stages:\n  boom: {uses: flaky, with: {fatal: true}}\n")
    result = workshop.run(broken, jobs=1)
    assert (result.exit_code, workshop.ran) == (6, ["boom"])
    assert gist(result) == {"dddd": "not run", "ccc": "not run", "bb": "not run"}
    assert {row["why"] for row in result.tried["use"]} == {""}


def test_a_plan_says_what_may_be(workshop):
    workshop.manifest.write_text(FALL)
    plan = bigpipe.plan(workshop.manifest)
    assert {name: str(node.action) for name, node in plan.nodes.items()} == {
        "make@text=dddd": "run", "make@text=ccc": "maybe", "make@text=bb": "maybe",
        "check@text=dddd": "run", "check@text=ccc": "maybe", "check@text=bb": "maybe", "use": "run", "after": "run",
    }  # fmt: skip
    assert plan.nodes["make@text=bb"].decision.reason == "if text dddd and ccc do not pass; first run"
    assert "takes the first text that passes: dddd, ccc or bb" in plan.nodes["use"].decision.reason
    assert plan.writes.known == 4 + 3 + 2 + 3 * 100 + 100 + 100
    assert plan.errors() == []
    rows = workshop.json("plan", "recipe.yaml")["nodes"]["use"]["tried"]
    assert [row["came_to"] for row in rows] == ["may", "may", "may"]
    workshop.run()
    known = bigpipe.plan(workshop.manifest)
    assert known.to_run == []
    assert [row["came_to"] for row in known.nodes["use"].tried] == ["left", "taken", "not run"]
    half = bigpipe.plan(workshop.manifest, params={"most": "2"})
    assert {name for name, node in half.nodes.items() if node.action.works} == {
        "make@text=bb", "check@text=bb", "use", "after"
    }  # fmt: skip
    assert half.nodes["use"].decision.reason.endswith(
        "takes the first text that passes: bb; "
        "dddd is left: gate characters <= 2: 4; ccc is left: gate characters <= 2: 3"
    )


def test_what_a_forecast_decides_is_not_run(workshop):
    """The judge's metric is known beforehand: a variant that cannot pass costs nothing."""
    text = FALL.replace("of: check", "of: make").replace(
        'with: {text: "${matrix.text}"}', 'with: {text: "${matrix.text}"}, gates: ["characters <= ${params.most}"]'
    )
    text = text.replace(
        "  check: {uses: join, inputs: {first: make}, gates", "  x: {uses: join, inputs: {first: use}, gates"
    )
    workshop.manifest.write_text(text)
    plan = bigpipe.plan(workshop.manifest, params={"most": "3"})
    assert {name: str(node.action) for name, node in plan.nodes.items()} == {
        "make@text=dddd": "skipped", "make@text=ccc": "run", "make@text=bb": "skipped", "use": "run", "x": "run",
        "after": "run",
    }  # fmt: skip
    assert plan.nodes["make@text=dddd"].decision.reason == f"left: {LEFT}"
    assert plan.nodes["make@text=bb"].decision.reason == "text ccc is taken"
    result = workshop.run()
    assert workshop.ran == ["make@text=ccc", "use", "x", "after"] or workshop.ran[:2] == ["make@text=ccc", "use"]
    assert gist(result) == {"dddd": "left", "ccc": "taken", "bb": "not run"}
    with pytest.raises(GateFailed, match="use: no text passes"):
        workshop.run(params={"most": "1"})
    assert workshop.ran == []


def test_targets(workshop):
    """Who is not asked for judges nobody: then a gate is a gate, and all variants run."""
    assert workshop.run(FALL, nodes=["make@text=bb"]).exit_code == 0
    assert workshop.ran == ["make@text=bb"]
    result = workshop.run(nodes=["check"], keep_going=True)
    assert result.exit_code == 3
    assert "check@text=dddd: gate characters <= 3: 4" in str(result.errors[0])
    assert statuses(result)["check@text=bb"] == "succeeded"
    assert set(workshop.run(nodes=["use"]).nodes) == {name for name in result.nodes} | {"use"}


def test_forced(workshop):
    workshop.run(FALL)
    workshop.run(force=["check"])
    assert workshop.ran == ["check@text=dddd", "check@text=ccc"]
    workshop.run(force=["use"])
    assert workshop.ran == ["use"]
    plan = workshop.run(force=["make@text=bb"])
    assert workshop.ran == []
    assert gist(plan)["bb"] == "not run"


def test_garbage_is_not_what_was_left(workshop):
    workshop.run(FALL)
    assert workshop.command("gc", "--yes").returncode == 0
    workshop.run()
    assert workshop.ran == []


def test_reports_of_all_that_were_tried_can_be_gathered(workshop):
    text = FALL.replace("{first: make}, first", "{first: make, rest: [check]}, first")
    text += "  all: {uses: join, inputs: {first: use, rest: [check]}}\n"
    result = workshop.run(text)
    assert text_of(result, "use") == "ccc-dddd-ccc"
    assert text_of(result, "all") == "ccc-dddd-ccc dddd ccc"


def test_two_take_the_same_and_another_axis_stays(workshop):
    also = "matrix: {s: [x, y]}, inputs: {first: make}, needs: [check], first: {axis: text, of: check}"
    text = FALL + f"  also: {{uses: join, {also}, with: {{separator: '${{matrix.s}}'}}}}\n"
    result = workshop.run(text)
    assert [text_of(result, node) for node in ("use", "also@s=x", "also@s=y")] == ["ccc"] * 3
    assert statuses(result)["make@text=bb"] == "skipped"


def test_one_after_the_other_is_the_same(workshop):
    assert gist(workshop.run(FALL, jobs=1)) == {"dddd": "left", "ccc": "taken", "bb": "not run"}


def test_what_depends_on_a_variant_that_was_left_is_skipped(workshop):
    text = FALL + "  more: {uses: join, inputs: {first: check}}\n"
    result = workshop.run(text)
    assert statuses(result)["more@text=dddd"] == "skipped"
    assert result.nodes["more@text=dddd"].reason == f"check@text=dddd is left: {LEFT}"
    assert statuses(result)["more@text=ccc"] == "succeeded" or statuses(result)["more@text=ccc"] == "cached"
    plan = bigpipe.plan(workshop.manifest, params={"most": "1", "join": "new"}, store=workshop.folder / "other")
    assert str(plan.nodes["more@text=ccc"].action) == "maybe"


def test_bytes_of_what_is_left_go(workshop):
    text = FALL.replace("make: {uses: write", "make: {uses: write, cache: false")
    text = text.replace('"parts == 1"]', '"parts == 1"], with: {squeeze: true}')
    result = workshop.run(text)
    assert [result.path(f"make@text={value}") for value in ("dddd", "ccc")] == [None, None]
    assert gist(workshop.run(params={"most": "4"}))["dddd"] == "taken"
    assert workshop.ran == ["make@text=dddd", "use", "after"]


def test_everything_that_looks_back_tells_it(workshop):
    workshop.manifest.write_text(FALL)
    done = workshop.command("run", "recipe.yaml", "--json", "--events", "events.jsonl")
    node = json.loads(done.stdout)["nodes"]["use"]
    assert node["verdict"] == f"takes text ccc; dddd is left: {LEFT}"
    assert node["tried"] == [
        {"value": "dddd", "judge": "check@text=dddd", "came_to": "left", "why": LEFT},
        {"value": "ccc", "judge": "check@text=ccc", "came_to": "taken", "why": ""},
        {"value": "bb", "judge": "check@text=bb", "came_to": "not run", "why": ""},
    ]
    assert "check@text=dddd: ✓ succeeded in" in done.stderr
    assert f"; left: {LEFT}" in done.stderr
    events = [json.loads(line) for line in (workshop.folder / "events.jsonl").read_text().splitlines()]
    assert {each["node"]: each["verdict"] for each in events if each["event"] == "node_finished"}["use"] == node[
        "verdict"
    ]
    for command in (["show"], ["why", "recipe.yaml", "use"], ["plan", "recipe.yaml"]):
        assert LEFT in workshop.command(*command).stdout, command
    assert f"dddd: left (check@text=dddd: {LEFT})" in workshop.command("why", "recipe.yaml", "use").stdout
    assert workshop.json("why", "recipe.yaml", "use")["nodes"]["use"]["tried"] == node["tried"]
    for name in ("report.html", "report.md"):
        workshop.command("report", "-o", name)
        page = (workshop.folder / name).read_text()
        assert "What use takes" in page
        assert "join: left" in page or name == "report.md"
        assert "not run" in page


def test_the_graph_tells_it(workshop):
    workshop.manifest.write_text(FALL)
    drawn = {
        form: workshop.command("graph", "recipe.yaml", "--format", form).stdout for form in ("text", "mermaid", "dot")
    }
    assert "the first text that passes check" in drawn["text"]
    assert '-. "text: ccc" .->' in drawn["mermaid"]
    assert '"make@text=ccc" -> "use" [style=dashed, label="text: ccc"];' in drawn["dot"]
    assert "join, the first text" in workshop.command("graph", "recipe.yaml", "--format", "svg").stdout
    first = {"axis": "text", "of": "check", "values": ["dddd", "ccc", "bb"]}
    assert workshop.json("graph", "recipe.yaml")["nodes"]["use"]["first"] == first


def test_a_lock_holds_what_was_taken(workshop):
    workshop.manifest.write_text(FALL)
    assert workshop.command("lock", "recipe.yaml").returncode == 0
    workshop.run()
    lock = (workshop.folder / "recipe.yaml.lock").read_text()
    assert "make@text=bb" in lock
    assert "make@text=bb" not in lock.partition("outputs:")[2].partition("params:")[0]
    assert workshop.command("run", "recipe.yaml", "--locked").returncode == 0
    assert workshop.command("lock", "recipe.yaml", "--check").returncode == 0


FILTER = """\
version: 1
name: filter
stages:
  a: {uses: write, with: {source: in.txt}, on_fail: ON_FAIL, gates: ["characters > 50"]}
  b: {uses: join, inputs: {first: a}}
  c: {uses: write}
"""


@pytest.mark.parametrize(
    ("on_fail", "exit_code", "b", "c"),
    [
        ("stop", 3, "skipped", "any"), ("continue", 3, "skipped", "succeeded"), ("skip", 0, "skipped", "succeeded"),
        ("warn", 0, "succeeded", "succeeded"),
    ],
)  # fmt: skip
def test_what_a_gate_that_does_not_hold_does(workshop, on_fail, exit_code, b, c):
    (workshop.folder / "in.txt").write_text("short")
    result = workshop.run(FILTER.replace("ON_FAIL", on_fail))
    assert result.exit_code == exit_code
    assert statuses(result)["b"] == b
    assert c in ("any", statuses(result)["c"])
    told = {"skip": "left: gate characters > 50: 10", "warn": "gate characters > 50: 10"}
    assert result.nodes["a"].verdict == told.get(on_fail, "")
    again = workshop.run(keep_going=on_fail == "stop")
    assert workshop.ran == ["c"] * (on_fail == "stop" and c == "any" and statuses(result)["c"] == "skipped")
    assert (again.exit_code, again.nodes["a"].verdict) == (exit_code, told.get(on_fail, ""))


@pytest.mark.parametrize("form", ["text", "mermaid", "dot", "svg"])
def test_a_graph_says_what_a_run_made_of_it(workshop, form):
    run = workshop.run(FALL).run
    graph = ["graph", "recipe.yaml", "--format", form]
    before, drawn = (workshop.command(*graph, *more).stdout for more in ((), ("--run", run)))
    assert "left" not in before
    told = (": left", "join, ") if form == "svg" else (f"left: {LEFT}", f"takes text ccc; dddd is left: {LEFT}")
    assert all(said.replace("<", "&lt;") in drawn or said in drawn for said in told), drawn


def test_a_graph_of_a_run_in_json(workshop):
    workshop.run(FALL)
    nodes = json.loads(workshop.command("graph", "recipe.yaml", "--run", "last", "--json").stdout)["nodes"]
    assert nodes["check@text=dddd"]["verdict"] == f"left: {LEFT}"
    assert [row["came_to"] for row in nodes["use"]["tried"]] == ["left", "taken", "not run"]
    assert nodes["make@text=bb"]["status"] == "skipped"
    workshop.manifest.write_text("version: 1\nname: x\nstages: {other: {uses: write, with: {text: a}}}\n")
    refused = workshop.command("graph", "recipe.yaml", "--run", "last")
    assert refused.returncode == 2
    assert "knows none of the nodes of" in refused.stderr
    named_alike = "version: 1\nname: y\nstages: {use: {uses: write, with: {text: a}}}\n"
    (workshop.folder / "other.yaml").write_text(named_alike)
    assert workshop.command("graph", "other.yaml", "--run", "last").returncode == 2


DEMANDED = """\
version: 1
params: {join: "-"}
stages:
  make: {uses: write, matrix: {text: [dddd, ccc]}, with: {text: "${matrix.text}"}}
  check: {uses: join, cache: false, inputs: {first: make}, gates: ["characters <= 3"], with: {squeeze: true}}
  use: {uses: join, inputs: {first: make}, first: {axis: text, of: check}, with: {separator: "${params.join}"}}
  also:
    uses: join
    inputs: {first: make, rest: [check]}
    first: {axis: text, of: check}
    with: {separator: "${params.join}"}
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_verdict_stands_while_dropped_bytes_of_its_judge_are_made_again(workshop, jobs):
    assert workshop.run(DEMANDED, jobs=jobs).exit_code == 0
    result = workshop.run(params={"join": "+"}, jobs=jobs)
    assert result.exit_code == 0
    assert {name: {row["value"]: row["came_to"] for row in rows} for name, rows in result.tried.items()} == {
        name: {"dddd": "left", "ccc": "taken"} for name in ("use", "also")
    }
    told = "takes text ccc; dddd is left: gate characters <= 3: 4"
    assert {result.nodes[name].verdict for name in ("use", "also")} == {told}
