"""The machines of one run meet in a folder that all of them share, in their store.

Machine 0 drives the run, and calls the others for each node whose ranks are to be on all of them; these wait, start
their ranks when they are called, and leave when the run has ended. Nothing is listened for on the network, and who may
write to the store may call.

    here-N.json             machine N has come; with a number of its own, so that what an earlier run left means nothing
    SESSION/welcome-N.json  machine 0 has seen it; there it goes on
    SESSION/joined-N        machine N is in this session
    SESSION/alive-N         a count that each machine keeps going
    SESSION/call-K.json     a job to start ranks of
    SESSION/over-K          it came to nothing: the ranks are to end
    SESSION/done-K-N.json   the launcher there has ended, and how
    SESSION/end.json        the run has, and how
    SESSION/read-N          machine N has read that

Nothing of it is worth keeping: the folder goes with the run, or with the next `gc`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from bigpipe.errors import BigpipeError, StageFailed, Transient
from bigpipe.files import make_directory, parse_json, write_file
from bigpipe.orchestrator.contract import Json

from .lifeline import host
from .schedulers import Standing

LOOKS = 0.1
"""Seconds between two looks into the folder."""
BEATS = 1.0
"""Seconds between two counts that say that a machine is alive."""
PATIENCE = 60.0
"""Seconds in which its count must change: file systems over a network tell late."""
LEAVING = 5.0
"""Seconds that machine 0 waits for those who have come to read of the end, before it tidies up."""
BUG = 1
"""What the others end with where this machine does not know why it ends."""
MISTAKE = 2
"""Of the user's, in the recipe or a call."""
INTERRUPTED = 128
"""From here on a status says which signal ended a run: its sender reaches all machines."""
ENDING = 30.0
"""Seconds in which the ranks of a call that is over should have ended."""
SHARED = "the store must lie on a file system that all machines share: set --store or BIGPIPE_HOME"


def meeting_place(meetings: Path, place: Standing, run: Sequence[Json]) -> Path:
    """Return the folder where the machines of a job meet, under what they share. run: what is run there, the same on
    all of them: of several runs in one job, each has a folder of its own."""
    named = json.dumps([place.scheduler, place.job, *run], sort_keys=True)
    return meetings / hashlib.sha256(named.encode()).hexdigest()[:32]


def _write(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value), durable=False)


def _read(path: Path) -> Any:
    """None where it is not there yet, or not whole."""
    with suppress(OSError, ValueError):
        return parse_json(path.read_bytes())
    return None


class _Pulse:
    """Whether another machine's count still changes."""

    def __init__(self, path: Path) -> None:
        self._path, self._last, self._since = path, None, time.monotonic()

    @property
    def stopped(self) -> bool:
        if (now := _read(self._path)) != self._last:
            self._last, self._since = now, time.monotonic()
        return time.monotonic() - self._since > PATIENCE


