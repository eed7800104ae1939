"""`<manifest>.lock`: what a recipe was made of and what came out, as YAML for review. Written by `bigpipe lock`, filled
by runs, enforced by `run --locked`.

`inputs` says per node what enters its key and can be known without running: kind and version, params, what each port is
wired to, pinned values and what they are the answer to, and of nodes that bring files from outside, each file's size
and sha256 (or git blob id). They are enforced.
`outputs` says what runs gave: digests, tool versions, and what the kind shows for review (a placement). They are
enforced only for kinds that are reproducible, and only where facts and packages equal those of the run that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bigpipe import plainyaml
from bigpipe.errors import Place, StageFailed, Stale, UsageError
from bigpipe.files import parse_json, read_file, write_file
from bigpipe.fit import as_parameters
from bigpipe.orchestrator.contract import Json, PinnedFile
from bigpipe.orchestrator.planning import ABSENT, Difference, Session, changed, lock_path
from bigpipe.orchestrator.recipe import Node
from bigpipe.orchestrator.store import KeyRecord
from bigpipe.redaction import redact_fields, redact_json, redact_value

from .answers import Illegible, again_by, read_answers, refuse, unmind, write_answers, writing

HEADER = """\
# Written by `bigpipe lock` and by successful runs; commit it beside the manifest.
# `bigpipe run --locked` refuses other inputs; `bigpipe lock --check` compares without running.
"""
LARGEST = 256 * 2**20
"""Bytes of a lock file: that of 10,000 nodes with 100 files each takes half."""
CONFLICT = "<<<<<<< "
"""Begins a line of what git could not merge."""
REVIEWED_LIMIT = 256 * 2**10
"""Bytes of a file that are still worth reviewing."""


class _Locked(BaseModel):
    # Only where there is a lock file is a schema compiled to read it.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class LockedInput(_Locked):
    kind: str
    version: int
    code: str | None = None
    """The digest of the kind's source, where it is not built in."""
    params: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    inputs: dict[str, list[str]] | None = None
    """Port → the nodes that it is wired to; None: written by a version that did not lock it."""
    pins: dict[str, str] = Field(default_factory=dict)
    asked: dict[str, Any] = Field(default_factory=dict)
    """What the pins are the answer to: field path → what the recipe said there."""
    files: dict[str, PinnedFile] = Field(default_factory=dict)


class LockedOutput(_Locked):
    model_config = ConfigDict(extra="ignore")

    digest: str | None
    key: str
    packages: dict[str, str | None] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    tools: dict[str, str] = Field(default_factory=dict)
    review: dict[str, Any] = Field(default_factory=dict)
    """Of the files that its kind has `reviewed`: name → what the JSON says."""


class LockFile(_Locked):
    version: int = 1
    recipe: str
    params: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, LockedInput] = Field(default_factory=dict)
    outputs: dict[str, LockedOutput] = Field(default_factory=dict)
    path: Path = Field(default=Path("."), exclude=True)
    """Where it was read from."""


