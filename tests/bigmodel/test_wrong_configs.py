"""What a config, a tokenizer or a class of one's own says wrongly is told as such, and what plan takes is loaded."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.models import make_checkpoint

from bigpipe.bigmodel.architecture import known_architecture, read_request
from bigpipe.bigmodel.architecture.instantiation import _answer
from bigpipe.bigmodel.execution import load
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import TaskOptions, find_task
from bigpipe.errors import BY_NAME, BigpipeError, InvalidCheckpoint, StageFailed, UsageError
from bigpipe.modules import foreign
from bigpipe.trust import Trust

WRONG: list[dict[str, Any]] = [
    {"max_position_embeddings": 128.0},
    {"max_position_embeddings": "128"},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": 1},
    {"attention_dropout": 0},
    {"hidden_size": "32"},
    {"num_attention_heads": 5},
    {"hidden_act": "siluu"},
    {"hidden_act": None},
    {"rope_parameters": None, "rope_scaling": "yarn"},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "yarm", "rope_theta": 10000.0, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": "4"}},
    {"rope_theta": "1e6", "rope_parameters": None},
    {"pad_token_id": 4096},
    {"pad_token_id": -1},
    {"pad_token_id": "0"},
    {"eos_token_id": [2, 3]},
    {"eos_token_id": "</s>"},
    {"bos_token_id": [1]},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": [None]},
    {"architectures": ["LlamaForCausalLM", "Other"]},
    {"tie_word_embeddings": "false"},
    {"use_cache": "yes"},
    {"initializer_range": None},
    {"vocab_size": None},
    {"layer_types": ["full_attention"]},
    {"torch_dtype": "float13", "dtype": None},
    {"id2label": ["a", "b"]},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", vocab_size=264)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "-".join(f"{name}={value}" for name, value in wrong.items()))
def test_a_config_is_used_or_refused_with_its_cause_and_what_is_planned_is_loaded(
    path: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    config = {**json.loads((path / "config.json").read_bytes()), **wrong}
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = known_architecture(config)
    answer = known.as_json() if known else _answer(read_request(config))
    try:
        load(tmp_path)
        loaded = None
    except BigpipeError as error:
        loaded = error
    if "error" in answer:
        assert issubclass(BY_NAME[answer["error"]], InvalidCheckpoint | UsageError)
        assert answer["cause"]
        assert loaded is not None
    else:
        assert loaded is None or "dtype" in str(loaded)


def test_the_field_that_is_wrong_is_named(path: Path) -> None:
    config = {**json.loads((path / "config.json").read_bytes()), "max_position_embeddings": 128.0}
    assert known_architecture(config) is None
    answer = _answer(read_request(config))
    assert answer["error"] == "InvalidCheckpoint"
    assert "max_position_embeddings" in answer["cause"]
    assert "\n" not in answer["cause"]


@pytest.mark.parametrize("content", ["{", "[]", '{"num_return_sequences": 3}', '{"max_new_tokens": -1}', '"text"'])
def test_a_broken_generation_config_is_named(path: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json cannot be used"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"x": 1}}'),
    ],
)
def test_a_broken_tokenizer_is_named_or_works(path: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    with suppress(UsageError):
        find_task("text-generation", Sources()).bind(load(path), tmp_path, TaskOptions(), Sources())


CLASS = """
import torch
{top}
class Own(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        {body}
        self.layer = torch.nn.Linear(width, width)

def task(model, rows): return [{{}} for row in rows]
"""


@pytest.mark.parametrize(
    ("top", "body", "config", "cause"),
    [
        ("", "raise KeyError('width')", {}, r"KeyError: 'width' \(.*owns_\d+\.py:7\)"),
        ("", "assert width > 9", {}, r"AssertionError \(.*owns_\d+\.py:7\)"),
        ("", "pass", {"wdith": 5}, r"TypeError: .*'wdith'"),
        ("1 / 0", "pass", {}, r"ZeroDivisionError: division by zero \(.*owns_\d+\.py:3\)"),
        ("import notthere", "pass", {}, "needs a library: No module named 'notthere'"),
        ("torch.notthere", "pass", {}, "notthere"),
    ],
)
def test_a_class_of_ones_own_says_where_it_failed(
    tmp_path: Path, top: str, body: str, config: dict[str, Any], cause: str
) -> None:
    module = f"owns_{abs(hash((top, body, str(config)))) % 10**6}"
    (tmp_path / f"{module}.py").write_text(CLASS.format(top=top, body=body))
    sources = Sources(trust=Trust((module,)), base=tmp_path)
    request = read_request({}, custom={"class": f"{module}:Own", "config": config}, sources=sources)
    answer = _answer(request)
    assert answer["error"] in ("InvalidCheckpoint", "UsageError")
    assert re.search(cause, answer["cause"])
    if top:
        with pytest.raises(UsageError, match=r"cannot be imported|No module named"):
            find_task(f"{module}:task", sources)


def test_what_ran_out_stays_what_it_is() -> None:
    for error in (
        MemoryError(),
        OSError(28, "No space left"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ):
        with pytest.raises(type(error)), foreign("a thing", "a cure", StageFailed):
            raise error
    said = r"a thing: ValueError: one two \(.*test_wrong_configs\.py:\d+\)"
    with pytest.raises(StageFailed, match=said), foreign("a thing", "a cure", StageFailed):
        raise ValueError("one\n  two")
