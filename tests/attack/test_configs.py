"""Configs and tokenizers made to hurt: refused by name and limit, before or while a class is built of them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from support.launching import Launched, make_job

from attack.templates import STAGE
from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.footprint.budgets import Workload
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks.arguments import check_values
from bigpipe.errors import BigpipeError, InvalidCheckpoint, UsageError
from bigpipe.trust import Limits, Trust

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
CONFIG = json.loads((QUICKSTART / "config.json").read_text())
COUNTED = {
    "num_hidden_layers": 1_000_000, "num_labels": 10**9, "n_layer": 10**7, "num_layers": 10**7, "encoder_layers": 10**6,
    "num_decoder_layers": 10**6, "num_local_experts": 10**6, "n_routed_experts": 10**6, "num_experts": 10**6,
    "depth": 10**6, "depths": [2, 10**6], "num_blocks": 10**6, "num_classes": 10**8,
    "text_config": {"num_hidden_layers": 10**6},
    "vision_config": {"num_hidden_layers": 10**6}, "decoder": {"n_layers": 10**6},
}  # fmt: skip
BUILT = {
    "num_hidden_layers": 150_000, "vocab_size": 10**18, "hidden_size": 2**62, "max_position_embeddings": 10**15,
    "ffn_dim": 10**18, "num_attention_heads": 0, "word_embed_proj_dim": -1, "pad_token_id": 10**12,
    "init_std": "x" * 1000,
    "activation_function": "os.system", "torch_dtype": "os", "architectures": ["os"], "model_type": "__main__",
    "id2label": {str(n): "x" for n in range(1000)}, "layerdrop": float("inf"), "dropout": -1, "num_labels": -5,
    "_name_or_path": "/etc/passwd", "attn_implementation": "evil/kernels", "auto_map": {"AutoConfig": "x.Y"},
    "quantization_config": {"quant_method": "x"}, "rope_scaling": {"type": "x"}, "tie_word_embeddings": "yes",
}  # fmt: skip
SMALL = Limits(seconds=40, memory=3 * 2**29)


def described(limits: Limits = SMALL, **fields: object) -> None:
    describe_architecture({**CONFIG, **fields}, sources=Sources(trust=Trust(limits=limits)))


@pytest.mark.parametrize("name", COUNTED)
def test_more_layers_than_any_model_has_are_refused_before_a_class_is_built(name):
    started = time.monotonic()
    with pytest.raises(InvalidCheckpoint, match="the config says") as caught:
        described(**{name: COUNTED[name]})
    assert "trust: {limits: {modules: 400000}}" in caught.value.cure
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "ffn_dim", "max_position_embeddings", "word_embed_proj_dim"]
)
def test_a_number_that_torch_does_not_take_is_refused_before_anything_is_reckoned_with_it(name):
    with pytest.raises(InvalidCheckpoint, match=f"the config says {name}: 9999"):
        described(**{name: int("9" * 400)})


@pytest.mark.parametrize("name", ["batch_size", "sequence_length", "lora_rank"])
def test_a_number_of_the_user_is_one_that_can_be_reckoned_with(name):
    with pytest.raises(UsageError, match=f"{name} is 9999"):
        Workload(**{name: int("9" * 400)})


@pytest.mark.attack
@pytest.mark.parametrize("name", BUILT)
def test_a_class_is_built_within_its_limits_or_refused(name):
    started = time.monotonic()
    error = None
    try:
        described(**{name: BUILT[name]})
    except BigpipeError as refused:
        error = refused
    assert error is None or (error.cause and error.cure)
    assert time.monotonic() - started < SMALL.seconds + 30


def test_the_limits_of_a_class_name_themselves():
    for limits, message in (
        (Limits(seconds=0.05), r"building the model's class takes more than 0\.05 s"),
        (Limits(memory=2**20), "building the model's class"),
    ):
        with pytest.raises(InvalidCheckpoint, match=message):
            described(limits, layer_norm_elementwise_affine=False)
    with pytest.raises(InvalidCheckpoint, match="the config says num_hidden_layers"):
        described(Limits(modules=1))
    with pytest.raises(InvalidCheckpoint, match=r"the model's class has \d+ modules"):
        described(Limits(modules=10), layer_norm_elementwise_affine=False)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_more_sequences_than_anybody_wants_are_refused(name, own):
    settings = {name: 1_000_000}
    with pytest.raises(InvalidCheckpoint, match=f"generation: {name} is 1000000") as caught:
        check_values({} if own else settings, settings if own else {}, Sources())
    assert "trust: {limits: {sequences: 128}}" in caught.value.cure


def tokenizer_json(**changes: object) -> str:
    return json.dumps({**json.loads((QUICKSTART / "tokenizer.json").read_text()), **changes})


def replaced(pattern: object, content: str) -> str:
    return tokenizer_json(normalizer={"type": "Replace", "pattern": pattern, "content": content})


def added(count: int) -> str:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return tokenizer_json(added_tokens=[{"id": 4000 + n, "content": f"token {n}", **token} for n in range(count)])


TOKENIZERS = {
    "an expansion": lambda: replaced({"String": "i"}, "i" * 10**8),
    "expansions": lambda: tokenizer_json(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "i"}, "content": "ii" * 50}] * 8,
        }
    ),
    "a prefix": lambda: tokenizer_json(normalizer={"type": "Prepend", "prepend": "x" * 10**8}),
    "a regular expression": lambda: replaced({"Regex": "((((((i|h)+)+)+)+)+)+x"}, "y"),
    "a large one": lambda: replaced({"Regex": "(((i{0,1000}){0,1000}){0,1000}){0,1000}"}, "y"),
    "tokens by the million": lambda: added(1_000_000),
    "depth": lambda: '{"normalizer": ' + '{"type":"Sequence","normalizers":[' * 5000 + "]}" * 5000 + "}",
    "a text": lambda: "[" * 10**6,
    "nothing": lambda: "",
}


@pytest.mark.attack
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_loaded_and_used_within_its_limits_or_refused(tmp_path, name):
    model = shutil.copytree(QUICKSTART, tmp_path / "model")
    (model / "tokenizer.json").write_text(TOKENIZERS[name]())
    limits = Limits(seconds=20, memory=600 * 2**20)
    job = make_job(
        tmp_path, stage=STAGE, module="attack.templates:STAGE", params={"templates": ["hi" * 50]},
        inputs={"model": (model,)}, trust=Trust(limits=limits),
    )  # fmt: skip
    started = time.monotonic()
    error = None
    try:
        ended = Launched(job).run(timeout=200).metrics["ended"]
    except BigpipeError as refused:
        error = refused
    assert error is not None or len(ended) == 1
    assert time.monotonic() - started < limits.seconds + 90
