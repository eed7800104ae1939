"""Strict YAML: what is read as what, what is refused, and where each value stands."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bigpipe.errors import ManifestError
from bigpipe.orchestrator.recipe.spelling import plain
from bigpipe.orchestrator.recipe.yamlsource import Document, read_document, read_value, to_python


def document(text: str | bytes) -> Document:
    return read_document("m.yaml", text if isinstance(text, bytes) else text.encode())


def parse(text: str | bytes) -> Any:
    return to_python(document(text).root)


def problem(text: str | bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        parse(text)
    first = caught.value.problems[0]
    return f"{first.place.line}:{first.place.column} {first.code} {first.cause}; {first.cure}"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("NO", "NO"),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("12:30:45", "12:30:45"), ("1e-5", 1e-5), ("1E5", 1e5), ("1.10", 1.1), (".5", 0.5), ("5.", 5.0), ("-3", -3),
        ("+3", 3), ("0o17", 15), ("0x1F", 31), ("0b11", "0b11"), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"),
        ("'0777'", "0777"), ('"no"', "no"), ("1-7", "1-7"), ("22GiB", "22GiB"), ("=", "="), ("nan", "nan"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(written: str, value: object) -> None:
    read = parse(f"a: {written}")["a"]
    assert read == value
    assert type(plain(read)) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 0777", "1:4 BP011 0777 is octal in YAML 1.1 only; write 777"),
        ("a: .inf", "1:4 BP011 .inf is not a finite number; write '.inf'"),
        ("a: -.INF", "1:4 BP011"),
        ("a: .nan", "1:4 BP011"),
        ("a: 1e999", "1:4 BP011"),
        ("a: " + "9" * 50, f"1:4 BP011 {'9' * 50} has too many digits"),
        ("a: 1\nb: 2\na: 3", "3:1 BP008 the key 'a' stands here twice; first on line 1; remove or rename one"),
        ("a: {0: 1, '0': 2}", "1:11 BP008 the key '0' stands here twice"),
        ("a: !!python/object:os.system x", "1:4 BP009 the tag !!python/object:os.system: tags are not read"),
        ("a: !!int '3'", "1:4 BP009"),
        ("a: !x [1]", "1:4 BP009"),
        ("true: 1", "1:1 BP010 true as a key; write the key in quotes"),
        ("1.5: 1", "1:1 BP010"),
        ("? [a]\n: 1", "1:3 BP010 a list or map as a key"),
        ("a: 1\n---\nb: 2", "2:1 BP007 a second document begins; one manifest per file"),
        ("", "1:1 BP006 the file is empty; start with `version: 1`"),
        ("# only a comment\n", "1:1 BP006"),
        ("- a\n- b", "1:1 BP006 the top level is not a map"),
        ("a:\n\tb: 1", "2:1 BP005"),
        ("a: b: c", "1:5 BP005 mapping values are not allowed in this context; put a text with ': ' in it into quotes"),
        (
            "a: [1, 2\n\n",
            "1:4 BP005 while parsing a flow sequence, did not find expected ',' or ']'; close the bracket",
        ),
        ("a: {0: ${params.x}}", "1:9 BP005"),
        ("a: @x", "1:4 BP005"),
        ('a: "\\q"', "1:5 BP005"),
        ("a: *nothing", "1:4 BP012 no anchor named nothing; define it with &nothing above"),
        ("a: &a [*a]", "1:8 BP012 *a stands inside its own anchor"),
        ("a: {<<: 3}", "1:9 BP012 `<<` merges maps only"),
        (
            "a: &a {x: 1}\nb: {<<: *a, <<: {x: 2}}",
            "2:13 BP008 `<<` stands here twice; write both in one: `<<: [*a, *b]`",
        ),
        ('a: "\\0"', "1:4 BP001"),
        (b"a: \xff", "1:4 BP001 byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"\xff\xfea\x00", "1:1 BP001 the file is UTF-16; save it as UTF-8"),
        ("a: 1\nb: \x07", "2:4 BP001 the character U+0007 cannot stand in YAML"),
        ("a: " + "[" * 40 + "]" * 40, "1:35 BP003 nested more than 32 deep"),
        ("a: " + "x" * 1_000_001, "1:1 BP002 1,000,004 bytes; a manifest holds at most 1,000,000"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_refused_with_place_and_cure(text: str | bytes, expected: str) -> None:
    assert problem(text).startswith(expected)


def test_the_cure_names_tabs_and_unquoted_references() -> None:
    assert problem("a:\n\tb: 1").endswith("indent with spaces, not tabs")
    assert problem("a: {0: ${params.x}}").endswith('in quotes: "${…}"')


def test_all_problems_are_found_at_once() -> None:
    with pytest.raises(ManifestError) as caught:
        parse("a: 0777\nb: !x y\na: 2\nnull: 1")
    assert [found.code for found in caught.value.problems] == ["BP011", "BP009", "BP008", "BP010"]
    assert "    3 | a: 2\n      | ^" in str(caught.value)


def test_a_text_of_digits_that_is_no_number_as_written_is_a_key_of_its_own() -> None:
    assert parse("a: {'007': 1, 7: 2, '-0': 3, 0: 4}")["a"] == {"007": 1, 7: 2, "-0": 3, 0: 4}
    assert "the key '-7' stands here twice" in problem("a: {-7: 1, '-7': 2}")


def test_an_alias_bomb_is_stopped_before_it_expands() -> None:
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "BP004 aliases expand to more than 10,000 values" in problem("\n".join(levels))


def test_depth_counts_through_aliases() -> None:
    nested = "[" * 20 + "1" + "]" * 20
    assert "BP003 nested more than 32 deep through aliases" in problem(f"a: &a {nested}\nb: {'[' * 20}*a{']' * 20}")


@pytest.mark.parametrize("opening", ["[", "[\n", "{a: ", "- ", "? ", "{"])
def test_a_megabyte_of_brackets_ends_at_once(opening: str) -> None:
    assert "BP003" in problem(opening * (900_000 // len(opening)))


def test_anchors_merge_keys_and_byte_order_mark() -> None:
    text = "x-a: &a {p: 1, q: 2}\nx-b: &b {q: 3, r: 4}\nc: {<<: [*a, *b], p: 0}\nd: {'<<': 1}\ne: *a\n"
    read = parse(b"\xef\xbb\xbf" + text.encode())
    assert read["c"] == {"p": 0, "q": 2, "r": 4}
    assert read["d"] == {"<<": 1}
    assert read["e"] == {"p": 1, "q": 2}
    assert read["e"] is not read["x-a"]


def test_a_key_that_is_written_out_wins_over_a_merged_one_in_its_other_form() -> None:
    read = parse("a: &a {0: 20, '1': 5, 2: 7}\nb: {<<: *a, '0': 10, 1: 6}\n")
    assert read["b"] == {"0": 10, 1: 6, 2: 7}


def test_places_of_values_keys_and_parts() -> None:
    found = document("é: 1\nstages:\n  q: {with: {scheme: nf4, list: [1, 'a ${b} c']}}\n")
    place = found.place_at(("stages", "q", "with", "scheme"))
    assert (place.line, place.column, place.width) == (3, 22, 3)
    assert place.text == "  q: {with: {scheme: nf4, list: [1, 'a ${b} c']}}"
    assert found.place_at(("stages", "q", "with", "scheme"), key=True).column == 14
    assert found.place_at(("stages", "q", "with", "list", 1), part="${b}").column == 40
    assert found.place_at(("stages", "q", "with", "nothing", "below"), key=True).column == 7
    assert found.place_at(("é",)).column == 4
    assert str(found.place_at(("stages", "nothing"))) == "m.yaml:3:3"


def test_windows_line_ends_and_unicode_breaks_count_as_lines() -> None:
    assert document("a: 1\r\nb: 2\r\n").place_at(("b",)).line == 2
    assert document("a: 1\rb: 2\r").place_at(("b",)).line == 2


def test_a_value_outside_a_manifest() -> None:
    assert read_value("{a: [1, no]}") == {"a": [1, "no"]}
    assert read_value("") is None
    with pytest.raises(ManifestError, match="BP003"):
        read_value("[" * 50)


SEED = b"""\
version: 1
params: {a: &x [1, 2.5, 'q'], b: *x}
stages:
  s: {uses: source, with: {repo: "a\\tb"}}
  t:
    - |
      block
