"""A class of one's own, the one that ships with the recipes: through every kind, saved, and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.models import tiny_tokenizer
from support.workshop import statuses

from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE
from bigpipe.plugins.download import OWN_CLASS

MANIFESTS = Path(__file__).parents[1] / "manifests"

RECIPE = """\
version: 1
name: own
trust: {modules: [gpt2_own]}
params: {scheme: int8}
stages:
  download:
    uses: download
    with:
      path: checkpoint
      architecture:
        class: gpt2_own:GPT
        config: {model_type: gpt-nano, vocab_size: 512, block_size: 64}
        no_split_module_classes: [Block]
  shard: {uses: shard, inputs: download, with: {max_shard_size: 100KB}}
  quantize: {uses: quantize, inputs: shard, with: {scheme: "${params.scheme}", dtype: float32}}
  plain:
    uses: dispatch
    inputs: shard
    with: {device_map: auto, max_memory: {cpu: 300KB, disk: 1GB}, no_split_module_classes: [Block]}
  dispatch:
    uses: dispatch
    inputs: quantize
    with: {device_map: auto, max_memory: {cpu: 1GiB}}
  streamed:
    uses: distributed-infer
    inputs: {model: shard, placement: plain}
    with: &task
      task: gpt2_own:complete
      prompts: ["Return the", "A module"]
      max_new_tokens: 5
      generation: {tokenizer: TOKENIZER}
  generate:
    uses: distributed-infer
    inputs: {model: quantize, placement: dispatch}
    with: *task
  save: {uses: save, inputs: {model: shard, results: streamed}, with: {to: dist}}
"""


OWN = "architecture: {class: gpt2_own:GPT, config: {model_type: gpt-nano, vocab_size: 512, block_size: 64}}"
LOOKED_AT = """\
version: 1
name: looked-at
trust: {modules: [gpt2_own]}
stages:
  download: {uses: download, with: {path: checkpoint, WITH}}
  look:
    uses: command
    inputs: {model: download}
    with: {argv: [cp, "${input.model}/bigpipe_architecture.json", "${out}"], produces: report}
"""


@pytest.fixture
def own(workshop, monkeypatch):
    import torch
    from safetensors.torch import save_file

    shutil.copy(MANIFESTS / "gpt2_own.py", workshop.folder)
    monkeypatch.syspath_prepend(str(workshop.folder))
    import gpt2_own

    torch.manual_seed(0)
    model = gpt2_own.GPT(_config(gpt2_own))
    (workshop.folder / "checkpoint").mkdir()
    save_file(model.state_dict(), workshop.folder / "checkpoint/model.safetensors")
    tiny_tokenizer().save_pretrained(workshop.folder / "tokenizer")
    workshop.text = RECIPE.replace("TOKENIZER", str(workshop.folder / "tokenizer"))
    workshop.model = model
    return workshop


def test_through_every_kind_and_loaded_again(own):
    import gpt2_own
    import torch

    import bigpipe

    result = own.run(own.text)
    assert result.exit_code == 0, [str(error) for error in result.errors]
    placement = json.loads((result.path("plain") / "placement.json").read_text())
    assert set(placement["device_map"].values()) == {"cpu", "disk"}
    expected = gpt2_own.complete(
        own.model, [{"prompt": "Return the"}, {"prompt": "A module"}],
        tokenizer=str(own.folder / "tokenizer"), max_new_tokens=5,
    )  # fmt: skip
    rows = [json.loads(line) for line in (result.path("streamed") / "results.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in expected]
    loaded = bigpipe.load(own.folder / "dist", model=gpt2_own.GPT(_config(gpt2_own)))
    tokens = torch.tensor([[3, 5, 7]])
    with torch.inference_mode():
        assert torch.equal(loaded(tokens), own.model(tokens))


@pytest.mark.parametrize("said", ["by the recipe", "by the directory"])
def test_all_that_is_made_with_a_class_is_made_again_when_it_is_edited(own, said):
    text = LOOKED_AT.replace("WITH", OWN if said == "by the recipe" else "variant: null")
    if said == "by the directory":
        told = {"class": "gpt2_own:GPT", "config": {"model_type": "gpt-nano", "vocab_size": 512, "block_size": 64}}
        (own.folder / "checkpoint/bigpipe_architecture.json").write_text(json.dumps(told))
    assert statuses(own.run(text)) == {"download": "succeeded", "look": "succeeded"}
    assert statuses(own.run(text)) == {"download": "cached", "look": "cached"}
    with (own.folder / "gpt2_own.py").open("a") as file:
        file.write("\nBUG = None\n")
    result = own.run(text)
    assert statuses(result) == {"download": "succeeded", "look": "succeeded"}
    told = json.loads((result.path("download") / "bigpipe_architecture.json").read_text())
    assert (told["class"], told["source"][:7]) == ("gpt2_own:GPT", "sha256:")
    assert OWN_CLASS == ARCHITECTURE_FILE


def _config(gpt2_own):
    config = gpt2_own.GPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = "gpt-nano", 512, 64
    return config


def test_nothing_runs_that_the_recipe_does_not_trust(own):
    own.manifest.write_text(own.text.replace("trust: {modules: [gpt2_own]}", "trust: {}"))
    done = own.command("plan", "recipe.yaml")
    assert done.returncode == 2
    assert "trust" in done.stderr
    assert "Traceback" not in done.stderr
