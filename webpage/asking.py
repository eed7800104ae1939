"""Children that work for a page: a few at once, a few waiting, each bounded in seconds, memory and what it may say.

    await Children(…).ask(["-m", "bigpipe", "plan", "recipe.yaml", "--json"], b"", "the plan")

A child has a session of its own; when its time is up, or nobody waits for it any more, all of it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import bigpipe
from bigpipe.errors import StageFailed, Transient
from bigpipe.programs import limit_memory
from bigpipe.sizes import format_size
from bigpipe.trust import Limits

LONGEST_ANSWER = 32 * 2**20
"""Bytes."""
PACKAGE = Path(bigpipe.__file__).parents[1]
"""Where a child finds bigpipe."""


class Busy(Transient):
    """Too many wait already."""


@dataclass(slots=True)
class Children:
    """Those of one page. directory: where they work."""

    directory: Path
    at_once: int = 2
    waiting: int = 8
    limits: Limits = field(default_factory=lambda: Limits(seconds=60))
    asked: int = 0
    """How many work or wait, of those whose asker has not gone."""
    _turn: asyncio.Semaphore | None = None

    async def ask(
        self, arguments: Sequence[str], question: bytes, what: str, gone: Callable[[], Awaitable[object]] | None = None
    ) -> dict[str, Any]:
        """Return the JSON object that `python ARGUMENTS` prints, given a question on standard input. what: for errors.
        gone: ends when nobody waits for the answer any more. Raise Busy, and StageFailed where there is no answer."""
        if self.asked >= self.at_once + self.waiting:
            raise Busy(f"{self.asked} questions wait already", "try again in a moment")
        self._turn = self._turn or asyncio.Semaphore(self.at_once)
        self.asked += 1
        try:
            return await self._first(self._in_turn(self._turn, arguments, question, what), gone)
        finally:
            self.asked -= 1

    async def _in_turn(
        self, turn: asyncio.Semaphore, arguments: Sequence[str], question: bytes, what: str
    ) -> dict[str, Any]:
        async with turn:
            return await self._answer(arguments, question, what)

    async def _first(
        self, answer: Awaitable[dict[str, Any]], gone: Callable[[], Awaitable[object]] | None
    ) -> dict[str, Any]:
        """The answer, or the end where nobody waits for it any more."""
        working = asyncio.ensure_future(answer)
        watching = [asyncio.ensure_future(gone())] if gone else []
        try:
            await asyncio.wait([working, *watching], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Busy("nobody waits for the answer", "")
        finally:
            for task in (working, *watching):
                task.cancel()
            await asyncio.gather(working, *watching, return_exceptions=True)

    async def _answer(self, arguments: Sequence[str], question: bytes, what: str) -> dict[str, Any]:
        with TemporaryFile() as asked, TemporaryFile() as said:  # files wait for nobody, as pipes do
            asked.write(question)
            asked.seek(0)
            status = await self._run(arguments, asked, said, what)
            if said.seek(0, os.SEEK_END) > LONGEST_ANSWER:
                said.truncate(0)
            said.seek(0)
            answer = _object(said.read())
        if answer is None:
            cause = f"{what} ended without an answer (exit {status})"
            raise StageFailed(cause, f"it may take {format_size(self.limits.memory)}; the command itself says more")
        return answer

    async def _run(self, arguments: Sequence[str], asked: IO[bytes], said: IO[bytes], what: str) -> int:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", *arguments, cwd=self.directory, env=_environment(), start_new_session=True,
            stdin=asked, stdout=said, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            limit_memory(child.pid, self.limits.memory)
            return await asyncio.wait_for(child.wait(), self.limits.seconds)
        except TimeoutError as error:
            raise StageFailed(
                f"{what} takes more than {self.limits.seconds:g} s", "ask for something smaller"
            ) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


def _object(said: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _environment() -> dict[str, str]:
    """That of the page, whose user asks: the Hub's token too."""
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}
