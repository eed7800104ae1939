"""The JSON schema for editors, and the first manifest that `bigpipe init` writes."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import jsonschema
import pytest
from pydantic import Field
from support.kinds import KINDS, InferParams

from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.recipe.initial import initial_manifest
from bigpipe.orchestrator.recipe.registry import BUILT_IN, load_stage
from bigpipe.orchestrator.recipe.schema import field_descriptions, manifest_schema, recipe_schema
from bigpipe.orchestrator.recipe.yamlsource import read_document, to_python
from bigpipe.orchestrator.stage import Params, Size


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(json.dumps(manifest_schema(KINDS)))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


def data(text: str) -> Any:
    """As an editor sees it: keys are text."""
    return json.loads(json.dumps(to_python(read_document("m.yaml", dedent(text).encode()).root)))


def errors(validator: Any, text: str) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(data(text))]


GOOD = """
    version: 1
    name: opt
    description: all of it
    x-defaults: &defaults {retries: 2}
    params: {gpu: 22GiB, schemes: [int8, nf4], batch: 4, size: {0: 3GB}}
    secrets: [TOKEN]
    trust: {modules: [mingpt]}
    stages:
      source: {uses: source, with: {synthetic: {config: {layers: 2}}}, <<: *defaults, timeout: 30m, secrets: [TOKEN]}
      estimate:
        uses: estimate
        inputs: source
        with: {dtypes: [int8], batch_size: "${params.batch}"}
        gates: ["int8.inference_high <= ${params.gpu}"]
        resources: {ram: 4GiB, cpus: "${params.batch}"}
      quantize:
        uses: quantize
        inputs: {model: source}
        needs: [estimate]
        matrix: {scheme: "${params.schemes}"}
        when: ${stages.estimate.metrics.int8.weights} < 30GiB
        with: {scheme: "${matrix.scheme}", threshold: "${params.batch}", double: "${env.DOUBLE:-false}"}
        cache: false
        env: {OMP_NUM_THREADS: 4}
      place:
        {uses: place, inputs: quantize, with: {device_map: {"": 0, a: cpu}, max_memory: {0: 3B, 1-7: 46GiB, cpu: 1GB}}}
      place2: {uses: place, inputs: quantize, with: {device_map: auto, max_memory: "${params.size}"}}
      infer:
        {uses: infer, inputs: {model: quantize, placement: place}, with: {prompts: [a]}, launch: {num_processes: 2}}
      save:
        {uses: save, inputs: {model: quantize@scheme=int8, reports: [estimate]}, with: {to: dist}, on_fail: continue}
      again: {uses: estimate, with: "${params.size}"}
      own: {uses: "my.kinds:CENSUS", inputs: source, with: {prefix: a}}
