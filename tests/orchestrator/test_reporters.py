from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.launching import wait_for

from bigpipe.errors import DoesNotFit, ManifestError, Place, Problem, UsageError
from bigpipe.orchestrator.contract.events import (
    Event,
    LogLine,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    Progress,
    RunFinished,
    RunStarted,
    event_from_json,
)
from bigpipe.orchestrator.report import progress, reporters, shown
from bigpipe.orchestrator.report.progress import ProgressMeter
from bigpipe.orchestrator.report.reporters import RichReporter
from bigpipe.redaction import conceal

GB = 10**9


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


STORY: list[Event] = [
    RunStarted("r1", "opt.yaml", ("download", "shard", "save")),
    NodeFinished("download", "cached", 0.0, 0, {}),
    NodeStarted("shard", "no record"),
    Progress("shard", 1, 2, "file"),
    LogLine("shard", "[red]two[/red] files"),
    LogLine("shard", "only for the log", detail=True),
    NodeRetried("shard", 2, "busy", 1.5),
    NodeFinished("shard", "succeeded", 12.34, 2**28, {}),
    NodeStarted("save", ""),
    NodeFinished("save", "failed", 1.0, 0, {}, error="no such bucket\n  make it"),
    RunFinished("r1", "failed", 13.5),
]


def test_plain_lines_tell_the_story() -> None:
    stream = io.StringIO()
    with closing(reporters.PlainReporter(stream)) as reporter:
        for event in STORY:
            reporter.report(event)
    assert stream.getvalue().splitlines() == [
        "[1/3] download: · cached",
        "[2/3] shard: started (no record)",
        "[2/3] shard: 50 % 1/2 file",
        "[2/3] shard: [red]two[/red] files",
        "[2/3] shard: attempt 2 in 1.50 s: busy",
        "[2/3] shard: ✓ succeeded in 12.3 s, peak 256.0 MiB",
        "[3/3] save: started",
        "[3/3] save: ✗ failed in 1.00 s: no such bucket",
        "  make it",
        "run r1 failed in 13.5 s",
    ]


