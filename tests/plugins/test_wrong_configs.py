"""No kind calls a bug what a config, a tokenizer, a class or a function of the user's says wrongly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models import make_checkpoint
from support.workshop import Workshop

RECIPE = """version: 1
name: wrong
{trust}
stages:
  download: {{uses: download, with: {{path: model{architecture}}}}}
  estimate: {{uses: estimate, inputs: download, with: {{dtypes: [float32]}}}}
  shard: {{uses: shard, inputs: download, with: {{max_shard_size: 100KB}}}}
  quantize: {{uses: quantize, inputs: download, with: {{scheme: int8}}}}
  dispatch: {{uses: dispatch, inputs: download, with: {{max_memory: {{cpu: 1GiB}}}}}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {{task: "{task}", prompts: [a], max_new_tokens: 2}}
"""
OWN = """
import torch

class Own(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(width["wide"], 4)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=264)


def said_by(workshop: Workshop, node: str) -> str:
    """What plan and, where plan lets it through, the run say of a node."""
    planned = workshop.command("plan", str(workshop.manifest), node)
    text = planned.stdout + planned.stderr
    assert planned.returncode in (0, 2, 6), text
    if planned.returncode == 0:
        ran = workshop.command("run", str(workshop.manifest), node)
        text += ran.stdout + ran.stderr
        assert ran.returncode in (0, 2, 6), text
    assert "Traceback" not in text
    assert "bug" not in text.replace("debug", "")
    return text if planned.returncode else f"run: {text}"


@pytest.mark.parametrize("wrong", [{"max_position_embeddings": 128.0}, {"hidden_act": "siluu"}], ids=str)
def test_each_kind_names_a_wrong_config_at_plan(workshop: Workshop, model: Path, wrong: dict[str, Any]) -> None:
    shutil.copytree(model, workshop.folder / "model")
    file = workshop.folder / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **wrong}))
    workshop.manifest.write_text(RECIPE.format(trust="", architecture="", task="text-generation"))
    for node in ("estimate", "quantize", "dispatch", "generate"):
        said = said_by(workshop, node)
        assert not said.startswith("run: ")
        assert "recipe.yaml:" in said
        assert str(*wrong) in said or str(*wrong.values()) in said


def test_a_class_of_ones_own_that_fails_is_named_with_its_line(workshop: Workshop, model: Path) -> None:
    shutil.copytree(model, workshop.folder / "model")
    (workshop.folder / "ownclass.py").write_text(OWN)
    architecture = ", architecture: {class: 'ownclass:Own', config: {width: 4}}"
    trust = "trust: {modules: [ownclass]}"
    workshop.manifest.write_text(RECIPE.format(trust=trust, architecture=architecture, task="ownclass:gone"))
    for node in ("estimate", "dispatch"):
        assert "ownclass.py:7" in said_by(workshop, node)
    assert "ownclass.py" in said_by(workshop, "generate")


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "[1]"), ("generation_config.json", '{"num_return_sequences": 3}')]
)
def test_side_files_that_are_broken_are_named(workshop: Workshop, model: Path, name: str, content: str) -> None:
    shutil.copytree(model, workshop.folder / "model")
    (workshop.folder / "model" / name).write_text(content)
    workshop.manifest.write_text(RECIPE.format(trust="", architecture="", task="text-generation"))
    said = said_by(workshop, "generate")
    assert "tokenizer that can be used" in said or name in said
