"""Whoever is killed among command, launcher and ranks: it is told within 30 s, and nobody is left after 10 s more."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.launching import TESTS, Launched, gone, make_job, read_pid, wait_for

from bigpipe.errors import Interrupted, StageFailed, Transient
from bigpipe.orchestrator.contract.events import LogLine
from bigpipe.orchestrator.contract.types import Launch
from bigpipe.orchestrator.launch.processes import signed_in

pytestmark = pytest.mark.fault
TWO = Launch(num_processes=2)


@pytest.mark.parametrize("action", ["sleep", "ignore", "barrier"])
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "launcher"])
def test_a_death_below_the_command_is_told(tmp_path: Path, victim: str, action: str) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": action}))
    killed: list[float] = []

    def kill() -> None:
        os.kill(_victim(tmp_path, victim), signal.SIGKILL)
        killed.append(time.monotonic())

    threading.Thread(target=kill).start()
    who = "the launcher of the ranks" if victim == "launcher" else victim
    with pytest.raises(StageFailed, match=f"{who} (was ended by SIGKILL|died)"):
        launched.run()
    assert time.monotonic() - killed[0] < 30
    _assert_nobody_left(tmp_path)


@pytest.mark.parametrize("action", ["sleep", "ignore", "barrier"])
def test_a_killed_command_leaves_nobody(tmp_path: Path, action: str) -> None:
    command = _command(tmp_path, "RANKS", action, 2)
    _victim(tmp_path, "rank 0")
    command.kill()
    command.wait()
    wait_for(lambda: _all_gone(tmp_path), 10)


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0, 3.0, 4.0])
def test_a_command_killed_while_ranks_start_leaves_nobody(tmp_path: Path, seconds: float) -> None:
    command = _command(tmp_path, "RANKS", "sleep", 2)
    time.sleep(seconds)
    command.kill()
    command.wait()
    time.sleep(1.5)  # whoever was being started signs in
    wait_for(lambda: _all_gone(tmp_path), 10)


@pytest.mark.parametrize("action", ["sleep", "ignore", "barrier"])
def test_cancelling_ends_all_ranks(tmp_path: Path, action: str) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": action}))
    threading.Thread(target=lambda: (_victim(tmp_path, "rank 0"), launched.cancelled.set())).start()
    with pytest.raises(Interrupted):
        launched.run()
    _assert_nobody_left(tmp_path)


def test_a_timeout_ends_all_ranks(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "sleep"}))
    with pytest.raises(StageFailed, match="timeout of 12 s"):
        launched.run(timeout=12)
    _assert_nobody_left(tmp_path)


def test_an_unexpected_error_of_one_rank_is_the_one_told(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "crash", "rank": 1}))
    with pytest.raises(StageFailed, match="rank 1: KeyError: 'lost'"):
        launched.run()


def test_a_rank_that_leaves_without_a_result_failed(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "vanish", "rank": 1}))
    with pytest.raises(StageFailed, match="rank 1"):
        launched.run()


def test_a_rank_that_leaves_those_that_wait_for_it_is_the_one_told(tmp_path: Path) -> None:
    """Theirs is the only error that was raised: their connection broke."""
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "desert"}))
    with pytest.raises(StageFailed, match="rank 1 ended with exit status 0 and no result"):
        launched.run()


def test_a_port_that_is_taken_is_worth_another_try(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = Launch(num_processes=2, num_machines=2, main_process_ip="127.0.0.1", main_process_port=port)
        with pytest.raises(Transient, match=r"could not be brought together: .*port"):
            Launched(make_job(tmp_path, "RANKS", launch=launch)).run()


def test_two_machines_that_share_a_store_make_one_run(tmp_path: Path) -> None:
    """Here both are this one; each starts one of two ranks."""
    port = _free_port()
    launch = Launch(
        num_processes=2, num_machines=2, main_process_ip="127.0.0.1", main_process_port=port,
    )  # fmt: skip
    launched = Launched(make_job(tmp_path, "RANKS", launch=launch))
    joined: list[subprocess.Popen[bytes]] = []

    def join() -> None:
        line = wait_for(lambda: [event.line for event in launched.of(LogLine) if "start on each" in event.line])[0]
        command = line.split("start on each: ")[1].split(" N ")[0].split()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
        joined.append(subprocess.Popen([*command, "1"], env=environment))

    helper = threading.Thread(target=join)
    helper.start()
    launched.run()
    helper.join()
    assert (tmp_path / "work/out/merged").read_text() == "0/2 1/2"
    assert joined[0].wait(20) == 0


def _victim(folder: Path, who: str) -> int:
    """The process id of a rank or of the launcher, once both ranks are at work."""
    asleep = [read_pid(folder / f"work/scratch/asleep-{rank}") for rank in range(2)]
    if who != "launcher":
        return asleep[int(who.removeprefix("rank "))]
    workers = list(signed_in(folder / "attempt/processes"))
    return next(worker.pid for worker in workers if worker.alive and worker.rank is None)


def _command(folder: Path, attribute: str, action: str, ranks: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "support.command", str(folder), attribute, json.dumps({"do": action}), str(ranks)],
        env={**os.environ, "PYTHONPATH": path},
    )


def _all_gone(folder: Path) -> bool:
    return all(gone(worker.pid) for worker in signed_in(folder / "attempt/processes"))


def _assert_nobody_left(folder: Path) -> None:
    workers = list(signed_in(folder / "attempt/processes"))
    assert len(workers) >= 3
    assert not [worker for worker in workers if worker.alive]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
