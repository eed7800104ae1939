"""Params of others' kinds: what no key could hold by its content is refused before it misleads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, SecretBytes, SecretStr

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import ContentField, Stage


def require_followed(stage: Stage[Any], location: str) -> None:
    """Raise UsageError where a field of the params is a path that is not said to be read or not, whose content would
    enter no key, or a secret, which workers would be given as stars."""
    for where, leaf in _leaves(stage.params, "", {}):
        if not isinstance(leaf, type):
            continue
        if issubclass(leaf, PathLike):
            cure = "write File, Tree or Folder for what is read, by its content, and str for any other path"
            raise UsageError(f"{location}: its field {where} is a {leaf.__name__}, which says neither", cure)
        if issubclass(leaf, SecretStr | SecretBytes):
            cure = "name the variable under `secrets`, and read it from `context.environment`"
            raise UsageError(f"{location}: its field {where} is a {leaf.__name__}, which no job file may hold", cure)


def _leaves(annotation: Any, where: str, seen: dict[int, Any], *, marked: bool = False) -> Iterator[tuple[str, Any]]:
    """The path and the type of all that stands in an annotation, but for what is marked as content."""
    annotation, origin = getattr(annotation, "__value__", annotation), get_origin(annotation)
    if origin is Annotated:
        marked = marked or any(isinstance(each, ContentField) for each in annotation.__metadata__)
        yield from _leaves(annotation.__origin__, where, seen, marked=marked)
    elif origin is not None:
        passed = marked and origin in (Union, UnionType)
        for each in get_args(annotation):
            yield from _leaves(each, where, seen, marked=passed)
    elif fields := _fields(annotation) if id(annotation) not in seen else {}:
        seen[id(annotation)] = annotation
        for name, (each, held) in fields.items():
            yield from _leaves(each, f"{where}.{name}" if where else name, seen, marked=held)
    elif not marked:
        yield where, annotation


def _fields(owner: Any) -> Mapping[str, tuple[Any, bool]]:
    """Of a model, a dataclass, a TypedDict or a NamedTuple: what its fields are, and whether that is marked."""
    if isinstance(owner, type) and issubclass(owner, BaseModel):
        return {
            info.alias or name: (info.annotation, any(isinstance(each, ContentField) for each in info.metadata))
            for name, info in owner.model_fields.items()
        }
    if any(hasattr(owner, sign) for sign in ("__dataclass_fields__", "__total__", "_fields")):
        return {name: (each, False) for name, each in get_type_hints(owner, include_extras=True).items()}
    return {}
