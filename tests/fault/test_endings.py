"""However a run ends, or is not heard: its work and its exit code are what they would be, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from support.commanding import BIGPIPE, end, left_of, start
from support.launching import Launched, make_job, wait_for
from support.workshop import environment

from bigpipe.errors import StageFailed
from bigpipe.files import PATIENCE, LogFile
from bigpipe.orchestrator.launch.output import Log, OutputReader
from bigpipe.orchestrator.launch.processes import signed_in

NOISY = '''
import resource, sys, time
from pathlib import Path
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult

class NoisyParams(Params):
    full: str = ""
    """What cannot be written for a while: log, events."""

class NoisyMetrics(Metrics):
    lines: int

def run(params, context):
    if params.full == "log":
        log = next(context.base.glob("store/runs/*/nodes/noisy/1")) / "log.txt"
        print("first", flush=True)
        while not log.exists():
            time.sleep(0.01)
        log.rename(f"{log}.aside")
        log.symlink_to("/dev/full")
    if params.full == "events":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    for number in range(3000):
        print("x" * 100)
        if number % 1000 == 0:
            context.log(f"line {number}")
    sys.stdout.flush()
    if params.full == "log":
        time.sleep(0.5)
        log.unlink()
        print("last", flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (context.out / "text").write_text("done")
    return StageResult(NoisyMetrics(lines=3000))

NOISY = Stage(kind="noisy", version=1, params=NoisyParams, metrics=NoisyMetrics, inputs={}, output="text", run=run,
              forecast=lambda params, context: Forecast())
'''
RECIPE = """version: 1
name: noisy
trust: {{modules: [noisy]}}
params: {{full: "{full}"}}
stages:
  first: {{uses: write}}
  noisy: {{uses: "noisy:NOISY", needs: [first], with: {{full: "${{params.full}}"}}}}
  after: {{uses: join, inputs: {{first: noisy}}, gates: ["characters > {least}"]}}
"""
SLOW = """version: 1
name: slow
stages:
  quick: {uses: write}
  slow: {uses: sleep, inputs: {after: quick}, with: {seconds: 60}}