"""


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SEED)), st.binary(max_size=4)), min_size=1, max_size=6))
def test_mutated_bytes_give_a_value_or_a_manifest_error(changes: list[tuple[int, bytes]]) -> None:
    data = SEED
    for position, inserted in changes:
        data = data[:position] + inserted + data[position + len(inserted) // 2 :]
    shown: list[str] = []
    try:
        assert isinstance(parse(data), dict)
    except ManifestError as error:
        shown.extend(str(found) for found in error.problems)
    assert all(line.startswith("m.yaml:") for line in shown)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#, \n\t0.~<$\\", max_size=60))
def test_any_text_gives_a_value_or_a_manifest_error(text: str) -> None:
    with suppress(ManifestError):
        read_value(text)


WITHOUT_LIBYAML = """
import json, sys
sys.modules["yaml._yaml"] = None
import yaml
assert not yaml.__with_libyaml__
from bigpipe.errors import ManifestError
from bigpipe.orchestrator.recipe.yamlsource import read_value

def outcome(text):
    try:
        return repr(read_value(text))
    except ManifestError:
        return None

print(json.dumps([outcome(text) for text in json.load(sys.stdin)]))
"""


@settings(max_examples=3, deadline=None)
@given(st.lists(st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#, \n\t0.~<$\\U", max_size=60), min_size=30))
def test_pyyaml_without_libyaml_agrees(texts: list[str]) -> None:
    """Wheels for some platforms lack libyaml; the values are the same, the words of a syntax error may differ."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBYAML], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    for text, without in zip(texts, json.loads(done.stdout), strict=True):
        with suppress(ManifestError):
            assert without in (None, repr(read_value(text)))
