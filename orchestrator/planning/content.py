"""What the params of a node are by content: files, trees and code that they name become digests.

A renamed or moved file, or another checkout of the same repository, is the same; a changed byte is not.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Protocol,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from bigpipe.errors import UsageError
from bigpipe.files import missing, only_a_shell_reads
from bigpipe.modules import code_files, installed_in, only_here, top_level
from bigpipe.orchestrator.contract import ContentField, Json, Params
from bigpipe.orchestrator.store import StatMemo, canonical, digest_of
from bigpipe.programs import content_below
from bigpipe.versions import brought_by

_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def content_params(params: Params, base: Path, memo: StatMemo) -> dict[str, Json]:
    """Return the params in full as canonical JSON values: sizes as ints, keys of maps as strings, sets sorted.

    Fields typed as content become strings:
      file: `sha256:…` and the file's suffix (which says how it is read); of a glob, one digest over all in path order,
        with their names where the field asks for them.
      tree: `sha256:…` of the sorted (relative path, sha256) of its files, but for `.git`, `.cache` and `__pycache__`.
      folder: as a tree, but links to folders are not followed.
      path: the digest of the path as it is written and what it is as a file or a tree.
      code: `module:name@sha256:…`, over all Python files of its top-level package, and of the modules beside it that
        it imports (nothing is imported).
    A value of such a field that is not a string, or stands in the type as a literal, is taken as it is.

    Raise UsageError naming the field, where a path leads nowhere or a number is not finite.
    """
    return _Walk(base, memo).model(params, "")


def content_paths(
    params: Params, base: Path, *, inside: bool = True, strict: bool = True
) -> tuple[list[Path], list[Path]]:
    """Return the directories that the params name as trees, and all files that are their content.
    inside: those of trees too, for which each is walked through.
    Raise UsageError as `content_params`, but not for a tree: it may still have to be made. strict: False leaves out
    what is not there, whatever it is."""
    naming = _Naming(base, _Noted([]), inside, strict)
    naming.model(params, "")
    return naming.trees, naming.memo.paths


def gathered_files(params: Params, base: Path) -> list[Path]:
    """Return the files that globs, and directories in their place, stand for in the params: pictures, say, which are
    read one after another. Raise UsageError as `content_params`."""
    gathering = _Gathering(base, _Noted([]), inside=False, strict=True)
    gathering.model(params, "")
    return gathering.memo.paths


def named_code(params: Params, base: Path) -> list[str]:
    """Return what the params name as `module:name`; nothing is looked for."""
    naming = _NamingCode(base, _Noted([]), inside=False, strict=False)
    naming.model(params, "")
    return naming.found


class Digests(Protocol):
    def sha256(self, path: str | Path) -> str: ...


@dataclass(frozen=True, slots=True)
class _Noted(Digests):
    """Notes down which files are asked for, and reads none."""

    paths: list[Path]

    def sha256(self, path: str | Path) -> str:
        self.paths.append(Path(path))
        return ""


@dataclass(frozen=True, slots=True)
class _Walk:
    """Goes through params; what is marked as content becomes its digest."""

    base: Path
    memo: Digests

    def model(self, value: BaseModel, where: str) -> dict[str, Json]:
        prefix = f"{where}." if where else ""
        content = {
            written: self.value(getattr(value, name), arms, prefix + written)
            for name, written, arms in _fields(type(value))
        }
        for name, extra in (value.model_extra or {}).items():
            content[name] = self.value(extra, (), prefix + name)
        return content

    def value(self, value: Any, arms: tuple[_Arm, ...], where: str) -> Json:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, str):
            return self.text(value, arms, where)
        if isinstance(value, os.PathLike):
            return self.text(os.fspath(value), arms, where)
        if isinstance(value, BaseModel):
            return self.model(value, where)
        if is_dataclass(value) and not isinstance(value, type):
            members = _members(type(value))
            return {name: self.value(getattr(value, name), each, f"{where}.{name}") for name, each in members.items()}
        if isinstance(value, Mapping):
            items, named = _inner(arms, of_map=True), _named(arms)
            return {
                _key(key): self.value(item, (*items, *named.get(key, ())), f"{where}.{_key(key)}")
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            items, placed = _inner(arms, of_map=False), _placed(arms, len(value))
            return [
                self.value(item, (*items, *each), f"{where}[{index}]")
                for index, (item, each) in enumerate(zip(value, placed, strict=True))
            ]
        if isinstance(value, set | frozenset):
            items = _inner(arms, of_map=False)
            return sorted((self.value(item, items, where) for item in value), key=canonical)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{where} is {value}, which no result can be named by", "write a finite number")
        return to_jsonable_python(value)

    def text(self, value: str, arms: tuple[_Arm, ...], where: str) -> str:
        marker = next((arm.content for arm in arms if arm.content), None)
        if marker is None or any(get_origin(arm.type) is Literal and value in get_args(arm.type) for arm in arms):
            return value if type(value) is str else str(to_jsonable_python(value))
        readers: Mapping[str, Callable[[str, str], str]] = {
            "file": partial(self.file, names=marker.names),
            "tree": self.tree,
            "folder": partial(self.tree, links=False),
            "code": self.code,
            "path": self.path,
        }
        try:
            return readers[marker.kind](value, where)
        except FileNotFoundError as error:
            raise self._missing(where, os.path.relpath(error.filename or value, self.base)) from error
        except OSError as error:
            raise self._wrong(where, value, f"{value} cannot be read: {error.strerror or error}") from error

    def file(self, value: str, where: str, *, names: bool = False) -> str:
        path = self.base / value
        if path.is_file():
            return f"sha256:{self.memo.sha256(path)}{path.suffix.lower()}"
        if path.is_dir() and not names:
            cure = f"name a file in it, or write {value}/*"
            raise UsageError(f"{where}: {value} is a directory, not a file", cure, field=where)
        pattern = os.path.join(glob.escape(value), "*") if path.is_dir() else value
        matching = glob.glob(pattern, root_dir=self.base, recursive=True) if glob.has_magic(pattern) else []
        found = sorted(name for name in matching if (self.base / name).is_file())
        if not found:
            raise self._missing(where, next(iter(matching), value))
        told = [Path(name).as_posix() if names else Path(name).suffix.lower() for name in found]
        digests = [self.memo.sha256(self.base / name) for name in found]
        return digest_of("files", [list(pair) for pair in zip(told, digests, strict=True)])

    def path(self, value: str, where: str) -> str:
        found = self.tree(value, where) if (self.base / value).is_dir() else self.file(value, where, names=True)
        return digest_of("path", [os.path.normpath(value), found])

    def tree(self, value: str, where: str, *, links: bool = True) -> str:
        path = self.base / value
        if not path.is_dir():
            cause = "is a file, not a directory" if path.exists() else "is not there"
            raise self._wrong(where, value, f"the directory {value} {cause}")
        found = content_below(path, links=links, field=where)
        return digest_of("tree", [[name, self.memo.sha256(os.path.join(path, name))] for name in found])

    def code(self, value: str, where: str) -> str:
        if not _CODE.fullmatch(value):
            return value  # the name of something built in, in a field that takes either
        digest, top = source_digest(value, self.base, self.memo), top_level(value)
        if digest is None:
            cure = f"put {top}.py or {top}/ into {self.base}, or install it beside bigpipe"
            raise UsageError(f"{where}: there is no Python source of a module {top!r}", cure, field=where)
        if folder := only_here(value, self.base):
            cause = f"{where}: the module {top} lies in {folder}, where workers do not look for it"
            raise UsageError(cause, f"put it into {self.base}, or install it", field=where)
        return f"{value}@{digest}"

    def _missing(self, where: str, name: str) -> UsageError:
        cause, cure = missing(name, self.base)
        return UsageError(f"{where}: {cause}", cure, field=where)

    def _wrong(self, where: str, path: str, cause: str) -> UsageError:
        cure = only_a_shell_reads(path) or f"relative paths start at {self.base}"
        return UsageError(f"{where}: {cause}", cure, field=where)


@dataclass(frozen=True, slots=True)
class _Naming(_Walk):
    """The same, and notes the directories it comes by."""

    memo: _Noted
    inside: bool
    strict: bool
    trees: list[Path] = field(default_factory=list)

    def value(self, value: Any, arms: tuple[_Arm, ...], where: str) -> Json:
        try:
            return _Walk.value(self, value, arms, where)
        except UsageError:
            if self.strict:
                raise
            return ""

    def tree(self, value: str, where: str, *, links: bool = True) -> str:
        self.trees.append(self.base / value)
        return _Walk.tree(self, value, where, links=links) if self.inside and self.trees[-1].is_dir() else ""


@dataclass(frozen=True, slots=True)
class _Gathering(_Naming):
    """Leaves out the files that are named one by one."""

    def file(self, value: str, where: str, *, names: bool = False) -> str:
        return "" if (self.base / value).is_file() else _Walk.file(self, value, where, names=names)

    def code(self, value: str, where: str) -> str:
        return value


@dataclass(frozen=True, slots=True)
class _NamingCode(_Naming):
    """Notes the code that it comes by, and looks at no file."""

    found: list[str] = field(default_factory=list)

    def file(self, value: str, where: str, *, names: bool = False) -> str:
        return ""

    def code(self, value: str, where: str) -> str:
        self.found.extend([value] if _CODE.fullmatch(value) else ())
        return ""


class _Arm(NamedTuple):
    """One member of a union, with the content marker that holds for it."""

    type: Any
    content: ContentField | None


def _arms(annotation: Any, metadata: tuple[Any, ...]) -> tuple[_Arm, ...]:
    """The members of a (nested, annotated, aliased) union."""
    content = next((item for item in metadata if isinstance(item, ContentField)), None)
    annotation = getattr(annotation, "__value__", annotation)  # `type X = …`
    origin = get_origin(annotation)
    if origin in (Required, NotRequired):
        return _arms(get_args(annotation)[0], metadata)
    if origin is Annotated:
        return _arms(annotation.__origin__, (*annotation.__metadata__, *metadata))
    if origin in (Union, UnionType):
        inherited = (content,) if content else ()
        return tuple(arm for member in get_args(annotation) for arm in _arms(member, inherited))
    return (_Arm(annotation, content),)


@cache
def _fields(model: type[BaseModel]) -> list[tuple[str, str, tuple[_Arm, ...]]]:
    """Per field: its name, its name as people write it, what its value may be."""
    return [
        (name, field.alias or name, _arms(field.annotation, tuple(field.metadata)))
        for name, field in model.model_fields.items()
    ]


@cache
def _members(owner: type) -> dict[str, tuple[_Arm, ...]]:
    """What the fields of a dataclass, a TypedDict or a NamedTuple may be."""
    hints = get_type_hints(owner, include_extras=True)
    names = [each.name for each in fields(owner)] if is_dataclass(owner) else hints
    return {name: _arms(hints[name], ()) for name in names}


def _inner(arms: tuple[_Arm, ...], *, of_map: bool) -> tuple[_Arm, ...]:
    """What any item of those members that are maps, or else lists of some kind, may be."""
    found: list[Any] = []
    for arm in arms:
        origin, items = get_origin(arm.type), get_args(arm.type)
        if not isinstance(origin, type) or issubclass(origin, Mapping) != of_map:
            continue
        if of_map or not issubclass(origin, tuple) or items[1:] == (Ellipsis,):
            found += items[-1:] if of_map else items[:1]
    return tuple(arm for item in found for arm in _arms(item, ()))


def _named(arms: tuple[_Arm, ...]) -> dict[str, tuple[_Arm, ...]]:
    """What the items of those members that are TypedDicts may be, by their names."""
    found: dict[str, tuple[_Arm, ...]] = {}
    for arm in filter(lambda arm: hasattr(arm.type, "__total__"), arms):
        for name, each in _members(arm.type).items():
            found[name] = (*found.get(name, ()), *each)
    return found


def _placed(arms: tuple[_Arm, ...], count: int) -> list[tuple[_Arm, ...]]:
    """What the items of those members that are tuples of so many items, or NamedTuples, may be, one by one."""
    found: list[tuple[_Arm, ...]] = [()] * count
    for arm in arms:
        origin, items = get_origin(arm.type), get_args(arm.type)
        if origin is tuple and len(items) == count and Ellipsis not in items:
            found = [(*have, *_arms(item, ())) for have, item in zip(found, items, strict=True)]
        elif isinstance(arm.type, type) and issubclass(arm.type, tuple) and len(_members(arm.type)) == count:
            found = [(*have, *each) for have, each in zip(found, _members(arm.type).values(), strict=True)]
    return found


def _key(key: Any) -> str:
    return key if type(key) is str else str(to_jsonable_python({key: None}).popitem()[0])


def source_digest(reference: str, base: Path | None, memo: Digests) -> str | None:
    """Return `sha256:…` over all Python files of the top-level package of `module:name`, and of the modules beside it
    that it imports, or of all files of its distribution where it is installed; None where there are none. base: the
    directory in which it is looked for first. Nothing is imported."""
    top = top_level(reference)
    sources, folder = code_files(top, base), installed_in(top, base)
    found = [[name, memo.sha256(path)] for name, path in sources]
    found += map(list, sorted(brought_by(top, folder).items()) if folder else ())
    return digest_of("code", found) if found else None