"""


@pytest.fixture
def noisy(workshop):
    (workshop.folder / "noisy.py").write_text(NOISY)
    workshop.manifest.write_text(RECIPE.format(full="", least=0))
    return workshop


def cached(workshop) -> set[str]:
    return {item["action"] for item in workshop.json("status", "recipe.yaml")["nodes"].values()}


class TestFilesThatCannotBeWritten:
    def test_a_log_costs_its_lines(self, noisy):
        done = noisy.command("run", "recipe.yaml", "-p", "full=log")
        assert done.returncode == 0, done.stderr
        assert "noisy: its log is not written, and lines are lost: the disk is full: " in done.stderr
        log = next(noisy.folder.glob("store/runs/*/nodes/noisy/1/log.txt")).read_text()
        assert "lines could not be written here)" in log
        assert log.endswith("last\n")

    @pytest.mark.fault
    def test_a_workers_events_cost_themselves(self, noisy):
        done = noisy.command("run", "recipe.yaml", "-p", "full=events")
        assert done.returncode == 0, done.stderr
        assert "events are lost: " in noisy.command("log", "last", "noisy").stdout

    def test_a_file_for_events_costs_itself(self, noisy):
        done = noisy.command("run", "recipe.yaml", "--events", "/dev/full")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("events are lost: the disk is full: /dev/full: ") == 1

    def test_a_file_for_events_that_cannot_be_made_is_an_error_at_once(self, noisy):
        done = noisy.command("run", "recipe.yaml", "--events", ".")
        assert done.returncode == 2
        assert "name another file with --events" in done.stderr
        assert not (noisy.folder / "store" / "runs").exists()

    def test_a_fifo_for_events_needs_a_reader(self, noisy):
        """Else it is an error at once. One that stops reading costs the events that it does not take."""
        os.mkfifo(noisy.folder / "events")
        done = noisy.command("run", "recipe.yaml", "--events", "events")
        assert done.returncode == 6
        assert "events: nobody reads it\n  start its reader first" in done.stderr
        with open(noisy.folder / "read", "wb") as read, subprocess.Popen(["cat", noisy.folder / "events"], stdout=read):
            done = noisy.command("run", "recipe.yaml", "--events", "events")
        assert done.returncode == 0, done.stderr
        lines = (noisy.folder / "read").read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "run_finished"

    def test_a_reader_of_events_that_stops_costs_what_it_does_not_take(self, tmp_path):
        os.mkfifo(tmp_path / "events")
        with open(os.open(tmp_path / "events", os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
            with LogFile(tmp_path / "events") as log:
                with pytest.raises(OSError, match="nobody reads it"):
                    log.append(b"x" * 2**20)
                began = time.monotonic()
                with pytest.raises(OSError, match="nobody reads it"):
                    log.append(b"y")
                assert time.monotonic() - began < PATIENCE
                assert b"y" not in reader.read()
                log.append(b"z")
            assert reader.read() == b"z"

    def test_a_reader_of_output_that_dies_ends_the_attempt(self, tmp_path):
        """A name that no file can have is none of the faults that cost lines only."""
        job = make_job(tmp_path, params={"do": "flood"})
        job.folder.log = Path("no\0such")
        began = time.monotonic()
        with pytest.raises(ValueError, match="null"):
            Launched(job).run()
        assert time.monotonic() - began < 30
        assert all(not worker.alive for worker in signed_in(job.folder.processes))

    def test_what_a_reader_died_of_is_told_to_who_takes_lines(self):
        reading, writing = os.pipe()
        reader = OutputReader(Log(Path("no\0such")), {reading: None})
        os.write(writing, b"a line\n")

        wait_for(lambda: not reader._thread.is_alive())
        with pytest.raises(ValueError, match="null"):
            reader.take()
        assert reader.finish() == []
        os.close(writing)


class TestReadersThatGoAway:
    """Neither the work nor the exit code changes."""

    @pytest.mark.parametrize(("least", "code"), [(0, 0), (1000, 3)])
    @pytest.mark.parametrize("redirection", [
        "2>&1 | head -1",
        *(pytest.param(more, marks=pytest.mark.fault)
          for more in (">&- 2>&- <&-", "| head -1", "2>&1 | true", "2>&-", ">&-", "2>/dev/full")),
    ])  # fmt: skip
    def test_of_standard_streams(self, noisy, redirection, least, code):
        noisy.manifest.write_text(RECIPE.format(full="", least=least))
        command = f"set -o pipefail; {shlex.join([*BIGPIPE, 'run', 'recipe.yaml'])} {redirection}"
        shell = ["bash", "-c", command]
        done = subprocess.run(shell, cwd=noisy.folder, env=environment(noisy.folder), capture_output=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert cached(noisy) == {"cached"}

    @pytest.mark.fault
    def test_output_that_somebody_wants_and_does_not_get_is_an_error_after_the_work(self, noisy):
        with open("/dev/full", "w") as full:
            process = start(noisy, "run", "recipe.yaml", stdout=full)
            said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 6
        assert "error: the disk is full: /dev/full: " in said
        assert cached(noisy) == {"cached"}

    @pytest.mark.fault
    def test_of_a_terminal_that_is_closed(self, workshop):
        workshop.manifest.write_text(SLOW.replace("60", "1.5"))
        with terminal() as (master, slave):
            process = start(workshop, "run", "recipe.yaml", stdout=slave, stderr=slave, environ={"TERM": "xterm"})
            os.close(slave)
            wait_for((workshop.folder / "pid-slow").exists)
            os.close(master)
            assert process.wait(60) == 0
        assert cached(workshop) == {"cached"}


@contextlib.contextmanager
def terminal():
    ends = os.openpty()
    try:
        yield ends
    finally:
        for end_ in ends:
            with contextlib.suppress(OSError):
                os.close(end_)


def in_foreground(slave: int):
    """Makes the terminal the one that controls the session: closing it then hangs up."""
    return lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "code"),
        [
            (signal.SIGINT, 130),
            pytest.param(signal.SIGTERM, 143, marks=pytest.mark.fault),
            pytest.param(signal.SIGHUP, 129, marks=pytest.mark.fault),
        ],
    )
    def test_each_leaves_a_run_that_can_go_on(self, workshop, number, code):
        workshop.manifest.write_text(SLOW)
        process = start(workshop, "run", "recipe.yaml")
        wait_for((workshop.folder / "pid-slow").exists)
        assert end(process, number) == code
        assert left_of(workshop.folder / "store") == []
        shown = workshop.json("show", "last")
        assert shown["status"] == "interrupted"
        assert shown["nodes"]["quick"]["status"] == "succeeded"

    def test_a_terminal_that_goes_away_is_one_of_them(self, workshop):
        workshop.manifest.write_text(SLOW)
        with terminal() as (master, slave):
            process = start(workshop, "run", "recipe.yaml", stdin=slave, stdout=slave, stderr=slave,
                            preexec_fn=in_foreground(slave))  # fmt: skip
            os.close(slave)
            wait_for((workshop.folder / "pid-slow").exists)
            os.close(master)
            assert process.wait(60) == 129
        assert left_of(workshop.folder / "store") == []
        assert workshop.json("show", "last")["status"] == "interrupted"

    @pytest.mark.fault
    def test_nohup_is_heeded(self, workshop):
        workshop.manifest.write_text(SLOW.replace("60", "1.5"))
        process = start(workshop, "run", "recipe.yaml", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        wait_for((workshop.folder / "pid-slow").exists)
        assert end(process, signal.SIGHUP) == 0
        assert cached(workshop) == {"cached"}

    @pytest.mark.parametrize("times", [3, pytest.param(300, marks=[pytest.mark.fault, pytest.mark.timeout(3600)])])
    def test_control_c_at_any_moment(self, workshop, seed, times):
        workshop.manifest.write_text(MANY)
        process = start(workshop, "run", "recipe.yaml")
        began = time.monotonic()
        process.communicate(timeout=120)
        whole = time.monotonic() - began
        draw, codes = random.Random(seed), []  # noqa: S311
        for number in range(times):
            process = start(workshop, "run", "recipe.yaml", "-p", f"word=w{number}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0.05, whole) if number else whole / 2)  # one is in the middle
            process.send_signal(signal.SIGINT)
            if draw.random() < 0.3:  # impatient
                time.sleep(draw.uniform(0, 0.2))
                process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1].decode()
            if said.startswith("Fatal Python error: init_"):  # of the interpreter, before anything of ours is there
                continue
            codes.append(process.returncode)
            assert process.returncode in (0, 130, -signal.SIGINT), said
            assert "this is a bug" not in said
            assert process.returncode == -signal.SIGINT or "Traceback" not in said, said
            assert left_of(workshop.folder / "store") == []
        assert workshop.command("run", "recipe.yaml").returncode == 0
        assert workshop.command("verify").returncode == 0
        assert {run["status"] for run in workshop.json("ls")["runs"]} <= {"succeeded", "interrupted", "dead"}
        assert 130 in codes
        assert len(codes) > 0.9 * times


MANY = """version: 1
name: many
params: {word: w}
stages:
  a: {uses: write, with: {text: "${params.word}"}}
  b: {uses: join, inputs: {first: a}}
  c: {uses: join, inputs: {first: a, second: b}}
  d: {uses: join, inputs: {first: c}}
