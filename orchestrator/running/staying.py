"""Whether the files that a key was made of stay what they were, while somebody works under that key.

The key was made when the run began; the node's turn may come hours later. What is made of an edited file has another
key: recorded under the old one it would be served to whoever has the old file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bigpipe.errors import BigpipeError, Transient
from bigpipe.orchestrator.contract import Event, RankHello
from bigpipe.orchestrator.planning import (
    ABSENT,
    Difference,
    Session,
    content_paths,
    difference_text,
    gathered_files,
)
from bigpipe.orchestrator.recipe import Node

READ = 30.0
"""Seconds after which a worker that has come up has read its files and imported its modules. Directories, what globs
stand for, and the files that others lead to, are read all the time."""
Hear = Callable[[Event], None]


@contextmanager
def files_stay(session: Session, node: Node, drop: Callable[[], None]) -> Iterator[Hear]:
    """Raise Transient where a file was edited before what is done within has read it, or, of those that are read all
    the time, before it ended. Yield what hears the events of the work. drop: lets go of what was made of an edited
    file, which nobody may go on with, also where the work fails or is interrupted. Raise UsageError where a file is
    gone."""
    _require(node, session.moved(node))
    trees, files = content_paths(node.params, session.base, inside=False)
    if not (trees or files or node.kind.planning.leads_to or session.identity(node).code):
        yield lambda event: None
        return
    reading = _Reading(session, node, to_the_end=bool(trees))
    try:
        yield reading.hear
    except BaseException:
        if reading.went_wrong():
            drop()
        raise
    try:
        _require(node, reading.moved())
    except BigpipeError:
        drop()
        raise


class _Reading:
    """What becomes of a node's files while workers come up and read them."""

    def __init__(self, session: Session, node: Node, *, to_the_end: bool) -> None:
        self._session, self._node, self._to_the_end = session, node, to_the_end
        self._throughout = _read_throughout(session, node)
        self._moved: Sequence[Difference] = ()
        self._error: BigpipeError | None = None
        self._guard = threading.Lock()
        self._timer = threading.Timer(READ, lambda: None)
        self._came, self._looked = 0, -1
        """Workers that have come up, and how many had when it was looked for the last time."""

    def hear(self, event: Event) -> None:
        """Look again some time after a worker has come up: what was edited earlier may be what it has read."""
        if not isinstance(event, RankHello):
            return
        with self._guard:
            self._came += 1
            self._timer.cancel()
            self._timer = threading.Timer(READ, self._look, [self._came])
            self._timer.daemon = True
            self._timer.start()

    def _look(self, came: int) -> None:
        try:
            self._moved = self._moved or self._session.moved(self._node)
        except BigpipeError as error:
            self._error = error
        self._looked = max(self._looked, came)

    def moved(self) -> Sequence[Difference]:
        """Return, once nobody works any more, what was edited too early. Raise UsageError where a file is gone."""
        with self._guard:
            self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        if self._to_the_end or self._looked < self._came:
            self._look(self._came)
        if self._error is not None:
            raise self._error
        return self._moved or self._moved_since()

    def _moved_since(self) -> Sequence[Difference]:
        now = {path: _digest(self._session, path) for path in self._throughout}
        return [
            Difference(f"files.{path.name}", before, now[path])
            for path, before in self._throughout.items()
            if now[path] != before
        ]

    def went_wrong(self) -> bool:
        """Return whether anything was, or is not there to be compared."""
        try:
            return bool(self.moved())
        except BigpipeError:
            return True


def _read_throughout(session: Session, node: Node) -> Mapping[Path, str]:
    """The files that are read one after another, as they are now: which ones rows lead to later does not matter."""
    leads_to, base = node.kind.planning.leads_to, session.base
    paths = [*gathered_files(node.params, base), *(leads_to(node.params, base) if leads_to else ())]
    return {path: _digest(session, path) for path in paths}


def _digest(session: Session, path: Path) -> str:
    try:
        return session.memo.sha256(path)
    except OSError:
        return ABSENT


def _require(node: Node, moved: Sequence[Difference]) -> None:
    if not moved:
        return
    told = "; ".join(difference_text(node, each) for each in moved)
    error = Transient(
        f"{node.name}: {told}, since the run looked at it", "run it again: what other nodes have finished is kept"
    )
    error.place = node.places.get(moved[0].path)
    raise error
