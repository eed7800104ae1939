"""`<manifest>.lock`: written by `bigpipe lock`, filled by runs, enforced by `run --locked`.

Its content is described in `locked`, which is imported only where there is a lock file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bigpipe.errors import UsageError
from bigpipe.orchestrator.stage import Pinned

from .keyrecord import KeyRecord
from .keys import Identity

if TYPE_CHECKING:
    from .locked import Lock, LockedInput, LockedOutput
    from .records import RecipeFacts


def lock_path(manifest: Path) -> Path:
    return manifest.with_name(manifest.name + ".lock")


def read_lock(manifest: Path) -> Lock | None:
    """The lock beside a manifest, None where there is none. UsageError where it is not a lock file."""
    path = lock_path(manifest)
    if not path.exists():
        return None
    from .locked import read

    return read(path)


class Records(Protocol):
    """What is read of a store."""

    def find(self, key: str) -> KeyRecord | None: ...
    def artifact_path(self, digest: str) -> Path: ...


class Resolved(Protocol):
    """A recipe with a store and an answer to what each node computes; the nodes are in topological order."""

    @property
    def recipe(self) -> RecipeFacts: ...
    @property
    def nodes(self) -> Sequence[Any]: ...
    @property
    def lock(self) -> Lock | None: ...
    @property
    def store(self) -> Records: ...
    def identity(self, node: Any) -> Identity: ...
    def pinned(self, node: Any) -> Pinned: ...


class Finished(Protocol):
    @property
    def record(self) -> KeyRecord | None: ...


def current(session: Resolved) -> Lock:
    """What a lock written now would say. Runs nothing."""
    from .locked import build

    return build(
        session.recipe.name,
        json.loads(json.dumps(dict(session.recipe.params), default=str)),
        {node.name: _input_now(session, node) for node in session.nodes},
        _producers(session),
        session.lock,
    )


def _producers(session: Resolved) -> dict[str, list[str]]:
    return {node.name: [name for names in node.inputs.values() for name in names] for node in session.nodes}


def _input_now(session: Resolved, node: Any) -> LockedInput:
    from .locked import LockedFile, locked_files, locked_input

    identity, pinned = session.identity(node), session.pinned(node)
    files = {
        name: LockedFile(size=file.size, sha256=file.sha256, git_blob=file.git_blob)
        for name, file in pinned.files().items()
    }
    if not files and not node.inputs:
        record = session.store.find(identity.key({}))
        files = locked_files(record) if record is not None else {}
    return locked_input(identity, pinned.values, files)


def write_lock(session: Resolved) -> Path:
    """Writes the lock beside the manifest. Returns its path."""
    from .locked import write

    path = lock_path(session.recipe.path)
    write(path, current(session))
    return path


def check_lock(session: Resolved) -> Path:
    """Raises Stale where the lock is not what `write_lock` would write, UsageError where there is none."""
    from .locked import require

    lock = _needed(session)
    require(lock.path, lock, current(session))
    return lock.path


def enforce(session: Resolved) -> None:
    """Before `run --locked`: raises Stale where the inputs of the nodes to run differ from the lock."""
    from .locked import require

    lock = _needed(session)
    require(lock.path, lock, current(session), [node.name for node in session.nodes])


def _needed(session: Resolved) -> Lock:
    if session.lock is None:
        path = lock_path(session.recipe.path)
        raise UsageError(f"there is no lock file {path}", f"write it: bigpipe lock {session.recipe.path.name}")
    return session.lock


def enforce_outputs(session: Resolved, finished: Mapping[str, Finished]) -> None:
    """After `run --locked`, before `record_outputs`: raises StageFailed where a node gave something else than locked,
    see `require_record`."""
    from .locked import require_record

    lock = _needed(session)
    for node in session.nodes:
        record = finished[node.name].record if node.name in finished else None
        if record is not None:
            tree = session.store.artifact_path(record.digest) if record.digest else None
            require_record(lock.path, lock, node.name, record, tree, node.kind.reproducible)


def record_outputs(session: Resolved, finished: Mapping[str, Finished]) -> None:
    """Adds what a successful run gave to the lock file, if there is one.

    Only nodes that ran with the locked inputs count: a run never moves a lock, `bigpipe lock` does.
    """
    lock = session.lock
    records = {name: item.record for name, item in finished.items() if item.record is not None}
    if lock is None or all(_is_recorded(lock, name, record) for name, record in records.items()):
        return
    from .locked import find_unmoved, write

    now = current(session)
    unmoved = find_unmoved(lock.inputs, now.inputs, _producers(session))
    fresh = {name: record for name, record in records.items() if name in unmoved}
    outputs = {name: _output_now(session, record) for name, record in fresh.items()}
    inputs = {name: now.inputs[name] for name in fresh}
    write(
        lock.path,
        lock.model_copy(update={"inputs": {**lock.inputs, **inputs}, "outputs": {**lock.outputs, **outputs}}),
    )


def _is_recorded(lock: Lock, node: str, record: KeyRecord) -> bool:
    output = lock.outputs.get(node)
    return output is not None and (output.key, output.digest) == (record.key, record.digest)


def _output_now(session: Resolved, record: KeyRecord) -> LockedOutput:
    from .locked import locked_output

    return locked_output(record, session.store.artifact_path(record.digest) if record.digest else None)
