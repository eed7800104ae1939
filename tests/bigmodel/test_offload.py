"""Weights that are streamed give the same bits as weights that stay, in a fraction of the memory, and write nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import ALL
from support.models import forward, make_checkpoint, sample_inputs, save_model, tiny_model
from support.real import build
from transformers import (
    LlamaForCausalLM,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from bigpipe.bigmodel.checkpoint import MappedFiles, TensorInfo, open_checkpoint
from bigpipe.bigmodel.checkpoint.mapped import DROP, _Span
from bigpipe.bigmodel.execution import HostMemory, forward_once, load, loaded
from bigpipe.errors import StageFailed, UsageError


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2", "mixtral", "bert", "t5", "bart", "vit"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_disk_gives_the_same_bits(tmp_path: Path, architecture: str, stored: str) -> None:
    make_checkpoint(tmp_path, architecture, dtype=stored)
    wanted = forward(load(tmp_path, dtype="float32"))
    model = load(tmp_path, {"": "disk"}, dtype="float32")
    for _ in range(2):
        assert torch.equal(forward(model), wanted)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_streamed_is_used_as_stored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype="float16")
    wide = sum(4 * tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    for options, dtype in (
        ({}, torch.float32),
        ({"placement": {"": "disk"}}, torch.float16),
        ({"placement": {"": "cpu", "model.layers.1": "disk"}}, torch.float16),
        ({"memory": HostMemory(cast=wide, widen=wide)}, torch.float32),
        ({"memory": HostMemory(cast=wide, widen=wide - 1)}, torch.float16),
    ):
        model = load(tmp_path, **options)
        assert model.dtype == dtype
        assert torch.equal(forward(model), forward(LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_generates_from_disk_and_from_a_mixed_map(tmp_path: Path, dtype: str) -> None:
    make_checkpoint(tmp_path, "opt", dtype="float16")
    tokens = sample_inputs(tiny_model("opt"))["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = load(tmp_path, dtype=dtype).generate(tokens, **options)
    mixed = {"model.decoder.layers.1": "disk", "model.decoder.layers.0.self_attn": "disk", "": "cpu"}
    for device_map in ({"": "disk"}, mixed):
        model = load(tmp_path, device_map, dtype=dtype)
        assert torch.equal(model.generate(tokens, **options), wanted)
        assert model.hf_device_map == device_map


def test_ram_too_small_for_the_cast_weights_changes_no_bit(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype="float16")
    whole = load(tmp_path)
    for cast in (0, loaded(whole).held["cpu"] // 2):
        model = load(tmp_path, memory=HostMemory(cast=cast, widen=2**30))
        assert torch.equal(forward(model), forward(whole))
        assert loaded(model).held["cpu"] < loaded(whole).held["cpu"]
        assert loaded(model).streamed == loaded(model).stream.bytes_read == 0


def test_counts_what_it_reads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    sizes = {name: tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    model = load(tmp_path, {"": "disk"})
    state = loaded(model)
    table = sizes.pop("model.embed_tokens.weight")
    row = table // model.config.vocab_size
    assert state.held["disk"] == sum(sizes.values()) + table
    assert state.streamed == sum(sizes.values()) + row
    tokens = sample_inputs(model)["input_ids"]
    model(tokens)
    assert state.stream.bytes_read == sum(sizes.values()) + tokens.numel() * row


def test_stored_buffers_are_streamed_too(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(64, 64))
            self.register_buffer("scale", torch.full((2,), 3.0), persistent=False)
            self.inner = torch.nn.Linear(64, 64)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden @ self.mask) * self.scale[0]

    wanted = Masked()
    wanted.mask.normal_()
    save_file(wanted.state_dict(), tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", {"": "disk"}, model=Masked())
    assert loaded(model).held == {"disk": 4 * (64 * 64 * 2 + 64), "cpu": 8}
    hidden = torch.randn(3, 64)
    assert torch.equal(model(hidden), wanted(hidden))
    assert model.mask.is_meta


def test_a_forward_that_fails_leaves_the_model_usable(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt")
    model = load(tmp_path, {"": "disk"})
    wanted = forward(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[model.config.vocab_size + 5]]))
    with pytest.raises(RuntimeError, match="size"):
        model.model.decoder.layers[0](torch.ones(1, 2, 7))
    assert torch.equal(forward(model), wanted)


def test_a_forward_that_never_reaches_what_was_read_ahead_leaves_the_model_usable(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt")
    model = load(tmp_path, {"": "disk"})
    wanted = forward(model)

    def refuse(module: torch.nn.Module, arguments: object) -> None:
        raise ValueError("not now")

    hook = model.model.decoder.layers[1].register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="not now"):
        forward(model)
    hook.remove()
    assert torch.equal(forward(model), wanted)


def test_works_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt", dtype="float16")
    model = load(tmp_path, {"": "disk"})
    inputs = sample_inputs(model)
    with torch.inference_mode():
        inside = model(**inputs).logits
    with torch.no_grad():
        outside = model(**inputs).logits
    assert torch.equal(inside, outside)


class Reaching(torch.nn.Module):
    """Uses the weight of a module that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(8, 4)
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens) @ self.inner.weight


def test_a_weight_that_is_reached_for_from_outside_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(Reaching().state_dict(), file)
    with pytest.raises(UsageError, match=r"inner\.weight is streamed") as error:
        forward_once(load(file, {"": "disk"}, model=Reaching()))
    assert "device_map: {inner: cpu}" in error.value.cure
    assert forward_once(load(file, {"": "disk", "inner": "cpu"}, model=Reaching())) is None
    assert forward_once(load(file, {"": "disk"}, model=Reaching(), no_split_module_classes=["Reaching"])) is None
    assert forward_once(load(file, {"": "cpu"}, model=Reaching())) is None


