"""The lock file of a session: written by `bigpipe lock`, filled by runs, enforced by `run --locked`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.orchestrator.planning import Session
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord

from .beside import lock_path, read_lock
from .lockfile import (
    LockedInput,
    LockFile,
    is_same,
    locked_files,
    locked_output,
    require,
    require_record,
    with_files,
    write,
)


def current(session: Session) -> LockFile:
    """Return what a lock written now would say. Runs nothing.

    What the lock knew of a node's files stays where its inputs are the same, what it knew of its output where those of
    all its ancestors are too.
    """
    recipe = session.recipe
    old = read_lock(recipe.path) or LockFile(recipe=recipe.name)
    inputs = {node.name: _input_now(session, node) for node in session.nodes}
    unmoved = _unmoved(session, old.inputs, inputs)
    for name, item in inputs.items():
        if is_same(old.inputs.get(name), item):
            inputs[name] = with_files(item, old.inputs[name])
    return LockFile(
        recipe=recipe.name,
        params=json.loads(json.dumps(dict(recipe.params), default=str)),
        inputs=inputs,
        outputs={name: output for name, output in old.outputs.items() if name in unmoved},
    )


def _unmoved(session: Session, old: Mapping[str, LockedInput], new: Mapping[str, LockedInput]) -> set[str]:
    """The nodes whose inputs, and those of all their ancestors, are as they were."""
    unmoved: set[str] = set()
    for node in session.nodes:
        if is_same(old.get(node.name), new[node.name]) and unmoved.issuperset(node.producers):
            unmoved.add(node.name)
    return unmoved


def _input_now(session: Session, node: Node) -> LockedInput:
    identity, pinned = session.identity(node), session.pinned(node)
    files = dict(pinned.files())
    if not files and not node.inputs and (record := session.store.find(identity.key({}))):
        files = locked_files(record)
    return LockedInput(
        kind=identity.kind,
        version=identity.version,
        code=identity.code,
        params=dict(identity.params),
        env=dict(identity.env),
        pins=dict(pinned.values),
        files=files,
    )


def write_lock(session: Session) -> Path:
    """Write the lock beside the manifest. Return its path."""
    path = lock_path(session.recipe.path)
    write(path, current(session))
    return path


def check_lock(session: Session) -> Path:
    """Return the lock's path. Raise Stale where it is not what `write_lock` would write, UsageError where there is
    none."""
    lock = _needed(session)
    require(lock, current(session))
    return lock.path


def enforce(session: Session) -> None:
    """Before `run --locked`: raise Stale where the inputs of the nodes to run differ from the lock."""
    require(_needed(session), current(session), [node.name for node in session.nodes])


def _needed(session: Session) -> LockFile:
    path = session.recipe.path
    lock = read_lock(path)
    if lock is None:
        raise UsageError(f"there is no lock file {lock_path(path)}", f"write it: bigpipe lock {path.name}")
    return lock


def enforce_outputs(session: Session, records: Mapping[str, KeyRecord]) -> None:
    """After `run --locked`, before `record_outputs`: raise StageFailed where a node gave something else than locked,
    see `require_record`. records: by node, of those that have one."""
    lock = _needed(session)
    for node in session.nodes:
        if record := records.get(node.name):
            require_record(lock, node.name, record, _tree(session, record), node.kind.reproducible)


def record_outputs(session: Session, records: Mapping[str, KeyRecord]) -> None:
    """Add what a successful run gave to the lock file, if there is one. records: by node, of those that have one.

    Only nodes that ran with the locked inputs count: a run never moves a lock, `bigpipe lock` does.
    """
    lock = read_lock(session.recipe.path)
    if lock is None or all(_is_recorded(lock, name, record) for name, record in records.items()):
        return
    now = current(session)
    unmoved = _unmoved(session, lock.inputs, now.inputs)
    outputs, inputs = dict(lock.outputs), dict(lock.inputs)
    for node in session.nodes:
        record = records.get(node.name)
        if record is not None and node.name in unmoved:
            outputs[node.name] = locked_output(record, _tree(session, record), node.kind.reviewed)
            inputs[node.name] = now.inputs[node.name]
    write(lock.path, lock.model_copy(update={"inputs": inputs, "outputs": outputs}))


def _tree(session: Session, record: KeyRecord) -> Path | None:
    return session.store.artifact_path(record.digest) if record.digest else None


def _is_recorded(lock: LockFile, node: str, record: KeyRecord) -> bool:
    output = lock.outputs.get(node)
    return output is not None and (output.key, output.digest) == (record.key, record.digest)
