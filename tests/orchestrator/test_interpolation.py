"""`${…}`: what may stand where, what keeps its type, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from bigpipe.errors import Place
from bigpipe.orchestrator.recipe.interpolation import Scope, Unread, escape, interpolate, read_argument
from bigpipe.orchestrator.recipe.problems import Problems
from bigpipe.orchestrator.recipe.spelling import plain

SCOPE = Scope(
    params={"gpu": "22GiB", "n": 3, "x": 1.5, "on": True, "map": {"cpu": "4GiB"}, "list": [1, 2], "none-such": "a"},
    matrix={"scheme": "int8"},
    environment={"HOME": "/h", "EMPTY": "", "HF_TOKEN": "canary"},
)


def resolve(value: Any, scope: Scope = SCOPE) -> Any:
    problems = Problems(lambda path, key, part: Place(".".join(map(str, path)), 1, 1, part))
    result = interpolate(value, scope, problems)
    if not problems:
        return result
    return [f"{p.code} {p.place.file} {p.place.text}: {p.cause}; {p.cure}" for p in problems.error().problems]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${params.gpu}", "22GiB"), ("${params.n}", 3), ("${params.x}", 1.5), ("${params.on}", True),
        ("${params.map}", {"cpu": "4GiB"}), ("${params.list}", [1, 2]), ("${matrix.scheme}", "int8"),
        ("a-${params.n}-${matrix.scheme}", "a-3-int8"), ("${params.on}!", "true!"), ("${params.x}x", "1.5x"),
        ("${env.HOME}", "/h"), ("${env.NO:-d}", "d"), ("${env.NO:-}", ""), ("${env.EMPTY:-d}", "d"),
        ("${env.EMPTY}", ""),
        ("${env.HOME:?needed}", "/h"), ("${env.NO:-a:-b}", "a:-b"),
        ("$${params.gpu}", "${params.gpu}"), ("$$${params.gpu}", "$${params.gpu}"), ("a $ b {c} $", "a $ b {c} $"),
        ("$$${", "$${"), ({"k": ["${params.n}", {"j": "x${params.n}"}]}, {"k": [3, {"j": "x3"}]}),
        (7, 7), (None, None), ({0: "${params.gpu}"}, {0: "22GiB"}),
    ],
)  # fmt: skip
def test_references(written: Any, value: Any) -> None:
    assert resolve(written) == value


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("${params.gup}", "BP201  ${params.gup}: no parameter 'gup'; did you mean 'gpu'?"),
        ("${matrix.shceme}", "BP201  ${matrix.shceme}: no axis 'shceme' reaches this stage; did you mean 'scheme'?"),
        ("${param.gpu}", "BP202  ${param.gpu}: ${param.gpu} is not a reference; did you mean 'params'?"),
        ("${params.a.b}", "BP202"),
        ("${gpu}", "BP202"),
        ("${}", "BP202"),
        ("a ${params.gpu", "BP202  ${params.gpu: `${` is not closed; close it with `}`"),
        ("${env.A-B}", "BP202"),
        (
            "${env.NO:-${params.gpu}}",
            "BP202  ${env.NO:-${params.gpu}: what stands for NO where it is not set cannot hold references or braces;",
        ),
        ("${env.HOME:-{}}", "BP202"),
        ("${env.HOME:?say {where}}", "BP202"),
        ("${env.NO}", "BP203  ${env.NO}: the environment variable NO is not set; export NO=…"),
        (
            "${env.EMPTY:?say where}",
            "BP203  ${env.EMPTY:?say where}: the environment variable EMPTY is empty: say where",
        ),
        ("${env.HF_TOKEN}", "BP204  ${env.HF_TOKEN}: HF_TOKEN is a secret and is never written out; list it under"),
        ("${env.HF_TOKEN:-x}", "BP204"),
        ("a${params.map}", "BP207  ${params.map}: ${params.map} is a map and cannot stand inside a text; make it the"),
        ("a${params.list}", "BP207"),
        ("${stages.a.metrics.b}", "BP207  ${stages.a.metrics.b}: ${stages.a.metrics.b} cannot be read here; metrics"),
        ({"${params.n}": 1}, "BP207 ${params.n} ${params.n}: the key '${params.n}' cannot hold a reference"),
        ({"a": [0, "${params.b}"]}, "BP201 a.1 ${params.b}: no parameter 'b'; there are"),
    ],
    ids=str,
)
def test_refused(written: Any, expected: str) -> None:
    (found,) = resolve(written)
    assert found.startswith(expected)
    assert "canary" not in found


def test_all_problems_of_a_value_are_reported() -> None:
    assert len(resolve({"a": "${params.b}", "c": ["${matrix.d}", "${env.E}"]})) == 3


def test_namespaces_can_be_closed() -> None:
    (found,) = resolve("${matrix.scheme}", Scope(params={}))
    assert found.startswith("BP207")
    assert found.endswith("it may name ${params.x} and ${env.X}")
    (found,) = resolve("${params.x}", Scope(params=None))
    assert found.endswith("it may name ${env.X}")


def test_stage_metrics_are_left_for_conditions() -> None:
    scope = Scope(params={"gpu": "2GiB"}, stages=True)
    assert resolve("${stages.a.metrics.b} < ${params.gpu}", scope) == "${stages.a.metrics.b} < 2GiB"


@given(st.text(alphabet="a${}.params", max_size=40) | st.text(max_size=40))
def test_escaped_text_means_itself(text: str) -> None:
    assert resolve(escape(text)) == text


@given(st.text(alphabet="${}:-?.abenvprmstixHOME", max_size=60))
def test_any_text_is_resolved_or_reported(text: str) -> None:
    resolve(text)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("x", "text", "x"), ("3", "text", "3"), ("no", "text", "no"), ("", "text", ""),
        ("3", 1, 3), ("-3", 1, -3), ("0x10", 1, 16), ("2", 1.5, 2.0), ("1e-3", 1.5, 0.001),
        ("true", False, True), ("False", True, False), ("[a, 1]", [], ["a", 1]), ("{a: 1, 0: 2}", {}, {"a": 1, 0: 2}),
        ("x", None, "x"), ("3", None, "3"), ("1e10", None, "1e10"), ("[a]", None, ["a"]),
        ("[INST] hi", None, "[INST] hi"),
        ("{a: 1}", None, {"a": 1}),
    ],
)  # fmt: skip
def test_arguments_are_read_as_the_type_of_the_default(text: str, default: Any, value: Any) -> None:
    read = read_argument(text, default)
    assert read == value
    assert type(plain(read)) is (Unread if default is None and isinstance(value, str) else type(value))


@pytest.mark.parametrize(
    ("text", "default", "cause"),
    [
        ("x", 1, "'x' is not a whole number"), ("1.5", 1, "not a whole number"), ("true", 1, "not a whole number"),
        ("x", 1.5, "not a number"), ("true", 1.5, "not a number"), ("no", True, "not true or false"),
        ("1", True, "not true"),
        ("a", [], "not a list such as"), ("{a: 1}", [], "not a list"), ("[a", [], "not a list such as [a, b]: while"),
        ("a", {}, "not a map"),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_refused(text: str, default: Any, cause: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        read_argument(text, default)
    assert cause in str(caught.value)
