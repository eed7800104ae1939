"""The columns of a table that holds rows of JSON: one type for each, or a refusal that names row and field.

A type is `"bool" | "int" | "long" | "double" | "text"`, `[type]` for a list, `{name: type}` for an object, and None for
null alone. `long` is a whole number that no double holds. A field that some rows lack is null there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from bigpipe.errors import StageFailed

Type = Any
PLAIN = {NoneType: None, str: "text", bool: "bool", float: "double"}
NAMES = {
    "bool": "a truth value",
    "int": "a whole number",
    "long": "a whole number",
    "double": "a number",
    "text": "a text",
}
EXACT = 2**53
"""Whole numbers up to here are doubles too."""
WHOLE = 2**63
NUMBERS = {frozenset({"int", "double"}): "double", frozenset({"int", "long"}): "long"}


class Unfit(Exception):
    """What does not go into one column: (where in the row, what is wrong)."""


def type_of(value: Any, at: str = "") -> Type:
    """Return the type of a JSON value. Raise Unfit for one that Parquet has none for."""
    if (kind := type(value)) in PLAIN:
        return PLAIN[kind]
    if isinstance(value, int):
        if not -WHOLE <= value < WHOLE:
            raise Unfit(at, f"is {value!r:.40}, more than 64 bits hold")
        return "int" if abs(value) <= EXACT else "long"
    if isinstance(value, str | float):  # of a class that derives from it
        return "text" if isinstance(value, str) else "double"
    if isinstance(value, list):
        kinds = set(map(type, value))
        return ["double"] if kinds == {float} else [_of_all(value, at)]
    if not value:
        raise Unfit(at, "is an object without fields, which Parquet does not hold")
    return {
        name: PLAIN[kind] if (kind := type(inner)) in PLAIN else type_of(inner, f"{at}.{name}")
        for name, inner in value.items()
    }


def _of_all(values: list[Any], at: str) -> Type:
    found: Type = None
    for value in values:
        found = joined(found, type_of(value, f"{at}[]"), f"{at}[]")
    return found


def joined(one: Type, other: Type, at: str = "") -> Type:
    """Return the type that holds values of both. Raise Unfit where there is none."""
    if one == other or other is None:
        return one
    if one is None:
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {name: joined(one.get(name), kind, f"{at}.{name}") for name, kind in other.items()}
    if isinstance(one, list) and isinstance(other, list):
        return [joined(one[0], other[0], f"{at}[]")]
    if isinstance(one, str) and isinstance(other, str) and (number := NUMBERS.get(frozenset({one, other}))):
        return number
    raise Unfit(at, f"is {_named(other)}, and {_named(one)} in a row before it")


def _named(kind: Type) -> str:
    return NAMES[kind] if isinstance(kind, str) else "a list" if isinstance(kind, list) else "an object"


@dataclass(slots=True)
class Columns:
    """What columns the rows need that were added, in the order in which their fields came."""

    types: dict[str, Type] = field(default_factory=dict)

    def add(self, index: int, row: Mapping[str, Any]) -> None:
        """Take a row's fields in. Raise StageFailed for one that does not go into a column."""
        try:
            self.types = joined(self.types, type_of(row, ""))
        except Unfit as unfit:
            at, wrong = unfit.args
            cause = f"prompt {index}: a column of Parquet holds one type, and {at.removeprefix('.')!r} {wrong}"
            raise StageFailed(cause, "write lines of JSON (output_format: jsonl)", field="output_format") from unfit

    def schema(self) -> Any:
        """Return them as a schema of pyarrow's."""
        import pyarrow as arrow

        return arrow.schema([(name, _arrow(kind)) for name, kind in self.types.items()])


def columns_of(rows: Iterable[Mapping[str, Any]], before: Columns | None = None) -> Columns:
    """Return what columns results need, with those of the ones `before`. Raise StageFailed."""
    columns = Columns(before.types if before else {})
    for row in rows:
        columns.add(row["index"], row)
    return columns


def _arrow(kind: Type) -> Any:
    import pyarrow as arrow

    if isinstance(kind, list):
        return arrow.list_(_arrow(kind[0]))
    if isinstance(kind, dict):
        return arrow.struct([(name, _arrow(inner)) for name, inner in kind.items()])
    plain = {
        None: arrow.null, "bool": arrow.bool_, "int": arrow.int64, "long": arrow.int64, "double": arrow.float64,
        "text": arrow.string,
    }  # fmt: skip
    return plain[kind]()
