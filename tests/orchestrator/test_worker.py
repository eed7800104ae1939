from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, computed_field
from support import stages
from support.launching import TESTS, Launched, gone, make_job, read_pid, wait_for

from bigpipe.errors import Interrupted, NotAuthorised, Place, UsageError
from bigpipe.orchestrator.contract.contexts import Assignment
from bigpipe.orchestrator.contract.events import LogLine, Progress
from bigpipe.orchestrator.contract.stage import Params
from bigpipe.orchestrator.launch import lifeline, processes
from bigpipe.orchestrator.launch.jobs import Failure, JobFile, Outcome
from bigpipe.orchestrator.launch.output import EventTail, EventWriter
from bigpipe.redaction import conceal

PATH = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH}


def start_command(folder: Path, action: str) -> subprocess.Popen[bytes]:
    arguments = ["-m", "support.command", str(folder), "PROCESS", json.dumps({"do": action}), "1"]
    return subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT)


def run_worker(folder: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    arguments = ["-m", "bigpipe.orchestrator.launch.worker", str(folder / "attempt/job.json"), mode]
    return subprocess.run(
        [sys.executable, *arguments], env={**ENVIRONMENT, **environment}, check=False, capture_output=True, timeout=60
    )


@pytest.mark.parametrize("action", ["sleep", "ignore"])
def test_a_worker_dies_with_its_command(tmp_path: Path, action: str) -> None:
    command = start_command(tmp_path, action)
    worker = read_pid(tmp_path / "work/scratch/asleep-0")
    command.kill()
    command.wait()
    wait_for(lambda: gone(worker), 10)


@pytest.mark.parametrize("listens", [False, True])
def test_what_has_no_kernel_tie_notices_by_itself(tmp_path: Path, listens: bool) -> None:
    """The way of systems without PR_SET_PDEATHSIG, with a child of its own that goes along. What listens to SIGTERM is
    sent that first."""
    pids, told = tmp_path / "pids", tmp_path / "told"
    listen = f"signal.signal(signal.SIGTERM, lambda *_: open({str(told)!r}, 'w').close())" if listens else ""
    orphan = f"""
import os, signal, subprocess, sys, threading, time
from bigpipe.orchestrator.launch.lifeline import watch_parent
{listen}
threading.Thread(target=watch_parent, args=(os.getppid(), 0.1), daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pids)!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")
os.rename({str(pids)!r} + ".new", {str(pids)!r})
time.sleep(60)
"""
    parent = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {orphan!r}], start_new_session=True).wait()
