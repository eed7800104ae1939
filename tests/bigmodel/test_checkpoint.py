from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.models import ARCHITECTURES, forward, make_checkpoint, tiny_model

from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.errors import InvalidCheckpoint


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_real_model_reads_back_byte_for_byte(tmp_path, architecture, form):
    make_checkpoint(tmp_path, architecture, format=form, max_shard_size="20KB", dtype="float16")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    state = tiny_model(architecture, dtype="float16").state_dict()
    names = {*checkpoint.tensors, *checkpoint.tied}
    if form == "bin":
        assert names == set(state)
    for name in names & set(state):
        assert checkpoint.read(name) == raw(state[name]), name


def test_from_pretrained_loads_what_make_checkpoint_saved(tmp_path):
    import transformers

    make_checkpoint(tmp_path, "llama")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(forward(loaded), forward(tiny_model("llama")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("Grüße, world").input_ids) == "Grüße, world"


def test_a_description_tells_shapes_and_bytes(tmp_path):
    make_checkpoint(tmp_path, "opt", dtype="bfloat16")
    description = describe_checkpoint(tmp_path)
    model = tiny_model("opt", dtype="bfloat16")
    assert description.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert description.tensors["model.decoder.embed_tokens.weight"] == ("bfloat16", (264, 32))
    assert description.config["model_type"] == "opt"
    assert description.custom is None


@pytest.mark.parametrize(
    ("name", "content", "told", "cure"),
    [
        ("model.safetensors", b"<!DOCTYPE html><html>sign in</html>", "is HTML or XML", "fetch the file again"),
        ("model.safetensors", b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is HTML or XML", "fetch"),
        ("pytorch_model.bin", b"<html>404 Not Found</html>" * 9, "is HTML or XML", "fetch the file again"),
        ("model.safetensors", b'{"error": "Repository not found"}', "is JSON", "fetch the file again"),
        ("model.safetensors", b"GGUF" + bytes(100), "is a GGUF file", "the model that it was made of"),
    ],
)
def test_what_came_in_place_of_weights_is_called_that(
    tmp_path: Path, name: str, content: bytes, told: str, cure: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=f"{name}: {told}") as error:
        open_checkpoint(tmp_path)
    assert cure in error.value.cure


def test_weights_by_the_name_of_the_other_format(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"is a zip file, as torch\.save writes it") as error:
        open_checkpoint(tmp_path)
    assert ".bin" in error.value.cure
    save_file({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match="is a safetensors file, by another name") as error:
        open_checkpoint(tmp_path / "pytorch_model.bin")
    assert ".safetensors" in error.value.cure
