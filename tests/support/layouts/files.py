"""Weights in files: one, many, in torch's format, beside others, indexed wrongly, broken."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.models import make_checkpoint, tiny_model

from .layout import index, layout, llama, shards, weights, write


@layout("equal")
def one_file(folder: Path) -> None:
    llama(folder)


@layout("equal")
def shards_and_an_index(folder: Path) -> None:
    make_checkpoint(folder, "llama", max_shard_size="20KB")


@layout("equal")
def one_shard_of_one_and_an_index(folder: Path) -> None:
    index(folder, shards(folder, llama(folder), 1))


@layout("bigpipe reads", because="the names of the shards say their order and that none is missing")
def shards_without_an_index(folder: Path) -> Any:
    shards(folder, llama(folder))
    return tiny_model("llama")


@layout("both refuse")
def shards_without_an_index_and_one_missing(folder: Path) -> None:
    shards(folder, llama(folder))
    (folder / "model-00002-of-00003.safetensors").unlink()


@layout("equal")
def torch_file(folder: Path) -> None:
    make_checkpoint(folder, "opt", format="bin")


@layout("equal")
def torch_shards(folder: Path) -> None:
    make_checkpoint(folder, "bert", format="bin", max_shard_size="20KB")


@layout("bigpipe refuses", because="torch's format before 1.6 is a pickle without places of its bytes")
def torch_file_of_before_1_6(folder: Path) -> None:
    torch.save(llama(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


@layout("equal")
def torch_file_of_parameters(folder: Path) -> None:
    """Trainers write `torch.save(dict(model.named_parameters()))`."""
    llama(folder)
    (folder / "model.safetensors").unlink()
    torch.save(dict(tiny_model("llama").named_parameters()), folder / "pytorch_model.bin")


@layout("equal")
def torch_file_of_views(folder: Path) -> None:
    """Tensors that are transposed, and slices of one storage."""
    tensors = llama(folder)
    (folder / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = tensor.t().contiguous().t()
    norms = [name for name, tensor in tensors.items() if tensor.dim() == 1]
    stacked = torch.stack([tensors[name] for name in norms])
    torch.save({**tensors, **dict(zip(norms, stacked, strict=True))}, folder / "pytorch_model.bin")


@layout("equal")
def torch_file_of_a_state_dict_with_versions(folder: Path) -> None:
    """An OrderedDict with `_metadata`, as `torch.save(model.state_dict())` writes."""
    llama(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")


@layout("both refuse")
def torch_file_that_runs_code(folder: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.getcwd, ()

    tensors = llama(folder)
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "bad": Bad()}, folder / "pytorch_model.bin")


@layout("equal")
def safetensors_beside_a_torch_file_of_other_numbers(folder: Path) -> None:
    make_checkpoint(folder, "llama", format="bin", seed=1)
    llama(folder)


@layout("equal")
def one_file_beside_an_index(folder: Path) -> None:
    index(folder, shards(folder, llama(folder, seed=1)))
    llama(folder)


@layout("equal", asked={"variant": "fp16"})
def variant_alone(folder: Path) -> None:
    llama(folder, dtype="float16")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


@layout("equal")
def variant_beside_the_plain_one(folder: Path) -> None:
    llama(folder, dtype="float16", seed=1)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    llama(folder)


@layout("equal", asked={"variant": "fp16"}, below="model.fp16.safetensors")
def variant_by_its_file(folder: Path) -> None:
    variant_beside_the_plain_one(folder)


@layout("equal", asked={"variant": "fp16"})
def variant_in_shards(folder: Path) -> None:
    make_checkpoint(folder, "llama", dtype="float16", max_shard_size="20KB")
    tiny_model("llama", dtype="float16").save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    for file in folder.glob("model-*.safetensors"):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()


@layout("equal", asked={"variant": "fp16"})
def variant_as_a_torch_file(folder: Path) -> None:
    make_checkpoint(folder, "llama", dtype="float16", format="bin")
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model.fp16.bin")


@layout("equal", asked={"subfolder": "text_model"}, below="text_model")
def subfolder(folder: Path) -> None:
    llama(folder / "text_model")


@layout("both refuse")
def only_in_a_subfolder(folder: Path) -> None:
    llama(folder / "text_model")
    (folder / "text_model/config.json").rename(folder / "config.json")


@layout("equal")
def consolidated_beside(folder: Path) -> None:
    """Mistral's repositories hold the weights twice."""
    write(folder, {"tok_embeddings.weight": llama(folder)["model.embed_tokens.weight"]}, "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2}))


@layout("both refuse")
def consolidated_alone(folder: Path) -> None:
    consolidated_beside(folder)
    (folder / "model.safetensors").unlink()


@layout("equal")
def original_below(folder: Path) -> None:
    """Meta's repositories hold their own format in `original/`."""
    tensors = llama(folder)
    (folder / "original").mkdir()
    torch.save({"tok_embeddings.weight": tensors["model.embed_tokens.weight"]}, folder / "original/consolidated.00.pth")


@layout("both refuse")
def adapter_alone(folder: Path) -> None:
    llama(folder)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    write(folder, lora, "adapter_model.safetensors")


@layout("equal")
def checkpoints_of_a_trainer(folder: Path) -> None:
    """The model in the root, states of training and earlier steps around it."""
    tensors = llama(folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"):
        torch.save({"state": torch.ones(2)}, folder / name)
    (folder / "checkpoint-10").mkdir()
    write(folder, {name: tensor + 1 for name, tensor in tensors.items()}, "checkpoint-10/model.safetensors")


@layout("equal")
def files_of_other_frameworks(folder: Path) -> None:
    llama(folder)
    for name in ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx", "model.gguf", "model.tflite"):
        (folder / name).write_bytes(b"another format")


@layout("equal")
def names_that_need_care(folder: Path) -> None:
    """A space, a percent sign, accents and an apostrophe in the folder's own name."""
    make_checkpoint(folder / "my model's 100%25 é", "llama")
    for file in (folder / "my model's 100%25 é").iterdir():
        (folder / file.name).symlink_to(file)


@layout("equal")
def resource_forks_of_macos(folder: Path) -> None:
    """Archives made there carry `._NAME` beside every file."""
    llama(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")


@layout("equal")
def snapshot_of_the_hub_cache(folder: Path) -> None:
    """Links into `blobs/`, named by their hashes."""
    blobs = folder / "models--org--name/blobs"
    blobs.mkdir(parents=True)
    llama(folder)
    for number, name in enumerate(("config.json", "model.safetensors")):
        (folder / name).rename(blobs / f"{number:064x}")
        (folder / name).symlink_to(Path("models--org--name/blobs") / f"{number:064x}")


@layout("both refuse")
def index_of_a_file_that_is_missing(folder: Path) -> None:
    index(folder, shards(folder, llama(folder)))
    (folder / "model-00002-of-00003.safetensors").unlink()


@layout("both refuse")
def index_without_a_map(folder: Path) -> None:
    shards(folder, llama(folder))
    (folder / "model.safetensors.index.json").write_text("{}")


@layout("bigpipe refuses", because="the index was made for other files")
def index_that_names_the_wrong_shard(folder: Path) -> None:
    weight_map = shards(folder, llama(folder))
    others = {*weight_map.values()} - {weight_map["model.norm.weight"]}
    index(folder, {**weight_map, "model.norm.weight": min(others)})


@layout("bigpipe refuses", because="transformers makes up the tensor that is missing")
def index_of_a_tensor_that_is_nowhere(folder: Path) -> None:
    tensors = llama(folder)
    del tensors["model.norm.weight"]
    index(folder, {**shards(folder, tensors), "model.norm.weight": "model-00001-of-00003.safetensors"})


@layout("equal")
def index_that_does_not_know_a_tensor(folder: Path) -> None:
    weight_map = shards(folder, llama(folder))
    del weight_map["model.norm.weight"]
    index(folder, weight_map)


@layout("bigpipe refuses", because="which of the two is right nobody can say")
def one_tensor_in_two_shards(folder: Path) -> None:
    tensors = llama(folder)
    weight_map = shards(folder, tensors)
    for name in set(weight_map.values()):
        write(folder, {**weights(folder, name), "model.norm.weight": tensors["model.norm.weight"] + len(name)}, name)
    index(folder, weight_map)


def _spoilt(folder: Path, change: Callable[[bytes], bytes]) -> None:
    llama(folder)
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


@layout("both refuse")
def file_cut_short(folder: Path) -> None:
    _spoilt(folder, lambda data: data[:-100])


@layout("both refuse")
def file_with_more_at_its_end(folder: Path) -> None:
    _spoilt(folder, lambda data: data + bytes(100))


@layout("both refuse")
def empty_file(folder: Path) -> None:
    _spoilt(folder, lambda data: b"")


@layout("both refuse")
def page_of_html(folder: Path) -> None:
    _spoilt(folder, lambda data: b"<!DOCTYPE html><html><body>Sign in</body></html>")


@layout("both refuse")
def pointer_of_git_lfs(folder: Path) -> None:
    _spoilt(folder, lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 9\n" % 7)


@layout("both refuse")
def header_longer_than_the_file(folder: Path) -> None:
    _spoilt(folder, lambda data: struct.pack("<Q", len(data) * 2) + data[8:])


@layout("both refuse")
def torch_file_cut_short(folder: Path) -> None:
    make_checkpoint(folder, "llama", format="bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000])


@layout("both refuse")
def pickle_that_is_no_torch_file(folder: Path) -> None:
    llama(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0, 2.0]}))
