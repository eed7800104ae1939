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
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from bigpipe.errors import StageFailed, Stale, UsageError
from bigpipe.files import write_file
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import ABSENT, Change, Identity, changed
from bigpipe.orchestrator.store import KeyRecord

HEADER = """\
# Written by `bigpipe lock` and by successful runs; commit it beside the manifest.
# `bigpipe run --locked` refuses other inputs; `bigpipe lock --check` compares without running.
"""
REVIEWED_LIMIT = 256 * 2**10
"""Bytes of a file that are still worth reviewing."""


class _Locked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedFile(_Locked):
    size: int
    sha256: str | None = None
    git_blob: str | None = None
    """Git's id of the file, 40 hex digits: all that the Hub says of small files."""


class LockedInput(_Locked):
    kind: str
    version: int
    code: str | None = None
    """The digest of the kind's source, where it is not built in."""
    params: dict[str, Any] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)
    pins: dict[str, str] = Field(default_factory=dict)
    files: dict[str, LockedFile] = Field(default_factory=dict)


class LockedOutput(_Locked):
    model_config = ConfigDict(frozen=True, extra="ignore")

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

    def pins(self, node: str) -> dict[str, str]:
        """Return what the floating values of a node were when it was locked."""
        return dict(self.inputs[node].pins) if node in self.inputs else {}


def locked_input(
    identity: Identity, pins: Mapping[str, str], files: Mapping[str, LockedFile] | None = None
) -> LockedInput:
    """Return what is locked of a node before it runs. `files`: what it brings from outside, as far as that is known."""
    return LockedInput(
        kind=identity.kind,
        version=identity.version,
        code=identity.code,
        params=dict(identity.params),
        env=dict(identity.env),
        pins=dict(pins),
        files=dict(files or {}),
    )


def locked_files(record: KeyRecord) -> dict[str, LockedFile]:
    """Return the files of a finished node that has no inputs: what it brought from outside."""
    if any(record.inputs.values()):
        return {}
    return {name: LockedFile(size=int(file["size"]), sha256=str(file["sha256"])) for name, file in record.files.items()}


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


def build(
    recipe: str,
    params: Mapping[str, Json],
    inputs: Mapping[str, LockedInput],
    producers: Mapping[str, Iterable[str]],
    previous: LockFile | None = None,
) -> LockFile:
    """Return a lock of these inputs, in topological order; `producers` names what each node's artifact is made from.

    What `previous` knew of a node's files stays where its inputs are the same, what it knew of its output where those
    of all its ancestors are too.
    """
    old = previous or LockFile(recipe=recipe)
    same = _same(old.inputs, inputs)
    unmoved = find_unmoved(old.inputs, inputs, producers)
    return LockFile(
        recipe=recipe,
        params=dict(params),
        inputs={name: _with_files(item, old.inputs[name]) if name in same else item for name, item in inputs.items()},
        outputs={name: output for name, output in old.outputs.items() if name in unmoved},
    )


def _same(old: Mapping[str, LockedInput], new: Mapping[str, LockedInput]) -> set[str]:
    """The nodes whose own inputs are as they were."""
    return {name for name, item in new.items() if name in old and not _input_changes(old[name], item)}


def find_unmoved(
    old: Mapping[str, LockedInput], new: Mapping[str, LockedInput], producers: Mapping[str, Iterable[str]]
) -> set[str]:
    """Return the nodes whose inputs, and those of all their ancestors, are as they were; `new` in topological order."""
    same = _same(old, new)
    unmoved: set[str] = set()
    for name in new:
        if name in same and unmoved.issuperset(producers.get(name, ())):
            unmoved.add(name)
    return unmoved


def _with_files(now: LockedInput, old: LockedInput) -> LockedInput:
    files = dict(now.files)
    for name, file in old.files.items():
        mine = files.get(name)
        files[name] = file if mine is None else _both(mine, file)
    return now.model_copy(update={"files": files})


def _both(one: LockedFile, other: LockedFile) -> LockedFile:
    return LockedFile(size=one.size, sha256=one.sha256 or other.sha256, git_blob=one.git_blob or other.git_blob)


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


def lock_path(manifest: Path) -> Path:
    """Return where the lock file of a manifest lies: beside it."""
    return manifest.with_name(manifest.name + ".lock")


