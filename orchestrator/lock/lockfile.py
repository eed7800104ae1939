"""What stands in `<manifest>.lock`: what a recipe was made of and what came out, as YAML for review.

`inputs` says per node what enters its key and can be known without running: kind and version, params, pinned values,
and of nodes that bring files from outside, each file's size and sha256 (or git blob id). They are enforced.
`outputs` says what runs gave: digests, tool versions, and what the kind shows for review (a placement). They are
enforced only for kinds that are reproducible, and only where facts and packages equal those of the run that wrote them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from bigpipe.errors import StageFailed, Stale, UsageError
from bigpipe.files import write_file
from bigpipe.orchestrator.contract import Json, PinnedFile
from bigpipe.orchestrator.planning import ABSENT, Difference, changed
from bigpipe.orchestrator.store import KeyRecord

HEADER = """\
# Written by `bigpipe lock` and by successful runs; commit it beside the manifest.
# `bigpipe run --locked` refuses other inputs; `bigpipe lock --check` compares without running.
"""
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
    pins: dict[str, str] = Field(default_factory=dict)
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

    _path: Path = PrivateAttr(default=Path("."))

    @property
    def path(self) -> Path:
        """Where it was read from."""
        return self._path


def locked_files(record: KeyRecord) -> dict[str, PinnedFile]:
    """Return the files of a finished node that has no inputs: what it brought from outside."""
    if any(record.inputs.values()):
        return {}
    return {name: PinnedFile(size=int(file["size"]), sha256=str(file["sha256"])) for name, file in record.files.items()}


def locked_output(record: KeyRecord, tree: Path | None, reviewed: Sequence[str] = ()) -> LockedOutput:
    """Return what is locked of a node that has run. tree: its artifact, if its bytes are there; reviewed: names of
    files in it that hold JSON worth reviewing."""
    return LockedOutput(
        digest=record.digest,
        key=record.key,
        packages=record.identity.get("packages", {}),
        facts=record.identity.get("facts", {}),
        tools=record.tools,
        review=_read_reviewed(tree, reviewed) if tree is not None else {},
    )


def _read_reviewed(tree: Path, names: Sequence[str]) -> dict[str, Json]:
    found = {}
    for name in names:
        with suppress(OSError, ValueError):
            if (tree / name).stat().st_size <= REVIEWED_LIMIT:
                found[name] = json.loads((tree / name).read_text("utf-8"))
    return found


def is_same(old: LockedInput | None, new: LockedInput) -> bool:
    """Return whether a node's own inputs are as they were."""
    return old is not None and not _input_changes(old, new)


def with_files(now: LockedInput, old: LockedInput) -> LockedInput:
    """Return the inputs with all that either side knows of the node's files."""
    files = {**now.files, **{name: _both(now.files.get(name, file), file) for name, file in old.files.items()}}
    return now.model_copy(update={"files": files})


def _both(one: PinnedFile, other: PinnedFile) -> PinnedFile:
    return replace(one, sha256=one.sha256 or other.sha256, git_blob=one.git_blob or other.git_blob)


def write(path: Path, lock: LockFile) -> bool:
    """Write the lock if it says anything new. Sorted, so that a diff shows what changed. Raise BigpipeError."""
    import yaml

    data = lock.model_dump(mode="json", exclude_defaults=True) | {"version": lock.version}
    for name, item in lock.inputs.items():
        data["inputs"][name] |= {"params": item.params}  # params in full, nulls included: they are what was chosen
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = HEADER + yaml.dump(data, Dumper=dumper, sort_keys=True, allow_unicode=True, width=120)
    try:
        with suppress(FileNotFoundError):
            if path.read_text("utf-8") == text:
                return False
        write_file(path, text)
    except OSError as error:
        raise UsageError(
            f"the lock file {path} cannot be written: {error.strerror}", "make room, or writable"
        ) from error
    return True