"""


def test_a_manifest_with_everything_is_valid(validator: Any) -> None:
    assert errors(validator, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("batch_size:", "batch_sise:", "$.stages.estimate.with: Additional properties are not allowed ('batch_sise'"),
        ("dtypes: [int8]", "dtypes: [int9]", "$.stages.estimate.with.dtypes"),
        ('"${params.batch}"}\n        gates', "four}\n        gates", "$.stages.estimate.with.batch_size"),
        ("threshold: \"${params.batch}\"", "threshold: high", "$.stages.quantize.with.threshold"),
        ("scheme: \"${matrix.scheme}\"", "scheme: int4", "$.stages.quantize.with.scheme"),
        ("{synthetic: {config: {layers: 2}}}", "{synthetic: {dtype: float16}}", "$.stages.source.with.synthetic"),
        ("a: cpu", "a: tpu", "$.stages.place.with.device_map"),
        ("{uses: save,", "{uses: safe,", "$.stages.save.uses: 'safe' is not valid under any"),
        ("my.kinds:CENSUS", "my.kinds:", "$.stages.own.uses: 'my.kinds:' is not valid under any"),
        ("inputs: {model: source}", "inputs: {modle: source}", "$.stages.quantize.inputs"),
        ("inputs: {model: source}", "retries: 1", "$.stages.quantize: 'inputs' is a required property"),
        ("with: {prompts: [a]}, ", "", "$.stages.infer: 'with' is a required property"),
        ("reports: [estimate]", "reports: 3", "$.stages.save.inputs"),
        ("uses: source, ", "uses: source, inputs: place, ", "$.stages.source: False schema does not allow 'place'"),
        ("cache: false", "launch: {num_processes: 2}", "$.stages.quantize: False schema does not allow"),
        ("num_processes: 2", "num_process: 2", "$.stages.infer.launch"),
        ("on_fail: continue", "on_fail: go", "$.stages.save.on_fail"),
        ("retries: 2", "retrys: 2", "$.stages.source: Additional properties"),
        ("cache: false", "cache: never", "$.stages.quantize.cache"),
        ("version: 1", "version: 2", "$.version: 1 was expected"),
        ("trust:", "thrust:", "$: 'thrust' does not match any of the regexes: '^x-'"),
        ("stages:\n      source:", "stages:\n      my source:", "$.stages: 'my source' does not match"),
        ("modules: [mingpt]", "modules: mingpt", "$.trust.modules"),
    ],
)  # fmt: skip
def test_what_an_editor_underlines(validator: Any, old: str, new: str, found: str) -> None:
    changed = GOOD.replace(old, new, 1)
    assert changed != GOOD
    assert any(message.startswith(found) for message in errors(validator, changed)), errors(validator, changed)


class Described(Params):
    first: int = 1
    """How many
    there are."""
    second: Size = Field(default=0, description="Said in place.")
    third: str = ""


def test_docstrings_below_fields_become_descriptions() -> None:
    assert field_descriptions(Described) == {"first": "How many there are.", "second": "Said in place."}
    assert field_descriptions(InferParams) == {}


FIRST = [kind for kind in BUILT_IN if kind not in ("finetune", "evaluate", "merge", "command")]
"""Those others need a text, or an adapter, which nobody has yet."""


def test_the_first_manifest_uses_every_built_in_kind_that_needs_no_file_once(tmp_path: Path) -> None:
    text = initial_manifest("facebook/opt-13b", "opt13b", "../schema/bigpipe.schema.json")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=../schema/bigpipe.schema.json"
    stages = data(text)["stages"]
    assert [stage["uses"] for stage in stages.values()] == FIRST
    assert stages["download"]["with"] == {"repo": "facebook/opt-13b", "revision": "main"}


@pytest.mark.parametrize("name", ["opt", "1e5", "no", "true", "a: b", "${params.x}", 'q"uote', "ünï", "0777", "x\ny"])
def test_any_name_is_written_so_that_it_is_read_back(name: str) -> None:
    read = data(initial_manifest(f"./{name}", name))
    assert isinstance(read["name"], str)
    assert read["name"].isprintable()
    assert read["stages"]["download"]["with"] == {"path": f"./{name.replace('${', '$${')}"}
    assert read["stages"]["save"]["with"] == {"to": f"dist/{read['name']}"}


@pytest.fixture(scope="module")
def installed() -> Any:
    schema = json.loads(json.dumps(manifest_schema()))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("model", ["facebook/opt-13b", "./checkpoint"])
def test_the_first_manifest_is_valid(installed: Any, tmp_path: Path, model: str) -> None:
    path = tmp_path / "first.yaml"
    path.write_text(initial_manifest(model, "first"), encoding="utf-8")
    assert errors(installed, path.read_text(encoding="utf-8")) == []
    assert len(load_recipe(path, environment={}).nodes) == len(FIRST)


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("text-generation", {"temperature": 0.5}), ("text-classification", {"top_k": None}), ("m:f", {"own": 1}),
        ("fill-mask", {"top_k": 3}), ("fill-mask", "${params.x}"),
    ],
)  # fmt: skip
def test_what_a_task_takes_is_not_underlined(installed: Any, task: str, arguments: Any) -> None:
    manifest = data(initial_manifest("a/b", "first"))
    manifest["stages"]["generate"]["with"] = {"task": task, "prompts": ["a"], "generation": arguments}
    assert [error.message for error in installed.iter_errors(manifest)] == []


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"quantize": {"scheme": "int4"}}, "$.stages.quantize.with.scheme"),
        ({"quantize": {"scheme": "int8", "skip_module": ["lm_head"]}}, "$.stages.quantize.with: Additional"),
        ({"shard": {"format": "bins"}}, "$.stages.shard.with.format"),
        ({"dispatch": {"device_map": "automatic"}}, "$.stages.dispatch.with.device_map"),
        ({"generate": {"task": "text-generation"}}, "$.stages.generate.with: 'prompts' is a required property"),
        ({"estimate": {"batch_size": "many"}}, "$.stages.estimate.with.batch_size"),
        ({"save": {"too": "x"}}, "$.stages.save.with"),
        (
            {"generate": {"task": "text-classification", "prompts": ["a"], "generation": {"topk": 3}}},
            "$.stages.generate.with.generation",
        ),
        (
            {"generate": {"task": "fill-mask", "prompts": ["a"], "generation": {"top_k": 0}}},
            "$.stages.generate.with.generation",
        ),
        ({"quantize": {"load_in_4bit": "maybe"}}, "$.stages.quantize.with.load_in_4bit"),
    ],
    ids=str,
)
def test_mistakes_in_the_installed_kinds_are_underlined(installed: Any, changed: Any, found: str) -> None:
    manifest = data(initial_manifest("a/b", "first"))
    ((stage, fields),) = changed.items()
    manifest["stages"][stage]["with"] = fields
    messages = [f"{error.json_path}: {error.message}" for error in installed.iter_errors(manifest)]
    assert any(message.startswith(found) for message in messages), messages


def bare(schema: Any, path: str = "") -> list[str]:
    """Where an editor would show a field without saying what it is."""
    if isinstance(schema, list):
        return [found for child in schema for found in bare(child, path)]
    if not isinstance(schema, dict):
        return []
    own = schema.get("properties", {})
    found = [
        f"{path}/{name}"
        for name, field in own.items()
        if isinstance(field, dict) and not {"description", "const"} & field.keys()
    ]
    below = [*own.items(), *((key, child) for key, child in schema.items() if key != "properties")]
    return found + [each for name, child in below for each in bare(child, f"{path}/{name}")]


def test_every_field_says_what_it_is() -> None:
    made = manifest_schema({name: load_stage(name) for name in BUILT_IN})
    assert bare(made) == []
    assert '"ge"' not in json.dumps(made)


NAMED = """
    version: 1
    name: named
    params: {limit: 3GiB}
    trust: {modules: [census_of_words]}
    stages:
      download: {uses: download, with: {path: .}}
      quantize:
        {uses: quantize, inputs: download, matrix: {scheme: [int8, nf4]}, with: {scheme: "${matrix.scheme}"}}
      words: {uses: "census_of_words:STAGE", needs: [quantize]}
