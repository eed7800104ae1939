"""What the params of a node say, with every path replaced by the content it leads to.

A field marked `ContentField` enters the key by content: a renamed or moved file, or another checkout of the same
repository, gives the same key; a changed byte gives another one.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from bigpipe.errors import UsageError
from bigpipe.modules import source_files, top_level
from bigpipe.orchestrator.contract import ContentField, Json, Params
from bigpipe.orchestrator.store import StatMemo, canonical, digest_of

NO_CONTENT = frozenset({".git", ".cache", "__pycache__"})
"""Directories of a tree that hold what tools noted down, not what the tree is."""
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def content_params(params: Params, base: Path, memo: StatMemo) -> dict[str, Json]:
    """Return the params in full as canonical JSON values: sizes as ints, keys of maps as strings, sets sorted.

    Fields typed as content become strings:
      file: `sha256:…` and the file's suffix (which says how it is read); of a glob, one digest over all in path order.
      tree: `sha256:…` of the sorted (relative path, sha256) of its files, but for `.git`, `.cache` and `__pycache__`.
      code: `module:name@sha256:…`, over all Python files of its top-level package (nothing is imported).
    A value of such a field that is not a string, or stands in the type as a literal, is taken as it is.

    Raise UsageError naming the field, where a path leads nowhere or a number is not finite.
    """
    return _Walk(base, memo).model(params, "")


@dataclass(frozen=True, slots=True)
class _Walk:
    base: Path
    memo: StatMemo

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
        if isinstance(value, BaseModel):
            return self.model(value, where)
        if isinstance(value, Mapping):
            items = _inner(arms, dict)
            return {_key(key): self.value(item, items, f"{where}.{_key(key)}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = _inner(arms, list)
            return [self.value(item, items, f"{where}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            items = _inner(arms, list)
            return sorted((self.value(item, items, where) for item in value), key=canonical)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{where} is {value}, which no result can be named by", "write a finite number")
        return to_jsonable_python(value)

    def text(self, value: str, arms: tuple[_Arm, ...], where: str) -> str:
        marker = next((arm.content for arm in arms if arm.content), None)
        if marker is None or any(get_origin(arm.type) is Literal and value in get_args(arm.type) for arm in arms):
            return value if type(value) is str else str(to_jsonable_python(value))
        readers: Mapping[str, Callable[[str, str], str]] = {"file": self.file, "tree": self.tree, "code": self.code}
        try:
            return readers[marker.kind](value, where)
        except OSError as error:
            raise UsageError(
                f"{where}: {value} cannot be read: {error.strerror or error}",
                f"relative paths start at {self.base}",
            ) from error

    def file(self, value: str, where: str) -> str:
        path = self.base / value
        if path.is_file():
            return f"sha256:{self.memo.sha256(path)}{path.suffix.lower()}"
        if path.is_dir():
            raise UsageError(f"{where}: {value} is a directory, not a file", f"name a file in it, or write {value}/*")
        names = glob.glob(value, root_dir=self.base, recursive=True) if glob.has_magic(value) else []
        found = sorted(name for name in names if (self.base / name).is_file())
        if not found:
            raise UsageError(f"{where}: there is no file {value}", f"relative paths start at {self.base}")
        return digest_of("files", [[Path(name).suffix.lower(), self.memo.sha256(self.base / name)] for name in found])

    def tree(self, value: str, where: str) -> str:
        path = self.base / value
        if not path.is_dir():
            cause = "is a file, not a directory" if path.exists() else "is not there"
            raise UsageError(f"{where}: the directory {value} {cause}", f"relative paths start at {self.base}")
        return digest_of("tree", [[name, self.memo.sha256(os.path.join(path, name))] for name in _files(path)])

    def code(self, value: str, where: str) -> str:
        if not _CODE.fullmatch(value):
            return value  # the name of something built in, in a field that takes either
        digest = source_digest(value, self.base, self.memo)
        if digest is None:
            top = top_level(value)
            raise UsageError(
                f"{where}: there is no Python source of a module {top!r}",
                f"put {top}.py or {top}/ into {self.base}, or install it beside bigpipe",
            )
        return f"{value}@{digest}"


class _Arm(NamedTuple):
    """One member of a union, with the content marker that holds for it."""

    type: Any
    content: ContentField | None


def _arms(annotation: Any, metadata: tuple[Any, ...]) -> tuple[_Arm, ...]:
    """The members of a (nested, annotated, aliased) union."""
    content = next((item for item in metadata if isinstance(item, ContentField)), None)
    annotation = getattr(annotation, "__value__", annotation)  # `type X = …`
    origin = get_origin(annotation)
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


def _inner(arms: tuple[_Arm, ...], shape: type) -> tuple[_Arm, ...]:
    """What the items of those members that are lists (or maps) may be."""
    kinds: tuple[type, ...] = (dict, Mapping) if shape is dict else (list, tuple, set, frozenset)
    members = []
    for arm in arms:
        origin = get_origin(arm.type)
        if isinstance(origin, type) and (issubclass(origin, kinds) or (shape is list and _is_sequence(origin))):
            arguments = [item for item in get_args(arm.type) if item is not Ellipsis]
            members.extend(arguments[-1:] if shape is dict else arguments)
    return tuple(arm for member in members for arm in _arms(member, ()))


def _is_sequence(origin: type) -> bool:
    return origin.__name__ in ("Sequence", "Iterable", "Collection", "Set")


def _key(key: Any) -> str:
    return key if type(key) is str else str(to_jsonable_python({key: None}).popitem()[0])


def _files(folder: Path) -> list[str]:
    """The relative paths of all files below a directory, sorted; links are followed, a second way in is not taken."""
    found = []
    seen = set()
    top = os.fspath(folder)
    for place, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if name not in NO_CONTENT and os.path.realpath(os.path.join(place, name)) not in seen
        )
        inside = place.removeprefix(top).lstrip(os.sep)
        found += [os.path.join(inside, name) for name in names] if inside else names
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def source_digest(reference: str, base: Path | None, memo: StatMemo) -> str | None:
    """Return `sha256:…` over all Python files of the top-level package of `module:name`; None where there are none.

    base: the directory in which it is looked for first. Nothing is imported.
    """
    sources = source_files(top_level(reference), base)
    return digest_of("code", [[name, memo.sha256(path)] for name, path in sources]) if sources else None
