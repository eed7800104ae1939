"""Builds jobs for tests and starts them as a command would."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract.events import Event
from bigpipe.orchestrator.contract.types import Launch, Machine, Trust
from bigpipe.orchestrator.launch.launcher import Job, Outcome, launch
from bigpipe.orchestrator.launch.lifeline import start_mark
from support import stages

TESTS = Path(__file__).parent.parent
MACHINE = Machine("test", cpus=2, memory=8 * 2**30, memory_available=4 * 2**30, disk_free=2**40)


def make_job(folder: Path, attribute: str = "PROCESS", **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "node": "node@a=1",
        "kind": attribute.lower(),
        "module": f"support.stages:{attribute}",
        "params": {},
        "inputs": {},
        "out": folder / "work" / "out",
        "scratch": folder / "work" / "scratch",
        "parts": folder / "parts",
        "memo": folder / "memo",
        "base": folder,
        "launch": Launch(),
        "trust": Trust(),
        "machine": MACHINE,
        "attempt_dir": folder / "attempt",
    }
    return Job(**{**fields, **changes})


@dataclass
class Launched:
    """`launch` with the arguments that tests rarely care for, and what it reported."""

    job: Job
    events: list[Event] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def run(
        self, *, timeout: float | None = 120, secrets: Mapping[str, str] = {}, environment: Mapping[str, str] = {}
    ) -> Outcome:
        stage = getattr(stages, self.job.module.partition(":")[2])
        parent = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", **environment}
        return launch(
            self.job,
            stage,
            timeout=timeout,
            cancelled=self.cancelled,
            report=self.events.append,
            secrets=secrets,
            parent_environment=parent,
        )

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The first true value of `condition`; AssertionError if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"did not come true within {seconds} s")


def gone(process: int) -> bool:
    return start_mark(process) is None


def read_pid(path: Path) -> int:
    """Wait for a file with a process id in it."""
    return int(wait_for(lambda: path.exists() and path.read_text()))
