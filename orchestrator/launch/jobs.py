"""What crosses the border between the command and its workers: a job on the way in, a result on the way out.

All of it goes by files in the attempt's folder, never on a command line:

    job.json         the Job, without values of its environment
    result-MODE.json, rank-N.json   a Result, written whole or not at all
    hello-N.json     who came up as rank N, and in what world
    processes/PID    every worker, for whoever must end it
    events/*.jsonl   what they tell while they go
    log.txt          what they printed
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bigpipe.errors import BY_NAME, BigpipeError, StageFailed
from bigpipe.orchestrator.contract.events import Reporter
from bigpipe.orchestrator.contract.stage import Params, Stage, StageContext, StageResult
from bigpipe.orchestrator.contract.types import Launch, Lineage, Machine, Trust

from .redaction import Redactor

NO_MEMORY = "can't allocate memory"
"""In the RuntimeError of torch's allocator for the CPU."""
Mode = Literal["run", "prepare", "launch", "rank", "finish"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything one attempt of a node needs, wherever it runs."""

    node: str
    kind: str
    module: str
    """`module:attribute` of the Stage."""
    params: dict[str, Any]
    inputs: Mapping[str, tuple[str, ...]]
    """Port → artifact directories."""
    out: Path
    """`out` and `scratch` lie in one work folder; its `lock` is held shared by every worker."""
    scratch: Path
    parts: Path
    memo: Path
    base: Path
    launch: Launch
    trust: Trust
    machine: Machine
    lineage: tuple[Lineage, ...] = ()
    recipe: str = ""
    recipe_name: str = ""
    pins: Mapping[str, str] = field(default_factory=dict)
    offline: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    """The node's `env`. It reaches workers by their process environment; `job.json` holds the names alone."""
    outlet: Path | None = None
    """The folder of the `handover` to whoever waits for this node's files."""
    inlet: Path | None = None
    """The folder of the `handover` of the node whose files this one takes one by one."""
    attempt_dir: Path

    @property
    def job_file(self) -> Path:
        return self.attempt_dir / "job.json"

    @property
    def log_file(self) -> Path:
        return self.attempt_dir / "log.txt"

    @property
    def events_dir(self) -> Path:
        return self.attempt_dir / "events"

    @property
    def processes_dir(self) -> Path:
        return self.attempt_dir / "processes"

    def result_file(self, mode: Mode, rank: int = 0) -> Path:
        return self.attempt_dir / (f"rank-{rank}.json" if mode == "rank" else f"result-{mode}.json")

    def hello_file(self, rank: int) -> Path:
        return self.attempt_dir / f"hello-{rank}.json"

    def output_pipe(self, rank: int) -> Path:
        return self.attempt_dir / f"rank-{rank}.pipe"

    def rank_dir(self, rank: int) -> Path:
        return self.scratch / f"rank-{rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a successful attempt gave. Sizes in bytes."""

    metrics: dict[str, Any]
    files: dict[str, tuple[str, int]]
    peak_rss: int
    """Largest resident memory; of ranks, the sum of each one's largest."""
    seconds: float
    peak_anonymous: int = 0
    """The part that is not files mapped into memory, sampled five times a second; 0 where it cannot be had."""


def absolute(job: Job) -> Job:
    """The same job with absolute paths: workers have another working directory."""
    paths = {name: getattr(job, name).absolute() for name in ("out", "scratch", "parts", "memo", "base", "attempt_dir")}
    inputs = {port: tuple(str(Path(path).absolute()) for path in paths_) for port, paths_ in job.inputs.items()}
    return replace(job, inputs=inputs, **paths)


class JobFile(BaseModel):
    """`job.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["bigpipe.job/1"] = "bigpipe.job/1"
    job: Job
    environment: tuple[str, ...]
    """Names of the variables that the stage gets to see as `context.environment`."""
    secrets: tuple[str, ...]
    """Those of them that must not be shown or written."""
    cpu: bool
    """Ranks run on the CPU, whatever else is there."""

    def write(self, path: Path) -> None:
        bare = self.model_copy(update={"job": replace(self.job, environment={})})
        write_whole(path, bare.model_dump_json(indent=1))

    @classmethod
    def read(cls, path: Path, environment: Mapping[str, str]) -> JobFile:
        """The job with its environment filled in again from the process's own."""
        stored = cls.model_validate_json(path.read_bytes())
        seen = {name: environment[name] for name in stored.environment if name in environment}
        return stored.model_copy(update={"job": replace(stored.job, environment=seen)})


class Hello(BaseModel):
    """`hello-N.json`: written once the process group is up."""

    rank: int
    world_size: int
    pid: int


class Failure(BaseModel):
    """An error on its way to the command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    """A name of `errors.BY_NAME`."""
    cause: str
    cure: str = ""
    expected: bool = True
    """False: an exception that nobody raised as an error for the user; its traceback is in the log."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        for known in type(error).__mro__:
            if isinstance(error, BigpipeError) and BY_NAME.get(known.__name__) is known:
                cause = f"{error.place}: {error.cause}" if error.place else error.cause
                return cls(type=known.__name__, cause=cause, cure=error.cure)
        return _out_of_room(error) or cls(type="StageFailed", cause=_describe(error), expected=False)

    def error(self, node: str, log: Path) -> BigpipeError:
        """The same class again. Unexpected ones name the node and the log with the traceback."""
        if self.expected:
            return BY_NAME.get(self.type, StageFailed)(self.cause, self.cure)
        return StageFailed(f"{node}: {self.cause}", f"this is a bug in the stage; the traceback is in {log}")


class Result(BaseModel):
    """What one worker ends with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: dict[str, Any] = {}
    files: dict[str, tuple[str, int]] = {}
    peak_rss: int = 0
    failure: Failure | None = None
    ended: float = Field(default_factory=time.time)

    @classmethod
    def of(cls, result: StageResult | None, stage: Stage[Any], *, empty: bool = False) -> Result:
        """From what a stage returned; StageFailed where that is not what the contract asks for."""
        if empty:
            return cls()
        if not isinstance(result, StageResult) or not isinstance(result.metrics, BaseModel):
            raise StageFailed(f"kind {stage.kind} returned {result!r}", "a stage returns StageResult(metrics, files)")
        return cls(metrics=result.metrics.model_dump(mode="json"), files=dict(result.files))

    def write(self, path: Path, redactor: Redactor) -> None:
        write_whole(path, json.dumps(redactor.value(self.model_dump(mode="json"))))

    @classmethod
    def read(cls, path: Path) -> Result | None:
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None


class LaunchFailure(BaseModel):
    """`launch.json`: why the launcher ended, written by itself."""

    codes: dict[int, int]
    """Rank → return code (negative: a signal), of those that failed."""
    text: str


def parse_params(stage: Stage[Any], job: Job) -> Params:
    params: Params = stage.params.model_validate(job.params)
    return params


def context(
    job: Job, reporter: Reporter, *, rank: int = 0, world_size: int = 1, rank_dir: Path | None = None
) -> StageContext:
    outlet, inlet = None, None
    if job.outlet or job.inlet:
        from bigpipe.orchestrator.contract.passing import Inlet, Outlet

        outlet = Outlet(job.outlet, job.out) if job.outlet else None
        inlet = Inlet(job.inlet, job.node) if job.inlet else None
    return StageContext(
        node=job.node,
        inputs={port: tuple(map(Path, paths)) for port, paths in job.inputs.items()},
        out=job.out,
        scratch=job.scratch,
        parts=job.parts,
        memo=job.memo,
        base=job.base,
        machine=job.machine,
        launch=job.launch,
        trust=job.trust,
        environment=job.environment,
        lineage=job.lineage,
        recipe=job.recipe,
        recipe_name=job.recipe_name,
        pins=job.pins,
        offline=job.offline,
        rank=rank,
        world_size=world_size,
        rank_dir=rank_dir,
        outlet=outlet,
        inlet=inlet,
        reporter=reporter,
    )


def write_whole(path: Path, text: str) -> None:
    """Readers see the whole file or none. Not synced: after a power cut the attempt is made again anyway."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _out_of_room(error: BaseException) -> Failure | None:
    """Memory and disk that ran out are no bugs of the stage."""
    if isinstance(error, MemoryError) or NO_MEMORY in str(error):
        return Failure(type="DoesNotFit", cause=f"memory ran out: {_describe(error)}", cure="use a smaller batch")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which must not be imported for this
        return Failure(
            type="DoesNotFit",
            cause=f"GPU memory ran out: {error}",
            cure="use a smaller batch, or give max_memory a lower cap so that more is kept off the GPU",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return Failure(
            type="DoesNotFit",
            cause=f"no space left{where}: {error.strerror}",
            cure="free some (`bigpipe gc` drops what no manifest names), or put the store elsewhere with --store",
        )
    return None