def test_plain_progress_is_a_line_per_tenth_or_half_minute() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = reporters.PlainReporter(stream, clock)
    reporter.report(NodeStarted("n", ""))
    for step in range(1, 1001):
        clock.now = step * 0.1
        reporter.report(Progress("n", step * GB // 1000 * 20, 20 * GB))
    lines = stream.getvalue().splitlines()[1:]
    assert len(lines) == 10
    assert lines[0] == "n: 10 % 2.0/20.0 GB 200.0 MB/s eta 1:30"
    assert lines[-1] == "n: 100 % 20.0/20.0 GB 200.0 MB/s"
    stream.truncate(0)
    for minute in range(1, 4):
        clock.now += 60
        reporter.report(Progress("n", minute, None, "record", "slow"))
    assert stream.getvalue().count("\n") == 3


def test_the_rate_follows_the_last_seconds_and_ranks_add_up() -> None:
    clock = Clock()
    meter = ProgressMeter(clock)
    for second in range(20):
        clock.now = second
        meter.update(Progress("n", second * 100, 10_000, "x", rank=0))
    reading = meter.update(Progress("n", 500, 10_000, "x", rank=1))
    assert (reading.done, reading.total) == (2400, 20_000)
    told = [(1, 3, 0), (2, 2, 1), (3, 3, 0)]  # of what is left, each expects its part
    shared = [Progress("n", done, total, "y", "shared", rank, whole=5) for done, total, rank in told]
    assert [meter.update(event).total for event in shared] == [5, 5, 5]
    slow = ProgressMeter(clock)
    for second in range(100):
        clock.now = second
        reading = slow.update(Progress("n", min(second, 50) * 100, 10_000, "x"))
    assert reading.rate == 0
    assert reading.eta is None
    assert slow.update(Progress("n", 0, 10, "x", "another task")).rate is None


def test_ranks_that_count_tokens_are_told_one_by_one() -> None:
    """One makes 10 tokens a second and is never idle; the other makes 4, works half the time, and ends at second 5."""
    clock, meter = Clock(), ProgressMeter(Clock())
    meter.clock = clock
    meter.update(Progress("n", 0, 20, "prompts", rank=0, tokens=0, busy=0.0))
    for second in range(1, 10):
        clock.now = second
        if second <= 5:
            meter.update(Progress("n", second, 5, "prompts", rank=1, tokens=4 * second, busy=second / 2))
        reading = meter.update(Progress("n", second, 20, "prompts", rank=0, tokens=10 * second, busy=float(second)))
    first, second_rank = reading.paces
    assert first.text() == "rank 0: 9/20 prompts 10 tokens/s idle 0% eta 0:11"
    assert second_rank.text() == "rank 1: 5/5 prompts 4.0 tokens/s idle 75%", "2 of 8 seconds at work"
    assert reading.text().endswith(" 14 tokens/s idle 38%")
    (alone,) = ProgressMeter(Clock()).update(Progress("n", 1, 2, "x", tokens=3, busy=1.0)).paces
    assert alone.text() == "rank 0: 1/2 x"
    assert ProgressMeter(Clock()).update(Progress("n", 1, 2, "x")).paces == ()


def test_ranks_that_begin_again_after_a_death_are_no_slower_than_nothing() -> None:
    clock, meter = Clock(), ProgressMeter(Clock())
    meter.clock = clock
    for second in range(1, 10):
        clock.now = second
        meter.update(Progress("n", second, 60, "prompts", tokens=100 * second, busy=float(second), whole=120))
    for second in range(10, 15):
        clock.now, done = second, second - 9
        reading = meter.update(Progress("n", done, 50, "prompts", tokens=50 * done, busy=float(done), whole=100))
        assert (reading.done, reading.total) == (done, 100)
        assert not any((pace.tokens_per_second or 0) < 0 or (pace.idle or 0) > 0.01 for pace in reading.paces)
    again = ProgressMeter(clock)
    again.update(Progress("n", 5, 9, "prompts", tokens=500, busy=5.0))
    clock.now += 1
    (pace,) = again.update(Progress("n", 1, 9, "prompts", tokens=10, busy=1.0)).paces
    assert pace.tokens_per_second is None


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (18_300_000_000, 25_700_000_000, "B", "18.3/25.7 GB"),
        (999, None, "B", "999 B"),
        (12, 500, "B", "12/500 B"),
        (3, 5, "prompts", "3/5 prompts"),
        (7, None, "prompts", "7.0 prompts"),
    ],
)
def test_amounts(done: int, total: int | None, unit: str, text: str) -> None:
    assert progress.amount(done, total, unit) == text


def test_durations() -> None:
    assert [progress.duration(s) for s in (0, 24.4, 60, 3723)] == ["0:00", "0:24", "1:00", "1:02:03"]


def test_a_terminal_shows_the_same_story_and_no_markup_is_read() -> None:
    stream = Terminal()
    with closing(RichReporter(stream, environment={"TERM": "xterm"}, width=100)) as reporter:
        for event in STORY:
            reporter.report(event)
            if isinstance(event, Progress):
                wait_for(lambda: "1/2 file" in stream.getvalue(), 5)  # bars are drawn eight times a second
    shown = stream.getvalue()
    for part in (
        "· [1/3] download: cached",
        "[red]two[/red] files",
        "no such bucket",
        "run r1 failed in 13.5 s",
    ):
        assert part in shown
    assert "only for the log" not in shown


def test_no_color_is_obeyed() -> None:
    colours = {}
    for name, environment in (("plain", {"NO_COLOR": "1"}), ("coloured", {"COLORTERM": "truecolor"})):
        stream = Terminal()
        with closing(
            RichReporter(stream, environment={"TERM": "xterm-256color", **environment}, width=100)
        ) as reporter:
            reporter.report(NodeStarted("n", ""))
            reporter.report(NodeFinished("n", "failed", 1.0, 0, {}, error="bad"))
        colours[name] = "\x1b[31m" in stream.getvalue()
    assert colours == {"plain": False, "coloured": True}


