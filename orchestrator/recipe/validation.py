"""pydantic's errors as placed problems: one per mistake, in the words of the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from bigpipe.names import SPELLINGS, closest, did_you_mean, listed
from bigpipe.orchestrator.contract import BYTES, Json, Params, Written

from .conditions import Measure
from .interpolation import Unread, as_text, contains_reference
from .problems import Fault, Problems
from .spelling import Spelt, plain
from .yamlsource import Document, Key, child_of

_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "list_type": "a list", "tuple_type": "a list", "set_type": "a list", "frozen_set_type": "a list",
    "dict_type": "a map", "mapping_type": "a map", "model_type": "a map", "model_attributes_type": "a map",
    "none_required": "null",
}  # fmt: skip
SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_LIMITS = {
    "greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"), "less_than_equal": ("le", "at most"),
}  # fmt: skip

_OF_NAMES = ("extra_forbidden", "missing")
"""They hold whatever the values are."""
_STRICT = ("int_type", "float_type", "bool_type", "string_type")

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Target:
    """What is being validated: where it stands, and what to call it."""

    document: Document
    path: tuple[Key, ...]
    subject: str
    """Who takes the fields: `quantize`, `the manifest`."""
    lenient: bool = False
    """A reference in it is unresolved and has been reported: errors about that text are noise."""


def validate(model: type[M], value: Json, target: Target, problems: Problems, *, salvage: bool = False) -> M | None:
    """Return the model, or None after every error was added to `problems`. salvage: after errors, the model without the
    entries that have some, so that the rest can be checked too. An Unread number is one where the model takes anything,
    and for a kind a Spelt one no more than a number: pydantic reads them only where a type is said."""
    kinds = (Unread, Spelt) if issubclass(model, Params) else (Unread,)
    value = _read(value, model, kinds) if _holds(value, kinds) else value
    try:
        found = model.model_validate(value, context=Written(value))
    except ValidationError as error:
        details = error.errors(include_url=False)
    else:
        mistyped = _mistyped(model, value, target)
        for finding in mistyped:
            _report(finding, model, target, problems)
        return None if mistyped and not salvage else found
    for finding in _causes(_merged([_finding(detail, target) for detail in details]), model):
        if finding.kind in _OF_NAMES or not (target.lenient and contains_reference(finding.input)):
            _report(finding, model, target, problems)
    return _salvaged(model, value, {detail["loc"][:2] for detail in details}) if salvage else None


def _holds(value: Json, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, dict | list):
        return any(_holds(child, kinds) for child in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, kinds)


def _read(value: Json, annotation: Any, kinds: tuple[type, ...]) -> Json:
    """The value with each Unread text that stands where anything may, and is how JSON writes a number or a switch, as
    that: `1.10` and `12e4567`, which may be a version and a commit, stay what they are. A Spelt number there is
    the number alone."""
    if isinstance(value, dict):
        return {key: _read(child, _below(annotation, str(key)), kinds) for key, child in value.items()}
    if isinstance(value, list):
        return [_read(child, _item(annotation), kinds) for child in value]
    if not isinstance(value, kinds) or Any not in _branches(annotation):
        return value
    return _number_or_text(value) if isinstance(value, Unread) else plain(value)


def _number_or_text(text: str) -> str | int | float:
    with suppress(ValueError):
        found = json.loads(text, parse_constant=str)
        if isinstance(found, int | float) and json.dumps(found) == text:
            return found
    return str(text)


def _item(annotation: Any) -> Any:
    """What an entry of a list may be."""
    found = (branch if branch is Any else next(iter(get_args(branch)), None) for branch in _branches(annotation)
             if branch is Any or _is(branch, list, tuple, set, frozenset))  # fmt: skip
    return next(found, None)


def _mistyped(model: type[BaseModel], value: Json, target: Target) -> list[_Finding]:
    """What stands for another type than it is, and is taken all the same where a reference gave it, as environment
    variables give texts: '4' for 4, true for 1, 0 for false."""
    try:
        model.model_validate_json(json.dumps(value), strict=True, context=Written(value))
    except ValidationError as error:
        details = [each for each in error.errors(include_url=False) if each["type"] in _STRICT]
        return [each for each in _merged([_finding(each, target) for each in details]) if _written(each, target)]
    return []


def _written(finding: _Finding, target: Target) -> bool:
    """Does it stand in the manifest as it is? A whole number may be written with a point, as in JSON's own schemas."""
    if isinstance(finding.input, float) and finding.kind != "string_type":
        return False
    path = target.path + finding.path
    item, covered = target.document.find(path)
    literal = covered == len(path) and not isinstance(item.value, dict | list)
    return literal and not contains_reference(item.value)


