from __future__ import annotations

import time

import pytest

from bigpipe.bigmodel.hub.selection import Choice, check_index, detect
from bigpipe.errors import InvalidCheckpoint, UsageError

OPT_13B = [
    ".gitattributes", "LICENSE.md", "README.md", "config.json", "flax_model-00001-of-00003.msgpack",
    "flax_model.msgpack.index.json", "generation_config.json", "merges.txt", "pytorch_model-00001-of-00003.bin",
    "pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin", "pytorch_model.bin.index.json",
    "special_tokens_map.json", "tf_model-00001-of-00003.h5", "tf_model.h5.index.json", "tokenizer_config.json",
    "vocab.json",
]  # fmt: skip


def test_one_weight_format_with_its_index_the_configs_and_the_tokenizer() -> None:
    assert Choice().among(OPT_13B) == [
        "LICENSE.md", "README.md", "config.json", "generation_config.json", "merges.txt",
        "pytorch_model-00001-of-00003.bin", "pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin",
        "pytorch_model.bin.index.json", "special_tokens_map.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip


def test_safetensors_are_preferred_and_the_same_weights_are_not_taken_twice() -> None:
    names = [
        "config.json", "consolidated.safetensors", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "original/params.json",
        "onnx/model.onnx", "tokenizer.model",
    ]  # fmt: skip
    assert Choice().among(names) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.model",
    ]  # fmt: skip


def test_a_single_file_wins_over_shards_and_variants() -> None:
    names = [
        "config.json", "model.fp16.safetensors", "model.safetensors", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "training_args.bin", "optimizer.bin",
    ]  # fmt: skip
    assert Choice().among(names) == ["config.json", "model.safetensors"]


def test_what_trainers_leave_is_no_weight_format() -> None:
    assert Choice().among(["config.json", "training_args.bin", "pytorch_model.bin"]) == [
        "config.json",
        "pytorch_model.bin",
    ]
    assert Choice().among(["config.json", "training_args.bin"]) == ["config.json"]


def test_diffusers_keeps_its_folders() -> None:
    names = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", "vae/config.json",
        "vae/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt",
    ]  # fmt: skip
    assert Choice().among(names) == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip


def test_include_replaces_the_choice_and_exclude_takes_away() -> None:
    assert Choice(include=["*.msgpack", "config.json"]).among(OPT_13B) == [
        "config.json",
        "flax_model-00001-of-00003.msgpack",
    ]
    assert "merges.txt" not in Choice(exclude=["*.txt"]).among(OPT_13B)


DUAL = [
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "exclude", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["*.safetensors"], ["pytorch_model.bin"]),
        (DUAL, ["*.safetensors"], ["config.json", *DUAL[4:]]),
        (DUAL, ["*.safetensors*"], ["config.json", *DUAL[4:]]),
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"], ["model.fp16.safetensors"]),
        (["a.safetensors", "b.safetensors", "config.json"], ["b.safetensors"], ["a.safetensors", "config.json"]),
        (["adapter_config.json", "adapter_model.bin", "model.bin"], ["adapter*"], ["model.bin"]),
    ],
)
def test_what_is_left_out_is_not_chosen(names: list[str], exclude: list[str], taken: list[str]) -> None:
    assert Choice(exclude=exclude).among(names) == taken


def test_of_two_models_the_cure_is_to_leave_one_out() -> None:
    with pytest.raises(InvalidCheckpoint, match="which of a") as caught:
        Choice().among(["a.safetensors", "b.safetensors"])
    assert "exclude: [b.safetensors]" in caught.value.cure


def test_what_loaders_read_beside_the_weights_is_taken() -> None:
    """Voices of Qwen2.5-Omni and Bark, the font of Ernie 4.5 VL, a model's own `generate`; not other models."""
    beside = [
        "Roboto-Regular.ttf", "config.json", "custom_generate/generate.py", "custom_generate/requirements.txt",
        "speaker_embeddings/v2/en_speaker_1_coarse_prompt.npy", "speaker_embeddings_path.json", "spk_dict.pt",
    ]  # fmt: skip
    weights = ["model-00001-of-00001.safetensors"]
    assert Choice().among([*beside, *weights, "other.pt", "voices/a.pt", "assets/a.npy"]) == sorted([*beside, *weights])


def test_an_adapter_comes_with_the_tokenizer_it_was_trained_with() -> None:
    adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tokenizer = [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    others = ["optimizer.pt", "trainer_state.json", "checkpoint-1/tokenizer.json"]
    assert Choice().among([*adapter, *tokenizer, *others]) == sorted([*adapter, *tokenizer])
    assert Choice().among([*adapter, *tokenizer[:2], *others]) == adapter  # of no use without a vocabulary


def test_what_git_and_the_client_keep_is_no_part_unless_it_is_named() -> None:
    kept = [".gitattributes", ".git/objects/ab/cd", ".cache/huggingface/x.metadata", "sub/.cache/x", ".github/a.yml"]
    names = [*kept, ".hidden.json", "config.json", "sub/.gitignore"]
    assert Choice(include=["*"]).among(names) == [".hidden.json", "config.json", "sub/.gitignore"]
    assert Choice(include=[".git*", "*.json"]).among(names)[:2] == [".git/objects/ab/cd", ".gitattributes"]


def test_a_glob_without_a_match_says_what_is_there() -> None:
    with pytest.raises(UsageError, match=r"'\*\.safetensor' matches none of 17") as caught:
        Choice(include=["*.safetensor"]).among(OPT_13B)
    assert "LICENSE.md" in caught.value.cure
    with pytest.raises(UsageError, match="no file is left"):
        Choice(exclude=["*"]).among(OPT_13B)


def test_libraries_are_told_apart() -> None:
    assert detect(["model_index.json"]) == "diffusers"
    assert detect(["config.json"], {"architecture": "resnet50", "num_classes": 1000}) == "timm"
    assert detect(["config.json"], {"model_type": "opt", "architectures": ["OPTForCausalLM"]}) == "transformers"
    assert detect(["config.json"], hint="timm") == "timm"


def test_an_index_must_find_its_shards() -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    check_index(names, "model.safetensors.index.json", index)
    with pytest.raises(InvalidCheckpoint, match="00002-of-00002"):
        check_index(names[:1], "model.safetensors.index.json", index)
    with pytest.raises(InvalidCheckpoint, match="names 1 of 2 shards"):
        check_index(names, "model.safetensors.index.json", {"a": names[0], "b": names[0]})
    with pytest.raises(InvalidCheckpoint, match="no weight_map"):
        check_index(names, "model.safetensors.index.json", {"weight_map": 3})
    assert check_index(names, "model.safetensors.index.json", index["weight_map"]) == index["weight_map"]
    check_index([f"unet/{name}" for name in names], "unet/model.safetensors.index.json", index)


@pytest.mark.parametrize("name", ["{0}/a", "{0}_a/model.safetensors", "a{0}/b{0}.json", "model-{0:05}-of-00099.bin"])
def test_so_many_files_are_looked_through_once(name: str) -> None:
    """`path` may name a home. Each folder against all files would take a minute."""

    def seconds(count: int) -> float:
        names = [name.format(number) for number in range(count)]
        started = time.process_time()
        with pytest.raises((UsageError, InvalidCheckpoint)):
            Choice().among(names)
        return time.process_time() - started

    # The least of three: one of them may meet the collector, which looks through all that other tests have left.
    assert min(seconds(12_000) for _ in range(3)) < 20 * (seconds(1_200) + 0.02)