@contextmanager
def _every(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """While it is open a thread does this again and again. What the file system refuses then is tried the next time."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(seconds):
            with suppress(OSError, BigpipeError):
                do()

    thread = threading.Thread(target=loop, name="meeting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _beating(session: Path, rank: int) -> Iterator[None]:
    beats = count()
    with _every(BEATS, lambda: _write(session / f"alive-{rank}", next(beats))):
        yield


class Meeting:
    """Machine 0's side."""

    def __init__(self, folder: Path, place: Standing, machines: int, limit: float) -> None:
        """machines: how many. limit: seconds until all of them must have come."""
        self._folder, self._place, self._limit = folder, place, limit
        self._session = folder / secrets.token_hex(8)
        self._others = range(1, machines)
        self._welcomed: dict[int, str] = {}
        self._came: set[int] = set()
        """Who has joined, or has been here meanwhile."""
        self._calls = 0
        self._called: dict[int, str] = {}
        """Who was called last, by the number that it came with."""
        self._pulses: dict[int, _Pulse] = {}

    status = 0
    """What the others end with, where nothing is raised."""

    @contextmanager
    def held(self, say: Callable[[str], None] | None = None) -> Iterator[None]:
        """Welcome who comes while it is open; at its end tell all how it ended: 0, or the status of the error. Who has
        not come by then is waited for, as long as is waited for at all, and said to be: it would wait for this machine.
        Not where the run was interrupted or had a bug, nor for a mistake of the user's, which is to be told at once.
        say: None: somebody else tells them."""
        make_directory(self._session, mode=0o700)
        until = time.monotonic() + self._limit
        for old in self._folder.iterdir():
            if old.is_dir() and old != self._session:
                shutil.rmtree(old, ignore_errors=True)
        status = BUG
        with _every(LOOKS, self._welcome), _beating(self._session, 0):
            try:
                yield
                status = self.status
            except BigpipeError as error:
                status = error.status
                raise
            finally:
                _write(self._session / "end.json", {"status": status})
                try:
                    if say is not None and status not in (BUG, MISTAKE) and status < INTERRUPTED:
                        self._await_others(until, say)
                    self._await_readers()
                finally:
                    shutil.rmtree(self._folder, ignore_errors=True)

    def _welcome(self) -> None:
        for rank in self._others:
            here = _read(self._folder / f"here-{rank}.json")
            known = self._welcomed.get(rank)
            if isinstance(here, dict) and here.get("number") != known and not self._has_read(rank):
                _write(self._session / f"welcome-{rank}.json", here)
                self._welcomed[rank] = here["number"]

    def _has_read(self, rank: int) -> bool:
        """Whether a machine knows of the end: when it comes again, it is for another run."""
        return (self._session / f"read-{rank}").exists()

    def _joined(self, rank: int, welcomed: Mapping[int, str]) -> bool:
        joined = rank in welcomed and _read(self._session / f"joined-{rank}") == welcomed[rank]
        self._came |= {rank} if joined else set()
        return joined

    def _missing(self) -> list[int]:
        """Who has not come. Who has is noted before it is looked for: one that comes again knows no earlier call."""
        self._called = dict(self._welcomed)
        return [rank for rank in self._others if not self._joined(rank, self._called)]

    def call(self, job_file: Path, node: str, check: Callable[[], None]) -> int:
        """Wait until all machines have come, call them to a job, and return the number of the call. check: may raise.
        Raise Transient, with the names of those missing, where they do not come in time."""
        deadline = time.monotonic() + self._limit
        while missing := self._missing():
            if time.monotonic() > deadline:
                names = ", ".join(map(self._place.name, missing))
                cause = f"{names} of {len(self._others) + 1} did not come within {self._limit:g} s"
                raise Transient(cause, f"see that `bigpipe run` is started on each machine, and {SHARED}")
            check()
            time.sleep(LOOKS)
        self._pulses = {rank: _Pulse(self._session / f"alive-{rank}") for rank in self._others}
        self._calls += 1
        _write(self._session / f"call-{self._calls}.json", {"job": str(job_file), "node": node})
        return self._calls

    def done(self, call: int) -> dict[int, int]:
        """Return the exit status of the launcher on each other machine where it has ended. Raise StageFailed where one
        of the others has gone."""
        found = {rank: _read(self._session / f"done-{call}-{rank}.json") for rank in self._others}
        for rank in self._others:
            again = self._welcomed[rank] != self._called[rank]
            if found[rank] is None and (again or self._pulses[rank].stopped or not self._joined(rank, self._called)):
                cause = f"{self._place.name(rank)} has gone, or is not heard of for {PATIENCE:g} s"
                raise StageFailed(cause, "look there; the same command continues where it stopped")
        return {rank: told["status"] for rank, told in found.items() if isinstance(told, dict)}

    def has_all(self, call: int) -> bool:
        """Return whether the launchers on all other machines have ended. Raise StageFailed as `done`."""
        return len(self.done(call)) == len(self._others)

    def end(self, call: int) -> None:
        """Let the others end their ranks of a call: it came to nothing."""
        with suppress(OSError, BigpipeError):  # the end of the run is told once more
            _write(self._session / f"over-{call}", True)

    def settle(self, call: int, check: Callable[[], None]) -> None:
        """Wait until the others have ended their ranks of a call that is over, or have gone; `ENDING` seconds at the
        most. check: may raise."""
        deadline = time.monotonic() + ENDING
        while time.monotonic() < deadline and self._at_work(call):
            check()
            time.sleep(LOOKS)

    def _at_work(self, call: int) -> bool:
        try:
            return not self.has_all(call)
        except StageFailed:
            return False

    def _await_others(self, until: float, say: Callable[[str], None]) -> None:
        """Until all have come, or the time has: `until`, by the monotonic clock."""
        told = False
        while (missing := self._yet_to_come()) and (left := until - time.monotonic()) > 0:
            if not told:
                names = ", ".join(map(self._place.name, missing))
                say(f"the run has ended; {names} would still wait for it, and is awaited for {left:.0f} s at the most")
            told = True
            time.sleep(LOOKS)

    def _yet_to_come(self) -> list[int]:
        return [
            rank
            for rank in self._others
            if not self._joined(rank, self._welcomed) and rank not in self._came and not self._has_read(rank)
        ]

    def _await_readers(self) -> None:
        deadline = time.monotonic() + LEAVING
        while any(self._joined(rank, self._welcomed) for rank in self._others) and time.monotonic() < deadline:
            time.sleep(LOOKS)


def attend(
    folder: Path, place: Standing, limit: float, start: Callable[[Path, str, Callable[[], None]], int],
    say: Callable[[str], None], check: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """The side of any other machine: start ranks when called, until the run has ended; return the status that machine 0
    ended with. start: (job file, node, a function to call now and then, which raises when it is over) → exit status.
    say: gets a line. check: called now and then; may raise. Raise Transient where machine 0 does not come in `limit` s,
    or has gone."""
    session, number = _find_session(folder, place, limit, check)
    say(f"{place.name(place.rank)} waits for calls of {place.name(0)}")
    pulse = _Pulse(session / "alive-0")

    def over() -> None:
        check()
        if (end := _read(session / "end.json")) is not None:
            raise _Over(int(end["status"]))
        if pulse.stopped:
            cause = f"{place.name(0)} has gone: nothing is heard of it for {PATIENCE:g} s"
            raise Transient(cause, "look there; the same command continues where it stopped")
        if (session / f"over-{number}").exists():
            raise _CallOver

    joined = session / f"joined-{place.rank}"
    with _beating(session, place.rank):
        try:
            while True:
                if (call := _read(session / f"call-{number}.json")) is not None:
                    status = 1
                    with suppress(_CallOver):
                        status = start(Path(call["job"]), call["node"], over)
                    _write(session / f"done-{number}-{place.rank}.json", {"status": status})
                    number += 1
                with suppress(_CallOver):  # of a call that has not been seen yet: the next look finds it
                    over()
                time.sleep(LOOKS)
        except _Over as end:
            with suppress(OSError, BigpipeError):  # machine 0 waited long enough for it, and took the folder away
                _write(session / f"read-{place.rank}", True)
            return end.status
        finally:
            joined.unlink(missing_ok=True)


class _CallOver(Exception):
    """The ranks of a call are to end; another call may come."""


class _Over(Exception):
    """The run has ended."""

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


def _find_session(folder: Path, place: Standing, limit: float, check: Callable[[], None]) -> tuple[Path, int]:
    """Join; return the session's folder and the number of the first call that is for this machine: what was called
    before it came was for another."""
    make_directory(folder, mode=0o700)
    here = {"number": secrets.token_hex(8), "host": host()}
    deadline, written = time.monotonic() + limit, folder / f"here-{place.rank}.json"
    while time.monotonic() < deadline:
        check()
        if _read(written) != here:  # of an earlier run, or machine 0 of one has tidied up
            with suppress(OSError):
                make_directory(folder, mode=0o700)
                _write(written, here)
        for welcome in folder.glob(f"*/welcome-{place.rank}.json"):
            if _read(welcome) == here:
                session = welcome.parent
                number = next(each for each in count(1) if not (session / f"call-{each}.json").exists())
                _write(session / f"joined-{place.rank}", here["number"])
                return session, number
        time.sleep(LOOKS)
    raise Transient(f"{place.name(0)} did not come within {limit:g} s", f"see that it runs there, and {SHARED}")
