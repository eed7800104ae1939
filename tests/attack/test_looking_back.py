"""What looks back at runs, and draws them, against records, results and names that nobody expects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.forking import forked
from support.workshop import Workshop

from bigpipe.errors import UsageError
from bigpipe.files import LogFile, read_sealed, write_sealed
from bigpipe.orchestrator.report import follow_log, graph_text, log_lines, report_runs, running
from bigpipe.orchestrator.report.drawing import Drawn, graph
from bigpipe.orchestrator.running import records

RECIPE = """\
version: 1
name: told
stages:
  first: {uses: write, with: {text: abc}}
  second: {uses: join, inputs: {first: first}}
"""
SAY = """\
from pathlib import Path

from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult


class Word(Params):
    pass


def run(params, context):
    (context.out / "results.jsonl").write_bytes(Path("ROW").read_bytes())
    return StageResult(Metrics())


SAY = Stage(kind="say", version=1, params=Word, metrics=Metrics, inputs={}, output="results", run=run,
            forecast=lambda params, context: Forecast())
"""
SAYING = "version: 1\nname: said\ntrust: {modules: [say]}\nstages:\n  a: {uses: 'say:SAY'}\n"
NAN, ENDLESS, HUGE = float("nan"), float("inf"), 10**400
METRICS: dict[str, dict[str, Any]] = {
    "nothing": {"predicted": {"cpu": None}, "measured": {"cpu": 3}},
    "a text": {"predicted": {"cpu": "much"}, "measured": {"cpu": 3}},
    "no number": {"predicted": {"cpu": NAN}, "measured": {"cpu": ENDLESS}},
    "less than none": {"predicted": {"cpu": -5}, "measured": {"cpu": -3}},
    "a list": {"predicted": {"cpu": [1]}, "measured": {"cpu": {}}},
    "too much": {"predicted": {"cpu": HUGE}, "measured": {"cpu": HUGE}},
    "tables of too much": {"a": {"x": HUGE, "y": 2}, "b": {"x": -HUGE, "y": NAN}},
    "numbers of too much": {"a": HUGE, "bytes": -HUGE, "c": ENDLESS},
    "markup": {"predicted": {"</title><script>x</script>": 1}, "measured": {'"><img src=x>': 2}},
}
EVENTS: dict[str, bytes] = {
    "no objects": b'5\n"time"\n["time"]\nnull\n',
    "a number for a time": b'{"time": 5, "event": "x"}\n',
    "no time": b'{"time": "nope", "event": "x"}\n',
    "the first year": b'{"time": "0001-01-01T00:00:00", "event": "x"}\n',
    "no event": b'{"time": "2026-01-01T00:00:00+00:00"}\n',
    "no node": b'{"time": "2026-01-01T00:00:00+00:00", "event": "node_started"}\n',
    "a list for a node": b'{"time": "2026-01-01T00:00:00+00:00", "event": "node_started", "node": []}\n',
    "depth": b"[" * 200_000 + b"\n",
    "no text": bytes(range(256)),
}
ROWS: dict[str, bytes] = {
    "depth": b"[" * 200_000 + b"]" * 200_000 + b"\n",
    "digits": b"9" * 10_000 + b"\n",
    "no text": b"\xff\xfe\x00\n",
    "one line without end": b"x" * 20_000_000,
    "scalars": b'5\nnull\n[]\n{"prompt": {"a": 1}, "text": [1]}\n{"text": "\\ud800 \\u001b[31m"}\n',
}


@pytest.mark.parametrize("found", METRICS.values(), ids=METRICS)
def test_metrics_of_any_kind_are_shown(workshop: Workshop, found: dict[str, Any]) -> None:
    done = workshop.run(RECIPE, check=True)
    path = workshop.folder / "store" / "runs" / done.run / "run.json"
    record = read_sealed(path)
    record["nodes"]["second"]["metrics"] = found
    write_sealed(path, record)
    texts = report_runs(store=workshop.folder / "store"), report_runs(store=workshop.folder / "store", form="markdown")
    assert not any(re.search(r"(?<!\\)<(script|img)", text) for text in texts)
    assert workshop.command("show").returncode == 0


@pytest.mark.parametrize("content", EVENTS.values(), ids=EVENTS)
def test_a_log_of_events_that_holds_anything(workshop: Workshop, content: bytes) -> None:
    done = workshop.run(RECIPE, check=True)
    events = workshop.folder / "store" / "runs" / done.run / records.EVENTS
    events.write_bytes(content + events.read_bytes())
    assert {"first", "second"} <= records.node_times(events.parents[1], done.run).keys()
    assert "second" in report_runs(store=workshop.folder / "store")


PROGRESS = (
    '{"event": "progress", "node": []}', '{"event": []}', '{"event": "progress", "node": "second", "done": "x"}',
    '{"event": "progress", "node": "second", "done": 1e999, "total": 1e999, "unit": "B"}',
    '{"event": "progress", "node": "second", "done": -1, "total": 1%s, "unit": "B"}' % ("0" * 400),
    '{"event": "progress", "node": "second", "done": null, "total": [], "unit": {}}',
)  # fmt: skip


@pytest.mark.parametrize("content", [*EVENTS.values(), *(line.encode() for line in PROGRESS)])
def test_a_run_that_goes_on_is_told_whatever_its_log_holds(workshop: Workshop, content: bytes) -> None:
    done = workshop.run(RECIPE, check=True)
    folder = workshop.folder / "store" / "runs" / done.run
    record = read_sealed(folder / "run.json")
    record["status"] = record["nodes"]["second"]["status"] = "running"
    write_sealed(folder / "run.json", record)
    (folder / records.EVENTS).write_bytes(content + b"\n")
    with LogFile(folder / records.EVENTS) as log:
        log.hold()
        assert done.run in running(store=workshop.folder / "store").text


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_results_of_any_kind_are_shown(workshop: Workshop, row: bytes) -> None:
    """Also by the command that made them, whose exit code they do not change."""
    (workshop.folder / "row").write_bytes(row)
    (workshop.folder / "say.py").write_text(SAY.replace("ROW", str(workshop.folder / "row")))
    workshop.manifest.write_text(SAYING)
    done = workshop.command("run", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert workshop.command("report").returncode == 0
    assert "\x1b" not in done.stdout + (workshop.folder / "report.html").read_text()


def test_a_token_of_the_environment_is_in_no_page(workshop: Workshop) -> None:
    """A kind wrote it into its results; they are its affair, the page is ours."""
    (workshop.folder / "row").write_text('{"prompt": "a", "text": "hf_canary4711"}\n')
    (workshop.folder / "say.py").write_text(SAY.replace("ROW", str(workshop.folder / "row")))
    workshop.run(SAYING, check=True)
    assert workshop.command("report", HF_TOKEN="hf_canary4711").returncode == 0
    assert "canary" not in (workshop.folder / "report.html").read_text()


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _elsewhere(path: Path) -> None:
    path.symlink_to(__file__)


@pytest.mark.parametrize("name", ["events.jsonl", "log.txt"])
@pytest.mark.parametrize("harm", [os.mkfifo, os.mkdir, _endless, _elsewhere])
def test_what_stands_in_the_place_of_a_log_is_not_waited_for(
    workshop: Workshop, name: str, harm: Callable[[Path], None]
) -> None:
    done = workshop.run(RECIPE, check=True)
    folder = workshop.folder / "store" / "runs" / done.run
    log = folder / name if name == records.EVENTS else folder / "nodes" / "first" / "1" / name
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    harm(log)
    (folder / "nodes" / "first" / "2x").mkdir(parents=True, exist_ok=True)
    (folder / "nodes" / "first" / "2x" / "log.txt").write_text("of nobody")
    assert forked(lambda: report_runs(store=workshop.folder / "store"), seconds=20).code == 0
    looked = forked(lambda: list(log_lines("last", None, workshop.folder / "store")), seconds=20)
    assert looked.in_order, looked
    assert forked(lambda: list(follow_log("last", store=workshop.folder / "store")), seconds=20).in_order
    assert forked(lambda: running(store=workshop.folder / "store"), seconds=20).in_order
    if name != records.EVENTS:
        with pytest.raises(UsageError, match="no log that can be read"):
            list(log_lines("last", "first", workshop.folder / "store"))


def test_a_graph_of_many_lines_is_no_bomb() -> None:
    """Of 2,000 nodes, each behind the one before and behind the first twenty: 40 million places, if all were drawn."""
    nodes = [Drawn(str(n), after=[str(m) for m in {*range(min(20, n)), n - 1} if m >= 0]) for n in range(2000)]
    assert forked(lambda: _small(graph(nodes)), seconds=30).code == 0


def _small(svg: str) -> None:
    assert len(svg) < 10_000_000


def test_names_stay_within_their_quotes(workshop: Workshop) -> None:
    """Texts of a matrix become names of nodes."""
    from bigpipe.orchestrator.recipe import load_recipe

    workshop.manifest.write_text(
        "version: 1\nname: q\nstages:\n"
        "  a: {uses: write, with: {text: '${matrix.t}'}, matrix: {t: ['\"]; evil', 'x\\']}}\n"
    )
    recipe = load_recipe(workshop.manifest)
    assert r'"a@t=\"]; evil" [label="a@t=\"]; evil\nwrite"];' in graph_text(recipe, "dot")
    assert r'"a@t=x\\" [label=' in graph_text(recipe, "dot")
    assert 'n0["a@t=#quot;]; evil"]' in graph_text(recipe, "mermaid")
