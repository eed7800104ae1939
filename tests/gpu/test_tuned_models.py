"""Adapters that are trained, judged and merged on a GPU: what a plain peft script gives there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import tuned
from support.models import make_checkpoint

import bigpipe
from bigpipe.bigmodel.placement import Device
from bigpipe.bigmodel.quantization import quantize_checkpoint

pytest.importorskip("peft")
from support.plainly import train_plainly
from support.tuning import train, write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),  # parameters did
    pytest.mark.filterwarnings("ignore:Failed to load CPU gemm_4bit_forward"),
]
QUICKSTART = Path(__file__).parents[2] / "models" / "quickstart"
ROWS = [
    "the cat sat on the mat", "hello world", "paris is in france", "a cat is in paris, and so is a mat",
    "the world is a mat on which cats sit", "hello, cat!", "on and on",
]  # fmt: skip
LOST = {"download": 1e-3, "int8": 0.05, "nf4": 0.2}
"""How much of the perplexity, at most, goes when the merged weights are packed again."""
RECIPE = """\
version: 1
name: tuned
stages:
  download: {{uses: download, with: {{path: "{model}"}}}}
  quantize: {{uses: quantize, inputs: download, with: {{scheme: {scheme}}}}}
  finetune:
    uses: finetune
    inputs: {source}
    with: {{data: text.txt, max_steps: 8, batch_size: 2, learning_rate: 0.003, max_length: 64, save_steps: 3}}
  tuned:
    uses: evaluate
    inputs: {{model: {source}, adapter: finetune, baseline: download}}
    with: {{data: text.txt, sequence_length: 64, dtype: float32}}
  merge: {{uses: merge, inputs: {{model: {source}, adapter: finetune}}}}
  merged: {{uses: evaluate, inputs: merge, with: {{data: text.txt, sequence_length: 64, dtype: float32}}}}
"""


def stored(folder: Path, kind: str) -> Path:
    """A tiny checkpoint, float32 or quantized."""
    plain = make_checkpoint(folder / "plain", "opt", hidden_size=64, ffn_dim=128, word_embed_proj_dim=64)
    if kind == "plain":
        return plain
    pytest.importorskip("bitsandbytes")
    quantize_checkpoint(plain, folder / kind, scheme=kind)
    return folder / kind


def on_gpu(peak: dict[str, Any], device: str) -> bool:
    return device == "cpu" or int(peak["0"]) > 0


@pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
def test_losses_are_those_of_a_plain_script(tmp_path: Path, device: str, kind: str) -> None:
    """Of every step, with dropout, which a GPU draws from random numbers of its own."""
    model = stored(tmp_path, kind)
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 40, "lora_dropout": 0.1}
    made = bigpipe.finetune(
        model, ROWS, tmp_path / "ours", dtype="float32", seed=3, max_steps=6, learning_rate=1e-3, batch_size=2, **lora
    )
    expected = train_plainly(
        model, tmp_path / "theirs", ROWS, steps=6, learning_rate=1e-3, batch_size=2, seed=3,
        quantized=kind != "plain", device=device, **lora,
    )  # fmt: skip
    assert made.losses == pytest.approx(expected, rel=1e-4)
    assert on_gpu(dict(made.peak), device)


def test_random_numbers_of_the_device_go_on_as_if_none_had_been_drawn(tmp_path: Path, device: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    bigpipe.finetune(stored(tmp_path, "plain"), ROWS, tmp_path / "out", max_steps=1, batch_size=2)
    assert torch.equal(torch.rand(3, device=device), expected)


@pytest.mark.parametrize("away", ["cpu", "disk"])
def test_an_adapter_of_an_embedding_that_lies_away(tmp_path: Path, device: str, home: Device, away: Device) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", dtype="float16")
    adapter = tuned(base, tmp_path / "lora", r=4, target_modules=["embed_tokens", "q_proj"])
    tokens = torch.arange(5, 25).view(2, 10).to(device)
    whole = bigpipe.load(base, {"": home}, adapter=adapter, dtype="float16")
    parts = bigpipe.load(base, {"": home, "model.embed_tokens": away}, adapter=adapter, dtype="float16")
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(parts(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
def test_the_loss_falls_as_it_is_computed_by_itself(tmp_path: Path, device: str, kind: str) -> None:
    """In the dtype that is chosen for the device."""
    options: dict[str, Any] = {"max_steps": 40, "learning_rate": 3e-2, "batch_size": 2}
    made = bigpipe.finetune(stored(tmp_path, kind), ROWS, tmp_path / "out", **options)
    assert sum(made.losses[-7:]) / 7 < sum(made.losses[:7]) / 7 - 0.3
    assert on_gpu(dict(made.peak), device)


@pytest.mark.parametrize("source", ["download", "int8", "nf4"])
def test_a_recipe_tunes_judges_and_merges(tmp_path: Path, device: str, source: str) -> None:
    if source != "download":
        pytest.importorskip("bitsandbytes")
    text = (QUICKSTART.parents[1] / "ARCHITECTURE.md").read_text().splitlines()
    (tmp_path / "text.txt").write_text("\n".join(line for line in text if len(line) > 40)[:4000])
    scheme, named = ("int8", source) if source == "download" else (source, "quantize")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=QUICKSTART, scheme=scheme, source=named))
    done = bigpipe.run(recipe, ["merged", "tuned"], store=tmp_path / "store", check=True)
    tuned, merged = (dict(done.nodes[name].metrics) for name in ("tuned", "merged"))
    assert tuned["perplexity_ratio"] < 0.9  # it learnt the text that it is asked about
    assert merged["perplexity"] == pytest.approx(tuned["perplexity"], rel=LOST[source])
    for node in ("finetune", "tuned", "merged"):
        assert on_gpu(dict(done.nodes[node].metrics)["peak"], device)


def test_a_training_that_is_killed_goes_on_with_the_random_numbers_that_came_next(tmp_path: Path, device: str) -> None:
    model, rows = make_checkpoint(tmp_path / "model", "opt"), write_rows(tmp_path / "rows.jsonl", ROWS)
    train(tmp_path / "whole", model, rows)
    assert train(tmp_path / "killed", model, rows, kill_after=5)[0] == 0
    assert train(tmp_path / "killed", model, rows)[0] == 4  # the last state
    whole, killed = (
        json.loads((tmp_path / side / "rank-0/measured.json").read_bytes()) for side in ("whole", "killed")
    )
    assert killed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert on_gpu(killed["peak"], device)
