"""Encoders as torch operations against those in numpy, bit by bit, on whatever devices there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.models import make_checkpoint

from bigpipe.bigmodel.formats.encoders.devices import DeviceFourBitEncoder, DeviceInt8Encoder
from bigpipe.bigmodel.formats.encoders.floats import BITS
from bigpipe.bigmodel.formats.encoders.four_bit import FourBitEncoder
from bigpipe.bigmodel.formats.encoders.int8 import Int8Encoder
from bigpipe.bigmodel.quantization import Settings, quantize_checkpoint
from bigpipe.bigmodel.quantization.encoding import check_device, usable_device
from bigpipe.errors import UsageError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = ["float16", "bfloat16", "float32"]
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def random_bits(dtype: str, count: int, seed: int) -> np.ndarray:
    """Any finite pattern, and infinities; which NaN a NaN becomes is left to chance in bitsandbytes too."""
    random = np.random.default_rng(seed)
    width = 8 * BITS[dtype].itemsize
    bits = random.integers(0, 1 << width, count).astype(BITS[dtype])
    values = torch.from_numpy(bits.view(f"i{width // 8}")).view(getattr(torch, dtype))
    bits[values.isnan().numpy()] = 0
    return bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 3000), scale=st.sampled_from([None, 1.0, 0.02, 1e-30]), seed=st.integers(0, 99))
def test_four_bit_codes_are_the_same(device: str, scheme: str, dtype: str, count: int, scale: float, seed: int) -> None:
    bits = random_bits(dtype, count, seed)
    if scale is not None:
        random = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale
        bits = random.to(getattr(torch, dtype)).view(getattr(torch, f"int{8 * bits.itemsize}")).numpy().view(bits.dtype)
    ours = DeviceFourBitEncoder(device, dtype, scheme)
    expected = FourBitEncoder(dtype, scheme)
    for one, other in zip(ours.encode(bits), expected.encode(bits), strict=True):
        assert one.tobytes() == other.tobytes()
    assert ours.absmax(bits).tobytes() == expected.absmax(bits).tobytes()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_int8_codes_are_the_same(device: str, rows: int, columns: int, seed: int) -> None:
    bits = random_bits("float16", rows * columns, seed).reshape(rows, columns)
    bits[0] = 0
    for one, other in zip(DeviceInt8Encoder(device).encode(bits), Int8Encoder().encode(bits), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "scheme", "double"), [
    ("llama", "int8", False), ("llama", "nf4", True), ("gpt2", "fp4", False),
])  # fmt: skip
def test_a_checkpoint_has_the_same_bytes(tmp_path: Path, device: str, name: str, scheme: str, double: bool) -> None:
    source = make_checkpoint(tmp_path / name, name, **(SIZES if name == "llama" else {"n_embd": 64}))
    for out, where in (("one", None), ("other", device)):
        quantize_checkpoint(source, tmp_path / out, scheme=scheme, bnb_4bit_use_double_quant=double, device=where)
    ours, theirs = ({file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("one", "other"))
    assert ours == theirs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
def test_a_device_is_asked_before_it_is_used(device: str, scheme: str, dtype: str) -> None:
    check_device(device, Settings(scheme=scheme, dtype=dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_none_is_used_and_asking_for_one_is_refused(tmp_path: Path) -> None:
    assert usable_device(Settings(scheme="nf4")) is None
    source = make_checkpoint(tmp_path / "llama", "llama", **SIZES)
    with pytest.raises(UsageError, match="device 'cuda' cannot be used"):
        quantize_checkpoint(source, tmp_path / "out", scheme="nf4", device="cuda")