"""


class TestDeadRuns:
    def test_are_called_dead_and_live_ones_running(self, workshop):
        workshop.manifest.write_text(SLOW)
        process = start(workshop, "run", "recipe.yaml", "--json")
        wait_for((workshop.folder / "pid-slow").exists)
        time.sleep(1.5)  # within a second it is on record
        shown = workshop.json("show", "last")
        assert shown["status"] == "running"
        assert {name: node["status"] for name, node in shown["nodes"].items()} == {
            "quick": "succeeded", "slow": "running",
        }  # fmt: skip
        end(process)
        assert left_of(workshop.folder / "store") == []
        shown = workshop.json("show", "last")
        assert shown["status"] == "dead"
        assert {name: node["status"] for name, node in shown["nodes"].items()} == {"quick": "succeeded", "slow": "dead"}
        assert [run["status"] for run in workshop.json("ls")["runs"]] == ["dead"]
        assert "running" not in workshop.command("ls").stdout + workshop.command("show").stdout

    @pytest.mark.fault
    def test_what_happened_is_on_record_a_second_later(self, workshop):
        workshop.manifest.write_text(SLOW)
        process = start(workshop, "run", "recipe.yaml")
        wait_for((workshop.folder / "pid-slow").exists)
        time.sleep(1.5)
        end(process)
        events = next(workshop.folder.glob("store/runs/*/events.jsonl")).read_text().splitlines()
        assert [json.loads(line)["event"] for line in events][-1] == "node_started"


def test_a_worker_that_cannot_write_what_came_of_it_says_so(tmp_path):
    with pytest.raises(StageFailed, match="could not write what came of it") as caught:
        Launched(make_job(tmp_path, params={"do": "choke"})).run()
    assert f"{tmp_path / 'attempt' / 'outcome-run.json'}: File too large" in caught.value.cure
    assert "allow larger files (`ulimit -f`" in caught.value.cure


def test_a_terminal_that_has_few_signs_is_shown_the_others_spelled_out(workshop):
    workshop.manifest.write_text("version: 1\nname: few\nstages:\n  a: {uses: write, with: {text: 'größe → 1'}}\n")
    run = workshop.command("run", "recipe.yaml", PYTHONIOENCODING="ascii")
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert "\\u2713 succeeded" in run.stderr


def test_a_working_directory_that_is_gone_is_named(workshop):
    workshop.manifest.write_text("version: 1\nname: gone\nstages:\n  a: {uses: write, with: {text: x}}\n")
    (workshop.folder / "gone").mkdir()
    script = f"cd gone && rmdir ../gone && exec {sys.executable} -m bigpipe plan ../recipe.yaml"
    environ = environment(workshop.folder)
    told = subprocess.run(["sh", "-c", script], cwd=workshop.folder, env=environ, capture_output=True, text=True)
    assert told.returncode == 2, told
    assert "the working directory cannot be used" in told.stderr
