"""What a program gives arrives as the value it was, through YAML too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.workshop import Workshop

import bigpipe
from bigpipe.errors import UsageError
from bigpipe.orchestrator import commands
from bigpipe.orchestrator.recipe import Single

TEXTS = ["😀", "a\x85b", "one\u2028 two", "p\u2029", "\x7f", "\ufeffx", "\ufffe", "ü", "${x}", "\t\n\x01", 'q"\\']
SINGLE = """\
version: 1
params: {p: %s}
stages:
  d: {uses: download, with: {synthetic: {config: {p: "${params.p}"}}}}
"""


def parameter(folder: Path, default: str, value: Any) -> Any:
    (folder / "r.yaml").write_text(SINGLE % default)
    return bigpipe.load_manifest(folder / "r.yaml", params={"p": value}).params["p"]


@pytest.mark.parametrize("value", [[TEXTS], {"k": TEXTS}, TEXTS, 2, 0.5, 1e-7, True, False, {"a": [1, None]}], ids=str)
def test_after_a_null_default_a_value_is_itself(tmp_path: Path, value: Any) -> None:
    found = parameter(tmp_path, "null", value)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_a_list_is_itself_after_a_list(tmp_path: Path, text: str) -> None:
    assert parameter(tmp_path, "[a]", [text]) == [text]


@pytest.mark.parametrize(("default", "value", "says"), [
    ("a", ["a"], r'"a"\] is not a text'),
    ("1", "1.5", r"write the default as 1\.0"),
    ("[a]", "b, c", r"write -p 'p=\[b, c\]'"),
    ("true", "Off", "write -p p=false"),
    ("1", "one", "it is read as the type of the default"),
    ("true", "perhaps", "it is read as the type of the default"),
    ("a", {"a": 1}, "is not a text"),
    ("[a]", "b", "is not a list"),
    ("1", 0.5, "0.5 is not a whole number|'0.5' is not a whole number"),
    ("1", True, "is not a whole number"),
    ("true", 1, "is not true or false"),
])  # fmt: skip
def test_a_value_of_another_type_than_the_default_is_refused(
    tmp_path: Path, default: str, value: Any, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        parameter(tmp_path, default, value)


@pytest.mark.parametrize(("default", "value", "is_read_as"), [("a", 2, "2"), ("a", True, "true"), ("0.5", 1, 1.0)])
def test_a_number_for_a_text_is_written(tmp_path: Path, default: str, value: Any, is_read_as: Any) -> None:
    found = parameter(tmp_path, default, value)
    assert (found, type(found)) == (is_read_as, type(is_read_as))


UNTYPED = """\
version: 1
params: {p: null}
stages:
  d:
    uses: download
    with: {path: ".", subfolder: VALUE, architecture: {class: "mine:Class", config: {a: [{b: VALUE}]}}}
trust: {modules: [mine]}
"""


@pytest.mark.parametrize(("text", "read"), [
    ("2", 2), ("-0.5", -0.5), ("true", True), ("1e-05", 1e-5),
    *[(text, text) for text in ("null", "x", "1.10", "12e4567", "007", "NaN", '"a"')],
])  # fmt: skip
@pytest.mark.parametrize("source", ["params", "env"])
def test_a_number_that_nobody_gave_a_type_is_one_where_a_kind_takes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, text: str, read: Any
) -> None:
    monkeypatch.setenv("GIVEN", text)
    value = '"${params.p}"' if source == "params" else '"${env.GIVEN}"'
    given = {"p": text} if source == "params" else {}
    recipe = UNTYPED.replace("VALUE", value)
    (tmp_path / "r.yaml").write_text(recipe if given else recipe.replace("null", "1"))
    params = bigpipe.load_manifest(tmp_path / "r.yaml", params=given).nodes["d"].params.model_dump()
    found = params["architecture"]["config"]["a"][0]["b"]
    assert (found, type(found)) == (read, type(read))
    assert params["subfolder"] == text


@pytest.mark.parametrize("target", ["argo", "github", "airflow"])
def test_a_value_is_written_into_what_is_exported(workshop: Workshop, target: str) -> None:
    workshop.manifest.write_text(
        'version: 1\nname: e\nparams: {n: null}\nstages:\n  a: {uses: write, with: {text: "${params.n}s"}}\n'
    )
    assert "22.5" in commands.export(target, workshop.manifest, params={"n": 22.5}).text


@pytest.mark.parametrize("text", TEXTS)
def test_a_command_without_a_recipe_asks_what_was_typed(tmp_path: Path, text: str) -> None:
    single = Single(
        name="generate", kind="distributed-infer", models={"model": "org/model"},
        fields={"task": "text-generation", "prompts": [text], "generation": {"stop_strings": text}},
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(single.manifest(), encoding="utf-8")
    recipe = bigpipe.load_manifest(tmp_path / "r.yaml")
    params = recipe.nodes["generate"].params.model_dump()
    assert list(params["prompts"]) == [text]
    assert yaml.safe_load(single.manifest())["stages"]["generate"]["with"]["prompts"] == [text.replace("${", "$${")]
