"""Builds jobs for tests and starts them as a command would."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract.contexts import Surroundings
from bigpipe.orchestrator.contract.events import Event
from bigpipe.orchestrator.contract.types import Machine
from bigpipe.orchestrator.launch.environment import visible_secrets
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import AttemptFolder, Job, Outcome
from bigpipe.orchestrator.launch.lifeline import start_mark
from support import stages

TESTS = Path(__file__).parent.parent
MACHINE = Machine("test", cpus=2, memory=8 * 2**30, memory_available=4 * 2**30, disk_free=2**40)
AROUND = {item.name for item in fields(Surroundings)}
PARENT = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def make_job(folder: Path, attribute: str = "PROCESS", **changes: Any) -> Job:
    """A job of one of `support.stages`; `changes` override its fields, or those of its surroundings."""
    around = {"base": folder, "machine": MACHINE, "memo": folder / "memo"}
    around |= {name: changes.pop(name) for name in AROUND & changes.keys()}
    stage = changes.pop("stage", None) or getattr(stages, attribute)
    given: dict[str, Any] = {
        "surroundings": Surroundings(**around),
        "node": "node@a=1",
        "inputs": {},
        "out": folder / "work" / "out",
        "scratch": folder / "work" / "scratch",
        "parts": folder / "parts",
        "stage": stage,
        "module": f"support.stages:{attribute}",
        "folder": AttemptFolder(folder / "attempt"),
        "parent_environment": PARENT,
        "timeout": 120,
        "report": ignore,
    }
    params = stage.params.model_validate(changes.pop("params", {}))
    return Job(**{**given, **changes}, params=params)


def ignore(event: Event) -> None:
    """Nobody cares."""


@dataclass
class Launched:
    """The executor's `start` with the arguments that tests rarely care for, and what it reported."""

    job: Job
    events: list[Event] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def run(
        self, *, timeout: float | None = 120, secrets: Mapping[str, str] = {}, environment: Mapping[str, str] = {}
    ) -> Outcome:
        parent = {**PARENT, **environment, **secrets}
        visible = visible_secrets(self.job.stage, secrets, parent)
        job = replace(
            self.job.within(environment={**self.job.environment, **visible}),
            secrets=frozenset(visible), parent_environment=parent,
            timeout=timeout, cancelled=self.cancelled, report=self.events.append,
        )  # fmt: skip
        return executor(job.stage.runs_in).start(job)

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
