"""Programs that are started as a tool is: without a shell, tied to who starts them, their output passed on."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Protocol

from .errors import UsageError

if TYPE_CHECKING:
    import subprocess

LAST_LINES = 10
"""Of what a program printed, for whoever tells of its end."""
AFTER_ITS_END = 1.0
"""Seconds in which the rest of the output is read; something that a program left running may hold it open."""
NOTES = frozenset({".git", ".cache", "__pycache__"})
"""Directories that hold what tools noted down."""
MOST_AGAIN = 10_000
"""Folders that links lead to once more, in all: among folders that link to each other the ways multiply."""
ENDS_THE_GROUP = "import os, signal, sys; sys.stdin.buffer.read(); os.killpg(0, signal.SIGKILL)"
"""What a program's keeper does: waits until nobody can write to it, then ends the group that both are in."""
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


@dataclass(frozen=True, slots=True)
class Ended:
    """status: what it exited with; negative: the signal that ended it. last: the last lines that it printed."""

    status: int
    last: tuple[str, ...]


def signal_in_words(number: int) -> str:
    """Return `signal 11 (SIGSEGV)`; of a signal without a name of its own, as those of real time, the number alone."""
    with contextlib.suppress(ValueError):
        return f"signal {number} ({signal.Signals(number).name})"
    return f"signal {number}"


def busy(process: int) -> float:
    """Return the seconds in which a process has had a processor so far, over all its threads; 0 once it is gone."""
    import psutil

    try:
        used = psutil.Process(process).cpu_times()
    except psutil.Error:
        return 0.0
    return float(used.user + used.system)


def death_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """Return a function after which the kernel sends this process the signal once the thread that forked it has ended.
    Linux alone has it; elsewhere it does nothing. Loads what it needs at once: it may be called between fork and exec.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        control = ctypes.CDLL(None).prctl
        return lambda: control(_SET_PARENT_DEATH_SIGNAL, number, 0, 0, 0) and None
    return lambda: None


class Output(Protocol):
    """Takes what a program prints."""

    def write(self, data: bytes, /) -> object: ...

    def flush(self) -> object: ...


class Program:
    """A program that runs, and the last lines that it has printed."""

    def __init__(self, child: subprocess.Popen[bytes], output: Output) -> None:
        """output: where to pass on what it prints."""
        self._child = child
        self._last: deque[bytes] = deque([b""], maxlen=LAST_LINES + 1)
        assert child.stdout is not None  # noqa: S101  it is a pipe
        self._reader = threading.Thread(target=_pass_on, args=(child.stdout, output, self._last), daemon=True)
        self._reader.start()

    def ended(self, seconds: float | None = 0) -> Ended | None:
        """Return how it ended; None where it still runs after so many seconds. None: wait for its end."""
        import subprocess

        try:
            status = self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(AFTER_ITS_END)
        return Ended(status, self.last)

    @property
    def last(self) -> tuple[str, ...]:
        lines = [line.decode("utf-8", "replace").rstrip() for line in list(self._last)]
        return tuple(line for line in lines if line)[-LAST_LINES:]

    def end(self, grace: float) -> None:
        """End it where it runs: SIGTERM, so many seconds, SIGKILL."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
            if self.ended() is None:
                self._child.send_signal(number)
                self.ended(seconds)


def run_program(argv: Sequence[str], *, folder: Path, environment: Mapping[str, str]) -> Ended:
    """Run a program to its end as `running_program` does, and return how it ended."""
    with running_program(argv, folder=folder, environment=environment) as program:
        ended = program.ended(None)
    assert ended is not None  # noqa: S101  it was waited for
    return ended


def limit_memory(process: int, size: int) -> None:
    """Limit what a process may write to, in bytes; what it only reads from files counts nothing. Its own children have
    the same limit."""
    import resource

    if hasattr(resource, "prlimit"):  # not on macOS
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_DATA, (size, size))


@contextlib.contextmanager
def running_program(
    argv: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    output: Output | None = None,
    grace: float = 0.0,
    apart: bool = False,
) -> Iterator[Program]:
    """Run a program in `folder`, in this process's session, while the context is open, and pass on what it prints, both
    streams. output: where to; by default this process's own. grace: seconds between SIGTERM and SIGKILL where it still
    runs at the end. apart: in a session of its own, for who may end all that is in its session. Call it from a thread
    that lives until then. If this process is killed before, the program ends; so does what that started, where this
    process leads its group, as workers do. Raise OSError where it cannot be started."""
    leads = os.getpgrp() == os.getpid()
    with _keeper() if leads else contextlib.nullcontext():  # else others are in the group
        program = Program(_start(argv, folder, environment, apart), output or sys.stdout.buffer)
        try:
            yield program
        finally:
            program.end(grace)


