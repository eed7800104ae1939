"""`${…}` in manifest values.

    ${params.x}  ${matrix.x}  ${env.X}  ${env.X:-default}  ${env.X:?message}      $${ stands for ${

A value that is one whole reference keeps the type of what it names, maps and lists included; a reference inside a
text is written as text. Nothing else is computed. `${stages.NODE.metrics.PATH}` is left as it is where conditions may
read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bigpipe.errors import ManifestError
from bigpipe.names import did_you_mean, is_text
from bigpipe.orchestrator.contract import Json
from bigpipe.redaction import has_password, holds_token, redact

from .arguments import Argument
from .problems import Fault, Problems
from .spelling import Spelt, plain, spelt
from .yamlsource import Key, read_value

WELL_KNOWN_SECRETS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})

_OPENING = re.compile(r"\$\$\{|\$\{")
_ENVIRONMENT = r"(?s)([A-Za-z_][A-Za-z0-9_]*)(?::([-?])(.*))?"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What references may name in one place of a manifest."""

    params: Mapping[str, Json] | None = field(default_factory=dict)
    """None: not readable here."""
    open_params: frozenset[str] = frozenset()
    """Declared, but without a value because of an earlier problem: let through."""
    matrix: Mapping[str, Json] | None = None
    """None: not readable here."""
    open_matrix: bool = False
    """The axes are not known because of an earlier problem: any name is let through."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: frozenset[str] = WELL_KNOWN_SECRETS
    placeholders: tuple[str, ...] = ()
    """References that begin so are left in the text, for the kind to fill in."""
    stages: bool = False
    """`${stages…}` is left in the text, for a condition to read."""


_ARGUMENTS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "true or false"),  # before int: it is one
    (int, int, "a whole number"),
    (float, float | int, "a number"),
    (list, list, "a list such as [a, b]"),
    (dict, dict, "a map such as {a: 1}"),
)
"""Type of a parameter's default, what an argument for it may be, and how that is called."""


class Unread(str):
    """A text whose type nobody has said: of an environment variable, or of an argument for a parameter without a
    default. Whoever takes it reads it as its own type; see `validate`."""

    __slots__ = ()


class _Unresolved(Exception):
    """Fault, the reference as written, cause, cure."""


def contains_reference(value: Json, namespace: str = "") -> bool:
    """Return whether `value` holds a `${namespace…}`, at any depth, in keys too; escaped ones count."""
    if isinstance(value, str):
        return "${" + namespace in value
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return isinstance(value, (list, tuple)) and any(contains_reference(child, namespace) for child in value)


def escape(text: str) -> str:
    """Return the text that interpolation turns into `text`."""
    return text.replace("${", "$${")


def interpolate(value: Json, scope: Scope, problems: Problems, path: tuple[Key, ...] = ()) -> Json:
    """Return `value` with every reference replaced, at any depth; keys are left alone. A reference that cannot be
    resolved is a problem, and left standing. path: where `value` stands."""
    if isinstance(value, str):
        if "${" not in value:
            return value
        try:
            return _interpolate_text(value, scope)
        except _Unresolved as error:
            code, reference, cause, cure = error.args
            problems.add(code, path, cause, cure, part=reference)
            return value
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, str) and "${" in key:
                cause = f"the key {key!r} cannot hold a reference"
                cure = "references stand in values only"
                problems.add(Fault.MISPLACED_REFERENCE, (*path, key), cause, cure, part=key)
        return {key: interpolate(child, scope, problems, (*path, key)) for key, child in value.items()}
    if isinstance(value, list):
        return [interpolate(child, scope, problems, (*path, index)) for index, child in enumerate(value)]
    return value


