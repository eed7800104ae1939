"""What crosses the border between the command and its workers: a job on the way in, an outcome on the way out.

All of it goes by files in the attempt's folder, never on a command line:

    job.json         a JobFile: the Job, without values of its environment
    outcome-MODE.json, rank-N.json   an Outcome, written whole or not at all (of a launcher, only where it fails)
    processes/PID    every worker, for whoever must end it
    events/*.jsonl   what they tell while they go
    log.txt          what they printed
    log-N.txt        what the ranks on machine N of several printed: two do not append to one file over a network

Nothing is synced: after a power cut the attempt is made again anyway.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bigpipe.errors import BY_NAME, BigpipeError, DoesNotFit, StageFailed, UsageError, gpu_memory_ran_out
from bigpipe.files import LIMITS, NO_SPACE, explain, write_file
from bigpipe.fit import out_of_memory
from bigpipe.modules import raised_at
from bigpipe.orchestrator.contract import Assignment, Event, Params, Stage, StageResult
from bigpipe.redaction import redact_fields, redact_metrics
from bigpipe.versions import lacks

from .lifeline import host

if TYPE_CHECKING:
    from .meeting import Meeting
    from .processes import WarmWorker

DISK = (errno.EIO, errno.EROFS, *NO_SPACE, *LIMITS)
"""What the system says of a disk that is full or broken, and of its own limits."""
NO_THREADS = "can't start new thread"
"""In the RuntimeError of Python's threading (Modules/_threadmodule.c)."""
Mode = Literal["run", "prepare", "launch", "rank", "finish"]


class AttemptFolder:
    """The files of one attempt, and what they are called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = path / "job.json"
        self.log = path / "log.txt"
        self.events = path / "events"
        self.processes = path / "processes"
        self.acceleration = path / "accelerate.yaml"
        self._lost = path / "lost.json"

    def outcome(self, mode: Mode, rank: int = 0) -> Path:
        """rank: of a launcher, that of its machine."""
        if mode == "rank":
            return self.path / f"rank-{rank}.json"
        return self.path / (f"outcome-{mode}-{rank}.json" if rank else f"outcome-{mode}.json")

    def log_of(self, machine: int) -> Path:
        """Return the file with what the workers on a machine printed; 0: the one that drives."""
        return self.path / f"log-{machine}.txt" if machine else self.log

    def logs(self) -> dict[int, Path]:
        """Return the logs that there are, by machine, in their order."""
        found = {int(path.stem.partition("-")[2] or 0): path for path in self.path.glob("log*.txt")}
        return dict(sorted(found.items()))

    def output_pipe(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.pipe"

    def clear(self) -> None:
        """Remove what an earlier attempt left here, which must not be taken for the work of a new one."""
        self._remove("outcome-*.json", "rank-*", "lost.json", "events/*", "processes/*/*")

    def replace_ranks(self, lost: Mapping[int, str]) -> None:
        """Remove what the ranks left here, to start them again. lost: those that died, and how."""
        self._remove("outcome-*.json", "rank-*", "processes/*/*")
        write_file(self._lost, json.dumps(lost), durable=False)

    def lost(self) -> dict[int, str]:
        """Return the ranks that died before they were started again, and how."""
        if not self._lost.exists():
            return {}
        return {int(rank): how for rank, how in json.loads(self._lost.read_bytes()).items()}

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.path.glob(pattern):
                path.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an attempt holds on each machine while it runs: what a cluster must find for it."""

    cpus: int = 1
    gpus: int = 0
    ram: int = 0
    """Bytes."""
    hosts: tuple[str, ...] = ()
    """The machines that may run it, by what the cluster calls them; empty: any with these labels."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the machines that may run it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Assignment):
    """One attempt of a node, as it is given to an executor."""

    stage: Stage[Any]
    module: str
    """`module:attribute` of the stage."""
    params: Params
    folder: AttemptFolder
    secrets: frozenset[str] = frozenset()
    """Names of the variables in `environment` that must not be shown or written."""
    parent_environment: Mapping[str, str] = field(repr=False)
    """The command's own, of which workers see a part."""
    timeout: float | None = None
    """Seconds for the whole attempt."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Once set, workers are ended and Interrupted is raised."""
    report: Callable[[Event], None]
    """Called from the thread of the executor's `start` only."""
    needs: Needs = field(default_factory=Needs)
    """For executors that send it elsewhere."""
    meeting: Meeting | None = None
    """Where the other machines can be called, if a scheduler started them."""
    warm: WarmWorker | None = None
    """A worker that waits for this very attempt; taken, or ended where it does not fit."""


