"""The conditions of `gates` and `when`: one comparison, read by a parser of our own and never by `eval`.

    condition  = sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
    sum        = product (("+" | "-") product)*
    product    = factor (("*" | "/") factor)*
    factor     = "-" factor | "(" sum ")" | NUMBER [UNIT] | METRIC | "${stages.NODE.metrics.METRIC}"
    METRIC     = NAME ("." NAME_OR_NUMBER)*        a metric of the node itself

Units are those of sizes (`GiB`, `GB`, …) and of time (`ms`, `s`, `min` or `m`, `h`). Whole numbers stay exact.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeAlias

from bigpipe.errors import Place
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.contract import Json
from bigpipe.sizes import BARE, UNITS, format_size, parse_size

from .problems import Fault, Problems

MAX_LENGTH = 500
MAX_DEPTH = 20

UNKNOWN: Any = object()
"""What a lookup returns for a metric that is not known yet."""

Unit = Literal["", "size", "time"]
Measure: TypeAlias = Literal["size", "time", "number", "count", "fraction"] | None
"""What is measured: bytes; seconds; a number that is written without a unit; how many there are of something; a metric
with decimals, which may be seconds; None: unknown."""
Lookup: TypeAlias = Callable[[str | None, str], Json]

_SECONDS = {"ms": 0.001, "s": 1, "min": 60, "m": 60, "h": 3600}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<reference>\$\{stages\.(?P<node>[^{}]+?)\.metrics\.(?P<metric>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\})
    | (?P<number>(?P<digits>[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?)
        (?:[ ]?(?P<unit>[A-Za-z]+))?)
    | (?P<path>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)
    | (?P<compare><=|>=|==|!=|<|>)
    | (?P<sign>[-+*/()])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_HINTS = (
    (r"=<", "write <="),
    (r"=>", "write >="),
    (r"=", "write == to compare"),
    (r"and\b|or\b|not\b|&|\||!", "write one comparison per condition; a list of gates holds when all of them do"),
    (r"%", "write the fraction: 0.05 for 5 %"),
    (r"\$", "write ${stages.NODE.metrics.PATH}"),
    (r"[<>]", "write one comparison per condition"),
)
"""What a text that does not belong begins with → what to write."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number with its unit, as it was written."""

    value: int | float
    unit: Unit
    text: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of a node."""

    node: str | None
    """None: the node that has the condition."""
    path: str


@dataclass(frozen=True, slots=True)
class Operation:
    """Two expressions, joined by `+ - *` or `/`."""

    sign: str
    left: Expression
    right: Expression


Expression: TypeAlias = Number | Metric | Operation


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a condition found. `left` and `right` are the values, written for people: `21.3 GiB`, `20GiB`."""

    passed: bool
    left: str
    right: str
    value: int | float | None = None
    """The left one, as a number."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A comparison of two expressions: a `when`, or a gate."""

    text: str
    place: Place
    left: Expression
    sign: str
    right: Expression

    @property
    def references(self) -> frozenset[tuple[str | None, str]]:
        """(node, or None for the node's own metrics; metric path)."""
        return frozenset((leaf.node, leaf.path) for leaf in _leaves(self.left, self.right) if isinstance(leaf, Metric))

    def evaluate(self, lookup: Lookup) -> Comparison | None:
        """Return None where a metric is UNKNOWN. A metric that is no number, and a division by zero, do not pass."""
        try:
            left, right = _value(self.left, lookup), _value(self.right, lookup)
        except _NotKnown:
            return None
        except _NotANumber as error:
            return Comparison(False, str(error), _written(self.right))
        units = [leaf.unit for leaf in _leaves(self.left, self.right) if isinstance(leaf, Number) and leaf.unit]
        one, other = (_shown(value, units[0] if units else "") for value in (left, right))
        if left != right and one == other:  # 20.0 GiB against 20.0 GiB explains nothing
            one, other = f"{left:,}", f"{right:,}"
        one = self.left.text if isinstance(self.left, Number) else one
        other = self.right.text if isinstance(self.right, Number) else other
        return Comparison(_COMPARISONS[self.sign](left, right), one, other, left)

    def odd_units(self, measure: Callable[[str | None, str], Measure]) -> tuple[str, str] | None:
        """Return cause and cure where what is compared can never be meant: bytes with what is no size, or with a number
        too small to be bytes. measure: of a metric of a node."""
        sides = [(side, _measured(side, measure)) for side in (self.left, self.right)]
        measures = {found for _, found in sides}
        bare = next((s for s, _ in sides if isinstance(s, Number) and not s.unit and 0 < s.value < BARE), None)
        texts = [_written(side) for side, _ in sides]
        if "size" in measures and measures & {"time", "count", "fraction"}:
            other = next(_written(side) for side, found in sides if found != "size")
            return f"{texts[0]} and {texts[1]} cannot be compared: {other} is no size", "compare it with its own kind"
        if "size" in measures and bare is not None:
            return f"{bare.text} has no unit", f"write {bare.text}GB or {bare.text}GiB, or {bare.text}B if it is bytes"
        return None

    def bind(self, nodes: Mapping[str, str | None]) -> Condition:
        """Return the same condition with the stages it names replaced by nodes; None is the node itself."""
        if all(node is None or nodes.get(node, node) == node for node, _ in self.references):
            return self
        return replace(self, left=_bind(self.left, nodes), right=_bind(self.right, nodes))