def check_passwords(value: Json, problems: Problems, path: tuple[Key, ...]) -> None:
    """Note a problem for every token, and every address with a password, at any depth: it would be in keys, records and
    cards."""
    if isinstance(value, (dict, list)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            check_passwords(child, problems, (*path, key))
    elif isinstance(value, str) and (held := _held(value)):
        cure = "leave it out; a stage finds it in its environment, where its `secrets: [NAME]` lists the variable"
        problems.add(Fault.PASSWORD, path, f"{held}, which would be recorded", cure)


def _held(text: str) -> str:
    """What a text holds that may not be recorded, in words."""
    if "://" in text and " " not in text and has_password(text):
        return f"the address {redact(text)} has a password or token in it"
    return f"{redact(text)[:200]} is, or holds, a token" if holds_token(text) else ""


def _interpolate_text(text: str, scope: Scope) -> Json:
    pieces: list[str] = []
    position = 0
    while opening := _OPENING.search(text, position):
        pieces.append(text[position : opening.start()])
        if opening[0] == "$${":
            pieces.append("${")
            position = opening.end()
            continue
        end = text.find("}", opening.end())
        if end < 0:
            cure = "close it with `}`, or write $${ for the characters themselves"
            raise _Unresolved(Fault.BAD_REFERENCE, text[opening.start() :], "`${` is not closed", cure)
        reference = text[opening.start() : end + 1]
        value = _resolve(reference, scope)
        if len(reference) == len(text):
            return value
        pieces.append(_as_text(reference, value, scope))
        position = end + 1
    pieces.append(text[position:])
    return "".join(pieces)


def as_text(value: str | bool | int | float) -> str:
    """Return what a value is inside a text: a number as it is written, `2.10`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_text(reference: str, value: Json, scope: Scope) -> str:
    if scope.stages and isinstance(value, Spelt):
        return str(plain(value))  # a condition compares numbers
    if isinstance(value, str | bool | int | float):
        return as_text(value)
    kind = "null" if value is None else "a map" if isinstance(value, Mapping) else "a list"
    cause = f"{reference} is {kind} and cannot stand inside a text"
    raise _Unresolved(Fault.MISPLACED_REFERENCE, reference, cause, f'make it the whole value: "{reference}"')


def _resolve(reference: str, scope: Scope) -> Json:
    namespace, dot, name = reference[2:-1].partition(".")
    if namespace in scope.placeholders:
        return reference
    if namespace == "env" and dot:
        return _from_environment(reference, name, scope)
    if namespace == "stages" and dot:
        if scope.stages:
            return reference
        cure = "metrics exist only after a stage has run; compare them in `when` or `gates`"
        raise _Unresolved(Fault.MISPLACED_REFERENCE, reference, f"{reference} cannot be read here", cure)
    if namespace not in ("params", "matrix") or not dot or not _NAME.fullmatch(name):
        known = ("params", "matrix", "env", "stages", *scope.placeholders)
        cure = did_you_mean(namespace, [word for word in known if word != namespace])
        cure = cure or "write ${params.x}, ${matrix.x} or ${env.X}, or $${ for the characters themselves"
        raise _Unresolved(Fault.BAD_REFERENCE, reference, f"{reference} is not a reference", cure)
    return _from_values(reference, namespace, name, scope)


def _from_values(reference: str, namespace: str, name: str, scope: Scope) -> Json:
    values = scope.params if namespace == "params" else scope.matrix
    if values is None:
        cure = "it may name ${params.x} and ${env.X}" if scope.params is not None else "it may name ${env.X}"
        raise _Unresolved(Fault.MISPLACED_REFERENCE, reference, f"{reference} cannot be read here", cure)
    if name in values:
        return values[name]
    if scope.open_matrix if namespace == "matrix" else name in scope.open_params:
        return reference
    if namespace == "matrix":
        cause, cure = f"no axis {name!r} reaches this stage", did_you_mean(name, values, otherwise="it has")
        cure = cure or "declare it under `matrix:` here or in a stage that this one takes as input or needs"
    else:
        cause, cure = f"no parameter {name!r}", did_you_mean(name, values, otherwise="there are")
        cure = cure or f"declare it: `params: {{{name}: …}}`"
    raise _Unresolved(Fault.UNKNOWN_REFERENCE, reference, cause, cure)


def _from_environment(reference: str, body: str, scope: Scope) -> Unread:
    match = re.fullmatch(_ENVIRONMENT, body)
    if match is None:
        cure = "write ${env.NAME}, ${env.NAME:-default} or ${env.NAME:?message}"
        raise _Unresolved(Fault.BAD_REFERENCE, reference, f"{reference} is not a reference", cure)
    name, operator, rest = match.groups()
    if "{" in (rest or ""):
        cure = "write the default out, or make this the default of a parameter, which `-p` replaces"
        cause = f"what stands for {name} where it is not set cannot hold references or braces"
        raise _Unresolved(Fault.BAD_REFERENCE, reference, cause, cure)
    if name in scope.secrets:
        cure = f"list it under the stage's `secrets: [{name}]`, which hands it to that process only"
        raise _Unresolved(Fault.SECRET_REFERENCE, reference, f"{name} is a secret and is never written out", cure)
    value = scope.environment.get(name, "")
    if not is_text(value):
        cause = f"the environment variable {name} holds bytes that are no UTF-8"
        raise _Unresolved(Fault.ENVIRONMENT_UNSET, reference, cause, f"export {name}=… as UTF-8")
    if value or (operator is None and name in scope.environment):
        return Unread(value)
    if operator == "-":
        return Unread(rest)
    said = f": {rest}" if operator == "?" and rest else ""
    state = "empty" if name in scope.environment else "not set"
    cure = f"export {name}=…, or give a default: ${{env.{name}:-…}}"
    raise _Unresolved(Fault.ENVIRONMENT_UNSET, reference, f"the environment variable {name} is {state}{said}", cure)


def read_argument(text: str, default: Json) -> Json:
    """Return `value` of `-p name=value`, read as the type of the parameter's default. After a null default a list or
    map is read as such and anything else is Unread; an Argument is what it means. Raise ValueError with the cause."""
    if not is_text(text):
        raise ValueError(f"{text!a} holds NUL, or bytes that are no UTF-8")
    if isinstance(default, str):
        if isinstance(text, Argument) and isinstance(text.value, list | dict):
            raise ValueError(f"{text} is not a text")
        return str(text)
    if default is None and isinstance(text, Argument):
        return text.value
    for kind, expected, phrase in _ARGUMENTS:
        if isinstance(default, kind):
            value = _expect(text, expected, phrase)
            return spelt(float(value), as_text(value)) if kind is float else value
    if text.lstrip().startswith(("[", "{")):
        with suppress(ManifestError):
            return read_value(text)
    return Unread(text)


def _expect(text: str, expected: Any, phrase: str) -> Any:
    try:
        value = text.value if isinstance(text, Argument) else read_value(text)
    except ManifestError as error:
        raise ValueError(f"{text!r} is not {phrase}: {error.problems[0].cause}") from None
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{text!r} is not {phrase}")
    return value
