"""Tokenizers of many classes go from a repository through download, shard and save, and read texts as before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.models import make_checkpoint
from support.real import transformers_quietly
from support.vocabularies import BROKEN, PUBLISHED, TEXTS
from support.workshop import environment

import bigpipe
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import Row, TaskOptions, find_task
from bigpipe.bigmodel.tasks.tokenizing import encode, load_tokenizer
from bigpipe.errors import UsageError

SOURCES = Sources(trust_remote_code=True)
QUICK = {
    "bert", "tokens added", "roberta", "gpt2", "unigram", "llama", "clip", "phobert", "bertweet", "prophetnet", "myt5",
    "byt5", "several chat templates", "code of its own",
}  # fmt: skip
"""Those that are tried whenever tests run."""


def names(part: str = "") -> list[Any]:
    """Those with `part` in their names, as parameters of a test."""
    found = [name for name in PUBLISHED if part in name]
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in found]


pytestmark = pytest.mark.filterwarnings("ignore:.*byte_maps.json:ResourceWarning")  # MyT5's own class leaves it open
CHAT = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """`published/NAME` of each that is tried, and `saved/NAME`: brought from a Hub, sharded and saved by a recipe."""
    folder = tmp_path_factory.mktemp("tokenizers")
    transformers_quietly()
    tried = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    params = [item.params["name"] for item in tried]
    stages: dict[str, Any] = {}
    with LoopbackHub() as hub:
        for number, name in enumerate(name for name in dict.fromkeys(params) if name in PUBLISHED):
            hub.create(f"org/{number}", files_of(PUBLISHED[name].make(folder / "published" / name)))
            stages[f"download-{number}"] = stage("download", repo=f"org/{number}")
            stages[f"shard-{number}"] = stage("shard", f"download-{number}", max_shard_size="50KB", format="bin")
            stages[f"save-{number}"] = stage("save", f"shard-{number}", to=f"saved/{name}")
        recipe = {"version": 1, "name": "tokenizers", "stages": stages}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        done = subprocess.run(
            [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--keep-going"], cwd=folder, check=False,
            env={**environment(folder), **hub.environment(folder / "hf")}, capture_output=True, text=True,
        )  # fmt: skip
    assert "Traceback" not in done.stderr
    return folder


def stage(kind: str, model: str | None = None, **params: str) -> dict[str, Any]:
    inputs: dict[str, Any] = {"inputs": {"model": model}} if model else {}
    return {"uses": kind, **inputs, "with": params}


def original(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("name", names())
def test_every_file_arrives_as_it_was(folder: Path, name: str) -> None:
    published, saved = folder / "published" / name, folder / "saved" / name
    for file in (path for path in published.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        assert (saved / file.relative_to(published)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", names())
def test_texts_become_the_same_tokens(folder: Path, name: str) -> None:
    wanted, found = (
        original(folder / "published" / name),
        load_tokenizer(folder / "saved" / name, SOURCES, TaskOptions().bounded),
    )
    assert type(found).__name__ == type(wanted).__name__
    for text in TEXTS:
        tokens = encode(found, [Row(0, text, {})], TaskOptions().bounded)[0]["input_ids"]
        assert tokens == wanted(text)["input_ids"]
        assert len(set(tokens)) > 1


@pytest.mark.parametrize("name", names("chat"))
def test_messages_become_the_same_tokens(folder: Path, name: str) -> None:
    wanted, found = (
        original(folder / "published" / name),
        load_tokenizer(folder / "saved" / name, SOURCES, TaskOptions().bounded),
    )
    tokens = encode(found, [Row(0, CHAT, {})], TaskOptions().bounded)[0]["input_ids"]
    assert tokens == wanted.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert wanted.decode(tokens) == "<user>hello world<a>"
    assert found.chat_template == wanted.chat_template


@pytest.mark.parametrize("name", names())
def test_the_model_answers_as_the_original(folder: Path, name: str) -> None:
    """Text where it can be continued, else features."""
    saved, row = folder / "saved" / name, Row(0, TEXTS[0], {})
    published, kept = folder / "published" / name, bigpipe.load(saved)
    task = "text-generation" if kept.can_generate() else "feature-extraction"
    bound = find_task(task, SOURCES).bind(kept, saved, TaskOptions(max_new_tokens=6), SOURCES)
    assert bound([row])[0].payload == reference(published, row.prompt, task)


def reference(folder: Path, text: str, task: str) -> dict[str, Any]:
    """What transformers alone makes of it."""
    config = json.loads((folder / "config.json").read_bytes())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder)
    tokenizer = original(folder)
    inputs = tokenizer(text, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task == "feature-extraction":
            return {"features": model.base_model(**inputs).last_hidden_state[0].mean(0).tolist()}
        made = model.generate(**inputs, max_new_tokens=6, pad_token_id=tokenizer.pad_token_id or 0)[0]
    given = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return {"text": tokenizer.decode(made[given:], skip_special_tokens=True)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_is_broken_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    BROKEN[name](tmp_path)
    with pytest.raises(Exception):  # noqa: B017, PT011 transformers raises what it happens upon
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path, Sources(), TaskOptions().bounded)


def test_settings_that_no_text_survives_are_told_once(tmp_path: Path) -> None:
    """transformers loads such tokenizers, and fails at each text."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for odd in ({"model_max_length": "x"}, {"model_input_names": []}):
        file.write_text(json.dumps({**settings, **odd}))
        with pytest.raises(UsageError, match=rf"{re.escape(str(folder))} has a tokenizer that cannot be used") as error:
            load_tokenizer(folder, Sources(), TaskOptions().bounded)
        assert "tokenizer_config.json" in error.value.cure


def answers(folder: Path, *texts: str) -> list[Any]:
    """What the model continues them with, as one batch."""
    bound = find_task("text-generation", SOURCES).bind(
        bigpipe.load(folder), folder, TaskOptions(max_new_tokens=4), SOURCES
    )
    return [answer.payload["text"] for answer in bound([Row(number, text, {}) for number, text in enumerate(texts)])]


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    """The tokenizer was given tokens, and the model no rows for them."""
    make_checkpoint(tmp_path, "gpt2", vocab_size=100)
    assert len(answers(tmp_path, "!", "$%")) == 2
    with pytest.raises(ValueError, match="makes 'Ġ' token 224 of 260, and the model has 100 tokens"):
        answers(tmp_path, "! !")


def test_a_token_for_padding_needs_no_embedding(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt2", vocab_size=260)
    texts = ["hello", "hello world"]
    wanted = [answers(tmp_path, text)[0] for text in texts]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[PAD]"}))
    assert original(tmp_path).pad_token_id == 260
    assert answers(tmp_path, *texts) == wanted
