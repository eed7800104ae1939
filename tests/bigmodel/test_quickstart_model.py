"""The model that ships with the repository is a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigpipe.bigmodel.checkpoint import open_checkpoint

MODELS = Path(__file__).parents[2] / "models"
QUICKSTART = MODELS / "quickstart"


def test_it_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in QUICKSTART.iterdir()) < 4_000_000
    checkpoint = open_checkpoint(QUICKSTART)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float16"}
    assert checkpoint.config is not None
    assert checkpoint.config["architectures"] == ["OPTForCausalLM"]
    # 4-bit layers of bitsandbytes want rows of whole blocks on a CPU.
    assert checkpoint.config["hidden_size"] % 64 == checkpoint.config["ffn_dim"] % 64 == 0


def test_quantization_has_a_measured_cost_that_the_readme_states() -> None:
    numbers = json.loads((MODELS / "quickstart.json").read_text())
    measured = numbers["perplexity"]
    assert measured["float16"] < measured["int8"] < measured["nf4"]
    readme = (QUICKSTART / "README.md").read_text()
    for scheme in ("int8", "nf4"):
        assert f"| {scheme} | {measured[scheme]:.2f} |" in readme


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_writes_like_documentation() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    text = "Return the naïve value of  x.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.padding_side == "left"
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    prompts = ["Raise ValueError if", "Open the file and", "Create a new"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    written = model.generate(**batch, max_new_tokens=12, do_sample=False, repetition_penalty=1.2)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    words = {word.strip(".,\n") for text in texts for word in text.split()}
    assert {"exception", "file", "raised"} <= words, texts