@contextlib.contextmanager
def _keeper() -> Iterator[None]:
    """While it is open, another process of this group looks whether this one lives."""
    import subprocess

    argv = [sys.executable, "-I", "-S", "-c", ENDS_THE_GROUP]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd="/") as keeper:
        try:
            yield
        finally:
            keeper.kill()  # before its input ends


def _start(argv: Sequence[str], folder: Path, environment: Mapping[str, str], apart: bool) -> subprocess.Popen[bytes]:
    import subprocess

    parent, tie = os.getpid(), death_with_parent()

    def begin() -> None:
        tie()
        if os.getppid() != parent:
            os._exit(1)

    return subprocess.Popen(
        list(argv), cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, preexec_fn=begin, start_new_session=apart,
    )  # fmt: skip


def _pass_on(source: BinaryIO, target: Output, last: deque[bytes]) -> None:
    with source:
        while data := os.read(source.fileno(), 65536):
            with contextlib.suppress(OSError):  # whoever read it is gone: that is no reason to stop the program
                target.write(data)
                target.flush()
            first, *more = data.split(b"\n")
            last[-1] = (last[-1] + first)[-4096:]
            last.extend(line[-4096:] for line in more)


def laid_out(files: Sequence[str], base: Path) -> dict[PurePosixPath, Path]:
    """Return where each file lies in a working directory → where it is. files: paths, globs and directories, relative
    to `base`; what tools noted down in a directory is left out. Raise UsageError, with the field `files[3]`, for one
    that would lie where another one does."""
    found: dict[PurePosixPath, Path] = {}
    folders: dict[PurePosixPath, Path] = {}
    for number, name in enumerate(files):
        field = f"files[{number}]"
        for place, source in _laid_out(name, base, field):
            taken = next((above for above in (place, *place.parents) if above in found), place)
            other = found.get(taken) or folders.get(taken)
            if other is not None and not _is_same(other, source):
                cause = f"{other} and {source} would both lie at {taken} in the working directory"
                raise UsageError(cause, "rename one of them, or name one alone", field=field)
            found[place] = source
            folders.update(dict.fromkeys(place.parents, source))
    return found


def _is_same(one: Path, other: Path) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _laid_out(name: str, base: Path, field: str) -> Iterator[tuple[PurePosixPath, Path]]:
    path = base / name
    if path.is_dir():
        below = content_below(path, field=field)
        yield from ((laid_out_at(os.path.join(name, inside)), path / inside) for inside in below)
    else:
        found = [name] if path.is_file() else sorted(glob.glob(name, root_dir=base, recursive=True))
        yield from ((laid_out_at(each), base / each) for each in found if (base / each).is_file())


def content_below(folder: Path, *, links: bool = True, field: str = "") -> list[str]:
    """Return the relative paths of all files below a directory, sorted, but for what tools noted down. links: to
    folders are followed, but not to one that lies above the link, on the way there: that would be a circle. field: what
    names the directory, for errors. Raise OSError for a directory that cannot be read, and UsageError where links lead
    to folders once more `MOST_AGAIN` times."""
    found: list[str] = []
    top, real_top = os.fspath(folder), os.path.realpath(folder)
    around = {top: (real_top, frozenset([real_top]))}  # directory → its real path, and those of it and of those above
    known, again, real_of = {real_top}, 0, functools.cache(lambda path: str(os.path.realpath(path)))
    for place, folders, names in os.walk(top, onerror=_raise, followlinks=links):
        (real_place, above), kept = around.pop(place), []
        for name in sorted(set(folders) - NOTES):
            own = os.path.join(real_place, name)
            real = real_of(own)
            if real in above or (real != own and not links):
                continue
            again += real in known
            if again > MOST_AGAIN:
                cause = f"{folder}: links lead to the same folders in more than {MOST_AGAIN:,} ways"
                raise UsageError(cause, "name the folders that are meant, in place of what holds them", field=field)
            known.add(real)
            inner = os.path.join(place, name)
            around[inner] = real, above | {real}
            kept.append(name)
        folders[:] = kept
        inside = place.removeprefix(top).lstrip(os.sep)
        found += [os.path.join(inside, name) for name in names] if inside else names
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def laid_out_at(name: str) -> PurePosixPath:
    """A path from above the manifest, or from the root, lies under what follows the last `..`, or the root."""
    parts = [part for part in PurePosixPath(os.path.normpath(name)).parts if part not in ("..", "/")]
    return PurePosixPath(*parts)
