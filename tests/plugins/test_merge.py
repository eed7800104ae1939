"""`merge` in recipes: an adapter from a directory or a Hub, planned to the byte, merged, cached, refused early."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import loaded, merged_by_peft, tuned, with_adapter
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint, tiny_tokenizer
from support.workshop import Workshop, statuses
from transformers import AutoTokenizer

import bigpipe
from bigpipe.errors import ManifestError

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

FILE = "lora/adapter_model.safetensors"
RECIPE = """\
version: 1
name: tuned
stages:
  base: {uses: download, with: {path: base}}
  lora: {uses: download, with: LORA}
  merge:
    uses: merge
    inputs: {model: base, adapter: lora}
    with: {max_shard_size: 60KB}
"""


@pytest.fixture
def shop(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = make_checkpoint(workshop.folder / "base", "llama", dtype="bfloat16")
    tuned(base, workshop.folder / "lora", r=4, target_modules=["q_proj", "down_proj"])
    workshop.manifest.write_text(RECIPE.replace("LORA", "{path: lora}"))
    return workshop


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


def assert_planned(plan: dict[str, Any], result: Any) -> None:
    planned, node = plan["nodes"]["merge"], result.nodes["merge"]
    assert planned["forecast"]["metrics"] == node.record.metrics, "known before it runs"


def test_a_merge_is_planned_to_the_byte_and_equals_peft(shop: Workshop) -> None:
    plan = shop.json("plan", "recipe.yaml")
    result = shop.run()
    assert statuses(result) == {"base": "succeeded", "lora": "succeeded", "merge": "succeeded"}
    assert_planned(plan, result)
    assert result.nodes["merge"].record.metrics["merged"] == 4
    made = loaded(result.path("merge")).state_dict()
    wanted = merged_by_peft(shop.folder / "base", shop.folder / "lora").state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
    assert result.nodes["lora"].record.artifact_type == "adapter"
    assert result.nodes["base"].record.artifact_type == "checkpoint"
    assert sorted(file.name for file in result.path("lora").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert set(statuses(shop.run()).values()) == {"cached"}
    tuned(shop.folder / "base", shop.folder / "lora", seed=9, r=4, target_modules=["q_proj", "down_proj"])
    assert statuses(shop.run()) == {"base": "cached", "lora": "succeeded", "merge": "succeeded"}


@pytest.mark.parametrize("whose", ["adapter", "model"])
def test_a_merged_model_speaks_as_its_adapter_was_trained(shop: Workshop, whose: str) -> None:
    """With all that belongs to the one tokenizer, and nothing of the other's."""
    for folder in ("base", "lora"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = f"{folder}: {{{{ messages }}}}"
        tokenizer.save_pretrained(shop.folder / folder)
    (shop.folder / "base" / "added_tokens.json").write_text("{}")
    recipe = shop.manifest.read_text().replace("60KB}", f"60KB, tokenizer: {whose}}}")
    shop.manifest.write_text(recipe)
    plan = bigpipe.plan(shop.manifest)
    said = "the tokenizer is the adapter's, and so is the chat template, where it brings one"
    assert (said in plan.nodes["merge"].forecast.details) == (whose == "adapter")
    shop.manifest.write_text(UNPLACED)
    untaken = "tokenizer and chat template are the model's, not the adapter's: `merge` takes those"
    assert untaken in bigpipe.plan(shop.manifest).nodes["generate"].forecast.details
    shop.manifest.write_text(recipe)
    merged = shop.run(check=True).path("merge")
    told = AutoTokenizer.from_pretrained(merged)
    assert told.chat_template.startswith("lora" if whose == "adapter" else "base")
    assert (merged / "added_tokens.json").exists() == (whose == "model")
    bigpipe.merge_adapter(shop.folder / "base", shop.folder / "lora", shop.folder / "by-hand", tokenizer=whose)  # type: ignore[arg-type]
    assert {path.name for path in (shop.folder / "by-hand").glob("[!m]*")} == {
        path.name for path in merged.glob("[!m]*")
    }


@pytest.mark.parametrize("within", [False, True])
def test_a_model_keeps_its_chat_template_where_the_adapter_has_none(shop: Workshop, within: bool) -> None:
    for folder in ("base", "lora"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "base: {{ messages }}" if folder == "base" else None
        tokenizer.save_pretrained(shop.folder / folder, save_jinja_files=not within)
    assert (shop.folder / "base" / "chat_template.jinja").exists() != within
    bigpipe.merge_adapter(shop.folder / "base", shop.folder / "lora", shop.folder / "merged")
    assert AutoTokenizer.from_pretrained(shop.folder / "merged").chat_template == "base: {{ messages }}"


def test_an_adapter_comes_from_any_tool(shop: Workshop) -> None:
    copying = "import sys, shutil; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
    made = f"uses: command, with: {{argv: ['${{python}}', -c, '{copying}', lora, '${{out}}'], files: [lora], PRODUCES}}"
    text = RECIPE.replace("uses: download, with: LORA", made)
    shop.manifest.write_text(text.replace("PRODUCES", "produces: directory"))
    with pytest.raises(ManifestError) as caught:
        shop.run()
    (problem,) = caught.value.problems  # the base is wired already, and is no adapter
    assert problem.cause == "lora (command) gives a directory, but port 'adapter' of merge takes an adapter"
    assert problem.cure == "wire a stage that gives an adapter"
    shop.manifest.write_text(text.replace("PRODUCES", "produces: adapter"))
    assert set(statuses(shop.run()).values()) == {"succeeded"}
    assert shop.run().nodes["lora"].record.artifact_type == "adapter"
    shop.manifest.write_text(shop.manifest.read_text().replace("60KB", "50KB"))
    foreseen = shop.json("plan", "recipe.yaml")["nodes"]["merge"]["forecast"]["metrics"]
    assert foreseen["merged"] == 4, "it is known what the adapter changes"


def test_an_adapter_comes_from_a_hub(shop: Workshop, server: LoopbackHub, tmp_path: Path) -> None:
    """Before anything is fetched its config and the header of its weights are known."""
    tuned(shop.folder / "base", shop.folder / "lora", r=256, target_modules=["q_proj", "down_proj"])
    files = {**files_of(shop.folder / "lora"), "tokenizer.json": b"{}", "optimizer.pt": b"x"}
    server.create("org/lora", files)
    environment = server.environment(tmp_path / "hf")
    shop.manifest.write_text(RECIPE.replace("LORA", "{repo: org/lora}"))
    done = shop.command("plan", "recipe.yaml", "--json", **environment)
    assert json.loads(done.stdout)["nodes"]["merge"]["forecast"]["metrics"]["merged"] == 4, done.stderr
    assert server.bytes_sent("adapter_model.safetensors") < 70_000 < (shop.folder / FILE).stat().st_size
    done = shop.command("run", "recipe.yaml", "--json", **environment)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)["nodes"]["lora"]["path"]
    assert sorted(file.name for file in Path(there).iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_an_adapter_for_another_model_is_refused_by_the_plan(shop: Workshop) -> None:
    other = make_checkpoint(shop.folder / "other", "llama", hidden_size=48)
    tuned(other, shop.folder / "lora", r=4, target_modules=["q_proj"])
    done = shop.command("plan", "recipe.yaml")
    assert done.returncode == 2
    assert "recipe.yaml:8:" in done.stderr, "the place of the port"
    assert "was made for another model" in done.stderr
    assert "[4, 48]" in done.stderr


@pytest.mark.parametrize(("wrong", "said"), [("model: lora, adapter: lora", "is not a model by itself"),
                                             ("model: base, adapter: base", "no adapter_config.json")])  # fmt: skip
def test_one_in_place_of_the_other_is_refused_by_the_plan(shop: Workshop, wrong: str, said: str) -> None:
    shop.manifest.write_text(shop.manifest.read_text().replace("model: base, adapter: lora", wrong))
    done = shop.command("plan", "recipe.yaml")
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert "recipe.yaml:8:" in done.stderr


def test_several_adapters_are_weighed(shop: Workshop) -> None:
    tuned(shop.folder / "base", shop.folder / "second", seed=3, r=2, target_modules=["q_proj"])
    text = shop.manifest.read_text().replace("  merge:", "  second: {uses: download, with: {path: second}}\n  merge:")
    text = text.replace("adapter: lora}", "adapter: [lora, second]}").replace("60KB", "60KB, weights: [1, 0.5]")
    plan = shop.json("plan", "recipe.yaml") if shop.manifest.write_text(text) else {}
    result = shop.run()
    assert_planned(plan, result)
    assert result.nodes["merge"].record.metrics["merged"] == 4
    shop.manifest.write_text(text.replace("[1, 0.5]", "[1]"))
    done = shop.command("plan", "recipe.yaml")
    assert (done.returncode, "for 2 adapters" in done.stderr) == (2, True), done.stderr


INFER = """\
version: 1
stages:
  base: {uses: download, with: {path: base}}
  lora: {uses: download, with: {path: lora}}
  place:
    uses: dispatch
    inputs: {model: base, adapter: lora}
    with: {device_map: {"": disk}}
  generate:
    uses: distributed-infer
    inputs: {model: base, placement: place, adapter: lora}
    with: {task: text-generation, prompts: ["Hello", "a b c", "Once"], max_new_tokens: 6, dtype: float32}
"""


UNPLACED = re.sub(r"  place:\n.*?  generate:", "  generate:", INFER, flags=re.DOTALL).replace("placement: place, ", "")


def test_a_streamed_model_generates_with_its_adapter_what_peft_generates(shop: Workshop) -> None:
    from transformers import AutoTokenizer

    base = make_checkpoint(shop.folder / "base", "llama")
    tuned(base, shop.folder / "lora", r=4, target_modules=["q_proj", "down_proj"])
    shop.manifest.write_text(INFER)
    plan = shop.json("plan", "recipe.yaml")
    held = 4 * 4 * 2 * ((32 + 32) + (64 + 32))
    assert any("adapter: " in line for line in plan["nodes"]["place"]["forecast"]["details"])
    alone = INFER.replace(", adapter: lora", "")
    shop.manifest.write_text(alone)
    without = shop.json("plan", "recipe.yaml")
    for node in ("place", "generate"):
        ram = [each["nodes"][node]["forecast"]["ram"] for each in (plan, without)]
        assert ram[0] - ram[1] == held, "its bytes count"
    shop.manifest.write_text(INFER)
    result = shop.run()
    assert result.status == "succeeded", result.errors
    lines = (result.path("generate") / "results.jsonl").read_text().splitlines()
    model, tokenizer = with_adapter(base, shop.folder / "lora"), AutoTokenizer.from_pretrained(base)
    for line in map(json.loads, lines):
        inputs = tokenizer(line["prompt"], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert line["text"].endswith(tokenizer.decode(made, skip_special_tokens=True))
    tuned(base, shop.folder / "lora", seed=8, r=4, target_modules=["q_proj", "down_proj"])
    again = {name: node["action"] for name, node in shop.json("plan", "recipe.yaml")["nodes"].items()}
    assert again["base"] == "cached"
    assert again["generate"] != "cached", "another adapter is another key"


def test_an_adapter_for_another_model_does_not_come_to_inference(shop: Workshop) -> None:
    wide = make_checkpoint(shop.folder / "other", "llama", hidden_size=48)
    tuned(wide, shop.folder / "lora", r=4, target_modules=["q_proj"])
    for wired, place in ((INFER, "recipe.yaml:7:"), (INFER.replace("base, adapter: lora", "base"), "recipe.yaml:11:")):
        shop.manifest.write_text(wired)
        done = shop.command("plan", "recipe.yaml")
        assert (done.returncode, place in done.stderr) == (2, True), done.stderr
        assert "was made for another model" in done.stderr


def test_merging_into_a_quantized_model_is_planned(shop: Workshop) -> None:
    """How many tensors change is known; the bytes are told by the run."""
    text = shop.manifest.read_text().replace("model: base,", "model: packed,")
    packed = "  packed: {uses: quantize, inputs: base, with: {scheme: int8}}\n  merge:"
    plan = shop.json("plan", "recipe.yaml") if shop.manifest.write_text(text.replace("  merge:", packed)) else {}
    assert plan["nodes"]["merge"]["forecast"]["metrics"] == {"merged": 4}
    result = shop.run()
    assert result.status == "succeeded", result.errors
    files = [file.stat().st_size for file in result.path("merge").glob("*.safetensors")]
    assert result.nodes["merge"].record.metrics == {"merged": 4, "bytes": sum(files)}
