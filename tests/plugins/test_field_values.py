"""Values of fields that have their effect everywhere, and fields that would have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
from pydantic import ValidationError
from support.models import make_checkpoint
from support.workshop import Workshop

from bigpipe.bigmodel import architecture, checkpoint, hub
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.footprint import budgets, estimates
from bigpipe.commandline import questions
from bigpipe.errors import ManifestError
from bigpipe.orchestrator.recipe import load_recipe, load_stage
from bigpipe.plugins import download, estimate, revisions
from bigpipe.webpage import questions as page_questions


def literals(annotation: Any) -> set[str]:
    return {word for part in (annotation, *get_args(annotation)) for word in get_args(part) if isinstance(word, str)}


def test_words_that_are_spelled_out_not_to_import_the_library_are_its_own() -> None:
    assert (revisions.COMMIT.pattern, download.OWN_CLASS) == (hub.COMMIT.pattern, checkpoint.ARCHITECTURE_FILE)
    asked = {option.name: option.type for option in questions.estimate.params}
    choices = {name: set(kind.choices) for name, kind in asked.items() if isinstance(kind, click.Choice)}
    for params in (download.DownloadParams, estimate.EstimateParams):
        assert literals(params.model_fields["library_name"].annotation) == set(architecture.LIBRARIES)
    assert set(get_args(hub.Library)) == choices["library_name"] == set(architecture.LIBRARIES)
    assert literals(estimate.EstimateParams.model_fields["train"].annotation) == choices["train"]
    assert choices["train"] == set(page_questions.TRAIN) == set(budgets.OPTIMIZERS)
    assert page_questions.DTYPES == estimates.DTYPES == estimate.EstimateParams().dtypes


WIDE: list[tuple[str, dict[str, Any]]] = [
    ("download", {"synthetic": {"config": {"model_type": "opt"}, "dtype": "float64"}}),
    ("shard", {"dtype": "float64"}),
    ("dispatch", {"dtype": "float64"}),
    ("dispatch", {"special_dtypes": {"lm_head.weight": "float64"}}),
    ("distributed-infer", {"task": "text-generation", "prompts": ["a"], "dtype": "float64"}),
    ("estimate", {"repo": "org/model", "dtypes": ["float64"]}),
]


@pytest.mark.parametrize(("kind", "given"), WIDE, ids=str)
def test_float64_is_a_dtype_wherever_one_is_asked_for(kind: str, given: dict[str, Any]) -> None:
    params = load_stage(kind).params
    assert "float64" in json.dumps(params.model_validate(given).model_dump(mode="json"))
    narrow = json.loads(json.dumps(given).replace("float64", "float128"))
    with pytest.raises(ValidationError, match="float64"):
        params.model_validate(narrow)


RECIPE = """
version: 1
name: wide
stages:
  download: {uses: download, with: {path: model}}
  made: {uses: download, with: {synthetic: {config: model/config.json, dtype: float64}}}
  shard: {uses: shard, inputs: download, with: {dtype: float64}}
  dispatch: {uses: dispatch, inputs: download, with: {dtype: float64, max_memory: {cpu: 1GiB}, sequence_length: 16}}
  features:
    uses: distributed-infer
    inputs: {model: download, placement: dispatch}
    with: {task: feature-extraction, prompts: [hello], dtype: float64}
"""


def test_a_recipe_in_float64_computes_in_it(workshop: Workshop) -> None:
    import transformers

    model = make_checkpoint(workshop.folder / "model", "llama")
    result = workshop.run(RECIPE, check=True)
    narrow, shard = open_checkpoint(model), open_checkpoint(result.path("shard"))
    for name, tensor in shard.tensors.items():
        assert tensor.dtype == "float64"
        values = torch.frombuffer(bytearray(narrow.read(name)), dtype=torch.float32)
        assert torch.equal(torch.frombuffer(bytearray(shard.read(name)), dtype=torch.float64), values.double()), name
    assert {tensor.dtype for tensor in open_checkpoint(result.path("made")).tensors.values()} == {"float64"}
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    held = sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers()))
    told = result.nodes["dispatch"].metrics
    assert told["predicted"]["cpu"] == told["measured"]["cpu"] == held
    record = json.loads((result.path("features") / "results.jsonl").read_text())
    with torch.inference_mode():
        ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(model)("hello")["input_ids"]])
        states = whole.model(ids).last_hidden_state[0].mean(0)
    found = torch.tensor(record["features"], dtype=torch.float64)
    assert (found - states).abs().max() < 1e-13  # of float32 it is 1e-7


IDLE = [
    (
        "  d: {uses: download, with: {library_name: timm, architecture: {class: 'm:C'}, synthetic: {config: {}}}}",
        "library_name says whose class a config names, and architecture names one; give one of them",
    ),
    (
        "  d: {uses: download, with: {path: model, revision: v2}}",
        "revision belongs to a repo; path has none",
    ),
]


@pytest.mark.parametrize(("stage", "told"), IDLE, ids=["library_name", "revision"])
def test_a_field_beside_one_that_leaves_it_no_effect_is_refused(tmp_path: Path, stage: str, told: str) -> None:
    (tmp_path / "r.yaml").write_text(f"version: 1\nname: r\ntrust: {{modules: [m]}}\nstages:\n{stage}\n")
    with pytest.raises(ManifestError, match=told) as error:
        load_recipe(tmp_path / "r.yaml")
    assert error.value.problems[0].place.line == 5


def test_a_card_belongs_to_a_model(workshop: Workshop) -> None:
    make_checkpoint(workshop.folder / "model", "llama")
    workshop.manifest.write_text(
        "version: 1\nname: r\nstages:\n  download: {uses: download, with: {path: model}}\n"
        "  estimate: {uses: estimate, inputs: download, with: {dtypes: [float32]}}\n"
        "  save:\n    uses: save\n    inputs: {reports: [estimate]}\n"
        "    with:\n      to: dist\n      card: {license: mit}\n"
    )
    done = workshop.command("plan", "recipe.yaml")
    assert done.returncode == 2
    assert "recipe.yaml:11:13: save: card is the metadata of a model card, and no model is saved" in done.stderr
    assert "wire inputs: model, or leave it out" in done.stderr
    workshop.manifest.write_text(
        workshop.manifest.read_text().replace("{reports: [estimate]}", "{model: download, reports: [estimate]}")
    )
    assert workshop.command("plan", "recipe.yaml").returncode == 0
