"""Work done in forks of this process, where everything is imported already: ended, broken or killed at a point."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from bigpipe.errors import BigpipeError

BUG, TOLD = 70, 71
"""Exit status of a fork whose action raised something of its own accord, or a BigpipeError."""


@dataclass(frozen=True)
class Ending:
    code: int | None
    """Exit status, or minus the signal; None where it was ended for taking too long."""
    said: str
    """The error's kind, cause and cure, or a traceback."""

    @property
    def in_order(self) -> bool:
        """It was done, it said what is wrong, or it was killed; no bug, no hang."""
        return self.code in (0, TOLD, -signal.SIGKILL)


def forked(action: Callable[[], object], *, seconds: float = 60.0, watch: Sequence[str] = (), user: int = 0) -> Ending:
    """Run `action` in a fork, in a session of its own. watch: options of strace, which counts from the first call of
    the action on. user: a number that it runs as, where this is root."""
    with TemporaryFile() as said:
        process = os.fork()
        if process == 0:
            _be_the_fork(action, said.fileno(), stopped=bool(watch), user=user)
        tracer = _attached(process, watch) if watch else None
        code = _ended(process, time.monotonic() + seconds)
        if tracer is not None:
            tracer.communicate(timeout=20)
        said.seek(0)
        return Ending(code, said.read().decode(errors="replace"))


def _be_the_fork(action: Callable[[], object], said: int, *, stopped: bool, user: int) -> None:
    status = BUG
    try:
        os.setsid()
        os.dup2(said, 1)
        os.dup2(said, 2)
        if user and os.geteuid() == 0:
            os.setgid(user)
            os.setuid(user)
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        action()
        status = 0
    except BigpipeError as error:
        status = TOLD
        _say(said, f"{type(error).__name__}: {error.cause}; {error.cure}")
    except BaseException:
        _say(said, traceback.format_exc())
    finally:
        os._exit(status)


def _say(said: int, text: str) -> None:
    for _ in range(2):  # the first writing may be the one that is broken
        with contextlib.suppress(OSError):
            os.write(said, text.encode())
            return


def _attached(process: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
    os.waitpid(process, os.WUNTRACED)
    tracer = subprocess.Popen([strace(), "-f", "-qq", *options, "-p", str(process)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while "TracerPid:\t0" in Path(f"/proc/{process}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            heard = tracer.communicate()[1].decode()
            assert "invalid" not in heard, heard
            pytest.skip(f"needs strace that may attach to a process (ptrace): {heard.strip()[-200:]}")
        time.sleep(0.001)
    os.kill(process, signal.SIGCONT)
    return tracer


def _ended(process: int, deadline: float) -> int | None:
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # what it started
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.001)


def strace() -> str:
    """The path of strace. Skips where there is none."""
    found = shutil.which("strace")
    if found is None or sys.platform != "linux":
        pytest.skip("needs strace")
    return found


def turns(action: Callable[[], object], calls: Sequence[str], log: Path) -> dict[tuple[str, int], bool]:
    """Each of these system calls that the action makes and its turn, from 1, as strace counts them: by thread. With
    whether a call that fails can be shown: strace does not make it at all, and a lock whose file stays open stays held,
    while Linux closes the file whatever it says."""
    ending = forked(action, watch=["-o", str(log), "-e", f"trace={','.join(calls)}", "-e", "signal=none"])
    assert ending.code == 0, ending.said
    counts, locked, found = Counter[tuple[str, str]](), set[str](), dict[tuple[str, int], bool]()
    for thread, call, first in re.findall(r"^(\d+) +(\w+)\(([^,)]*)", log.read_text(), re.MULTILINE):
        counts[thread, call] += 1
        point = call, counts[thread, call]
        found[point] = found.get(point, True) and not (call == "close" and first in locked)
        if call == "flock":
            locked.add(first)
        elif call == "close":
            locked.discard(first)
    return found


def together(
    number: int, action: Callable[[int], object], *, seconds: float = 120.0, watch: Sequence[str] = ()
) -> list[Ending]:
    """Run `action` in so many forks at once, each with its number; return how they ended. watch: as of `forked`."""
    deadline = time.monotonic() + seconds
    with ExitStack() as held:
        forks = []
        for which in range(number):
            said = held.enter_context(TemporaryFile())
            process = os.fork()
            if process == 0:
                _be_the_fork(partial(action, which), said.fileno(), stopped=bool(watch), user=0)
            forks.append((process, said))
        tracers = [_attached(process, watch) for process, _ in forks if watch]
        endings = []
        for process, said in forks:
            code = _ended(process, deadline)
            said.seek(0)
            endings.append(Ending(code, said.read().decode(errors="replace")))
        for tracer in tracers:
            tracer.communicate(timeout=20)
    return endings