SEEN_SECONDS = 10.0
"""How long what another machine has made may take to show up."""
LOOKS = 0.05


def require_inputs(assignment: Assignment) -> None:
    """Raise UsageError where what the inputs refer to is not on this machine, such as files of the Hub's cache. What
    still arrives is not looked at."""
    deadline = time.monotonic() + SEEN_SECONDS
    while (missing := next(_unseen(assignment), None)) is not None:
        if time.monotonic() > deadline:
            port, path = missing
            cause = f"{host()} does not see {path.name} of its input {port}: {os.path.realpath(path)} is not there"
            cure = "what artifacts refer to, as to the Hub's cache (HF_HOME), must lie where all machines see it, too"
            raise UsageError(cause, cure)
        time.sleep(LOOKS)


def _unseen(assignment: Assignment) -> Iterator[tuple[str, Path]]:
    for port in assignment.inputs.keys() - assignment.arriving.keys():
        for folder in filter(Path.is_dir, assignment.inputs[port]):
            yield from ((port, path) for path in sorted(folder.rglob("*")) if path.is_symlink() and not path.exists())


class JobFile(BaseModel):
    """`job.json`: a job, for those who work on it in other processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["bigpipe.job/1"] = "bigpipe.job/1"
    module: str
    params: dict[str, Any]
    assignment: Assignment
    """Without values of its environment."""
    environment: tuple[str, ...]
    """Names of the variables that the stage gets to see as `context.environment`."""
    secrets: frozenset[str]
    cpu: bool
    """Ranks run on the CPU, and see nothing else that is there."""

    @classmethod
    def of(cls, job: Job, *, cpu: bool = False) -> JobFile:
        return cls(
            module=job.module,
            params=_as_written(job.params),
            assignment=job.within(environment={}),
            environment=tuple(job.environment),
            secrets=job.secrets,
            cpu=cpu,
        )

    def write(self, path: Path) -> None:
        write_file(path, self.model_dump_json(indent=1), durable=False)

    @classmethod
    def read(cls, path: Path, environment: Mapping[str, str]) -> JobFile:
        """Return the job with its environment filled in again from the process's own."""
        stored = cls.model_validate_json(path.read_bytes())
        seen = {name: environment[name] for name in stored.environment if name in environment}
        return stored.model_copy(update={"assignment": stored.assignment.within(environment=seen)})


def _as_written(params: Params) -> dict[str, Any]:
    """Params as a worker reads them again: what was written, by the name it was, since validators may ask which fields
    were given; and what was made for a field by a function, which would make something else there."""
    given = params.model_copy(deep=True)
    _count_made(given)
    return given.model_dump(mode="json", exclude_unset=True, by_alias=True, round_trip=True)


def _count_made(value: Any) -> bool:
    """Have fields that a function made count as given, and those that hold such; return whether there are any."""
    if isinstance(value, BaseModel):
        factories = {name: info.default_factory for name, info in type(value).model_fields.items()}
        made = {
            name
            for name, factory in factories.items()
            if _count_made(getattr(value, name)) or (factory is not None and not isinstance(factory, type))
        }
        value.model_fields_set.update(made)
        return bool(made)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any([_count_made(item) for item in items])


