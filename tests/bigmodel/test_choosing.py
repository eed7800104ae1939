"""Which files of a folder are the model: by their names, the same for a directory and for a listing of the Hub."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from bigpipe.bigmodel.checkpoint import choose_weights, find_weight_files, no_weights
from bigpipe.bigmodel.hub.selection import Choice
from bigpipe.bigmodel.tasks.tokenizing import TOKENIZER_FILES, _holds
from bigpipe.errors import InvalidCheckpoint, UsageError


def shards(stem: str, count: int = 2, suffix: str = ".safetensors") -> list[str]:
    return [f"{stem}-{number + 1:05}-of-{count:05}{suffix}" for number in range(count)]


CHOSEN = {
    "one file comes before shards": (["model.safetensors", *shards("model")], ["model.safetensors"], None),
    "safetensors before torch": (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"], None),
    "the usual torch file before another name": (["x.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"], None),
    "shards without an index": (shards("model", 3), shards("model", 3), None),
    "torch shards without an index": (shards("pytorch_model", 3, ".bin"), shards("pytorch_model", 3, ".bin"), None),
    "shards that are counted from 0": (
        ["model-0-of-2.safetensors", "model-1-of-2.safetensors"],
        ["model-0-of-2.safetensors", "model-1-of-2.safetensors"],
        None,
    ),
    "ten shards and more, in the order of their numbers": (
        [f"m-{number}-of-11.safetensors" for number in range(1, 12)],
        [f"m-{number}-of-11.safetensors" for number in range(1, 12)],
        None,
    ),
    "shards and an index": (
        [*shards("model"), "model.safetensors.index.json"], shards("model"), "model.safetensors.index.json",
    ),
    "shards that repeat the suffix": (
        [*shards("model.safetensors"), "model.safetensors.index.json"],
        shards("model.safetensors"),
        "model.safetensors.index.json",
    ),
    "shards of other names": (
        ["a.safetensors", "b.safetensors", "model.safetensors.index.json"],
        ["a.safetensors", "b.safetensors"],
        "model.safetensors.index.json",
    ),
    "an index whose shards are missing": (
        ["model.safetensors.index.json", "pytorch_model.bin"], [], "model.safetensors.index.json",
    ),
    "a variant that is alone": (["model.fp16.safetensors"], ["model.fp16.safetensors"], None),
    "a variant in shards, as transformers writes it": (
        [*shards("model.fp16"), "model.safetensors.index.fp16.json"],
        shards("model.fp16"),
        "model.safetensors.index.fp16.json",
    ),
    "what lies beside": (
        ["._model.safetensors", "adapter_model.safetensors", "consolidated.safetensors", "optimizer.bin",
         "openvino_model.bin", "training_args.bin", "weights.safetensors"],
        ["weights.safetensors"],
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN)
def test_chosen(case: str) -> None:
    names, files, index = CHOSEN[case]
    found = choose_weights([*reversed(names), "config.json"], "it")
    assert found is not None
    assert (list(found.files), found.index) == (files, index)


AURA_FLOW = [
    *shards("diffusion_pytorch_model", 3), "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.fp16.index.json",
]  # fmt: skip


def test_a_variant_lies_beside_the_plain_one() -> None:
    plain, half = choose_weights(AURA_FLOW, "it"), choose_weights(AURA_FLOW, "it", "fp16")
    assert plain is not None
    assert plain.files == tuple(shards("diffusion_pytorch_model", 3))
    assert plain.index == "diffusion_pytorch_model.safetensors.index.json"
    assert half is not None
    assert half.files == tuple(AURA_FLOW[4:6])
    assert half.index == AURA_FLOW[-1]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (shards("model", 3)[:2], "holds 2 of 3 shards"),
        (["a.safetensors", "b.safetensors"], "which of a.safetensors, b.safetensors is the model"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "which of"),
        ([*shards("m", 2), *shards("m", 3)], "which of"),
        (
            [
                *shards("model.fp16"), *shards("model.bf16"), "model.safetensors.index.fp16.json",
                "model.safetensors.index.bf16.json",
            ],
            "which of",
        ),
    ],
)  # fmt: skip
def test_where_nobody_can_choose_it_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=f"it: {said}"):
        choose_weights(names, "it")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["adapter_model.safetensors", "adapter_config.json"], "holds an adapter"),
        (["pytorch_lora_weights.safetensors"], "holds an adapter"),
        (["m-Q4_K_M.gguf", "README.md"], r"GGUF \(m-Q4_K_M.gguf\)"),
        (["consolidated.safetensors", "params.json"], "Mistral's or Meta's own program"),
        (["consolidated.00.pth", "consolidated.01.pth"], "Mistral's or Meta's own program"),
        (["tf_model.h5", "flax_model.msgpack"], "of a kind that is not read here"),
        (["README.md", "text_model/model.safetensors"], "no weights were found"),
        (["README.md"], "no weights were found"),
        (["config.json", "model.safetensors.dvc"], r"tracked by DVC \(model.safetensors.dvc\)"),
    ],
)
def test_what_is_no_model_is_called_what_it_is(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InvalidCheckpoint, match=said) as caught:
        find_weight_files(tmp_path)
    assert str(tmp_path) in caught.value.cause
    assert no_weights(tmp_path, names).cause == caught.value.cause


def test_a_variant_is_chosen_by_name_and_one_that_is_missing_is_told() -> None:
    names = ["config.json", "model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"]
    assert Choice(variant="bf16").among(names) == ["config.json", "model.bf16.safetensors"]
    with pytest.raises(UsageError, match="no weights of 'int8'") as caught:
        Choice(variant="int8").among(names)
    assert "bf16, fp16" in caught.value.cure


def test_parts_of_a_pipeline_without_the_variant_are_taken_plain() -> None:
    names = ["model_index.json", "unet/diffusion_pytorch_model.safetensors",
             "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip
    assert Choice(variant="fp16").among(names) == [names[0], names[2], names[3]]


def test_single_files_of_a_pipeline_in_its_root_are_left() -> None:
    names = ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "v1-5-pruned-emaonly.safetensors"]
    assert Choice().among(names) == names[:2]


def test_folders_of_sentence_transformers_and_chat_templates_come_along() -> None:
    names = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
             "additional_chat_templates/tool_use.jinja", "config.json", "model.safetensors", "modules.json",
             "onnx/config.json", "onnx/model.onnx"]  # fmt: skip
    assert Choice().among(names) == [*names[:3], *names[4:8]]
    assert "1_Pooling/config.json" not in Choice().among([name for name in names if name != "modules.json"])


def vocabulary_files() -> Iterator[str]:
    """Every file that a tokenizer of the installed transformers names in a table."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin
    for file in Path(spec.origin).parent.glob("models/*/tokenization_*.py"):
        for item in ast.parse(file.read_text()).body:
            if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == "VOCAB_FILES_NAMES":
                for name in ast.literal_eval(item.value).values():
                    yield from [name] if isinstance(name, str) else name


def test_every_file_that_a_tokenizer_names_is_taken_and_seen(tmp_path: Path) -> None:
    names = sorted({*vocabulary_files(), "tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "vocab.bpe"})
    assert {"bpe.codes", "prophetnet.tokenizer", "byte_maps.json", "emoji.json", "source.spm"} <= {*names}
    assert Choice().among([*names, "model.safetensors"]) == sorted([*names, "model.safetensors"])
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in names:
        (alone / name).touch()
        seen = _holds(alone, TOKENIZER_FILES)
        (alone / name).unlink()
        assert seen or name in ("normalizer.json", "word_shape.json", "word_pronunciation.json"), name