def test_a_model_that_takes_no_tokens_says_so(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(torch.nn.Linear(5, 5).state_dict(), file)
    reason = forward_once(load(file, {"": "disk"}, model=torch.nn.Linear(5, 5)))
    assert reason is not None
    assert reason.startswith("Linear does not take a batch of tokens")


def test_a_model_that_takes_more_than_one_input_says_so(tmp_path: Path) -> None:
    clip = build(ALL["clip"])
    save_model(clip, tmp_path, tokenizer=False)
    reason = forward_once(load(tmp_path, {"": "disk"}))
    assert reason is not None
    assert reason.startswith("CLIPModel does not take input_ids alone: ")


def test_a_reader_of_pictures_gets_one_of_the_size_that_its_encoder_takes(tmp_path: Path) -> None:
    sees = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    writes = TrOCRConfig(
        vocab_size=50, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        max_position_embeddings=16, cross_attention_hidden_size=16,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(sees, writes)
    save_model(VisionEncoderDecoderModel(config), tmp_path, tokenizer=False)
    assert forward_once(load(tmp_path, {"": "disk"})) is None


def test_what_fails_in_a_forward_whose_inputs_are_known_is_no_input(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    model = load(tmp_path, {"": "cpu"})
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        forward_once(model)


def test_a_cut_file_is_an_error_with_its_bytes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", hidden_size=256)
    untouched, mapped = load(tmp_path, {"": "disk"}), load(tmp_path, {"": "disk"})
    mapped.model.embed_tokens(torch.tensor([[5]]))
    os.truncate(tmp_path / "model.safetensors", 600_000)
    for model in (untouched, mapped):
        with pytest.raises(StageFailed, match=r"model\.safetensors: bytes \d+–\d+ \(model\..* cannot be read"):
            forward(model)


CHILD = """
import gc, json, sys, torch
import transformers.models.opt.modeling_opt, accelerate
from bigpipe.bigmodel.execution import load

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def measure(path, home):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = memory("VmRSS")
    with torch.inference_mode():
        logits = load(path, {"": home}, dtype="float32")(torch.arange(4, 20)[None]).logits
    return {"grown": memory("VmHWM") - before, "logits": logits.double().flatten()[:50].tolist()}

print(json.dumps([{home: measure(path, home) for home in ("disk", "cpu")} for path in sys.argv[1:]]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory peaks as Linux tells them")
def test_memory_stays_far_below_the_models_size(tmp_path: Path) -> None:
    """A layer, the one read ahead, and what they compute. Stored as float16 they are held as float32."""
    widths = {"hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512, "num_hidden_layers": 16}
    shares = {"float32": 0.3, "float16": 0.6}
    paths = [make_checkpoint(tmp_path / dtype, "opt", dtype=dtype, **widths) for dtype in shares]
    command = [sys.executable, "-c", CHILD, *map(str, paths)]
    answer = subprocess.run(command, check=True, capture_output=True, timeout=200).stdout
    for path, result, share in zip(paths, json.loads(answer.splitlines()[-1]), shares.values(), strict=True):
        size = (path / "model.safetensors").stat().st_size
        assert result["disk"]["logits"] == result["cpu"]["logits"]
        assert result["disk"]["grown"] < share * size < result["cpu"]["grown"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(shares)


def test_nothing_behind_a_cut_file_is_dropped(tmp_path: Path) -> None:
    """What lies there is somebody else's memory, and would be lost."""
    make_checkpoint(tmp_path, "llama", hidden_size=256)
    checkpoint = open_checkpoint(tmp_path)
    last = max(checkpoint.tensors.values(), key=lambda tensor: tensor.offset)
    os.truncate(tmp_path / "model.safetensors", 600_000)
    files = MappedFiles()
    assert files._advise(_Span(last, last.offset, last.offset + last.nbytes), DROP) == errno.EFAULT
    cut = min(
        (each for each in checkpoint.tensors.values() if each.offset + each.nbytes > 600_000),
        key=lambda each: each.offset,
    )
    for tensors in ([last], list(checkpoint.tensors.values()), list(checkpoint.tensors.values())[::-1]):
        with pytest.raises(StageFailed, match=r"cannot be read") as error:
            files.populate(tensors)
        assert (last.name if len(tensors) == 1 else cut.name) in str(error.value)


def huge_pages(file: Path) -> bool:
    """Did this process ask for them in its map of the file?"""
    flags = ""
    for line in reversed(Path("/proc/self/smaps").read_text().splitlines()):
        if line.startswith("VmFlags:"):
            flags = line
        elif line.endswith(str(file)) and " hg" in flags:
            return True
    return False


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="only Linux has huge pages, where it was built so"
)
@pytest.mark.parametrize(("sizes", "huge"), [((20, 20), True), ((20, 4), False)])
def test_what_is_long_in_a_row_is_read_into_huge_pages(tmp_path: Path, sizes: tuple[int, ...], huge: bool) -> None:
    file, offset, tensors = tmp_path / "weights", 8, []
    for number, size in enumerate(sizes):
        tensors.append(TensorInfo(f"t{number}", "float16", (size * 2**19,), file, offset))
        offset += size * 2**20
    file.write_bytes(b"")
    os.truncate(file, offset)
    files = MappedFiles()
    files.populate(tensors[::-1])
    assert huge_pages(file) is huge
