"""Adapters merged into checkpoints: the bytes of peft's own merge, or a refusal that says what differs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import loaded, merged_by_peft, tuned
from support.models import make_checkpoint

from bigpipe.bigmodel.adapters import merge_adapter
from bigpipe.bigmodel.checkpoint import open_adapter, open_checkpoint
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.errors import BigpipeError, InvalidCheckpoint, UsageError

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS: dict[str, Any] = {
    "opt": ["q_proj", "v_proj", "fc1", "out_proj"],
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bloom": ["query_key_value", "dense"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "mistral": ["q_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "qwen2": ["q_proj", "embed_tokens"],
    "phi": ["q_proj", "fc1"],
    "bert": ["query", "dense"],
    "roberta": ["query"],
    "t5": ["q", "wi", "shared"],
    "bart": ["q_proj", "fc1"],
    "vit": ["q_proj", "fc1"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft asks the Hub for the base model's config when it saves."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def assert_same(out: Path, wanted: Any) -> None:
    made, state = loaded(out).state_dict(), wanted.state_dict()
    assert made.keys() == state.keys()
    assert [name for name in state if not torch.equal(made[name], state[name])] == []
    assert {tensor.dtype for tensor in made.values()} == {tensor.dtype for tensor in state.values()}


def merged(tmp_path: Path, base: Path, dtype: str | None = None, **config: Any) -> Any:
    adapter = tuned(base, tmp_path / "lora", **config)
    found = merge_adapter(base, adapter, tmp_path / "out", dtype=dtype)
    assert_same(tmp_path / "out", merged_by_peft(base, adapter, **({"dtype": dtype} if dtype else {})))
    return found


@pytest.mark.parametrize("architecture", TARGETS)
def test_merging_gives_the_bytes_of_peft(tmp_path: Path, architecture: str) -> None:
    base = make_checkpoint(tmp_path / "base", architecture, dtype="bfloat16" if architecture != "phi" else "float32")
    found = merged(tmp_path, base, r=5, lora_alpha=7, target_modules=TARGETS[architecture])
    assert found.merged >= 2
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_merging_gives_the_bytes_of_peft_in_any_dtype(tmp_path: Path, dtype: str) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", dtype=dtype)
    merged(tmp_path, base, r=16, lora_alpha=32, target_modules=["q_proj", "down_proj", "lm_head"])


def test_a_model_is_cast_before_anything_is_added(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", dtype="float32")
    merged(tmp_path, base, "bfloat16", r=4, target_modules=["q_proj"])


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks and alphas by pattern": ("llama", {
        "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 2},
        "alpha_pattern": {"^model.layers.0.*down_proj": 5},
    }),
    "rsLoRA": ("opt", {"target_modules": ["q_proj"], "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "DoRA on Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "DoRA on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "biases": ("opt", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of B": ("opt", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "a whole head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "a whole norm": ("opt", {"target_modules": ["q_proj"], "modules_to_save": ["final_layer_norm"]}),
    "an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embeddings": ("qwen2", {"target_modules": ["embed_tokens", "v_proj"]}),
    "an embedding that was tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "an embedding and a head that were tied": ("qwen2", {
        "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"],
    }),
    "an embedding that stays tied": ("qwen2", {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    }),
    "a head that was tied": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "matrices of a head that is tied": ("qwen2", {"target_modules": ["lm_head", "q_proj"]}),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 200, 7]}),
    "tokens of tied embeddings": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_gives_the_bytes_of_peft(tmp_path: Path, kind: str) -> None:
    architecture, config = KINDS[kind]
    merged(tmp_path, make_checkpoint(tmp_path / "base", architecture, dtype="bfloat16"), **{"r": 4, **config})


def test_a_head_of_its_own_does_not_change_how_t5_scales(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "t5")
    config = json.loads((base / "config.json").read_bytes())
    config.pop("scale_decoder_outputs", None)  # transformers before 5 did not write it
    (base / "config.json").write_text(json.dumps(config))
    adapter = tuned(base, tmp_path / "lora", target_modules=["q"], modules_to_save=["lm_head"])
    merge_adapter(base, adapter, tmp_path / "out")
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 9]])}
    with torch.no_grad():
        wanted, found = (model(**given).logits for model in (merged_by_peft(base, adapter), loaded(tmp_path / "out")))
    torch.testing.assert_close(found, wanted)


def test_a_matrix_of_many_runs_of_rows_gives_the_bytes_of_peft(tmp_path: Path) -> None:
    """Rows are computed by the megabyte, the last run shorter than the others, and two files at a time."""
    base = make_checkpoint(
        tmp_path / "base", "llama", dtype="bfloat16", hidden_size=640, intermediate_size=1501, max_shard_size="4MB",
    )  # fmt: skip
    found = merged(tmp_path, base, r=16, target_modules="all-linear", use_dora=True)
    assert found.shards == 1


def test_torch_files_are_read_on_both_sides(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "gpt2", format="bin")
    adapter = tuned(base, tmp_path / "lora", target_modules=["c_attn"])
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    wanted = merged_by_peft(base, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    merge_adapter(base, adapter, tmp_path / "out")
    assert_same(tmp_path / "out", wanted)


@pytest.mark.parametrize("combination", ["cat", "linear"])
def test_several_adapters_are_one_as_peft_weighs_them(tmp_path: Path, combination: str) -> None:
    from peft import PeftModel

    base = make_checkpoint(tmp_path / "base", "llama")
    ranks = (4, 4) if combination == "linear" else (4, 6)
    adapters = [
        tuned(base, tmp_path / f"lora-{seed}", seed=seed, r=rank, lora_alpha=9, target_modules=["q_proj", "up_proj"])
        for seed, rank in enumerate(ranks)
    ]
    model = PeftModel.from_pretrained(loaded(base), str(adapters[0]), "a")
    model.load_adapter(str(adapters[1]), "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", combination_type=combination)
    model.set_adapter("both")
    merge_adapter(base, adapters, tmp_path / "out", weights=[0.7, -0.4], combination=combination)  # type: ignore[arg-type]
    assert_same(tmp_path / "out", model.merge_and_unload())


def rewrite(adapter: Path, **changes: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return adapter


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama", dtype="float16")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is pissa_niter_16"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"trainable_token_indices": ["x"]}, "trainable_token_indices"),
    ],
)
def test_what_is_not_done_is_refused_by_its_name(tmp_path: Path, llama: Path, changes: dict, said: str) -> None:
    adapter = rewrite(tuned(llama, tmp_path / "lora", target_modules=["q_proj"]), **changes)
    with pytest.raises(UsageError) as error:
        merge_adapter(llama, adapter, tmp_path / "out")
    assert said in error.value.cause
    assert error.value.cure
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_model_says_what_differs(tmp_path: Path, llama: Path) -> None:
    wider = make_checkpoint(tmp_path / "wider", "llama", hidden_size=48)
    adapter = rewrite(tuned(wider, tmp_path / "lora", target_modules=["q_proj"]), base_model_name_or_path="org/wider")
    with pytest.raises(UsageError, match="was made for another model") as error:
        merge_adapter(llama, adapter, tmp_path / "out")
    assert "is [32, 32]" in error.value.cause
    assert "[8, 48]" in error.value.cause
    assert "trained on org/wider" in error.value.cause
    opt = make_checkpoint(tmp_path / "opt", "opt")
    adapter = tuned(opt, tmp_path / "lora-opt", target_modules=["q_proj"])
    with pytest.raises(UsageError, match=r"LlamaForCausalLM has no model\.decoder\.layers\.0"):
        merge_adapter(llama, adapter, tmp_path / "out")


def test_an_adapter_of_the_base_alone_is_merged_into_the_model(tmp_path: Path, llama: Path) -> None:
    """Of `AutoModel`, as retrievers are trained, on a repository whose class has a head."""
    import transformers

    base = transformers.AutoModel.from_pretrained(llama, dtype="auto")
    patterns = {
        "rank_pattern": {"^layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"^layers.0.self_attn.q_proj": 64},
    }  # fmt: skip
    adapter = tuned(llama, tmp_path / "lora", model=base, r=2, target_modules=["q_proj", "embed_tokens"], **patterns)
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in open_adapter(adapter).tensors
    merge_adapter(llama, adapter, tmp_path / "out")
    peft = pytest.importorskip("peft")
    base = transformers.AutoModel.from_pretrained(llama, dtype="auto")
    wanted = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    made = loaded(tmp_path / "out").model.state_dict()
    assert [name for name in wanted if not torch.equal(made[name], wanted[name])] == []


def test_an_adapter_with_the_names_that_the_class_had_is_merged(tmp_path: Path) -> None:
    """Before transformers 4.52, LLaVA's language model stood where today its base model does."""
    import transformers

    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config={**text, "num_attention_heads": 2},
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4},
        image_token_index=5,
    )
    base = tmp_path / "base"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(base)
    now, before = "model.language_model.", "language_model.model."
    layer, table = f"{now}layers.0.self_attn.", f"{now}embed_tokens"
    fields: dict[str, Any] = {
        "rank_pattern": {f"{layer}q_proj": 3}, "alpha_pattern": {f"{layer}v_proj": 64},
        "trainable_token_indices": {table: [3, 7]}, "modules_to_save": [f"{now}norm"],
    }  # fmt: skip
    adapter = tuned(base, tmp_path / "lora", r=2, target_modules=r".*language_model.*[qv]_proj", **fields)
    wanted = merged_by_peft(base, adapter)
    held = load_file(adapter / "adapter_model.safetensors")
    assert all(f"model.{now}" in name for name in held)
    old = {name.replace(f"model.{now}", f"model.{before}"): tensor for name, tensor in held.items()}
    save_file(old, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    rewrite(adapter, **json.loads(json.dumps(fields).replace(now, before)))
    merge_adapter(base, adapter, tmp_path / "out")
    assert_same(tmp_path / "out", wanted)


def test_a_vocabulary_that_was_resized_and_learnt_is_merged_into_the_resized_model_alone(
    tmp_path: Path, llama: Path
) -> None:
    """peft saves the modules beside their trained copies then."""
    wider = loaded(llama)
    wider.resize_token_embeddings(wider.config.vocab_size + 2)
    wider.save_pretrained(tmp_path / "wider")
    saved = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = tuned(llama, tmp_path / "lora", model=wider, **saved)
    held = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.lm_head.{}weight"
    save_file(
        {**held, name.format("original_module."): held[name.format("")] + 1}, adapter / "adapter_model.safetensors"
    )
    merge_adapter(tmp_path / "wider", adapter, tmp_path / "out")
    assert_same(tmp_path / "out", merged_by_peft(tmp_path / "wider", adapter))
    with pytest.raises(UsageError, match="was made for another model") as error:
        merge_adapter(llama, adapter, tmp_path / "none")
    assert f"`resize_token_embeddings({wider.config.vocab_size})`" in error.value.cure


def test_a_head_that_the_model_lacks_is_refused(tmp_path: Path, llama: Path) -> None:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(llama)
    adapter = tuned(llama, tmp_path / "lora", model=model, target_modules=["q_proj"], task_type="SEQ_CLS")
    with pytest.raises(UsageError, match=r"no score\.weight") as error:
        merge_adapter(llama, adapter, tmp_path / "out")
    assert "SEQ_CLS" in error.value.cure


def test_a_config_of_other_ranks_is_refused(tmp_path: Path, llama: Path) -> None:
    adapter = rewrite(tuned(llama, tmp_path / "lora", r=8, target_modules=["q_proj"]), r=4)
    with pytest.raises(InvalidCheckpoint, match="its config says rank 4"):
        merge_adapter(llama, adapter, tmp_path / "out")


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or infinity"), (30_000.0, "largest of float16")])
def test_sums_that_are_no_numbers_are_refused(tmp_path: Path, llama: Path, value: float, said: str) -> None:
    adapter = tuned(llama, tmp_path / "lora", r=8, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = value
    save_file({name: tensor * (1 if "lora_B" in name else 100) for name, tensor in tensors.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(InvalidCheckpoint, match=said) as error:
        merge_adapter(llama, adapter, tmp_path / "out")
    assert "q_proj" in error.value.cause
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_half_of_a_pair_is_refused(tmp_path: Path, llama: Path) -> None:
    adapter = tuned(llama, tmp_path / "lora", r=8, target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "lora_B" not in name},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(InvalidCheckpoint, match="there is only"):
        merge_adapter(llama, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "for 2 adapters"),
        ({"combination": "ties"}, "'ties'"),
        ({"weights": [1, "x"]}, "no number"),
        ({"weights": [1.0, float("nan")]}, "that of adapter 2 is nan"),
    ],
)
def test_weights_are_checked(tmp_path: Path, llama: Path, options: dict, said: str) -> None:
    adapter = tuned(llama, tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(BigpipeError, match=said) as error:
        merge_adapter(llama, [adapter, adapter], tmp_path / "out", **options)
    assert error.value.field in options
    assert "adapter_config.json" not in error.value.cure  # which says nothing about weights


def test_a_merge_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """Files that an earlier attempt finished are kept while both models are as they were, and no longer."""
    from bigpipe.bigmodel.adapters import Merge, merge_opened

    base = make_checkpoint(tmp_path / "base", "llama", max_shard_size="40KB")
    adapter = tuned(base, tmp_path / "lora", target_modules=["q_proj"])

    def go() -> dict[str, int]:
        merge_opened(
            open_checkpoint(base), [open_adapter(adapter)], tmp_path / "out", Merge(max_shard_size=40_000),
            journal=tmp_path / "notes",
        )  # fmt: skip
        return {file.name: file.stat().st_ino for file in (tmp_path / "out").glob("model-*.safetensors")}

    first = go()
    lost = sorted(first)[1]
    (tmp_path / "out" / lost).unlink()
    second = go()
    assert {name for name in first if first[name] == second[name]} == first.keys() - {lost}
    tuned(base, adapter, seed=5, target_modules=["q_proj"])
    changed = {name for name, inode in go().items() if inode != second[name]}
    assert changed, "other weights of the adapter make other files"
    assert_same(tmp_path / "out", merged_by_peft(base, adapter))
    assert os.listdir(tmp_path / "notes")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int8", {}),
        ("nf4", {"dtype": "bfloat16"}),
        ("fp4", {}),
        ("nf4", {"bnb_4bit_use_double_quant": True, "skip_modules": ["lm_head", "v_proj"]}),
    ],
    ids=["int8", "nf4", "fp4", "double"],
)
def test_merging_into_a_quantized_model_is_what_peft_and_bitsandbytes_make(
    tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    """Codes and scales of what is changed, and all else to the byte."""
    pytest.importorskip("bitsandbytes")
    source = make_checkpoint(tmp_path / "base", "llama", dtype="float16", hidden_size=128, intermediate_size=136)
    quantize_checkpoint(source, tmp_path / "packed", scheme=scheme, **options)
    adapter = tuned(source, tmp_path / "lora", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    found = merge_adapter(tmp_path / "packed", adapter, tmp_path / "out")
    assert found.merged == 6
    assert found.bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    wanted = merged_by_peft(tmp_path / "packed", adapter).state_dict()
    made = loaded(tmp_path / "out").state_dict()
    skipped = {name for name in wanted if name not in made or not isinstance(wanted[name], torch.Tensor)}
    assert not [name for name in skipped if isinstance(wanted[name], torch.Tensor)]
    assert [name for name in wanted.keys() - skipped if not torch.equal(made[name], wanted[name])] == []
    before, after = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    left = [name for name in before.tensors if not any(part in name for part in ("q_proj", "v_proj", "down_proj"))]
    assert [name for name in left if before.read(name) != after.read(name)] == []


def test_a_quantized_model_takes_pairs_only(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "base", "llama", dtype="float16", hidden_size=64)
    quantize_checkpoint(source, tmp_path / "packed", scheme="int8")
    adapter = tuned(source, tmp_path / "lora", r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UsageError, match="only pairs of matrices"):
        merge_adapter(tmp_path / "packed", adapter, tmp_path / "out")
    with pytest.raises(UsageError, match="the checkpoint is quantized"):
        merge_adapter(tmp_path / "packed", adapter, tmp_path / "out", dtype="float16")
