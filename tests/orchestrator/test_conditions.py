"""Gates and `when`: a grammar of one comparison, evaluated without `eval`."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bigpipe.errors import ManifestError, Place
from bigpipe.orchestrator.recipe.conditions import UNKNOWN, Condition, metric, parse_condition

GIB = 2**30


def read(text: str) -> Condition:
    line = f"gates: [{text}]"
    return parse_condition(text, Place("m.yaml", 5, 9, line, len(text)))


def decide(text: str, **metrics: Any) -> tuple[bool, str, str] | None:
    verdict = read(text).evaluate(lambda node, path: metrics.get(f"{node}.{path}" if node else path, UNKNOWN))
    return verdict and (verdict.passed, verdict.left, verdict.right)


@pytest.mark.parametrize(
    ("text", "metrics", "verdict"),
    [
        ("peak <= 20GiB", {"peak": 22870700851}, (False, "21.3 GiB", "20GiB")),
        ("peak <= 20 GiB", {"peak": 20 * GIB}, (True, "20.0 GiB", "20 GiB")),
        ("peak <= 0.5 * (20GiB + 2GiB)", {"peak": 11 * GIB}, (True, "11.0 GiB", "11.0 GiB")),
        ("peak < 20GB - 1GiB - 1GiB", {"peak": 1}, (True, "1 B", "16.6 GiB")),
        ("tokens >= 1000", {"tokens": 1234}, (True, "1,234", "1000")),
        ("ratio == 0.5", {"ratio": 0.5}, (True, "0.5", "0.5")),
        ("ratio != 0.5", {"ratio": 0.5}, (False, "0.5", "0.5")),
        ("seconds < 1min", {"seconds": 75.5}, (False, "75.5 s", "1min")),
        ("seconds < 2m", {"seconds": 130.0}, (False, "130 s", "2m")),  # as `timeout: 2m` has it
        ("x > 2 + 3 * 4 - 6 / 2", {"x": 12}, (True, "12", "11")),
        ("x != 0", {"x": math.nan}, (False, "nan, not a number", "0")),
        ("x > 0", {"x": math.inf}, (False, "inf, not a number", "0")),
        ("x * 1e308 * 10 > 0", {"x": 1.0}, (False, "a number out of range", "0")),
        ("x <= 1TiB", {"x": math.nan}, (False, "nan, not a number", "1TiB")),
        ("x > -(2 - 3) * -1", {"x": 0}, (True, "0", "-1")),
        ("x > y", {"x": 2, "y": 1}, (True, "2", "1")),
        ("1GiB <= x", {"x": 2 * GIB}, (True, "1GiB", "2.0 GiB")),
        ("x < 1e3", {"x": 2}, (True, "2", "1e3")),
        ("flag == 1", {"flag": True}, (True, "1", "1")),
        ("x <= 20GiB", {"x": 20 * GIB + 1}, (False, "21,474,836,481", "20GiB")),
        ("x <= 1GiB * 20", {"x": 20 * GIB + 1}, (False, "21,474,836,481", "21,474,836,480")),
        ("x < 3", {"x": None}, (False, "no value", "3")),
        ("x < 3", {"x": "int8"}, (False, "'int8', not a number", "3")),
        ("x < 3 / y", {"x": 1, "y": 0}, (False, "a division by zero", "3 / y")),
        ("x < 3", {}, None),
        ("x < y", {"x": 1}, None),
        ("x == 9007199254740993", {"x": 9007199254740993}, (True, "9,007,199,254,740,993", "9007199254740993")),
        ("x != 9007199254740992", {"x": 9007199254740993}, (True, "9,007,199,254,740,993", "9007199254740992")),
    ],
)
def test_verdicts(text: str, metrics: dict[str, Any], verdict: tuple[bool, str, str] | None) -> None:
    assert decide(text, **metrics) == verdict


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("int8.total", 5),
        ("float16.total", None),
        ("float16.training.sgd", None),
        ("float32.total", UNKNOWN),
        ("int8.other", UNKNOWN),
        ("a.b", 7),
    ],
)
def test_below_null_there_is_nothing_and_what_is_not_told_is_unknown(path: str, value: Any) -> None:
    assert metric({"int8": {"total": 5}, "float16": None, "a.b": 7}, path) is value


def test_metrics_of_other_nodes() -> None:
    condition = read("${stages.quantize@scheme=int8,t=6.0.metrics.peak.0} <= 2 * ${stages.shard.metrics.bytes}")
    assert condition.references == {("quantize@scheme=int8,t=6.0", "peak.0"), ("shard", "bytes")}
    bound = condition.bind({"shard": "shard@size=1GB"})
    assert bound.references == {("quantize@scheme=int8,t=6.0", "peak.0"), ("shard@size=1GB", "bytes")}
    assert bound.text == condition.text
    assert condition.bind({}) is condition
    assert read("${stages.me.metrics.a} < 1").bind({"me": None}).references == {(None, "a")}


def test_references_name_every_metric() -> None:
    assert read("a.b <= (c + 2) * predicted.0").references == {(None, "a.b"), (None, "c"), (None, "predicted.0")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "9 BP401 the condition ends where a metric or a number is expected; write it as `METRIC <= 20GiB`"),
        ("peak", "13 BP401 the condition ends where a comparison"),
        ("peak <", "15 BP401 the condition ends where a metric or a number"),
        ("peak =< 3", "14 BP401 '=' does not belong in a condition; write <="),
        ("peak => 3", "14 BP401 '=' does not belong in a condition; write >="),
        ("peak = 3", "14 BP401 '=' does not belong in a condition; write == to compare"),
        ("a < 3 < 4", "15 BP401 '<' stands where the end is expected; write one comparison per condition"),
        (
            "a < 3 and b < 4",
            "15 BP401 'and' does not belong in a condition; write one comparison per condition; a list of gates",
        ),
        ("a < b and b < 4", "15 BP401 'and' stands where the end is expected; write one comparison per condition"),
        ("a < 3 && b < 4", "15 BP401 '&' does not belong in a condition; write one comparison per condition"),
        ("not a < 3", "13 BP401"),
        ("a < 20Gb", "13 BP403 '20Gb' means bits; write 20GB for bytes"),
        ("a < 20Gib", "13 BP403 '20Gib' means bits; write 20GiB for bytes"),
        ("a < 20 gigs", "16 BP403 'gigs' is not a unit; sizes: KiB MiB GiB TiB kB MB GB TB; times: ms s min h"),
        ("a < 5%", "14 BP401 '%' does not belong in a condition; write the fraction: 0.05 for 5 %"),
        ("a < (3", "15 BP401 the condition ends where `)` is expected"),
        ("a < 3)", "14 BP401"),
        ("a < ${params.x}", "13 BP401 '$' does not belong in a condition; write ${stages.NODE.metrics.PATH}"),
        ("__import__('os').system('id') < 1", "19 BP401 '(' stands where a comparison"),
        ("a.__class__[0] < 1", "20 BP401 '[' does not belong in a condition"),
        ("lambda: 0 < 1", "15 BP401 ':' does not belong in a condition"),
        ("a < 'x'", "13 BP401"),
        ("a < " + "(" * 21 + "1" + ")" * 21, "33 BP401 nested more than 20 deep; simplify the condition"),
        ("a < " + "-" * 30 + "1", "33 BP401 nested more than 20 deep"),
        ("a < " + "1+" * 300 + "1", "9 BP401 the condition is longer than 500 characters; write several"),
    ],
    ids=lambda text: text[:20],
)
def test_refused(text: str, expected: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(text)
    (problem,) = caught.value.problems
    assert f"{problem.place.column} {problem.code} {problem.cause}; {problem.cure}".startswith(expected)
    assert problem.place.line == 5


def test_a_text_that_is_not_in_its_line_is_placed_as_a_whole() -> None:
    """After interpolation the text differs from what stands in the file."""
    place = Place("m.yaml", 5, 9, "gates: ['a < ${params.x}']", 17)
    with pytest.raises(ManifestError) as caught:
        parse_condition("a < 3 4", place)
    assert caught.value.problems[0].place == place


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="ab.1290 ()+-*/<>=!GiBs${}stagemrc@", max_size=80))
def test_any_text_parses_or_is_a_manifest_error(text: str) -> None:
    try:
        condition = read(text)
    except ManifestError:
        return
    condition.evaluate(lambda node, path: 3)
    condition.evaluate(lambda node, path: 10**40)
    condition.evaluate(lambda node, path: 1.5e308)
    condition.evaluate(lambda node, path: UNKNOWN)


expressions = st.recursive(
    st.integers(0, 1000).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({' '.join(parts)})")
        | st.tuples(inner, st.sampled_from("+-*"), inner, st.sampled_from("+-*"), inner)
        .map(" ".join)
        .map("({})".format)
    ),
    max_leaves=8,
)


@given(expressions)
def test_arithmetic_agrees_with_python(text: str) -> None:
    value = eval(text, {"__builtins__": {}})  # noqa: S307 - digits, signs and brackets made above
    found = read(f"{text} == x").evaluate(lambda node, path: value)
    assert found is not None
    assert found.passed


@given(st.integers(-(10**6), 10**6), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.integers(0, 10**6))
def test_comparisons_agree_with_python(metric: int, comparison: str, limit: int) -> None:
    names = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}
    found = read(f"x {comparison} {limit}").evaluate(lambda node, path: metric)
    assert found is not None
    assert found.passed == getattr(operator, names[comparison])(metric, limit)
