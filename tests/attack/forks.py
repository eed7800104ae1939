"""The `bigpipe` command, thousands of times: a process that has imported it forks once for each call.

    with Commands(folder) as commands:
        ended = commands.call("plan", "r.yaml")
        assert not ended.crash

Each call has a process group, a limit of seconds and of memory, and a cage with a canary: what opens a connection,
other than to an `http:` address among its arguments, starts anything but Python, or writes or removes anything outside
of `folder` is refused, written down, and a crash. What it writes at a place that is an argument, or right below, is
refused too, and no crash: it was asked to.
Where the system lets it (unshare(1) of Linux), all but `folder` is read-only besides, for children too.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

SOURCE = Path(__file__).parents[2] / "src"
TESTS = Path(__file__).parents[1]
SECRET = "canary-6b1f"
READ_ONLY = """\
mount --make-rprivate / && mount --bind "$1" "$1" && mount -o remount,bind,ro / && cd "$1" && shift && exec "$@"
"""
MEMORY = 4 << 30
SECONDS = 60
SERVES = {"ui": 5}
"""Commands that go on until they are interrupted, once they have told their address: after so many seconds."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EXIT_CODES = frozenset({0, 2, 3, 4, 5, 6, 10, 75, 130})


@dataclass(frozen=True)
class Ended:
    """How a call ended, and what it said."""

    arguments: tuple[str, ...]
    code: int
    said: str
    seconds: float
    sung: str
    """What the canary saw."""

    @property
    def crash(self) -> str:
        """Why this is no way to end, whatever the input was; empty if it is one."""
        why = []
        serves = self.arguments[0] in SERVES and self.said.startswith("http") and self.code == -signal.SIGALRM
        if self.code not in EXIT_CODES and not serves:
            why.append(f"exit {self.code} after {self.seconds:.0f} s")
        if "Traceback (most recent call last)" in self.said or "this is a bug" in self.said:
            why.append("a traceback, or a bug of the stage")
        if SECRET in self.said:
            why.append("a secret")
        if any(sign in self.said for sign in "\x1b\x07\x9b\x00\x08\x7f"):
            why.append("control characters")
        if self.sung:
            why.append(self.sung)
        if self.code not in (0, 10) and not self.said.strip():
            why.append("nothing said")
        return f"{' '.join(self.arguments)[:300]!a}: {', '.join(why)}: {self.said[-700:]}" if why else ""


class Commands:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "BIGPIPE_"))},
            "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, TESTS, TESTS / "support/toys"))),
            "BIGPIPE_HOME": str(self.folder / "store"), "HF_HOME": str(self.folder / "hf"), "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": SECRET, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200",
        }  # fmt: skip
        (self.folder / "tmp").mkdir(exist_ok=True)
        environment["HOME"] = str(self.folder)
        self._server = subprocess.Popen(
            [*_walls(self.folder), sys.executable, "-m", "attack.forks", str(self.folder)],
            cwd=self.folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def call(self, *arguments: str, seconds: float | None = None) -> Ended:
        """Run the command in `folder`. Arguments may hold bytes that are no UTF-8, as `os.fsdecode` gives them."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        seconds = SERVES.get(arguments[0], SECONDS) if seconds is None else seconds
        self._server.stdin.write(json.dumps([arguments, seconds]).encode() + b"\n")
        self._server.stdin.flush()
        code, said, took, sung = json.loads(self._server.stdout.readline())
        return Ended(arguments, code, said, took, sung)


def _walls(folder: Path) -> list[str]:
    """What starts a program for which everything but `folder` is read-only; nothing where that cannot be."""
    for how in ("-m", "-rm"):
        walls = ["unshare", how, "sh", "-c", READ_ONLY, "sh", str(folder)]
        with suppress(OSError):
            if subprocess.run([*walls, "true"], capture_output=True, check=False).returncode == 0:
                return walls
    return []


def serve(folder: Path) -> None:
    """Answer calls, a line of JSON each, until the input ends."""
    import bigpipe.cli  # noqa: F401
    from bigpipe.orchestrator import commands, recipe, report  # noqa: F401
    from bigpipe.orchestrator.planning import doctor  # noqa: F401

    for line in sys.stdin.buffer:
        arguments, seconds = json.loads(line)
        answer = _call(folder, arguments, seconds)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _call(folder: Path, arguments: list[str], seconds: float) -> tuple[int, str, float, str]:
    with tempfile.TemporaryFile() as output, tempfile.NamedTemporaryFile(dir="/dev/shm") as song:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become_command(folder, arguments, output.fileno(), song.name)
        code = _wait(child, started + seconds)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        output.seek(0)
        said = output.read(1 << 20).decode(errors="replace")
        return code, said, time.monotonic() - started, song.read().decode(errors="replace")[:300]


def _wait(child: int, deadline: float) -> int:
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -int(signal.SIGALRM)
        time.sleep(0.002)


def _become_command(folder: Path, arguments: list[str], output: int, song: str) -> NoReturn:
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["BIGPIPE_CANARY"] = f"{song}:{folder}"
        _watch(song, folder, arguments)
        sys.argv = ["bigpipe", *arguments]
        from bigpipe.cli import main

        main()
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def _watch(song: str, folder: Path, arguments: list[str]) -> None:
    named = [os.path.dirname(argument) for argument in arguments if argument.count("/") > 2 and argument[0] == "/"]
    allowed = (str(folder), "/dev/null", "/dev/shm/", "/proc/self/fd", *named)
    asked = set(filter(None, map(_place, arguments)))
    places = {os.path.abspath(folder / argument) for argument in arguments if argument}
    removing = frozenset({"os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.symlink", "os.link", "os.truncate"})

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        whole = os.path.abspath(os.fsdecode(path))
        return not whole.startswith(allowed) and not any(argument.startswith(f"{whole}/") for argument in arguments)

    def was_asked(path: object) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        whole = os.path.abspath(path)
        return whole in places or os.path.dirname(whole) in places

    def hook(event: str, given: tuple[Any, ...]) -> None:
        wrong = False
        if event == "open":
            wrong = isinstance(given[2], int) and bool(given[2] & WRITING) and outside(given[0])
        elif event in removing:
            made = given[1:2] if event in ("os.symlink", "os.link") else given[: 2 if event == "os.rename" else 1]
            wrong = any(outside(path) for path in made)
        elif event == "socket.connect":
            wrong = given[0].family != socket.AF_UNIX and tuple(given[1][:2]) not in asked
        elif event == "subprocess.Popen":
            wrong = not _is_known(given[0])
        if wrong or event == "os.system":
            if not was_asked(given[0]):
                _sing(song, f"{event} {given[:2]}\n")
            raise PermissionError(errno.EPERM, f"{event} is outside of the cage", str(given[0]))

    sys.addaudithook(hook)


def _sing(song: str, line: str) -> None:
    with suppress(OSError):
        descriptor = os.open(song, os.O_RDWR | os.O_APPEND)
        os.write(descriptor, line.encode(errors="replace"))
        os.close(descriptor)


def _place(argument: str) -> tuple[str | None, int | None] | None:
    """Host and port of an `http:` address."""
    try:
        address = urlsplit(argument)
        return (address.hostname, address.port) if address.scheme == "http" else None
    except ValueError:
        return None


def _is_known(program: Any) -> bool:
    name = os.path.basename(os.fsdecode(program))
    return name.startswith(("python", "git", "ldconfig", "gcc", "nvidia-smi", "uname", "lscpu"))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