def locked_digests(path: Path) -> set[str]:
    """Return the artifacts that a lock file names. Raise UsageError where it is not a lock file."""
    lock = read_lock_file(path)
    return {output.digest for output in lock.outputs.values() if output.digest is not None} if lock else set()


def read_lock_file(path: Path) -> LockFile | None:
    """Return the lock file, None where there is none. Raise UsageError where it is not one (a merge conflict, say)."""
    if not path.exists():
        return None
    import yaml

    again = f"write it again: bigpipe lock {path.name.removesuffix('.lock')}"
    try:
        data = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        lock = LockFile.model_validate(data)
    except OSError as error:
        raise UsageError(f"the lock file {path} cannot be read: {error.strerror}", again) from error
    except yaml.YAMLError as error:
        raise UsageError(f"the lock file {path} is not YAML: {error}", again) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"the lock file {path} is not one of ours: {where}: {first['msg']}", again) from error
    lock._path = path
    return lock


def check(lock: LockFile, now: LockFile, nodes: Iterable[str] | None = None) -> list[Difference]:
    """Return how the inputs of `nodes` (all, if None) differ from those locked. Empty: the lock holds.

    A file counts where both sides know of it; that a file is new or gone counts where both sides list files.
    """
    names = set(nodes) if nodes is not None else lock.inputs.keys() | now.inputs.keys()
    changes: list[Difference] = []
    for name in sorted(names):
        old, new = lock.inputs.get(name), now.inputs.get(name)
        if old is None or new is None:
            changes += changed(f"inputs.{name}", old.kind if old else ABSENT, new.kind if new else ABSENT)
        else:
            changes += [replace(item, path=f"inputs.{name}.{item.path}") for item in _input_changes(old, new)]
    return changes


def _input_changes(old: LockedInput, new: LockedInput) -> list[Difference]:
    fields = ("kind", "version", "code", "params", "env", "pins")
    changes = [item for name in fields for item in changed(name, getattr(old, name), getattr(new, name))]
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


def require(lock: LockFile, now: LockFile, nodes: Iterable[str] | None = None) -> None:
    """Raise Stale naming every difference."""
    if changes := check(lock, now, nodes):
        differ = "value differs" if len(changes) == 1 else "values differ"
        raise Stale(
            f"{lock.path} does not hold: {len(changes)} {differ}{_listed(changes)}",
            f"if that is meant: bigpipe lock {lock.path.name.removesuffix('.lock')}",
        )


def require_record(lock: LockFile, node: str, record: KeyRecord, tree: Path | None, reproducible: bool) -> None:
    """Compare what a node gave with what is locked: the files it brought, and its digest where that must be equal.

    Raise StageFailed naming the files, or both digests.
    """
    wanted, output = lock.inputs.get(node), lock.outputs.get(node)
    if wanted is not None and wanted.files and record.files:
        _require_files(lock.path, node, wanted.files, record, tree)
    if output is None or not reproducible or output.digest in (None, record.digest):
        return
    facts = (record.identity.get("packages", {}), record.identity.get("facts", {}))
    if output.key == record.key and facts == (output.packages, output.facts):
        raise StageFailed(
            f"{node} gave {record.digest}, but {lock.path} has {output.digest} for the same inputs, packages and facts",
            "one of the two is wrong: run `bigpipe verify`, then compare the artifacts",
        )


def _require_files(
    path: Path, node: str, wanted: Mapping[str, PinnedFile], record: KeyRecord, tree: Path | None
) -> None:
    given = locked_files(record)
    for name, file in wanted.items():
        if name in given and file.sha256 is None and file.git_blob is not None and tree is not None:
            given[name] = replace(given[name], git_blob=git_blob(tree / name))
    changes = _file_changes(wanted, given) if given else []
    if changes:
        raise StageFailed(
            f"{node} brought other files than {path} has:{_listed(changes)}", "the source has changed; do not use it"
        )


def git_blob(path: Path) -> str:
    """Return git's id of a file: the sha1 of `blob SIZE\\0` and its bytes. Identifies, does not protect."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
