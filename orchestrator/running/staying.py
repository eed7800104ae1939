"""Whether the files that a key was made of stay what they were, while somebody works under that key.

The key was made when the run began; the node's turn may come hours later. What is made of an edited file has another
key: recorded under the old one it would be served to whoever has the old file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bigpipe.errors import BigpipeError, Transient
from bigpipe.orchestrator.planning import Difference, Session, content_paths, difference_text
from bigpipe.orchestrator.recipe import Node

READ = 30.0
"""Seconds after which whoever works has read its files and imported its modules. Directories are read all the time."""


@contextmanager
def files_stay(session: Session, node: Node, drop: Callable[[], None]) -> Iterator[None]:
    """Raise Transient where a file was edited before what is done within began, while it was being read, or, in a
    directory, before it ended. drop: lets go of what was made of it, which nobody may go on with. Raise UsageError
    where a file is gone."""
    _require(node, session.moved(node))
    trees, files = content_paths(node.params, session.base, inside=False)
    if not (trees or files or node.kind.planning.leads_to or session.identity(node).code):
        yield
        return
    seen = _Seen(session, node)
    timer = threading.Timer(READ, seen.look)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    if trees or not seen.looked:
        seen.look()
    try:
        _require(node, seen.answer())
    except BigpipeError:
        drop()
        raise


class _Seen:
    """What has become of a node's files."""

    def __init__(self, session: Session, node: Node) -> None:
        self._session, self._node = session, node
        self._moved: Sequence[Difference] = ()
        self._error: BigpipeError | None = None
        self.looked = False

    def look(self) -> None:
        self.looked = True
        try:
            self._moved = self._moved or self._session.moved(self._node)
        except BigpipeError as error:
            self._error = error

    def answer(self) -> Sequence[Difference]:
        if self._error is not None:
            raise self._error
        return self._moved


def _require(node: Node, moved: Sequence[Difference]) -> None:
    if not moved:
        return
    told = "; ".join(difference_text(node, each) for each in moved)
    error = Transient(
        f"{node.name}: {told}, since the run looked at it", "run it again: what other nodes have finished is kept"
    )
    error.place = node.places.get(moved[0].path)
    raise error
