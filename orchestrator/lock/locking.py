"""The lock file of a session: written by `bigpipe lock`, filled by runs, enforced by `run --locked`.

What stands in it is described in `lockfile`, which is imported only where there is a lock file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import UsageError
from bigpipe.orchestrator.planning import Session
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord

if TYPE_CHECKING:
    from .lockfile import LockedInput, LockFile


def read_lock(manifest: Path) -> LockFile | None:
    """Return the lock beside a manifest, None where there is none. Raise UsageError where it is not a lock file."""
    path = manifest.with_name(manifest.name + ".lock")
    if not path.exists():
        return None
    from .lockfile import read

    return read(path)


def current(session: Session) -> LockFile:
    """Return what a lock written now would say. Runs nothing."""
    from .lockfile import build

    return build(
        session.recipe.name,
        json.loads(json.dumps(dict(session.recipe.params), default=str)),
        {node.name: _input_now(session, node) for node in session.nodes},
        _producers(session),
        read_lock(session.recipe.path),
    )


def _producers(session: Session) -> dict[str, list[str]]:
    return {node.name: [name for names in node.inputs.values() for name in names] for node in session.nodes}


def _input_now(session: Session, node: Node) -> LockedInput:
    from .lockfile import LockedFile, locked_files, locked_input

    identity, pinned = session.identity(node), session.pinned(node)
    files = {
        name: LockedFile(size=file.size, sha256=file.sha256, git_blob=file.git_blob)
        for name, file in pinned.files().items()
    }
    if not files and not node.inputs:
        record = session.store.find(identity.key({}))
        files = locked_files(record) if record is not None else {}
    return locked_input(identity, pinned.values, files)


def write_lock(session: Session) -> Path:
    """Write the lock beside the manifest. Return its path."""
    from .lockfile import lock_path, write

    path = lock_path(session.recipe.path)
    write(path, current(session))
    return path


def check_lock(session: Session) -> Path:
    """Return the lock's path. Raise Stale where it is not what `write_lock` would write, UsageError where there is
    none."""
    from .lockfile import require

    lock = _needed(session)
    require(lock.path, lock, current(session))
    return lock.path


def enforce(session: Session) -> None:
    """Before `run --locked`: raise Stale where the inputs of the nodes to run differ from the lock."""
    from .lockfile import require

    lock = _needed(session)
    require(lock.path, lock, current(session), [node.name for node in session.nodes])


def _needed(session: Session) -> LockFile:
    lock = read_lock(session.recipe.path)
    if lock is None:
        name = session.recipe.path.name
        raise UsageError(f"there is no lock file {session.recipe.path}.lock", f"write it: bigpipe lock {name}")
    return lock


def enforce_outputs(session: Session, records: Mapping[str, KeyRecord]) -> None:
    """After `run --locked`, before `record_outputs`: raise StageFailed where a node gave something else than locked,
    see `require_record`. records: by node, of those that have one."""
    from .lockfile import require_record

    lock = _needed(session)
    for node in session.nodes:
        if record := records.get(node.name):
            tree = session.store.artifact_path(record.digest) if record.digest else None
            require_record(lock.path, lock, node.name, record, tree, node.kind.reproducible)


def record_outputs(session: Session, records: Mapping[str, KeyRecord]) -> None:
    """Add what a successful run gave to the lock file, if there is one. records: by node, of those that have one.

    Only nodes that ran with the locked inputs count: a run never moves a lock, `bigpipe lock` does.
    """
    lock = read_lock(session.recipe.path)
    if lock is None or all(_is_recorded(lock, name, record) for name, record in records.items()):
        return
    from .lockfile import find_unmoved, locked_output, write

    now = current(session)
    unmoved = find_unmoved(lock.inputs, now.inputs, _producers(session))
    outputs, inputs = dict(lock.outputs), dict(lock.inputs)
    for node in session.nodes:
        record = records.get(node.name)
        if record is not None and node.name in unmoved:
            tree = session.store.artifact_path(record.digest) if record.digest else None
            outputs[node.name] = locked_output(record, tree, node.kind.reviewed)
            inputs[node.name] = now.inputs[node.name]
    write(lock.path, lock.model_copy(update={"inputs": inputs, "outputs": outputs}))


def _is_recorded(lock: LockFile, node: str, record: KeyRecord) -> bool:
    output = lock.outputs.get(node)
    return output is not None and (output.key, output.digest) == (record.key, record.digest)