"""
OWN_KIND = """
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage

class WordsParams(Params):
    longest: int = 3
    "How long a word may be."

STAGE = Stage(kind="words", version=1, params=WordsParams, metrics=Metrics, inputs={}, output="report",
              title="Count words", run=lambda params, ctx: Metrics(),
              forecast=lambda params, ctx: Forecast())
"""


def test_an_editor_is_offered_the_names_of_a_recipe_and_takes_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "census_of_words.py").write_text(OWN_KIND)
    (tmp_path / "named.yaml").write_text(dedent(NAMED))
    made = json.loads(json.dumps(recipe_schema(load_recipe(tmp_path / "named.yaml", environment={}))))
    jsonschema.Draft7Validator.check_schema(made)
    definitions = made["definitions"]
    assert definitions["node"]["anyOf"][0]["enum"] == [
        "download", "quantize", "quantize@scheme=int8", "quantize@scheme=nf4", "words",
        "words@scheme=int8", "words@scheme=nf4",
    ]  # fmt: skip
    assert definitions["reference"]["anyOf"][0]["enum"] == ["${params.limit}", "${matrix.scheme}"]
    assert definitions["census_of_words:STAGE"]["properties"]["longest"]["description"] == "How long a word may be."
    validator = jsonschema.Draft7Validator(made)
    assert errors(validator, NAMED) == []
    grown = NAMED + '      shard: {uses: shard, inputs: later, needs: [quantize], with: {dtype: "${env.TYPE}"}}\n'
    assert errors(validator, grown) == []
    assert errors(validator, NAMED.replace("needs: [quantize]", "needs: [a b]")) != []


STAGE = "version: 1\nstages:\n  s: {uses: shard, inputs: d%s, %swith: {max_shard_size: %s}}\n"


@pytest.mark.parametrize(
    ("port", "timeout", "size", "fine"),
    [
        *[
            ("", "", size, True)
            for size in ("5GB", "30GIB", "1.5 TiB", "10000000", "'1000000'", "12B", '"${params.x}"')
        ],
        *[("", "", size, False) for size in ("5Gb", "5", "'5'", "5GiBs", "-1GB", "-1", "'999999'", "GB", "''")],
        *[("", f"timeout: {time}, ", "5GB", True) for time in ("30m", "1h30m", "90", "1.5h", "10 min")],
        *[("", f"timeout: {time}, ", "5GB", False) for time in ("30 minutes", "''", "-3", "0", "m")],
        ("@dtype=float16", "", "5GB", True),
        (" e", "", "5GB", False),
        ("/e", "", "5GB", False),
    ],
)
def test_an_editor_knows_sizes_durations_and_names(port: str, timeout: str, size: str, fine: bool) -> None:
    found = list(jsonschema.Draft7Validator(manifest_schema()).iter_errors(data(STAGE % (port, timeout, size))))
    assert (found == []) is fine, found