def _causes(findings: list[_Finding], model: type[BaseModel]) -> list[_Finding]:
    """Without what another explains: a field is missing because it is misspelt, a list is short of a wrong item."""
    unknown = [finding.path for finding in findings if finding.kind == "extra_forbidden"]
    misspelt = {(*path[:-1], closest(str(path[-1]), fields_at(model, path[:-1]))) for path in unknown}
    above = {finding.path[:depth] for finding in findings for depth in range(len(finding.path))}
    above |= {finding.path for finding in findings if finding.kind != "too_short"}
    return [
        finding
        for finding in findings
        if not (finding.kind == "missing" and finding.path in misspelt)
        and not (finding.kind == "too_short" and finding.path in above)
    ]


def _salvaged(model: type[M], value: Mapping[Key, Json], wrong: set[tuple[Key, ...]]) -> M | None:
    kept: dict[Key, Json] = {}
    for name, entry in value.items():
        parts = {location[1] for location in wrong if location[0] == name and len(location) > 1}
        if isinstance(entry, dict) and (name,) not in wrong and parts <= entry.keys():
            kept[name] = {key: child for key, child in entry.items() if key not in parts}
        elif not parts and (name,) not in wrong:
            kept[name] = entry
    for rest in (kept, {name: entry for name, entry in kept.items() if (name,) not in {where[:1] for where in wrong}}):
        try:
            return model.model_validate(rest)
        except ValidationError:  # an entry lacks a part that it needs
            continue
    return None


@dataclass(slots=True)
class _Finding:
    """One pydantic error, its location split into what exists in the file and the rest."""

    kind: str
    input: Json
    context: Mapping[str, Any]
    message: str
    path: tuple[Key, ...]
    """Inside the validated value; its last part is missing from the file where the error is about a missing field."""
    union: tuple[Key, ...] | None
    """Where a union stands on the way, if one does: errors of its branches share it."""
    of_key: bool = False
    """It is the key that is wrong, not the value."""
    expected: list[str] = field(default_factory=list)


def _finding(details: Any, target: Target) -> _Finding:
    item, covered = target.document.find(target.path)
    value: Any = item if covered == len(target.path) else None
    path: list[Key] = []
    union: tuple[Key, ...] | None = None
    location: Sequence[Key] = details["loc"]
    of_key = location[-1:] == ("[key]",)
    if of_key:
        location = location[:-1]
    for index, part in enumerate(location):
        child = child_of(value, part) if value is not None else None
        last = index == len(location) - 1
        if child is not None or (last and details["type"] == "missing"):
            path.append(part)
            value = child
        elif union is None:
            union = tuple(path)
    context = details.get("ctx", {})
    return _Finding(details["type"], details["input"], context, details["msg"], tuple(path), union, of_key)


def _merged(findings: Iterable[_Finding]) -> list[_Finding]:
    """The branches of a union joined: those that got deepest into the value are the ones that were meant."""
    unions: dict[tuple[Key, ...] | None, list[_Finding]] = {}
    for finding in findings:
        unions.setdefault(finding.union, []).append(finding)
    result = unions.pop(None, [])
    for branches in unions.values():
        deepest = max(len(branch.path) for branch in branches)
        meant: dict[tuple[Key, ...], list[_Finding]] = {}
        for branch in branches:
            if len(branch.path) == deepest:
                meant.setdefault(branch.path, []).append(branch)
        result.extend(_joined(found) for found in meant.values())
    return result


def _joined(branches: list[_Finding]) -> _Finding:
    """One for all that is wrong with a value; one that says more than a type (a text that is no size) wins."""
    more = [branch for branch in branches if not _expected(branch)]
    meant = more[-1] if more else branches[0]
    meant.expected = list(dict.fromkeys(filter(None, map(_expected, branches))))
    return meant


