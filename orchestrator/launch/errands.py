"""An attempt on a machine of a cluster: what of the job travels there, and what is done with it.

    Errand.of(job)      here: all that is not in files that both machines see
    work(errand)        there: starts the job by the executor of its kind, as `bigpipe run` there would
    attend(errand)      there, on the others of several machines: starts ranks when they are called

Both yield what is told as it goes, and last what came of it.

Nothing here knows which cluster it is. The store and the recipe's directory lie at the same paths on all machines.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bigpipe.environment import inherited
from bigpipe.errors import Interrupted, UsageError
from bigpipe.machine import Machine, detect
from bigpipe.modules import import_attribute
from bigpipe.orchestrator.contract import Assignment, Event, LogLine, Stage
from bigpipe.versions import package_version

from .executors import executor
from .jobs import AttemptFolder, Failure, Job, JobFile, Outcome
from .lifeline import host
from .meeting import Meeting, attend as attend_meeting, meeting_place
from .schedulers import Standing

if TYPE_CHECKING:
    from collections.abc import Callable

OF_A_MACHINE = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "CC",
    "CXX", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
})  # fmt: skip
"""Variables that say where things lie on one machine, or what it has: these do not travel, nor do `OF_DEVICES`."""
OF_DEVICES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_", "ROCR_VISIBLE", "HIP_VISIBLE", "XDG_", "DYLD_")
SET_BY_CLUSTERS = frozenset({"OMP_NUM_THREADS"})
"""Ray sets it to the CPUs that a task asks for; what a node computes must not depend on who runs it."""
SEEN_SECONDS = 10.0
"""How long a folder that another machine has made may take to show up."""
LOOKS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A job as it travels to another machine."""

    file: str
    """The JobFile, as JSON."""
    folder: Path
    """Of the attempt."""
    timeout: float | None
    gpus: int
    environment: Mapping[str, str] = field(repr=False)
    """The node's, with its secrets."""
    parent: Mapping[str, str] = field(repr=False)
    """What the command's own environment says of how to work, not of its machine."""
    version: str | None
    """Of bigpipe, here."""
    standing: Standing | None = None
    """Of machine 0, where ranks are on several."""

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(
            file=JobFile.of(job).model_dump_json(),
            folder=job.folder.path,
            timeout=job.timeout,
            gpus=job.needs.gpus,
            environment=dict(job.environment),
            parent={name: value for name, value in inherited(job.parent_environment, passwords=True).items() if
                    name not in OF_A_MACHINE and not name.startswith(OF_DEVICES)},
            version=package_version("bigpipe-ml"),
        )  # fmt: skip

    def job(self, report: Callable[[Event], None], cancelled: threading.Event) -> Job:
        """Return the job again, on this machine. Raise UsageError where it cannot be done here."""
        self._require_same_version()
        file = JobFile.model_validate_json(self.file)
        assignment = file.assignment
        for what, path in (("the store", self.folder), ("the recipe's directory", assignment.base)):
            _require_seen(what, path)
        self._import_as_there()
        machine = self._machine(assignment.out)
        assignment = assignment.within(environment=self.environment, machine=machine)
        kind: Stage[Any] = import_attribute(file.module, assignment.trust.home(file.module, assignment.base))
        params = kind.params.model_validate(file.params)
        return Job(
            **{item.name: getattr(assignment, item.name) for item in fields(Assignment)},
            stage=kind.with_params(params), module=file.module, params=params, folder=AttemptFolder(self.folder),
            secrets=file.secrets, parent_environment=self._environment(), timeout=self.timeout, cancelled=cancelled,
            report=report,
        )  # fmt: skip

    def _require_same_version(self) -> None:
        found = package_version("bigpipe-ml")
        if found != self.version:
            cause = f"{host()} has bigpipe-ml {found}, and the command is of {self.version}"
            raise UsageError(cause, "install the same version on all machines of the cluster")

    def _import_as_there(self) -> None:
        """Find the modules of a kind where the command does."""
        written = self.parent.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [entry for entry in written if entry and entry not in sys.path]

    def _machine(self, out: Path) -> Machine:
        machine = detect(out)
        return replace(machine, gpus=machine.gpus[: self.gpus])

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in SET_BY_CLUSTERS}
        return {**own, **self.parent, **({} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""})}


def _require_seen(what: str, path: Path) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.is_dir():
        if time.monotonic() > deadline:
            cause = f"{host()} does not see {what}: {path} is not there"
            raise UsageError(cause, "it must lie on a file system that all machines share, at the same path")
        time.sleep(LOOKS)


Told = Iterator[list[Event] | str]
"""Events as they come, some at a time, and last the Outcome as JSON, a failure in it."""


def work(errand: Errand, address: str) -> Told:
    """Do the errand. address: of this machine, for the others."""
    return _telling(lambda report, cancelled: _started(errand, errand.job(report, cancelled), address))


def attend(errand: Errand, rank: int) -> Told:
    """On machine `rank` of several: start its ranks when they are called, until machine 0 has ended. The outcome has a
    failure where that does not come, or is gone."""
    return _telling(lambda report, cancelled: _attended(errand, errand.job(report, cancelled), rank))


def _telling(do: Callable[[Callable[[Event], None], threading.Event], Outcome]) -> Told:
    """Do it, and yield what it reports. Where the generator is closed before its end, it is cancelled: no process of it
    is left when that returns."""
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    cancelled, came = threading.Event(), list[Outcome]()

    def run() -> None:
        try:
            came.append(do(told.put, cancelled))
        except BaseException as error:
            came.append(Outcome(failure=Failure.of(error)))

    # Workers die with the thread that started them, and this one may be stopped at any time.
    thread = threading.Thread(target=run, name="attempt")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOKS)
            if events := _waiting(told):
                yield events
        if events := _waiting(told):
            yield events
        yield came[0].model_dump_json()
    finally:
        cancelled.set()
        while thread.is_alive():
            thread.join(LOOKS)


def _waiting(told: queue.SimpleQueue[Event]) -> list[Event]:
    return [told.get_nowait() for _ in range(told.qsize())]


def _started(errand: Errand, job: Job, address: str) -> Outcome:
    job.report(LogLine(job.node, f"on {host()} ({address})"))
    if errand.standing is None:
        return executor(job.stage.runs_in).start(job)
    launch = job.launch
    told = {"main_process_ip": launch.main_process_ip or address, "machine_rank": 0}
    place = meeting_place(job.memo, errand.standing, job.recipe_name)
    meeting = Meeting(place, errand.standing, launch.num_machines, launch.join_seconds)
    with meeting.held():
        job = replace(job.within(launch=launch.model_copy(update=told)), meeting=meeting)
        return executor(job.stage.runs_in).start(job)


def _attended(errand: Errand, job: Job, rank: int) -> Outcome:
    from .ranks import start_here

    assert errand.standing is not None  # noqa: S101  there are several machines
    launch = job.launch.model_copy(update={"machine_rank": rank})
    around = job.within(launch=launch).surroundings

    def tell(line: str) -> None:
        job.report(LogLine(job.node, line, detail=True, rank=rank * launch.local_processes))

    def start(job_file: Path, node: str, over: Callable[[], None]) -> int:
        return start_here(job.stage, around, job.parent_environment, job_file, over, tell)

    def check() -> None:
        if job.cancelled.is_set():
            raise Interrupted("interrupted")

    place = meeting_place(job.memo, errand.standing, job.recipe_name)
    attend_meeting(place, replace(errand.standing, rank=rank), launch.join_seconds, start, tell, check)
    return Outcome()
