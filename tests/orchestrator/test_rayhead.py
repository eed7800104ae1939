"""What is told of a Ray cluster's head, and what is asked of Ray, without a cluster."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.launching import make_job, wait_for
from support.workshop import Workshop

from bigpipe.errors import BigpipeError, Interrupted, Transient, UsageError
from bigpipe.orchestrator.contract import LogLine
from bigpipe.orchestrator.launch import Job, Needs, onray, rayhead
from bigpipe.orchestrator.launch.rayhead import Head, is_same, parts


@pytest.mark.parametrize("address", [
    "garbage", "10.0.0.1", "10.0.0.1:", ":6379", "10.0.0.1:70000", "10.0.0.1:६", "local", "ray://10.0.0.1:10001",
    "http://10.0.0.1:8265",
])  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="is not where the head of a Ray cluster is") as error:
        parts(address)
    assert "give HOST:PORT" in error.value.cure
    assert ("ray:// is of Ray's client" in error.value.cure) == ("://" in address)


def test_an_address_has_a_host_and_a_port() -> None:
    assert parts("head.example:6379") == ("head.example", 6379)
    assert parts("[::1]:6379") == ("::1", 6379)
    assert is_same("localhost:6379", "127.0.0.1:6379")
    assert not is_same("127.0.0.1:6379", "127.0.0.1:6380")


def test_the_variable_is_read_as_the_option_is(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "recipe.yaml").write_text("version: 1\nname: a\nstages: {a: {uses: write}}\n")
    done = Workshop(tmp_path).command("plan", "recipe.yaml", "--executor", "ray", RAY_ADDRESS="ray://127.0.0.1:10001")
    assert done.returncode == UsageError.exit_code
    assert "'ray://127.0.0.1:10001' is not where the head of a Ray cluster is" in done.stderr


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rayhead, "SILENCE", 0.5)
    monkeypatch.setattr(rayhead, "LOOKS", 0.05)
    monkeypatch.setattr(onray, "PATIENCE", 0.05)


@pytest.fixture
def listener() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def at(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("quick")
def test_a_head_is_gone_when_it_has_not_answered_for_a_while(listener: socket.socket) -> None:
    head = Head(at(listener))
    head.begin()
    time.sleep(1)
    head.check()
    assert head.answers
    listener.close()
    wait_for(lambda: not head.answers)
    head.check()  # not yet
    time.sleep(1)
    with pytest.raises(Transient, match="the head of the Ray cluster") as error:
        head.check()
    assert "the same command continues where it stopped" in error.value.cure
    head.close()


@dataclass
class Asked:
    """In Ray's place: what it is asked for. Nothing of it ever begins."""

    alive: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    cancelled: list[Any] = field(default_factory=list)
    exceptions: Any = field(default_factory=lambda: SimpleNamespace(
        TaskCancelledError=KeyError, RayTaskError=KeyError, RayError=KeyError, GetTimeoutError=KeyError))  # fmt: skip

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda *given: SimpleNamespace(completed=object))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True} for name in self.alive]

    def wait(self, items: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        time.sleep(0.01)
        return [], items

    def cancel(self, item: Any, force: bool = False) -> None:
        self.cancelled.append(force)


def job_of(folder: Path, told: list[str], **needs: Any) -> Job:
    def report(event: Any) -> None:
        if isinstance(event, LogLine):
            told.append(event.line)

    return make_job(folder, report=report, needs=Needs(**needs))


@pytest.mark.usefixtures("quick")
def test_what_is_asked_of_ray_for_a_task(tmp_path: Path, listener: socket.socket) -> None:
    ray, told = Asked(), list[str]()
    job = job_of(tmp_path, told, cpus=2, ram=2**30, gpus=1, labels={"place": "here"}, hosts=("a", "b"))
    threading.Timer(1, job.cancelled.set).start()
    ray.alive = ["a"]
    with pytest.raises(Interrupted):
        onray._Tasks(ray, Head(at(listener))).run(job)
    assert ray.options == {
        "max_retries": 0,  # Ray itself would run it beside who still works in its folder, and count nothing
        "num_returns": "streaming", "num_cpus": 2, "num_gpus": 1, "memory": 2**30,
        "label_selector": {"place": "here", "ray.io/node-id": "in(a,b)"},
    }  # fmt: skip
    assert told == ["waits until one machine of the cluster has 2 CPUs, 1 GPU, 1.0 GiB of RAM free"]
    assert ray.cancelled == [False, True], "what does not end is killed"


@pytest.mark.usefixtures("quick")
def test_nobody_waits_for_machines_that_are_gone(tmp_path: Path, listener: socket.socket) -> None:
    with pytest.raises(Transient, match="of the machines that may run it, too few are left in the cluster"):
        onray._Tasks(Asked(alive=["c"]), Head(at(listener))).run(job_of(tmp_path, [], hosts=("a", "b")))


@pytest.mark.usefixtures("quick")
def test_a_run_whose_head_is_gone_ends(tmp_path: Path, listener: socket.socket) -> None:
    head, job = Head(at(listener)), job_of(tmp_path, [])
    threading.Timer(0.5, listener.close).start()
    began = time.monotonic()
    with pytest.raises(Transient, match="is gone"):
        onray._Tasks(Asked(), head).run(job)
    assert time.monotonic() - began < 20
    with pytest.raises(Transient, match="is gone"):  # another node, at once
        onray._Tasks(Asked(), head).run(job)
    head.close()


def test_what_ray_prints_is_kept_from_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    from ray._private import worker

    line = {"lines": ["a worker died"], "pid": "raylet", "is_err": False, "ip": "10.0.0.1", "job": None}
    worker.print_to_stdstream(line, ignore_prefix=False)
    assert "a worker died" in capsys.readouterr().out, "Ray prints it otherwise now: `_quiet` is to be looked at"
    speak = onray._quiet()
    worker.print_to_stdstream({**line, "lines": ["another died"]}, ignore_prefix=False)
    assert capsys.readouterr().out == ""
    speak()
    worker.print_to_stdstream({**line, "lines": ["a third"]}, ignore_prefix=False)
    assert "a third" in capsys.readouterr().out


class StandIn:
    """A `ray` that cannot be joined, or can."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.left = error, False
        self.exceptions = SimpleNamespace(AuthenticationError=PermissionError)

    def init(self, *given: Any, **options: Any) -> None:
        if self.error is not None:
            raise self.error

    def shutdown(self) -> None:
        self.left = True


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\nThis process …\n"
    with pytest.raises(BigpipeError) as error:
        onray._join(StandIn(RuntimeError(told)), "")
    assert "is of other versions: The cluster was started with: Ray: 2.60.0 Python: 3.12.1" in error.value.cause
    assert "the same Python" in error.value.cure


def test_joining_keeps_ray_quiet_until_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray._private import worker

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before, ray = worker.print_to_stdstream, StandIn()
    leave = onray._join(ray, "")
    assert worker.print_to_stdstream is not before
    leave()
    assert worker.print_to_stdstream is before
    assert ray.left