def _expected(finding: _Finding) -> str:
    if finding.kind in ("literal_error", "enum"):
        return str(finding.context["expected"]).replace("'", "")
    return _EXPECTED.get(finding.kind, "")


def _report(finding: _Finding, model: type[BaseModel], target: Target, problems: Problems) -> None:
    document, path = target.document, target.path + finding.path
    name = ".".join(str(part) or '""' for part in finding.path)
    if finding.kind == "extra_forbidden":
        known = fields_at(model, finding.path[:-1])
        cure = did_you_mean(str(path[-1]), known, otherwise="it takes")
        cause = f"unknown field {str(path[-1])!r} in {_inside(target, finding.path)}"
        problems.add(Fault.UNKNOWN_FIELD, path, cause, cure, key=True)
    elif finding.kind == "missing":
        cause = f"{_inside(target, finding.path)} needs {path[-1]!r}"
        under = f" under `{path[-2]}`" if len(path) > 3 else ""
        problems.add(Fault.MISSING_FIELD, path[:-1], cause, f"add `{path[-1]}: …`{under}", key=True)
    else:
        code, cause, cure = _explain(finding, document, path)
        problems.add(code, path, f"{name}: {cause}" if name else cause, cure, key=finding.of_key)


def _inside(target: Target, path: tuple[Key, ...]) -> str:
    above = [str(part) for part in path[:-1]]
    return ".".join(above if above and " " in target.subject else [target.subject, *above])


def _explain(finding: _Finding, document: Document, path: tuple[Key, ...]) -> tuple[Fault, str, str]:
    item, covered = document.find(path)
    source = str(finding.input) if finding.of_key else item.source if covered == len(path) else ""
    shown = (source if not finding.of_key else "") or _shown(finding.input)
    if finding.kind == "value_error":
        cause, _, cure = str(finding.context.get("error", finding.message)).partition("; ")
        return Fault.BAD_VALUE, cause, cure
    if finding.kind in _LIMITS:
        key, words = _LIMITS[finding.kind]
        return Fault.BAD_VALUE, f"{shown} is out of range", f"it must be {words} {finding.context[key]}"
    if finding.kind in ("too_short", "string_too_short"):
        return Fault.BAD_VALUE, "it is empty" if not finding.input else "it is too short", "fill it in"
    phrases = finding.expected or [_expected(finding)]
    if not phrases[0]:
        return Fault.BAD_VALUE, f"{shown}: {finding.message[:1].lower()}{finding.message[1:]}", ""
    if finding.kind in ("literal_error", "enum") and isinstance(finding.input, str):
        choices = [choice for phrase in phrases for choice in phrase.replace(" or ", ", ").split(", ")]
        meant = SPELLINGS.get(finding.input.lower(), finding.input)
        cure = did_you_mean(meant, choices) or f"it takes {listed(phrases, 'or')}"
        return Fault.NOT_A_CHOICE, f"{shown} is not one of its values", cure
    cause = f"{shown} where {listed(phrases, 'or')} is expected"
    return Fault.WRONG_TYPE, cause, _retyped(finding.input, phrases, source)


def _retyped(value: Json, phrases: Sequence[str], source: str) -> str:
    if "a text" in phrases and (source or isinstance(value, bool | int | float)):  # a plain `1e10` or `true`
        where = "" if source else " where it is set"  # a reference brought it
        return f"put it in quotes{where} if it is text: '{source or as_text(value)}'"
    if value is None:
        return "fill it in, or remove it"
    if "true or false" in phrases and isinstance(value, str) and value.lower() in SWITCHES:
        return f"write {SWITCHES[value.lower()]}"
    if isinstance(value, str) and any("number" in phrase for phrase in phrases) and _NUMBER.fullmatch(value):
        return f"write {value} without quotes"
    if "a map" in phrases and isinstance(value, list):
        return "write lines of `name: value`, without dashes or brackets"
    if "a text" in phrases and isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return f"write {value[0]} without brackets"
    if "a list" in phrases and isinstance(value, str | int | float):
        return f"write [{source or value}]"
    return ""


