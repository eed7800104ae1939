"""bigpipe in Python and notebooks: what values say of themselves, progress, looking back; typed and documented."""

from __future__ import annotations

import html.parser
import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import bigpipe
from bigpipe.orchestrator.contract import Event
from bigpipe.tables import Screen, coloured, columns, html_table

QUICKSTART = Path(__file__).parents[1] / "models" / "quickstart"
RECIPE = """
version: 1
name: noted
params: {text: hello}
stages:
  write: {uses: write, with: {text: "${params.text}"}, matrix: {n: [1, 2]}, env: {N: "${matrix.n}"}}
  join: {uses: join, inputs: {first: "write@n=1"}}
"""
WHAT = """
from collections.abc import Mapping
import bigpipe

def noted(event: object) -> None:
    print(event)

result: bigpipe.RunResult = bigpipe.run("recipe.yaml", params={"text": "a"}, progress=noted)
metrics: Mapping[str, object] = result["join"].metrics
status: str = bigpipe.runs()[-1].nodes["join"].status
text: str = bigpipe.plan("recipe.yaml").render(width=80)
found: bigpipe.Estimate = bigpipe.estimate("org/model", dtypes=["int8"], memory="16GiB")
size: int = found["int8"].inference
placed: bigpipe.Placement = bigpipe.place("model", max_memory={"cpu": "1GiB"})
checkpoint: bigpipe.Checkpoint = bigpipe.open_checkpoint("model")
saved = bigpipe.save_checkpoint(checkpoint, "out", max_shard_size="1GB")
quantized = bigpipe.quantize_checkpoint("model", "int8", scheme="int8")
model = bigpipe.load("model", placed)
version: str = bigpipe.__version__
try:
    bigpipe.load_manifest("recipe.yaml")
except bigpipe.ManifestError as error:
    print(error.cause)
"""


