"""Casts without torch give torch's bits."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

from bigpipe.bigmodel.checkpoint import itemsize, open_checkpoint
from bigpipe.bigmodel.formats import decode
from bigpipe.bigmodel.writing.conversion import BLOCK, Conversion, cast, cast_while_read, convert, is_cast

FLOATS = ("float32", "float16", "bfloat16", "float64")


def every_pattern(dtype: str) -> torch.Tensor:
    """Every 16-bit value; for wider formats those values, their neighbours half a step off, and random bits."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if itemsize(dtype) == 2:
        return halves.view(getattr(torch, dtype))
    generator = numpy.random.default_rng(0)
    uppers = (numpy.arange(2**16, dtype=numpy.uint32) << 16)[:, None]
    lowers = numpy.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x1001, 0x3000], dtype=numpy.uint32)
    crafted = (uppers | lowers).reshape(-1)
    bits = numpy.concatenate([crafted, generator.integers(0, 2**32, 300_001, dtype=numpy.uint32)])
    values = torch.from_numpy(bits.view(numpy.float32).copy())
    return values if dtype == "float32" else torch.cat([values.double(), values.double() * (1 + 2**-40)])


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_every_cast_has_torchs_bits(stored, wanted):
    source = every_pattern(stored)
    raw = memoryview(source.view(torch.uint8).numpy().tobytes())
    target = memoryview(bytearray(len(source) * itemsize(wanted)))
    filled = cast(raw, stored, wanted, target)
    ours = torch.frombuffer(filled, dtype=getattr(torch, wanted))
    theirs = source.to(getattr(torch, wanted))
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize(wanted)]
    number = ~theirs.isnan()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.view(width)[number], theirs.view(width)[number])
    assert len(source) > BLOCK or itemsize(stored) == 2


def test_only_floating_point_tensors_change():
    assert is_cast("float32", "float16")
    assert not is_cast("float16", "float16")
    assert not is_cast("float16", None)
    assert not any(is_cast(dtype, "float16") for dtype in ("int64", "uint8", "bool", "float8_e4m3fn", "complex64"))


def test_a_cast_while_read_is_what_a_cast_writes_one_after_the_other(tmp_path):
    """Single numbers and fp8 codes among them: what is decoded is cast once more."""
    codes = torch.randn(128, 128).clamp(-2, 2).to(torch.float8_e4m3fn)
    tensors = {
        "logit_scale": torch.tensor(4.6052), "norm.weight": torch.randn(100), "up.weight": codes,
        "up.weight_scale_inv": torch.rand(1, 1),
    }  # fmt: skip
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16"}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    read = decode(open_checkpoint(tmp_path / "source"))
    for number, dtype in enumerate(("bfloat16", "float32", "float16")):
        read = cast_while_read(read, dtype)
        source = tmp_path / (f"{number - 1}" if number else "source")
        convert(open_checkpoint(source), tmp_path / f"{number}", Conversion(max_shard_size=10**9, dtype=dtype))
        written = open_checkpoint(tmp_path / f"{number}")
        assert set(written.tensors) == set(read.tensors) == {"logit_scale", "norm.weight", "up.weight"}
        for name, tensor in written.tensors.items():
            assert (tensor.dtype, tensor.shape) == (read.tensors[name].dtype, read.tensors[name].shape)
            assert written.read(name) == read.read(name), name