def metric(metrics: Mapping[str, Json], path: str) -> Json:
    """The value at a dotted path, UNKNOWN where there is none, and None below what is null: there never is one. Keys
    may themselves hold dots."""
    if path in metrics:
        return metrics[path]
    for cut in range(len(path) - 1, 0, -1):
        if path[cut] == "." and isinstance(inner := metrics.get(path[:cut]), Mapping):
            return metric(inner, path[cut + 1 :])
        if path[cut] == "." and path[:cut] in metrics and metrics[path[:cut]] is None:
            return None
    return UNKNOWN


class _NotKnown(Exception):
    pass


class _NotANumber(Exception):
    pass


def _value(expression: Expression, lookup: Lookup) -> int | float:
    if isinstance(expression, Number):
        return expression.value
    if isinstance(expression, Metric):
        value = lookup(expression.node, expression.path)
        if value is UNKNOWN:
            raise _NotKnown
        if not isinstance(value, int | float) or not _finite(value):
            raise _NotANumber("no value" if value is None else f"{value!r}, not a number")
        return value
    left, right = _value(expression.left, lookup), _value(expression.right, lookup)
    try:
        result: int | float = _ARITHMETIC[expression.sign](left, right)
    except ArithmeticError as error:
        zero = isinstance(error, ZeroDivisionError)
        raise _NotANumber("a division by zero" if zero else "a number out of range") from None
    if not _finite(result):
        raise _NotANumber("a number out of range")
    return result


def _finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _measured(expression: Expression, measure: Callable[[str | None, str], Measure]) -> Measure:
    if isinstance(expression, Number):
        return expression.unit or "number"
    if isinstance(expression, Metric):
        return measure(expression.node, expression.path)
    left, right = _measured(expression.left, measure), _measured(expression.right, measure)
    plain: tuple[Measure, ...] = ("number", "count", "fraction")
    if left in plain and right in plain:
        return max(left, right, key=plain.index)
    if expression.sign in "*/" and right in plain:
        return left
    if expression.sign == "*" and left in plain:
        return right
    if expression.sign == "/" and left == right:
        return "fraction" if left else None
    return left if expression.sign in "+-" and left == right else None


def _leaves(*expressions: Expression) -> Iterator[Number | Metric]:
    for expression in expressions:
        if isinstance(expression, Operation):
            yield from _leaves(expression.left, expression.right)
        else:
            yield expression


def _written(expression: Expression) -> str:
    if isinstance(expression, Number):
        return expression.text
    if isinstance(expression, Metric):
        return expression.path if expression.node is None else f"{expression.node}.{expression.path}"
    return f"{_written(expression.left)} {expression.sign} {_written(expression.right)}"


def _shown(value: int | float, unit: str) -> str:
    if unit == "size":
        return format_size(value)
    if unit == "time":
        return f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bind(expression: Expression, nodes: Mapping[str, str | None]) -> Expression:
    if isinstance(expression, Operation):
        return Operation(expression.sign, _bind(expression.left, nodes), _bind(expression.right, nodes))
    if isinstance(expression, Metric) and expression.node is not None:
        return Metric(nodes.get(expression.node, expression.node), expression.path)
    return expression


