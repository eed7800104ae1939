"""Ray clusters for tests: real ones, of addresses on the loopback device of this machine alone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from support.launching import wait_for

SMALL = ("--num-cpus", "2", "--object-store-memory", "80000000", "--memory", "4000000000", "--disable-usage-stats")
"""What each machine has; Ray would else take a third of the memory."""
HEAD = ("--head", "--include-dashboard", "false")


@dataclass
class Raylets:
    """A cluster of Ray, each machine of it a group of processes."""

    folder: Path
    environment: Mapping[str, str]
    """Variables of its machines, and of whoever asks it."""
    port: int
    machines: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Address → what keeps its processes."""
    started: dict[str, tuple[tuple[str, ...], bool]] = field(default_factory=dict)
    """Address → its options, and whether it is the head."""

    @property
    def address(self) -> str:
        return f"127.0.0.2:{self.port}"

    @property
    def executor(self) -> str:
        return f"ray:{self.address}"

    def add(self, address: str, *options: str) -> None:
        """Start a machine and wait until it takes tasks."""
        self.begin(address, *options)
        self.await_machines()

    def begin(self, address: str, *options: str) -> None:
        """Start a machine, the head first; others join it from the moment it answers."""
        if self.machines:
            wait_for(lambda: not self._gave_up("127.0.0.2") and self._answers(), seconds=300)
        self._start(address, *options, head=not self.machines)

    def _start(self, address: str, *options: str, head: bool) -> None:
        self.started[address] = (options, head)
        joins = (*HEAD, "--port", str(self.port)) if head else ("--address", self.address)
        own = ("--temp-dir", str(self.folder / "ray")) if head else ()
        script = Path(sys.executable).with_name("ray")
        with self._log(address).open("wb") as out:
            self.machines[address] = subprocess.Popen(
                [str(script), "start", *joins, *own, "--node-ip-address", address, *SMALL, *options, "--block"],
                env={**os.environ, **self.environment}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def await_machines(self) -> None:
        for address in self.machines:
            wait_for(lambda address=address: self._stands(address), seconds=300)

    def _stands(self, address: str) -> bool:
        return not self._gave_up(address) and b"Ray runtime started" in self._log(address).read_bytes()

    def _gave_up(self, address: str) -> bool:
        """Was it over before it stood? Then it is started again: Ray waits 30 s for its own processes."""
        machine = self.machines[address]
        if machine.poll() is None or b"Ray runtime started" in self._log(address).read_bytes():
            return False
        with suppress(ProcessLookupError):
            os.killpg(machine.pid, signal.SIGKILL)
        options, head = self.started[address]
        self._start(address, *options, head=head)
        return True

    def _log(self, address: str) -> Path:
        return self.folder / f"{address}.txt"

    def _answers(self) -> bool:
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.2", self.port)) == 0

    def raylet(self, address: str) -> psutil.Process:
        """Return the process that gives out the resources of a machine."""
        below = psutil.Process(self.machines[address].pid).children(recursive=True)
        (found,) = (process for process in below if process.name() == "raylet")
        return found

    def head(self) -> psutil.Process:
        """Return the process that keeps account of all machines."""
        below = psutil.Process(self.machines["127.0.0.2"].pid).children(recursive=True)
        (found,) = (process for process in below if process.name() == "gcs_server")
        return found

    def kill(self, address: str) -> None:
        """End a machine, as a power cut would: its raylet and what keeps it first."""
        started = self.machines.pop(address)
        keeper = psutil.Process(started.pid)
        below = keeper.children(recursive=True)
        for process in (keeper, *sorted(below, key=lambda each: each.name() != "raylet")):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait(20)
        psutil.wait_procs(below, timeout=20)


def free_port(address: str) -> int:
    with socket.socket() as found:
        found.bind((address, 0))
        return int(found.getsockname()[1])


@contextmanager
def raylets(*machines: tuple[str, ...], token: str | None = "0123456789abcdef" * 2) -> Iterator[Raylets]:
    """A cluster while it is open. machines: address, and further options of `ray start`; the first is the head. token:
    who asks must have it; None: nobody is asked for one."""
    # Paths of sockets may be 107 characters long.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    guard = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    environment = {
        "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Beside other tests, workers that yield to everybody (15 is Ray's choice) would not come to start.
        "RAY_worker_niceness": "0",
        # A machine that refuses to answer is missed after seconds; one that is slow is not.
        "RAY_health_check_period_ms": "1000",
        **guard,
    }  # fmt: skip
    cluster = Raylets(folder, environment, free_port("127.0.0.2"))
    try:
        for address, *options in machines:
            cluster.begin(address, *options)
        cluster.await_machines()
        yield cluster
    finally:
        for address in list(cluster.machines)[::-1]:
            cluster.kill(address)
        shutil.rmtree(folder, ignore_errors=True)
