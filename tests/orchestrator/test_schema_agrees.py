"""The JSON schema against `validate`, over some thousand small recipes that differ in one value.

What the schema refuses, `validate` refuses: an editor raises no false alarm. What only `validate` refuses is what a
schema cannot say, or what is not said in it to keep an editor's own messages short: `BEYOND` lists it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bigpipe.errors import ManifestError
from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.recipe.registry import BUILT_IN, load_stage
from bigpipe.orchestrator.recipe.schema import manifest_schema
from bigpipe.orchestrator.recipe.yamlsource import read_document, to_python

SOURCE = {"uses": "download", "with": {"path": "m"}}
STAGES: dict[str, dict[str, Any]] = {
    "download": {"with": {"repo": "a/b"}},
    "estimate": {"inputs": "d", "with": {}},
    "shard": {"inputs": "d", "with": {}},
    "quantize": {"inputs": "d", "with": {"scheme": "nf4"}},
    "dispatch": {"inputs": "d", "with": {}},
    "distributed-infer": {"inputs": "d", "with": {"task": "text-generation", "prompts": ["a"]}},
    "finetune": {"inputs": "d", "with": {"data": ["a"], "max_steps": 3}},
    "evaluate": {"inputs": "d", "with": {"data": ["a"]}},
    "merge": {"inputs": {"model": "d", "adapter": "d"}, "with": {}},
    "command": {"inputs": {"x": "d"}, "with": {"argv": ["true"], "produces": "report"}},
    "save": {"inputs": "d", "with": {"to": "out"}},
}
"""Of each built-in kind a stage that is right."""
VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 2**70, 0.5, 1.5, "", "a", "5", "1.5", "5GB", "5 GiB", "5Gb", "-1GB", "30m", "0s", "auto",
    "no", "float16", "fp16", "${params.p}", [], ["a"], [1], {}, {"a": 1}, {"cpu": "5GB"}, {"cpu": 5}, {"a": "cpu"},
    "..",
)  # fmt: skip
PARTS: dict[str, tuple[str, ...]] = {
    "resources": ("cpus", "ram", "gpus", "gpu_memory", "disk", "odd"),
    "launch": ("num_processes", "num_machines", "mixed_precision", "main_process_port", "join_seconds", "odd"),
    "first": ("axis", "of", "odd"),
}
SETTINGS = (
    "inputs", "needs", "matrix", "first", "secrets", "with", "when", "launch", "resources", "retries", "timeout",
    "gates", "on_fail", "cache", "env", "uses", "odd",
)  # fmt: skip
TOP = ("version", "name", "description", "secrets", "trust", "remote", "stages", "odd", "x-odd")
BEYOND = (
    r"exactly one of repo, path and synthetic",
    r"revision (belongs to|of) a",
    r"subfolder and variant choose",
    r"(max_steps|num_train_epochs) says how long",
    r"has no meaning for",
    r"(template: it|column: it) names",
    r"task: task '.*' is not known",
    r"(generation|serving)[.:]",
    r"no stage '",
    r"is not a declared secret",
    r"private of a Hub repository",
    r"apply_padding: ranks take from one queue",
    r"mixed_precision fp16 would change nothing",
    r"the stage kind .*: module . is not trusted",
    r"needs a checkpoint on its port|needs 'scheme'",  # in place of `inputs: {}`; `load_in_4bit` says it too
    r"subfolder: .* is not the path of a folder",
    r"metrics: \.\. does not lie under",
    r"device_map\..*: '.*' is not a device",
    r"error\[BP4..\]",  # conditions have a grammar of their own
    r"cannot hold a reference",
    r"\b3 where|'3' where|'3' is not|3 has no unit|write \[3\]",  # what a reference stands for
    r"no axis|cannot take the first|of: ",
)  # fmt: skip
"""What a schema cannot say: how fields depend on each other, names that only the recipe or the machine knows, what a
reference stands for."""


def recipe(kind: str, stage: Mapping[str, Any], **top: Any) -> dict[str, Any]:
    return {"version": 1, "params": {"p": 3}, "stages": {"d": SOURCE, "s": {"uses": kind, **stage}}, **top}


def recipes(kind: str) -> Iterator[dict[str, Any]]:
    stage = STAGES[kind]
    yield recipe(kind, stage)
    yield recipe(kind, {**stage, "with": {**stage["with"], "odd": 1}})
    for name in stage["with"]:
        yield recipe(kind, {**stage, "with": {key: value for key, value in stage["with"].items() if key != name}})
    for name in load_stage(kind).params.model_fields:
        for value in VALUES:
            yield recipe(kind, {**stage, "with": {**stage["with"], name: value}})


def around() -> Iterator[dict[str, Any]]:
    kind, stage = "distributed-infer", STAGES["distributed-infer"]
    for value in VALUES:
        yield from (recipe(kind, {**stage, name: value}) for name in SETTINGS)
        yield from (recipe(kind, {**stage, part: {name: value}}) for part, names in PARTS.items() for name in names)
        yield from ({**recipe(kind, stage), name: value} for name in TOP)
        yield from (recipe(kind, stage, trust={name: value}) for name in ("modules", "remote_code", "limits"))
        limits = ("seconds", "memory", "modules", "sequences")
        yield from (recipe(kind, stage, trust={"limits": {name: value}}) for name in limits)
        yield from (recipe(kind, stage, remote={"url": "x", name: value}) for name in ("url", "publish", "timeout"))


@pytest.fixture(scope="module")
def schema() -> Any:
    return jsonschema.Draft7Validator(json.loads(json.dumps(manifest_schema())))


def refusals(made: dict[str, Any], schema: Any, folder: Path) -> tuple[str, str]:
    """What the schema says against a recipe, and what `validate` does."""
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in made.items()) + "\n"
    data = to_python(read_document("recipe.yaml", text.encode()).root)
    seen = "; ".join(f"{error.json_path}: {error.message}" for error in schema.iter_errors(data))
    try:
        load_recipe(folder / "recipe.yaml", text=text)
    except ManifestError as error:
        return seen, str(error)
    return seen, ""


@pytest.mark.parametrize("kind", [*BUILT_IN, "around"])
def test_they_agree(kind: str, schema: Any, tmp_path: Path) -> None:
    alarms, missed, right = [], [], 0
    for made in around() if kind == "around" else recipes(kind):
        seen, told = refusals(made, schema, tmp_path)
        right += not seen and not told
        if seen and not told:
            alarms.append(f"{made}: {seen}")
        if told and not seen and not any(re.search(pattern, told) for pattern in BEYOND):
            missed.append(f"{made}: {told}")
    assert alarms == []
    assert missed == []
    assert right > 2


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('batch_size: "4"', "batch_size: '4' where a whole number is expected; write 4 without quotes"),
        ("batch_size: true", "batch_size: true where a whole number is expected"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: 1 where true or false is expected"),
        ("gradient_checkpointing: no", "gradient_checkpointing: 'no' where true or false is expected; write false"),
        ('batch_size: "${env.COUNT}"', ""),
        ("batch_size: 4.0", ""),
    ],
)
def test_a_text_is_no_number_unless_a_reference_gave_it(written: str, says: str, tmp_path: Path) -> None:
    text = f"version: 1\nstages:\n  s: {{uses: estimate, with: {{repo: a/b, {written}}}}}\n"
    try:
        load_recipe(tmp_path / "recipe.yaml", text=text, environment={"COUNT": "4"})
    except ManifestError as error:
        assert says
        assert says in str(error)  # noqa: PT017
    else:
        assert says == ""