def _shown(value: Json) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a map"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def fields_at(model: type[BaseModel], path: Sequence[Key]) -> list[str]:
    """Return the names (as written in the file) of the fields of the model that stands at `path` inside `model`."""
    models = {model}
    for part in path:
        models = {
            inner
            for outer in models
            for name, info in outer.model_fields.items()
            if (info.alias or name) == part
            for inner in models_in(info.annotation)
        }
    return [info.alias or name for found in models for name, info in found.model_fields.items()]


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """Return the models inside `X | None`, `list[X]`, `dict[str, X]`, `Annotated[X, …]`."""
    found: set[type[BaseModel]] = set()
    for branch in _branches(annotation):
        if _is(branch, BaseModel):
            found.add(branch)
        elif _is(branch, list, tuple, Mapping):
            found |= {model for argument in get_args(branch) for model in models_in(argument)}
    return found


def _branches(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [branch for argument in get_args(annotation) for branch in _branches(argument)]
    return [annotation]


def _is(annotation: Any, *classes: type) -> bool:
    plain = get_origin(annotation) or annotation
    return isinstance(plain, type) and issubclass(plain, classes)


def wrong_metric(metrics: Any, path: str) -> tuple[str, str] | None:
    """Return cause and cure where `path` names no number of the metrics model. Maps and untyped values are open."""
    annotation, done = metrics, ""
    for part in path.split("."):
        above, done = annotation, f"{done}.{part}" if done else part
        annotation = _below(above, part)
        if annotation is None:
            names = [f"{done[: -len(part)]}{name}" for name in _names(above)]
            return f"no metric {done!r}", did_you_mean(done, names, otherwise="there are")
    never = (str, list, tuple, Mapping, BaseModel, type(None))
    if any(get_origin(branch) is not Literal and not _is(branch, *never) for branch in _branches(annotation)):
        return None
    inner = [f"{path}.{name}" for name in _names(annotation)]
    cause = f"{path} is a group of metrics" if inner else f"{path} is no number"
    return cause, did_you_mean("", inner, otherwise="there are")


def measure_of(metrics: Any, path: str) -> Measure:
    """Return what the metric at `path` measures; None where that is not known."""
    annotation = metrics
    for part in path.split("."):
        annotation = _below(annotation, part)
    if _is_marked(annotation, BYTES):
        return "size"
    plain = [branch for branch in _branches(annotation) if branch is not type(None)]
    if plain == [int] and _marks_sizes(metrics):
        return "count"
    return "fraction" if plain == [float] else None


def _marks_sizes(annotation: Any, above: frozenset[Any] = frozenset()) -> bool:
    """Return whether something in it says that it is bytes: then a whole number that does not is none.
    above: models that it lies in, which may be inside of themselves."""
    models = models_in(annotation) - above
    fields = [_part_of(model, name) for model in models for name in model.model_fields]
    inner = [argument for branch in _branches(annotation) for argument in get_args(branch)]
    within = above | models
    return _is_marked(annotation, BYTES) or any(_marks_sizes(each, within) for each in (*fields, *inner))


def _is_marked(annotation: Any, mark: str) -> bool:
    if get_origin(annotation) is Annotated and mark in get_args(annotation)[1:]:
        return True
    within = (Annotated, Union, UnionType)
    return get_origin(annotation) in within and any(_is_marked(arm, mark) for arm in get_args(annotation))


def _below(annotation: Any, part: str) -> Any:
    found = (_part_of(branch, part) for branch in _branches(annotation))
    return next((inner for inner in found if inner is not None), None)


def _part_of(branch: Any, part: str) -> Any:
    if branch is Any or branch is object:
        return Any
    if _is(branch, Mapping):
        return get_args(branch)[1] if get_args(branch) else Any
    if not _is(branch, BaseModel):
        return None
    if branch.__pydantic_root_model__:
        return _below(branch.model_fields["root"].annotation, part)
    fields = (field for name, field in branch.model_fields.items() if part in (name, field.alias))
    if (field := next(fields, None)) is not None:
        return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return Any if branch.model_config.get("extra") == "allow" else None


def _names(annotation: Any) -> list[str]:
    return [name for model in models_in(annotation) for name in model.model_fields]