"""
    process = subprocess.Popen([sys.executable, "-c", parent], env=ENVIRONMENT)
    wait_for(pids.exists)
    process.kill()
    process.wait()
    wait_for(lambda: all(gone(int(pid)) for pid in pids.read_text().split()), 10)
    assert told.exists() == listens


def test_a_worker_whose_parent_is_gone_already_does_nothing(tmp_path: Path) -> None:
    Launched(make_job(tmp_path)).run()
    (tmp_path / "work/out/made").unlink()
    done = run_worker(tmp_path, "run", BIGPIPE_PARENT="1")
    assert done.returncode == lifeline.ORPHANED
    assert not (tmp_path / "work/out/made").exists()


def test_workers_hold_their_work_folder_and_a_successor_waits(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, params={"do": "sleep"}))
    tried: list[bool] = []

    def try_to_take_over() -> None:
        read_pid(tmp_path / "work/scratch/asleep-0")
        with (tmp_path / "work/lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                tried.append(True)
            except BlockingIOError:
                tried.append(False)
        launched.cancelled.set()

    threading.Thread(target=try_to_take_over).start()
    with pytest.raises(Interrupted):
        launched.run()
    assert tried == [False]
    with (tmp_path / "work/lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_worker_gives_way_to_a_successor(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from bigpipe.orchestrator.launch.lifeline import hold_work_folder\n"
    script += "hold_work_folder(Path(sys.argv[1]), patience=0.3)"
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=ENVIRONMENT, check=False)
    assert done.returncode == lifeline.ORPHANED
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=ENVIRONMENT, check=False).returncode == 0


def test_start_marks_tell_processes_apart() -> None:
    mine = lifeline.start_mark(os.getpid())
    assert mine is not None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.02)
    assert lifeline.start_mark(child.pid) not in (None, mine)
    child.kill()
    wait_for(lambda: gone(child.pid), 5)  # a zombie by now
    child.wait()
    assert gone(child.pid)


def test_a_number_that_serves_a_stranger_now_is_left_alone() -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    known = processes.Worker(stranger.pid, stranger.pid, mark="0")
    assert processes.end([known], grace=0.1) == []
    assert stranger.poll() is None
    ours = processes.Worker(stranger.pid, stranger.pid, lifeline.start_mark(stranger.pid))
    assert processes.end([ours], grace=5, reap=stranger.poll) == []
    assert stranger.wait() == -signal.SIGTERM


def test_who_does_not_heed_sigterm_is_killed() -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    )
    deaf = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE)
    assert deaf.stdout is not None
    with deaf.stdout:
        deaf.stdout.readline()
    worker = processes.Worker(deaf.pid, deaf.pid, lifeline.start_mark(deaf.pid))
    assert processes.end([worker], grace=0.2, reap=deaf.poll) == []
    assert deaf.wait() == -signal.SIGKILL


def test_events_cross_the_border_in_order_and_progress_is_thinned(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "events" / "run-0.jsonl")
    conceal(["hunter22"])
    tail = EventTail(tmp_path / "events")
    assert list(tail.new()) == []
    writer.report(LogLine("n", "with hunter22"))
    for done in range(500):
        writer.report(Progress("n", done, 1000))
    assert list(tail.new()) == [LogLine("n", "with ***"), Progress("n", 0, 1000)]
    with (tmp_path / "events" / "run-0.jsonl").open("a") as file:
        file.write('{"event": "nobody knows"}\n')
    writer.close()
    assert list(tail.new()) == [Progress("n", 499, 1000)]
    writer.report(LogLine("n", "too late"))
    assert list(tail.new()) == []
    with (tmp_path / "events" / "run-0.jsonl").open("a") as file:
        file.write('{"event": "log", "node": "n", ')
        file.flush()
        assert list(tail.new()) == []
        file.write('"line": "torn"}\n')
    assert list(tail.new()) == [LogLine("n", "torn")]


def test_errors_keep_their_class_over_the_border(tmp_path: Path) -> None:
    class OwnError(NotAuthorised):
        """A third party's."""

    for error in (OwnError("no", "log in"), UsageError("odd", place=Place("f.yaml", 3, 4))):
        Outcome(failure=Failure.of(error)).write(tmp_path / "outcome.json")
        read = Outcome.read(tmp_path / "outcome.json")
        assert read is not None
        assert read.failure is not None
        back = read.failure.error("node", tmp_path / "log.txt")
        assert type(back) is (NotAuthorised if isinstance(error, OwnError) else UsageError)
        assert back.cure == error.cure
        assert back.cause == ("no" if isinstance(error, OwnError) else "f.yaml:3:4: odd")
    assert Failure.of(OSError(28, "No space left on device", "/store")).cause.startswith("the disk is full: /store: ")
    assert Failure.of(OSError(errno.ENOMEM, "Cannot allocate memory")).cause.startswith("memory ran out")
    assert Failure.of(RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")).type == "DoesNotFit"
    assert not Failure.of(ValueError("DefaultCPUAllocator: can't allocate memory: 1 bytes")).expected
    for said in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert Failure.of(RuntimeError(said)).type == "DoesNotFit"
        assert Failure.of(RuntimeError(said)).cause.startswith("GPU memory ran out")
        assert not Failure.of(ValueError(said)).expected
    silent = SystemError("error return without exception set")
    assert not Failure.of(silent).expected
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**50, limit[1]))
    try:
        assert Failure.of(silent).cause.startswith("memory ran out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert Failure.of(KeyboardInterrupt()).cause == "KeyboardInterrupt"
    assert not Failure.of(KeyboardInterrupt()).expected


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = make_job(
        tmp_path, inputs={"model": (Path("/a"), Path("/b"))}, environment={"X": "1"}, params={"do": "talk"},
        arriving={"model": Path("/c")}, secrets=frozenset({"X"}),
    )  # fmt: skip
    JobFile.of(job, cpu=True).write(tmp_path / "job.json")
    again = JobFile.read(tmp_path / "job.json", {"X": "1", "Y": "2"})
    assert all(getattr(again.assignment, item.name) == getattr(job, item.name) for item in fields(Assignment))
    assert job.stage.params.model_validate(again.params) == job.params
    assert (again.secrets, again.cpu) == (job.secrets, True)


NUMBERS = count()


class Drawn(BaseModel):
    number: int = Field(default_factory=lambda: next(NUMBERS))


class Made(Params):
    number: int = Field(default_factory=lambda: next(NUMBERS))
    inner: Drawn = Field(default_factory=Drawn)
    more: list[Drawn] = Field(default_factory=list)
    empty: list[int] = Field(default_factory=list)
    plain: int = 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.number


def test_a_worker_is_given_what_was_made_for_a_field(tmp_path: Path) -> None:
    job = make_job(tmp_path, stage=replace(stages.PROCESS, params=Made), params={"more": [{}]})
    written = JobFile.of(job).params
    assert Made.model_validate(written) == job.params
    assert written.keys() == {"number", "inner", "more"}
    assert job.params.model_fields_set == {"more"}


def test_a_worker_imports_nothing_heavy_before_it_is_tied() -> None:
    script = "import sys, bigpipe.orchestrator.launch.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert not {"pydantic", "psutil", "torch", "accelerate", "yaml"} & set(done.stdout.split())