def test_the_stream_decides_and_events_go_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    stream = io.StringIO()
    conceal(["hunter22"])
    with closing(reporters.choose_reporter(stream, events=path)) as reporter:
        for event in [*STORY, LogLine("n", "the password is hunter22")]:
            reporter.report(event)
    assert "\x1b" not in stream.getvalue()
    assert "the password is ***" in stream.getvalue()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.pop("time").endswith("+00:00") for row in rows)
    assert event_from_json(rows[3]) == STORY[3]
    assert len(rows) == len(STORY) + 1
    assert "hunter22" not in path.read_text()
    dumb = Terminal()
    with closing(reporters.choose_reporter(dumb, environment={"TERM": "dumb"})) as reporter:
        reporter.report(NodeStarted("n", ""))
    assert dumb.getvalue() == "n: started\n"


def test_events_go_after_events_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"time": "2026-01-01T00:00:00+00:00", "event": "node_sta')
    for _ in range(2):
        with closing(reporters.choose_reporter(io.StringIO(), events=path)) as reporter:
            reporter.report(STORY[0])
    torn, *rows = path.read_text().splitlines()
    assert torn.endswith("node_sta")
    assert [json.loads(row)["event"] for row in rows] == [STORY[0].name] * 2
    for name, content in {"recipe.yaml": b"version: 1\n", "short": b"x", "model.safetensors": bytes(80)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="something else than events"):
            reporters.choose_reporter(io.StringIO(), events=tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_a_cached_run_never_imports_rich() -> None:
    script = """
import io, sys
from bigpipe.orchestrator.contract.events import *
from contextlib import closing
from bigpipe.orchestrator.report.reporters import choose_reporter
stream = io.StringIO(); stream.isatty = lambda: True
with closing(choose_reporter(stream, environment={})) as reporter:
    reporter.report(RunStarted("r", "m", ("a",)))
    reporter.report(NodeFinished("a", "cached", 0.0, 0, {}))
    reporter.report(RunFinished("r", "succeeded", 0.1))
assert "rich" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_errors_are_annotated_for_github() -> None:
    place = Place("a,b.yaml", 3, 7, "text", 2)
    error = ManifestError([Problem("BP103", place, "unknown field 'x': 50%", "did you mean 'y'?")])
    assert shown.error_text(error, {}).startswith("a,b.yaml:3:7: error[BP103]")
    annotated = shown.error_text(error, {"GITHUB_ACTIONS": "true"}).splitlines()[-1]
    assert annotated == "::error file=a%2Cb.yaml,line=3,col=7::unknown field 'x': 50%25; did you mean 'y'?"
    plain = DoesNotFit("20 GiB do not fit", "use less")
    assert shown.error_text(plain, {"GITHUB_ACTIONS": "true"}) == "error: 20 GiB do not fit\n  use less"
    placed = DoesNotFit("no", "use less", place=place)
    assert shown.error_text(placed, {"GITHUB_ACTIONS": "true"}).endswith("col=7::no%0Ause less")


def test_what_github_is_told_has_no_secret_and_moves_no_terminal_and_starts_at_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conceal(["hunter22"])
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    error = DoesNotFit("the server said hunter22 \x1b[2J", "use less", place=Place("a.yaml", 3, 7))
    around = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(tmp_path)}
    annotated = shown.error_text(error, around).splitlines()[-1]
    assert annotated.startswith("::error file=models/a.yaml,line=3,col=7::the server said ")
    assert "hunter22" not in annotated
    assert "\x1b" not in annotated
    elsewhere = shown.error_text(error, {**around, "GITHUB_WORKSPACE": str(tmp_path / "mod")})
    assert "::error file=a.yaml," in elsewhere