def read_lock(path: Path, illegible: Illegible = refuse) -> LockFile | None:
    """Return the lock file, None where there is none. Raise UsageError where it is not one. illegible: what is done
    about a text that cannot be read as one (a merge conflict, say) and may be written anew."""
    if not os.path.exists(path):
        return None
    again = again_by(path)
    text = b""
    try:
        text = read_file(path, LARGEST)
        data = plainyaml.load(text)
        if isinstance(data, dict) and "stages" in data:
            raise UsageError(
                f"{path} is a recipe, not a lock file", f"name {path}.lock, which `{writing(path)}` writes"
            )
        return LockFile.model_validate(data).model_copy(update={"path": path})
    except OSError as error:
        raise UsageError(f"the lock file {path} cannot be read: {error.strerror}", again) from error
    except plainyaml.NotPlain as error:
        illegible(_not_a_lock(path, text, f"is not YAML as it is written: {error}"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        wrong = f"{where}: {first['msg']}".removeprefix(": ") if text.strip() else "it is empty"
        illegible(_not_a_lock(path, text, f"is not one of ours: {wrong}"))
    return None


def _not_a_lock(path: Path, text: bytes, wrong: str) -> UsageError:
    place = _conflict(path, text)
    said = "has a merge conflict, as git left it" if place else wrong
    return UsageError(f"the lock file {path} {said}", again_by(path), place=place)


def _conflict(path: Path, text: bytes) -> Place | None:
    """Where git has left a conflict."""
    lines = text.decode("utf-8", "replace").splitlines()
    marks = (Place(str(path), number, 1, line, 7) for number, line in enumerate(lines, 1) if line.startswith(CONFLICT))
    return next(marks, None)


def write(path: Path, lock: LockFile) -> None:
    """Write the lock if it says anything new. Sorted, so that a diff shows what changed. Raise BigpipeError."""
    import yaml

    data = redact_fields(lock.model_dump(mode="json", exclude_defaults=True)) | {"version": lock.version}
    for name, item in lock.inputs.items():
        data["inputs"][name] |= {"params": item.params}  # params in full, nulls included: they are what was chosen
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = HEADER + yaml.dump(data, Dumper=dumper, sort_keys=True, allow_unicode=True, width=120)
    try:
        if not path.exists() or path.read_text("utf-8") != text:
            write_file(path, text)
    except OSError as error:
        cause = f"the lock file {path} cannot be written: {error.strerror}"
        raise UsageError(cause, "make room, or writable") from error


def locked_digests(path: Path) -> set[str]:
    """Return the artifacts that a lock file names. Raise UsageError where it is not a lock file."""
    lock = read_lock(path)
    return {output.digest for output in lock.outputs.values() if output.digest is not None} if lock else set()


def write_lock(session: Session) -> Path:
    """Write the lock beside the manifest, and beside that what the sources say, in place of what cannot be read too.
    Return the lock's path."""
    path, inputs = lock_path(session.recipe.path), _inputs_now(session)
    answers = {node.name: session.pinned(node).known() for node in session.nodes}
    with session.store.writing(path):
        before = read_lock(path, unmind)
        said, unmoved = read_answers(path, unmind), _unmoved(session, before.inputs if before else {}, inputs)
        kept = {name: said[name] for name in unmoved if name in said}
        write_answers(path, {**kept, **{name: found for name, found in answers.items() if found}})
        write(path, _current(session, before, inputs))
    return path


def current(session: Session) -> LockFile:
    """Return what a lock written now would say. Runs nothing."""
    return _current(session, read_lock(lock_path(session.recipe.path)), _inputs_now(session))


def _inputs_now(session: Session) -> dict[str, LockedInput]:
    """What may take long: files are hashed, and sources asked."""
    return {node.name: _input_now(session, node) for node in session.nodes}


def _current(session: Session, lock: LockFile | None, now: Mapping[str, LockedInput]) -> LockFile:
    """What the lock knew of a node's files stays where its inputs are the same, what it knew of its output where those
    of all its ancestors are too."""
    recipe, inputs = session.recipe, dict(now)
    old = lock or LockFile(recipe=recipe.name)
    unmoved = _unmoved(session, old.inputs, inputs)
    for name, item in now.items():
        before = old.inputs.get(name)
        if before is not None and not _input_changes(before, item):
            known = {file: _both(item.files.get(file, pinned), pinned) for file, pinned in before.files.items()}
            inputs[name] = item.model_copy(update={"files": {**item.files, **known}})
    return LockFile(
        recipe=recipe.name,
        params=redact_json(json.loads(json.dumps(dict(recipe.params), default=str)), redact_value),
        inputs=inputs,
        outputs={name: output for name, output in old.outputs.items() if name in unmoved},
    )


def _both(one: PinnedFile, other: PinnedFile) -> PinnedFile:
    return replace(one, sha256=one.sha256 or other.sha256, git_blob=one.git_blob or other.git_blob)


def _unmoved(session: Session, old: Mapping[str, LockedInput], new: Mapping[str, LockedInput]) -> set[str]:
    """The nodes whose inputs, and those of all their ancestors, are as they were."""
    unmoved: set[str] = set()
    for node in session.nodes:
        before = old.get(node.name)
        if before is not None and not _input_changes(before, new[node.name]) and unmoved.issuperset(node.producers):
            unmoved.add(node.name)
    return unmoved


def _input_now(session: Session, node: Node) -> LockedInput:
    identity, pinned = session.identity(node), session.pinned(node)
    files = dict(pinned.files())
    if not files and not node.inputs and (record := session.store.find(identity.key({}))):
        files = _brought(record)
    own = {name: getattr(identity, name) for name in ("kind", "version", "code", "params")}
    return LockedInput(
        **own, env=redact_json(identity.env, redact_value),
        inputs={port: list(nodes) for port, nodes in node.inputs.items()}, pins=dict(pinned.values),
        asked=session.asked(node) if pinned.values else {}, files=files,
    )  # fmt: skip


def _brought(record: KeyRecord) -> dict[str, PinnedFile]:
    """The files of a finished node that has no inputs: what it brought from outside."""
    files = {} if any(record.inputs.values()) else record.files
    return {name: PinnedFile(size=int(file["size"]), sha256=str(file["sha256"])) for name, file in files.items()}


def check_lock(session: Session) -> Path:
    """Return the lock's path. Raise Stale where it is not what `write_lock` would write, UsageError where there is
    none."""
    lock = _needed(session)
    _require(session, lock, current(session))
    return lock.path


def enforce(session: Session) -> None:
    """Before `run --locked`: raise Stale where the inputs of the nodes to run differ from the lock."""
    _require(session, _needed(session), current(session), [node.name for node in session.nodes])


def _needed(session: Session) -> LockFile:
    path = session.recipe.path
    lock = read_lock(lock_path(path))
    if lock is None:
        raise UsageError(f"there is no lock file {lock_path(path)}", f"write it: {_writing_again(session)}")
    return lock


def _writing_again(session: Session) -> str:
    """The command that writes the lock for these parameters."""
    return f"{writing(lock_path(session.recipe.path))} {as_parameters(session.arguments)}".rstrip()


def _require(session: Session, lock: LockFile, now: LockFile, nodes: Iterable[str] | None = None) -> None:
    if changes := check(lock, now, nodes):
        differ = "value differs" if len(changes) == 1 else "values differ"
        raise Stale(
            f"{lock.path} does not hold: {len(changes)} {differ}{_listed(changes)}",
            f"if that is meant: {_writing_again(session)}",
        )


def check(lock: LockFile, now: LockFile, nodes: Iterable[str] | None = None) -> list[Difference]:
    """Return how the inputs of `nodes` (all, if None) differ from those locked. Empty: the lock holds.
    A file counts where both sides know of it; that a file is new or gone counts where both sides list files."""
    changes: list[Difference] = []
    for name in sorted(lock.inputs.keys() | now.inputs.keys() if nodes is None else set(nodes)):
        old, new = lock.inputs.get(name), now.inputs.get(name)
        if old is None or new is None:
            changes += changed(f"inputs.{name}", old.kind if old else ABSENT, new.kind if new else ABSENT)
        else:
            changes += [replace(item, path=f"inputs.{name}.{item.path}") for item in _input_changes(old, new)]
    return changes


def lock_differences(old: LockFile, new: LockFile) -> dict[str, list[Difference]]:
    """Return what differs between two locks, by node, and of their recipes and parameters under "": inputs as `check`
    compares them; of what came out digests, versions of tools and packages, facts, and what is there for review."""
    own = [*changed("recipe", old.recipe, new.recipe), *changed("params", old.params, new.params)]
    found = {"": own}
    for name in sorted(old.inputs.keys() | new.inputs.keys()):
        before, after = old.inputs.get(name), new.inputs.get(name)
        if before is None or after is None:
            own += changed(f"nodes.{name}", before.kind if before else ABSENT, after.kind if after else ABSENT)
        else:
            found[name] = [
                *_input_changes(before, after),
                *_output_changes(old.outputs.get(name), new.outputs.get(name)),
            ]
    return {name: changes for name, changes in found.items() if changes}


def _output_changes(old: LockedOutput | None, new: LockedOutput | None) -> list[Difference]:
    """Where only one side has run, that it has is no change of the recipe."""
    if old is None or new is None:
        return []
    fields = ("digest", "packages", "facts", "tools", "review")
    return [item for name in fields for item in changed(name, getattr(old, name), getattr(new, name))]


def _input_changes(old: LockedInput, new: LockedInput) -> list[Difference]:
    fields = ("kind", "version", "code", "params", "env", "pins")
    changes = [item for name in fields for item in changed(name, getattr(old, name), getattr(new, name))]
    changes += changed("inputs", old.inputs, new.inputs) if None not in (old.inputs, new.inputs) else ()
    changes += changed("asked", old.asked, new.asked) if old.asked and new.asked else ()
    return changes + (_file_changes(old.files, new.files) if old.files and new.files else [])


def _file_changes(old: Mapping[str, PinnedFile], new: Mapping[str, PinnedFile]) -> list[Difference]:
    changes: list[Difference] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None or after is None:
            changes += changed(f"files.{name}", before.size if before else ABSENT, after.size if after else ABSENT)
            continue
        for field in ("size", "sha256", "git_blob"):
            values = getattr(before, field), getattr(after, field)
            if None not in values:
                changes += changed(f"files.{name}.{field}", *values)
    return changes


def _listed(changes: Iterable[Difference]) -> str:
    return "".join(f"\n  {change}" for change in changes)


def enforcing_outputs(session: Session) -> Callable[[Node, KeyRecord], None]:
    """Return what `run --locked` asks of each node that has a record, before anybody takes what it gave: it raises
    StageFailed where the node brought other files than are locked, or gave another digest where that must be equal.
    Raise UsageError where there is no lock."""
    lock = _needed(session)

    def enforce_output(node: Node, record: KeyRecord) -> None:
        _require_files(lock, node.name, record, _tree(session, record))
        output, identity = lock.outputs.get(node.name), record.identity
        if output is None or not node.kind.reproducible or output.digest in (None, record.digest):
            return
        facts = (identity.get("packages", {}), identity.get("facts", {}))
        if output.key == record.key and facts == (output.packages, output.facts):
            raise StageFailed(
                f"{node.name} gave {record.digest}, but {lock.path} has {output.digest} for the same inputs, "
                "packages and facts",
                "one of the two is wrong: run `bigpipe verify`, then compare the artifacts",
            )

    return enforce_output


def _require_files(lock: LockFile, node: str, record: KeyRecord, tree: Path | None) -> None:
    wanted, given = lock.inputs[node].files if node in lock.inputs else {}, _brought(record)
    for name, file in wanted.items():
        if name in given and file.sha256 is None and file.git_blob is not None and tree is not None:
            given[name] = replace(given[name], git_blob=git_blob(tree / name))
    if wanted and given and (changes := _file_changes(wanted, given)):
        cause = f"{node} brought other files than {lock.path} has:{_listed(changes)}"
        raise StageFailed(cause, "the source has changed; do not use it")


def git_blob(path: Path) -> str:
    """Return git's id of a file: the sha1 of `blob SIZE\\0` and its bytes. Identifies, does not protect."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def record_outputs(session: Session, records: Mapping[str, KeyRecord]) -> None:
    """Add what a successful run gave to the lock file, if there is one. records: by node, of those that have one.
    Only nodes that ran with the locked inputs count: a run never moves a lock, `bigpipe lock` does."""
    path = lock_path(session.recipe.path)
    lock = read_lock(path)
    if lock is None or _says_all(lock, records):
        return
    found = _inputs_now(session)
    with session.store.writing(path):
        if (lock := read_lock(path)) is not None:  # others may have written it meanwhile
            write(path, _filled(session, lock, _current(session, lock, found), records))


def _says_all(lock: LockFile, records: Mapping[str, KeyRecord]) -> bool:
    known = {name: (output.key, output.digest) for name, output in lock.outputs.items()}
    return all(known.get(name) == (record.key, record.digest) for name, record in records.items())


def _filled(session: Session, lock: LockFile, now: LockFile, records: Mapping[str, KeyRecord]) -> LockFile:
    unmoved = _unmoved(session, lock.inputs, now.inputs)
    outputs, inputs = dict(lock.outputs), dict(lock.inputs)
    for node in session.nodes:
        if node.name in unmoved and (record := records.get(node.name)):
            outputs[node.name] = locked_output(record, _tree(session, record), node.kind.reviewed)
            inputs[node.name] = now.inputs[node.name]
    return lock.model_copy(update={"inputs": inputs, "outputs": outputs})


def _tree(session: Session, record: KeyRecord) -> Path | None:
    """The artifact of a record; None where there is none, or its bytes were dropped."""
    tree = session.store.artifact_path(record.digest) if record.digest else None
    return tree if tree is not None and tree.is_dir() else None


def locked_output(record: KeyRecord, tree: Path | None, reviewed: Sequence[str] = ()) -> LockedOutput:
    """Return what is locked of a node that has run. tree: its artifact, if its bytes are there; reviewed: names of
    files in it that hold JSON worth reviewing."""
    review: dict[str, Json] = {}
    for name, path in {name: tree / name for name in reviewed}.items() if tree else ():
        with suppress(OSError, ValueError):
            review[name] = parse_json(read_file(path, REVIEWED_LIMIT))
    identity = {name: record.identity.get(name, {}) for name in ("packages", "facts")}
    return LockedOutput(digest=record.digest, key=record.key, tools=record.tools, review=review, **identity)