def parse_condition(text: str, place: Place) -> Condition:
    """Read one condition. `place` is where its text stands. Raise ManifestError and nothing else."""
    return _Parser(text, place).condition()


class _Parser:
    def __init__(self, text: str, place: Place) -> None:
        self.text, self.place = text.rstrip(), place
        self.depth = 0
        self.position = 0
        if len(text) > MAX_LENGTH:
            self.fail(0, f"the condition is longer than {MAX_LENGTH:,} characters", "write several, one per line")
        self.token = self.next()

    @property
    def ahead(self) -> str:
        return self.token[0].strip()

    def fail(self, start: int, cause: str, cure: str, code: Fault = Fault.CONDITION_SYNTAX, width: int = 1) -> NoReturn:
        place = self.place
        found = place.text.find(self.text, place.column - 1) if self.text else -1
        if found >= 0:
            place = Place(place.file, place.line, found + start + 1, place.text, width)
        Problems().fail(code, place, cause, cure)

    def next(self) -> re.Match[str]:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            rest = self.text[self.position :].lstrip()
            self.fail(len(self.text) - len(rest), f"{rest[0]!r} does not belong in a condition", _hint(rest))
        self.position = match.end()
        return match

    def advance(self) -> re.Match[str]:
        token, self.token = self.token, self.next()
        return token

    def unexpected(self, wanted: str) -> NoReturn:
        found = self.ahead
        what = f"{found!r} stands" if found else "the condition ends"
        cure = _hint(found) if found else "write it as `METRIC <= 20GiB`"
        start = self.token.end() - len(found)
        self.fail(start, f"{what} where {wanted} is expected", cure, width=max(1, len(found)))

    def condition(self) -> Condition:
        left = self.sum()
        if self.token["compare"] is None:
            self.unexpected("a comparison (< <= > >= == !=)")
        sign = self.advance()["compare"]
        right = self.sum()
        if self.ahead:
            self.unexpected("the end")
        return Condition(self.text.strip(), self.place, left, sign, right)

    def sum(self) -> Expression:
        return self.chain(("+", "-"), lambda: self.chain(("*", "/"), self.factor))

    def chain(self, signs: tuple[str, str], part: Callable[[], Expression]) -> Expression:
        result = part()
        while self.ahead in signs:
            result = Operation(self.advance()["sign"], result, part())
        return result

    def factor(self) -> Expression:
        if self.ahead in ("-", "("):
            return self.nested()
        match self.token.lastgroup:
            case "number":
                return self.number(self.advance())
            case "path":
                return Metric(None, self.advance()["path"])
            case "reference":
                token = self.advance()
                return Metric(token["node"], token["metric"])
        self.unexpected("a metric or a number")

    def nested(self) -> Expression:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(self.token.start("sign"), f"nested more than {MAX_DEPTH} deep", "simplify the condition")
        if self.advance()["sign"] == "-":
            result: Expression = Operation("-", Number(0, "", "0"), self.factor())
        else:
            result = self.sum()
            if self.ahead != ")":
                self.unexpected("`)`")
            self.advance()
        self.depth -= 1
        return result

    def number(self, token: re.Match[str]) -> Number:
        text, digits, unit = token["number"], token["digits"], token["unit"] or ""
        if unit.lower() in UNITS:
            if not unit:
                return Number(float(digits) if set(digits) & set(".eE") else int(digits), "", text)
            try:
                return Number(parse_size(text), "size", text)
            except ValueError as error:
                cause, _, cure = str(error).partition("; ")
                self.fail(token.start("number"), cause, cure, Fault.BAD_UNIT, len(text))
        if unit in _SECONDS:
            return Number(float(digits) * _SECONDS[unit], "time", text)
        units = ["B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB", *_SECONDS]
        if unit in ("and", "or", "not"):
            self.fail(token.start("unit"), f"{unit!r} does not belong in a condition", _hint(unit), width=len(unit))
        cure = did_you_mean(unit, units) or "sizes: KiB MiB GiB TiB kB MB GB TB; times: ms s min h"
        self.fail(token.start("unit"), f"{unit!r} is not a unit", cure, Fault.BAD_UNIT, len(unit))


def _hint(text: str) -> str:
    usual = "a condition is `METRIC <= 20GiB`: metrics, numbers with units, + - * / and parentheses"
    return next((hint for pattern, hint in _HINTS if re.match(pattern, text)), usual)