class Cells(html.parser.HTMLParser):
    """The tags and the texts of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def ran(workshop):
    return workshop, workshop.run(RECIPE, store=workshop.folder / "store")


def test_a_result_says_in_a_line_what_it_did_and_in_a_table_what_each_node_gave(ran):
    _, result = ran
    assert repr(result).startswith(f"<RunResult {result.run} succeeded in ")
    assert repr(result).endswith(": 3 succeeded>")
    shown = Cells(result._repr_html_())
    assert {"write@n=1", "write@n=2", "join", "succeeded"} <= {*shown.texts}
    assert shown.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "pre"}


def test_a_node_of_a_result_is_asked_for_by_name(ran):
    _, result = ran
    assert result["join"].metrics == dict(result.nodes["join"].metrics)
    assert result["join"].path == str(result.path("join"))
    assert result["write@n=2"].status == "succeeded"
    for name, says in (("write", "has 2 variants of write"), ("joined", "did you mean 'join'"), (0, "has no node 0")):
        with pytest.raises(bigpipe.BigpipeError, match=says):
            result[name]


def test_runs_are_looked_back_on(ran):
    workshop, result = ran
    (record,) = bigpipe.runs(store=workshop.folder / "store")
    assert record.nodes["join"].metrics == result["join"].metrics
    told = [re.sub(r"in [\d.]+ s", "in … s", text) for text in (repr(record), str(record), repr(result))]
    assert told[0] == told[1] == told[2].replace("RunResult", "Run")
    assert "join" in Cells(record._repr_html_()).texts
    assert bigpipe.runs(store=workshop.folder / "none") == []


def test_a_plan_is_drawn_as_the_command_draws_it(ran):
    workshop, _ = ran
    plan = bigpipe.plan(workshop.manifest, store=workshop.folder / "store", params={"text": "other"})
    assert repr(plan).startswith("<Plan of noted: 2 run, 1 maybe")
    printed = workshop.command("plan", "recipe.yaml", "-p", "text=other").stdout
    assert plan.render().splitlines()[:3] == printed.splitlines()[:3]
    assert max(map(len, plan.render(width=70).splitlines()[:6])) <= 70
    assert "params.text" in plan.render(explain=True)
    assert "write@n=1" in Cells(plan._repr_html_()).texts


def test_values_of_the_library_say_what_they_are():
    assert repr(bigpipe.estimate(QUICKSTART, dtypes=["int8"])).startswith(f"<Estimate of {QUICKSTART}, 1 × ")
    assert "int8" in Cells(bigpipe.estimate(QUICKSTART, dtypes=["int8"])._repr_html_()).texts
    placement = bigpipe.place(QUICKSTART, max_memory={"cpu": "1GiB"})
    assert repr(placement).startswith("<Placement auto: cpu ")
    assert "1.0 GiB" in Cells(placement._repr_html_()).texts
    assert repr(bigpipe.open_checkpoint(QUICKSTART)).startswith(f"<Checkpoint {QUICKSTART}: safetensors, ")
    for value in (bigpipe.estimate(QUICKSTART), placement, bigpipe.open_checkpoint(QUICKSTART)):
        assert len(repr(value)) < 300


def test_whatever_can_be_printed_is_one_short_line(ran, tmp_path):
    workshop, result = ran
    recipe = bigpipe.load_manifest(workshop.manifest)
    plan = bigpipe.plan(workshop.manifest, store=workshop.folder / "store")
    found, checkpoint = bigpipe.estimate(QUICKSTART), bigpipe.open_checkpoint(QUICKSTART)
    record = bigpipe.runs(store=workshop.folder / "store")[-1]
    saved = bigpipe.save_checkpoint(checkpoint, tmp_path / "saved")
    quantized = bigpipe.quantize_checkpoint(QUICKSTART, tmp_path / "int8", scheme="int8")
    attested, held = bigpipe.attest(tmp_path / "int8"), bigpipe.check_directory(tmp_path / "int8")
    values = [
        attested, held, recipe, recipe.nodes["join"],
        plan, plan.nodes["join"], plan.session, plan.session.store, result,
        result["join"], result.nodes["join"], result.records["join"], record, record["join"], found, found["int8"],
        found.architecture, bigpipe.place(QUICKSTART), checkpoint, saved, quantized,
    ]  # fmt: skip
    for value in values:
        for text in (repr(value), str(value)):
            assert len(text) < 250, text
            assert "\n" not in text
            assert " at 0x" not in text


def test_names_that_are_none_are_told_apart_by_those_that_are(ran):
    workshop, result = ran
    record = bigpipe.runs(store=workshop.folder / "store")[-1]
    for ask in (result.__getitem__, result.path, record.__getitem__):
        with pytest.raises(bigpipe.BigpipeError, match="has no node 'nope'") as caught:
            ask("nope")
        assert all(name in caught.value.cure for name in ("write@n=1", "write@n=2", "join"))
    assert result.path("join").is_dir()


def test_a_node_is_a_table_in_a_notebook(ran):
    _, result = ran
    cells = Cells(result["join"]._repr_html_())
    assert {"status", "result", "characters", str(result["join"].metrics["characters"])} <= {*cells.texts}


def test_recipes_and_kinds_say_what_they_are(ran):
    workshop, result = ran
    assert repr(bigpipe.load_manifest(workshop.manifest)) == "<Recipe noted: write@n=1, write@n=2, join>"
    assert "join" in Cells(bigpipe.load_manifest(workshop.manifest)._repr_html_()).texts
    assert repr(result.nodes["join"].node.kind).startswith("<Stage join, version 1: first")


def test_progress_is_told(workshop, capsys):
    events: list[Event] = []
    workshop.run(RECIPE, progress=events.append)
    assert [event.name for event in events][:2] == ["run_started", "node_started"]
    workshop.run(RECIPE, params={"text": "b"}, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "[3/3] join: ✓ succeeded" in err
    workshop.run(RECIPE, params={"text": "c"})
    assert capsys.readouterr() == ("", "")
    with pytest.raises(bigpipe.BigpipeError, match="progress is 3"):
        workshop.run(RECIPE, progress=3)


def test_what_others_wrote_is_text_in_a_notebook(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_shown")
    from bigpipe.redaction import conceal

    conceal(["hf_not_to_be_shown"])
    hostile = "<script>alert(1)</script>\x1b[31m"
    shown = html_table(hostile, [hostile], [[hostile, "hf_not_to_be_shown"]], hostile)
    assert "script" not in Cells(shown).tags
    assert "\x1b" not in shown
    assert "hf_not_to_be_shown" not in shown


def test_tables_are_wrapped_to_the_screen_under_their_last_column():
    rows = [("node", "why"), ("a" * 20, "one two three four five six seven eight nine ten eleven twelve thirteen")]
    shown = columns(rows, Screen(60)).splitlines()
    assert max(map(len, shown)) <= 60
    assert all(line.startswith(" " * 22) for line in shown[2:])
    assert " ".join(" ".join(shown[1:]).split()).endswith(rows[1][1])
    assert columns(rows, Screen()).splitlines()[1].endswith("thirteen")
    narrow = columns(rows, Screen(30)).splitlines()  # too narrow to wrap beside the node
    assert narrow[:4] == ["node", "    why", "a" * 20, "    one two three four five"]


def test_colours_are_those_of_the_screen_alone():
    rows = [("a", "failed", "x"), ("<0:31>\x1b[31mb", "run", "y")]
    shown = coloured(columns(rows, Screen(None, colours=True)))
    assert "\x1b[31mfailed\x1b[0m" in shown
    assert "\x1b[31mb" not in shown
    assert "\x1b" not in coloured(columns(rows, Screen()))


@pytest.mark.parametrize(
    ("terminal", "environment", "has"),
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_who_decides_of_colours(terminal, environment, has):
    ends = os.openpty() if terminal else os.pipe()
    with open(ends[1], "w") as stream:
        screen = Screen.of(stream, environment)
    os.close(ends[0])
    assert screen.colours is has
    assert (screen.width is not None) is terminal


def test_errors_and_plans_have_colours_where_they_are_wanted(workshop):
    workshop.manifest.write_text(RECIPE)
    assert "\x1b[33mrun\x1b[0m" in workshop.command("plan", "recipe.yaml", FORCE_COLOR="1").stdout
    assert "\x1b" not in workshop.command("plan", "recipe.yaml").stdout
    workshop.manifest.write_text(RECIPE.replace("uses: join", "uses: jion"))
    told = workshop.command("validate", "recipe.yaml", FORCE_COLOR="1").stderr
    assert "\x1b[31merror[BP" in told
    assert "\x1b[31m^^^^\x1b[0m" in told
    assert "\x1b" not in workshop.command("validate", "recipe.yaml", FORCE_COLOR="1", NO_COLOR="1").stderr


def test_the_version_is_that_of_the_distribution():
    assert bigpipe.__version__ == version("bigpipe-ml")


@pytest.mark.parametrize("name", sorted({*bigpipe.__all__} - {"__version__"}))
def test_every_export_is_documented_and_typed(name):
    export = getattr(bigpipe, name)
    assert inspect.getdoc(export)
    assert not inspect.getdoc(export).startswith(f"{name}(")
    functions = [export] if inspect.isfunction(export) else [
        member for own, member in vars(export).items() if inspect.isfunction(member) and not own.startswith("_")
    ]  # fmt: skip
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        untyped = [each.name for each in parameters if each.annotation is each.empty and each.name != "self"]
        assert untyped == [], function
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty, function


def test_a_script_that_uses_it_passes_a_strict_type_checker(tmp_path):
    """Where `make check` ran, mypy knows all of bigpipe already."""
    (tmp_path / "script.py").write_text(WHAT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "script.py")],
        cwd=QUICKSTART.parents[1], capture_output=True, text=True, check=False, env={**os.environ, "MYPYPATH": "src"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
