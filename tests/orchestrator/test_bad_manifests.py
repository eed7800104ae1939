"""Every mistake has its place, code, cause and cure; never a traceback. The manifests are in tests/data."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from support.kinds import KINDS

from bigpipe.errors import ManifestError, Problem
from bigpipe.orchestrator.recipe.graph import load_recipe

SECTIONS = (Path(__file__).parents[1] / "data" / "bad_manifests.txt").read_text(encoding="utf-8").split("\n## ")[1:]


def cases() -> list[tuple[str, str, list[str]]]:
    """Title, manifest, what must be said."""
    result = []
    for section in SECTIONS:
        title, _, body = section.partition("\n")
        lines = body.rstrip("\n").split("\n")
        manifest = [line for line in lines if not line.startswith("-> ")]
        expected = [line.removeprefix("-> ") for line in lines if line.startswith("-> ")]
        result.append((title, "\n".join(manifest) + "\n", expected))
    return result


def said(problem: Problem) -> str:
    cure = f"; {problem.cure}" if problem.cure else ""
    return f"{problem.place.line}:{problem.place.column} {problem.code} {problem.cause}{cure}"


@pytest.mark.parametrize(("title", "manifest", "expected"), [pytest.param(*case, id=case[0]) for case in cases()])
def test_every_problem_is_found(tmp_path: Path, title: str, manifest: str, expected: list[str]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(manifest, encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        load_recipe(path, environment={"HF_TOKEN": "canary", "MINE": "canary"}, stages=KINDS)
    assert [said(problem) for problem in caught.value.problems] == expected
    assert caught.value.exit_code == 2
    assert "canary" not in str(caught.value)
    for problem in caught.value.problems:
        place = problem.place
        assert place.file == str(path)
        assert place.text == manifest.splitlines()[place.line - 1]
        assert place.column - 1 + place.width <= len(place.text) + 1  # a missing value: the caret stands after the line


def test_there_are_many() -> None:
    assert len(SECTIONS) >= 30


def test_arguments(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    stage = "{uses: estimate, with: {batch_size: '${params.batch}'}}"
    path.write_text(f"version: 1\nparams: {{batch: 4}}\nstages: {{s: {stage}}}\n")
    with pytest.raises(ManifestError) as caught:
        load_recipe(path, {"batch": "four", "bacth": "3"}, environment={}, stages=KINDS)
    assert [said(problem) for problem in caught.value.problems] == [
        "2:1 BP206 -p bacth=…: no parameter 'bacth'; did you mean 'batch'?",
        "2:17 BP206 -p batch=…: 'four' is not a whole number; it is read as the type of the default",
    ]


def test_a_hopeless_file_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    lines = "".join(f"  s{i}: {{uses: quantize, inputs: t{i}, with: {{shceme: int8}}}}\n" for i in range(1500))
    path.write_text(f"version: 1\nstages:\n{lines}")
    with pytest.raises(ManifestError) as caught:
        load_recipe(path, environment={}, stages=KINDS)
    assert len(caught.value.problems) == 200


MANIFEST = b"""\
version: 1
params: {gpu: 22GiB, n: 3}
stages:
  s: {uses: source, with: {repo: "a/b", synthetic: {config: x}}}
  q:
    uses: quantize
    inputs: {model: s}
    matrix: {scheme: [int8, nf4]}
    when: ${stages.s.metrics.bytes} < 3 * ${params.gpu}
    with: {scheme: "${matrix.scheme}", threshold: 6.5}
    gates: ["ratio < 0.5"]
    launch: {num_processes: 2}
  p: {uses: place, inputs: q@scheme=int8, with: {max_memory: {0: 1GiB, cpu: "${env.X:-3GB}"}}, env: {A: 1}}
"""
WORDS = st.sampled_from(
    [b"s", b"q@", b"{", b"}", b"[", b"]", b": ", b", ", b"${", b"$", b"null", b"0", b"-1", b"1e9", b"&a ",
     b"*a", b"<<: ",
     b"'", b'"', b"\n", b"  ", b"model", b"matrix", b"inputs", b"[key]", b"~", b"@", b"=", b"\xc3\xa9", b"\xff", b"|\n"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(MANIFEST)), st.integers(0, 12), WORDS), min_size=1, max_size=5))
def test_mutations_load_or_are_manifest_errors(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bytes]]
) -> None:
    data = MANIFEST.replace(b"    launch: {num_processes: 2}\n", b"")
    for position, removed, inserted in changes:
        data = data[:position] + inserted + data[position + removed :]
    path = tmp_path_factory.mktemp("mutated") / "m.yaml"
    path.write_bytes(data)
    shown = ""
    try:
        load_recipe(path, environment={}, stages=KINDS)
    except ManifestError as error:
        shown = str(error)
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ("repo: a/b, dtypes: no", ["BP105 dtypes: 'no' is not one of its values"]),
        ("repo: a/b, dtypes: [fp16]", ["BP105 dtypes.0: 'fp16' is not one of its values; did you mean 'float16'?"]),
        ("repo: [a/b]", ["BP104 repo: a list where a text is expected; write a/b without brackets"]),
    ],
)
def test_mistakes_in_fields_are_told_once_and_in_the_words_of_the_kind(tmp_path: Path, fields, says) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(f"version: 1\nstages:\n  e: {{uses: estimate, with: {{{fields}}}}}\n", encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        load_recipe(path)
    told = [said(problem).partition(" ")[2] for problem in caught.value.problems]
    assert len(told) == len(says)
    assert all(one.startswith(other) for one, other in zip(told, says, strict=True)), told
