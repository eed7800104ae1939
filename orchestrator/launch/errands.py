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
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bigpipe.environment import inherited
from bigpipe.errors import Interrupted, UsageError
from bigpipe.machine import Machine, detect
from bigpipe.modules import import_attribute
from bigpipe.orchestrator.contract import Assignment, Event, LogLine, Params, Stage
from bigpipe.redaction import conceal_environment
from bigpipe.versions import package_version

from .executors import executor
from .jobs import LOOKS, SEEN_SECONDS, AttemptFolder, Failure, Job, JobFile, Outcome, require_inputs
from .lifeline import host
from .meeting import Meeting, attend as attend_meeting
from .output import Log
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
    versions: Mapping[str, str]
    """Of bigpipe and the packages that the kind names, here, as far as they are installed: its key holds them."""
    standing: Standing | None = None
    """Of machine 0, where ranks are on several."""

    @property
    def meeting(self) -> Path:
        """Where the machines meet."""
        return self.folder / "meeting"

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(
            file=JobFile.of(job).model_dump_json(),
            folder=job.folder.path,
            timeout=job.timeout,
            gpus=job.needs.gpus,
            environment=dict(job.environment),
            parent=_travels(job.parent_environment),
            versions={name: found for name in ("bigpipe-ml", *job.stage.packages) if (found := package_version(name))},
        )  # fmt: skip

    def job(self, report: Callable[[Event], None], cancelled: threading.Event, cpus: int | None = None) -> Job:
        """Return the job again, on this machine. cpus: that the cluster gives out here. Raise UsageError where it
        cannot be done here."""
        self._require_same_versions()
        file = JobFile.model_validate_json(self.file)
        assignment = file.assignment
        for what, path in (("the store", self.folder), ("the recipe's directory", assignment.base)):
            _require_seen(what, path)
        require_inputs(assignment)
        self._import_as_there()
        machine = self._machine(assignment.out, cpus)
        kind: Stage[Any] = import_attribute(file.module, assignment.trust.home(file.module, assignment.base))
        params = kind.params.model_validate(file.params)
        _require_alike(kind, params, assignment.machine, machine)
        assignment = assignment.within(environment=self.environment, machine=machine)
        return Job(
            **{item.name: getattr(assignment, item.name) for item in fields(Assignment)},
            stage=kind.with_params(params), module=file.module, params=params, folder=AttemptFolder(self.folder),
            secrets=file.secrets, parent_environment=self._environment(), timeout=self.timeout, cancelled=cancelled,
            report=report,
        )  # fmt: skip

    def _require_same_versions(self) -> None:
        found = {name: package_version(name) for name in self.versions}
        if other := [name for name in self.versions if found[name] != self.versions[name]]:
            there = ", ".join(f"{name} {found[name]}" if found[name] else f"no {name}" for name in other)
            here = ", ".join(f"{name} {self.versions[name]}" for name in other)
            cure = "install the same versions on all machines of the cluster: one constraints.txt does it"
            raise UsageError(f"{host()} has {there}, and the command {here}", cure)

    def _import_as_there(self) -> None:
        """Find the modules of a kind where the command does."""
        written = self.parent.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [entry for entry in written if entry and entry not in sys.path]

    def _machine(self, out: Path, cpus: int | None) -> Machine:
        """As it was planned with: the CPUs that are given out here, and the GPUs that it sees."""
        machine = detect(out)
        return replace(machine, cpus=cpus or machine.cpus, gpus=machine.gpus[: self.gpus])

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name not in SET_BY_CLUSTERS}
        return {**own, **self.parent, **({} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""})}


def _travels(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the command's environment is not of its machine. Modules are found where the command finds them, whatever
    directory a worker is in."""
    found = inherited(environment, passwords=True).items()
    kept = {name: value for name, value in found if name not in OF_A_MACHINE and not name.startswith(OF_DEVICES)}
    if written := kept.get("PYTHONPATH"):
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in written.split(os.pathsep) if entry)
    return kept


def _require_alike(kind: Stage[Any], params: Params, planned: Machine, machine: Machine) -> None:
    """Raise UsageError where what a node's key says of the machine is not so here."""
    facts = kind.planning.facts
    if facts is None or (wanted := facts(params, planned)) == (found := facts(params, machine)):
        return
    other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    told = ", ".join(f"{name} {found.get(name)}, and not {wanted.get(name)}" for name in other)
    cure = "run it again: a plan counts with the machines that are there then"
    raise UsageError(f"{host()} is not as the node was planned for: {told}", cure)


def _require_seen(what: str, path: Path) -> None:
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.is_dir():
        if time.monotonic() > deadline:
            cause = f"{host()} does not see {what}: {path} is not there"
            raise UsageError(cause, "it must lie on a file system that all machines share, at the same path")
        time.sleep(LOOKS)


Told = Iterator[list[Event] | str]
"""Events as they come, some at a time, and last the Outcome as JSON, a failure in it."""


def work(errand: Errand, address: str, cpus: int | None = None) -> Told:
    """Do the errand. address: of this machine, for the others. cpus: that the cluster gives out here."""
    return _telling(errand, lambda report, over: _started(errand, errand.job(report, over, cpus), address))


def attend(errand: Errand, rank: int, cpus: int | None = None) -> Told:
    """On machine `rank` of several: start its ranks when they are called, until machine 0 has ended. The outcome has a
    failure where that does not come, or is gone. cpus: that the cluster gives out here."""
    return _telling(errand, lambda report, over: _attended(errand, errand.job(report, over, cpus), rank))


def _telling(errand: Errand, do: Callable[[Callable[[Event], None], threading.Event], Outcome]) -> Told:
    """Do it, and yield what it reports. Where the generator is closed before its end, it is cancelled: no process of it
    is left when that returns."""
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    cancelled, came = threading.Event(), list[Outcome]()

    def run() -> None:
        try:
            came.append(do(told.put, cancelled))
        except BaseException as error:
            failure = Failure.of(error)
            if not failure.expected and errand.folder.is_dir():  # its error says that the log has it
                Log(AttemptFolder(errand.folder).log).write(traceback.format_exc())
            came.append(Outcome(failure=failure))

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
    meeting = Meeting(errand.meeting, errand.standing, launch.num_machines, launch.join_seconds)
    with meeting.held():
        job = replace(job.within(launch=launch.model_copy(update=told)), meeting=meeting)
        return executor(job.stage.runs_in).start(job)


def _attended(errand: Errand, job: Job, rank: int) -> Outcome:
    from .ranks import start_here

    assert errand.standing is not None  # noqa: S101  there are several machines
    conceal_environment({**job.parent_environment, **job.environment}, job.secrets)  # what is printed is logged here
    launch = job.launch.model_copy(update={"machine_rank": rank})
    around = job.within(launch=launch).surroundings

    def tell(line: str) -> None:
        job.report(LogLine(job.node, line, detail=True, rank=rank * launch.local_processes))

    def start(job_file: Path, node: str, over: Callable[[], None]) -> int:
        return start_here(job.stage, around, job.parent_environment, job_file, over, tell)

    def check() -> None:
        if job.cancelled.is_set():
            raise Interrupted("interrupted")

    attend_meeting(errand.meeting, replace(errand.standing, rank=rank), launch.join_seconds, start, tell, check)
    return Outcome()