class Failure(BaseModel):
    """An error on its way to the command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    """A name of `errors.BY_NAME`."""
    cause: str
    cure: str = ""
    field: str = ""
    """Of the stage, that is wrong."""
    expected: bool = True
    """False: an exception that nobody raised as an error for the user; its traceback is in the log."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        told = error if isinstance(error, BigpipeError) else ran_out(error)
        for known in type(told).__mro__:
            if told is not None and BY_NAME.get(known.__name__) is known:
                cause = f"{told.place}: {told.cause}" if told.place else told.cause
                return cls(type=known.__name__, cause=cause, cure=told.cure, field=told.field)
        place = f" ({raised_at(error)})" if error.__traceback__ else ""
        return cls(type="StageFailed", cause=_describe(error) + place, expected=False)

    def error(self, node: str, log: Path) -> BigpipeError:
        """The same class again. Unexpected ones name the node and the log with the traceback."""
        if self.expected:
            error = BY_NAME.get(self.type, StageFailed)(self.cause, self.cure)
            error.field = self.field
            return error
        return StageFailed(f"{node}: {self.cause}", f"this is a bug in the stage; the traceback is in {log}")


class Outcome(BaseModel):
    """What an attempt gave, or one worker of it. Bytes, seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: dict[str, Any] = {}
    files: dict[str, tuple[str, int]] = {}
    type: str = ""
    """Of the artifact, where that is not the kind's usual one."""
    peak_rss: int = 0
    """Largest resident memory; of ranks, the sum of each one's largest."""
    seconds: float = 0.0
    failure: Failure | None = None
    """Of a worker; an executor raises it."""
    codes: dict[int, int] = {}
    """Of a launcher: rank → return code (negative: a signal), of those that failed."""
    ended: float = Field(default_factory=time.time)

    @classmethod
    def of(cls, result: StageResult | None, stage: Stage[Any]) -> Outcome:
        """From what a stage returned; StageFailed where that is not what the contract asks for."""
        if not isinstance(result, StageResult) or not isinstance(result.metrics, BaseModel):
            raise StageFailed(f"kind {stage.kind} returned {result!r}", "a stage returns StageResult(metrics, files)")
        if not isinstance(result.metrics, stage.metrics):
            cause = f"kind {stage.kind} returned metrics of {type(result.metrics).__name__}"
            raise StageFailed(cause, f"a stage returns what its `metrics` say: {stage.metrics.__name__}")
        if result.type and not stage.may_give(result.type):
            raise StageFailed(f"kind {stage.kind} gave a {result.type!r}", "its `output` or `outputs` must name that")
        metrics = redact_metrics(result.metrics.model_dump(mode="json"))
        if (wrong := _not_finite(metrics)) is not None:
            raise StageFailed(f"kind {stage.kind} measured {wrong}", "a metric is a finite number, or null")
        return cls(metrics=metrics, files=dict(result.files), type=result.type)

    def write(self, path: Path) -> None:
        """Write it, all that is concealed masked."""
        write_file(path, json.dumps(redact_fields(self.model_dump(mode="json"))), durable=False)

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None


def _not_finite(value: Any, path: str = "") -> str | None:
    """The first number in metrics that JSON has no word for: `loss.eval = nan`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} = {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = (_not_finite(each, f"{path}.{key}" if path else str(key)) for key, each in items)
    return next((found for found in inside if found is not None), None)


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def ran_out(error: BaseException) -> BigpipeError | None:
    """Return the error for the user where memory, the disk or a limit of the system ran out, or what runs models is not
    installed: that is nobody's bug."""
    code = error.errno if isinstance(error, OSError) else None
    if gpu_memory_ran_out(error):
        cure = "use a smaller batch, or give max_memory a lower cap so that more is kept off the GPU"
        return DoesNotFit(f"GPU memory ran out: {error}", cure)
    if out_of_memory(error):
        return DoesNotFit(f"memory ran out: {_describe(error)}", "use a smaller batch")
    if isinstance(error, OSError) and code in LIMITS and error.filename is None:
        return StageFailed(f"a limit of the system was met: {error.strerror}", LIMITS[code])
    if isinstance(error, OSError) and code in DISK:
        free = "free some (`bigpipe gc` drops what no manifest names)"
        return explain(error, Path(), free=free, other="put the store elsewhere with --store")
    if isinstance(error, RuntimeError) and NO_THREADS in str(error):
        cure = f"{LIMITS[errno.EAGAIN]}, or more memory (`ulimit -v`), or use fewer `--jobs`"
        return StageFailed("no further thread may start", cure)
    return lacks(error)