def locked_digests(path: Path) -> set[str]:
    """Return the artifacts that a lock file names. Raise UsageError where it is not a lock file."""
    lock = read(path)
    return {output.digest for output in lock.outputs.values() if output.digest is not None} if lock else set()


def read(path: Path) -> LockFile | None:
    """Return the lock file, None where there is none. Raise UsageError where it is not one (a merge conflict, say)."""
    import yaml

    again = f"write it again: bigpipe lock {path.name.removesuffix('.lock')}"
    try:
        data = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
        lock = LockFile.model_validate(data)
    except FileNotFoundError:
        return None
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


def check(lock: LockFile, now: LockFile, nodes: Iterable[str] | None = None) -> list[Change]:
    """Return how the inputs of `nodes` (all, if None) differ from those locked. Empty: the lock holds.

    A file counts where both sides know of it; that a file is new or gone counts where both sides list files.
    """
    names = set(nodes) if nodes is not None else lock.inputs.keys() | now.inputs.keys()
    changes = []
    for name in sorted(names):
        old, new = lock.inputs.get(name), now.inputs.get(name)
        if old is None or new is None:
            changes.append(Change(f"inputs.{name}", *(ABSENT if item is None else item.kind for item in (old, new))))
        else:
            changes += [Change(f"inputs.{name}.{item.path}", item.old, item.new) for item in _input_changes(old, new)]
    return changes


def _input_changes(old: LockedInput, new: LockedInput) -> list[Change]:
    fields = ("kind", "version", "code", "params", "env", "pins")
    changes = [item for name in fields for item in changed(name, getattr(old, name), getattr(new, name))]
    return changes + (_file_changes(old.files, new.files) if old.files and new.files else [])


def _file_changes(old: Mapping[str, LockedFile], new: Mapping[str, LockedFile]) -> list[Change]:
    changes = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before is None or after is None:
            changes.append(
                Change(f"files.{name}", *(ABSENT if item is None else item.size for item in (before, after)))
            )
            continue
        for field in ("size", "sha256", "git_blob"):
            values = getattr(before, field), getattr(after, field)
            if None not in values:
                changes += changed(f"files.{name}.{field}", *values)
    return changes


def require(path: Path, lock: LockFile, now: LockFile, nodes: Iterable[str] | None = None) -> None:
    """Raise Stale naming every difference."""
    changes = check(lock, now, nodes)
    if changes:
        lines = "".join(f"\n  {change}" for change in changes)
        raise Stale(
            f"{path} does not hold: {len(changes)} {'value differs' if len(changes) == 1 else 'values differ'}{lines}",
            f"if that is meant: bigpipe lock {path.name.removesuffix('.lock')}",
        )


def require_record(
    path: Path, lock: LockFile, node: str, record: KeyRecord, tree: Path | None, reproducible: bool
) -> None:
    """Compare what a node gave with what is locked: the files it brought, and its digest where that must be equal.

    Raise StageFailed naming the files, or both digests.
    """
    wanted = lock.inputs.get(node)
    if wanted is not None and wanted.files and record.files:
        _require_files(path, node, wanted.files, record, tree)
    output = lock.outputs.get(node)
    if output is None or not reproducible or output.digest in (None, record.digest):
        return
    facts = (record.identity.get("packages", {}), record.identity.get("facts", {}))
    if output.key == record.key and facts == (output.packages, output.facts):
        raise StageFailed(
            f"{node} gave {record.digest}, but {path} has {output.digest} for the same inputs, packages and facts",
            "one of the two is wrong: run `bigpipe verify`, then compare the artifacts",
        )


def _require_files(
    path: Path, node: str, wanted: Mapping[str, LockedFile], record: KeyRecord, tree: Path | None
) -> None:
    given = locked_files(record)
    for name, file in wanted.items():
        if name in given and file.sha256 is None and file.git_blob is not None and tree is not None:
            given[name] = given[name].model_copy(update={"git_blob": git_blob(tree / name)})
    changes = _file_changes(wanted, given) if given else []
    if changes:
        lines = "".join(f"\n  {change}" for change in changes)
        raise StageFailed(
            f"{node} brought other files than {path} has:{lines}", "the source has changed; do not use it"
        )


def git_blob(path: Path) -> str:
    """Return git's id of a file: the sha1 of `blob SIZE\\0` and its bytes. Identifies, does not protect."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
