"""The one tree of errors. Each knows its cause, its place, its cure and the exit code of the command that meets it.

BigpipeError
├── UsageError                   2   wrong call, wrong argument
│   └── ManifestError            2   every problem of a manifest at once, each at file:line:column
├── GateFailed                   3
├── DoesNotFit                   4   RAM, GPU memory, disk, or a device that is not there
├── NotAuthorised                5
│   └── GatedRepository          5
├── StageFailed                  6
│   └── InvalidCheckpoint        6   bytes that are not what their headers say, or that we refuse to read
│       └── NoWeights            6   a directory without any
├── Stale                       10
├── Transient                   75   try again
│   └── Offline                 75
└── Interrupted            130/143   resumable
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from signal import SIGHUP, SIGINT, SIGTERM
from types import MappingProxyType
from typing import Any, ClassVar

from .redaction import printable, redact

GPU_FULL = ("CUDA error: out of memory", "CUDA driver error: out of memory", "_STATUS_ALLOC_FAILED")
"""In errors of torch whose class tells nothing, where the driver had no more for a context, pinned memory or kernels
(c10/cuda/CUDAException.cpp), or a library for its workspace (`CUBLAS_STATUS_ALLOC_FAILED`, and cuDNN's alike)."""


def first_few(names: Sequence[str], shown: int = 6) -> str:
    """Return `a, b and 3 more`: an error names some of what is wrong."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a text file. Lines and columns count from 1, columns in characters."""

    file: str
    line: int
    column: int
    text: str = ""
    """The whole line, without its end."""
    width: int = 1
    """How many characters the caret underlines."""
    argument: str = ""
    """What was typed on a command line, where that made the text, which nobody saw: `--max-shard-size 5`."""

    def __str__(self) -> str:
        return self.argument or f"{self.file}:{self.line}:{self.column}"

    @property
    def short(self) -> str:
        """Without the folders: for one-line reasons."""
        return self.argument or f"{self.file.rpartition('/')[2]}:{self.line}:{self.column}"

    def narrowed(self, part: str, end: int | None = None) -> Place:
        """Return the place of a text that begins here and lies before column `end` of the line, where it is there."""
        at = self.text.find(part, self.column - 1, end)
        return replace(self, column=at + 1, width=len(part)) if at >= 0 else self

    def before(self, cause: str) -> str:
        """Return a cause with the place before it, unless it begins with what was typed."""
        return cause if self.argument and cause.startswith(self.argument) else f"{self}: {cause}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a manifest."""

    code: str
    """`BP101` and so on; listed in docs/reference/errors.md."""
    place: Place
    cause: str
    cure: str = ""

    def __str__(self) -> str:
        if self.place.argument:
            return f"error: {self.place.before(self.cause)}" + (f"\n  {self.cure}" if self.cure else "")
        head = f"{self.place}: error[{self.code}]: {self.cause}" + (f"; {self.cure}" if self.cure else "")
        if not self.place.text:
            return head
        number = f"{self.place.line:5d} | "
        underline = " " * (len(number) - 2) + "| " + " " * (self.place.column - 1) + "^" * max(1, self.place.width)
        return f"{head}\n{number}{self.place.text}\n{underline}"


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it, nearest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def gpu_memory_ran_out(error: BaseException) -> bool:
    """Return whether torch says that a GPU has no more memory. torch is not imported to ask."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in GPU_FULL)


def _fields(code: str, cause: str, cure: str, place: Place | None, node: str) -> dict[str, object]:
    cause = place.before(cause) if place and place.argument else cause
    written = place if place and not place.argument else None
    where = {name: getattr(written, name, None) for name in ("file", "line", "column")}
    return {"code": code, "cause": cause, "cure": cure, **where, "node": node or None}


class BigpipeError(Exception):
    """Base of all errors that are not bugs. Printed as `cause` and `cure`, never with a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, cause: str, cure: str = "", *, place: Place | None = None, field: str = "") -> None:
        """field: the argument, or field of a stage, that is wrong (`max_memory.cuda:0`; `generation.top_q[key]`
        for its name): its place is found by it."""
        cause, cure = printable(redact(cause)), printable(redact(cure))
        super().__init__(cause, cure)
        self.cause = cause
        self.cure = cure
        self.place = place
        self.field = field
        self.node = ""
        """Of the recipe, where it is about one."""
        self.plan: Any = None
        """The Plan of a run that was refused for it."""

    @property
    def status(self) -> int:
        """The exit code of a command that ends with it."""
        return self.exit_code

    def as_json(self) -> list[dict[str, object]]:
        """Return what programs read of it: one object for each thing that is wrong."""
        return [_fields(type(self).__name__, self.cause, self.cure, self.place, self.node)]

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: all but the plan, whose functions stay here."""
        return _again, (type(self), self.args, vars(self) | {"plan": None})

    def __str__(self) -> str:
        cause = self.place.before(self.cause) if self.place else self.cause
        return cause + (f"\n  {self.cure}" if self.cure else "")


def _again(kind: type[BigpipeError], arguments: tuple[str, ...], values: Mapping[str, object]) -> BigpipeError:
    """An error as another process had it, whatever its class asks for when it is made."""
    error = kind.__new__(kind, *arguments)
    vars(error).update(values)
    return error


class UsageError(BigpipeError):
    exit_code = 2


class ManifestError(UsageError):
    """All problems of one manifest, in the order of their places."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.place.file, p.place.line, p.place.column)))
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def as_json(self) -> list[dict[str, object]]:
        return [_fields(each.code, each.cause, each.cure, each.place, "") for each in self.problems]


class GateFailed(BigpipeError):
    exit_code = 3


class DoesNotFit(BigpipeError):
    exit_code = 4
    change: Mapping[str, object] = MappingProxyType({})
    """The cure as option → value, where it is one that can be tried (`bigpipe.fit.Cure`)."""


class NotAuthorised(BigpipeError):
    exit_code = 5


class GatedRepository(NotAuthorised):
    pass


class StageFailed(BigpipeError):
    exit_code = 6


class InvalidCheckpoint(StageFailed):
    pass


class NoWeights(InvalidCheckpoint):
    pass


class Stale(BigpipeError):
    exit_code = 10


class Transient(BigpipeError):
    exit_code = 75


class Offline(Transient):
    pass


ENDED_BY: Mapping[int, str] = MappingProxyType(
    {SIGINT: "interrupted", SIGTERM: "terminated by SIGTERM", SIGHUP: "ended by SIGHUP: its terminal is gone"}
)


class Interrupted(BigpipeError):
    """Stopped by a signal. What was finished is kept; the same command continues."""

    exit_code = 130

    def __init__(self, cause: str, cure: str = "", *, place: Place | None = None, signal: int = 2) -> None:
        super().__init__(cause, cure, place=place)
        self.signal = signal

    @classmethod
    def by(cls, number: int, cure: str) -> Interrupted:
        """Return what a signal did."""
        return cls(ENDED_BY.get(number, f"ended by signal {number}"), cure, signal=number)

    @property
    def status(self) -> int:
        """128 + signal number, as shells report it."""
        return 128 + self.signal


BY_NAME: dict[str, type[BigpipeError]] = {
    name: error for name, error in globals().items() if isinstance(error, type) and issubclass(error, BigpipeError)
}
del BY_NAME["ManifestError"]  # holds more than cause and cure
"""How an error that crossed a process border finds its class again."""
