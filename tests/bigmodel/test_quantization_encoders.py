"""Our numpy encoders against bitsandbytes itself, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bigpipe.bigmodel.checkpoint import TensorInfo
from bigpipe.bigmodel.formats.encoders.codes import dynamic_code, four_bit_code
from bigpipe.bigmodel.formats.encoders.floats import convert
from bigpipe.bigmodel.formats.encoders.four_bit import FourBitEncoder
from bigpipe.bigmodel.formats.encoders.int8 import Int8Encoder
from bigpipe.bigmodel.formats.encoders.nested import mean, quantize_absmax
from bigpipe.bigmodel.formats.four_bit import FourBit, State, quant_state
from bigpipe.errors import InvalidCheckpoint

DTYPES = ["float16", "bfloat16", "float32"]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    views = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return tensor.contiguous().view(views[tensor.element_size()]).numpy()


def assert_same_bits(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.tobytes() == theirs.contiguous().numpy().tobytes()


def encode_all(dtype: str, quant_type: str, tensor: torch.Tensor, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    bits, encoder = bits_of(tensor).reshape(-1), FourBitEncoder(dtype, quant_type, chunk)
    pieces = [encoder.encode(bits[start : start + chunk]) for start in range(0, bits.size, chunk)]
    return np.concatenate([packed for packed, _ in pieces]), np.concatenate([absmax for _, absmax in pieces])


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_code_books_are_theirs(quant_type: str) -> None:
    assert_same_bits(four_bit_code(quant_type), bnb_functional.get_4bit_type(quant_type, "cpu"))


def test_the_dynamic_code_book_is_theirs() -> None:
    assert_same_bits(dynamic_code(), bnb_functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("count", [1, 3, 64, 65, 4099, 20000])
def test_four_bit_codes_are_theirs_at_every_scale(dtype: str, quant_type: str, count: int) -> None:
    for scale in (1.0, 0.02, 1e-6, 1e-30, 3e4):
        tensor = (torch.randn(count) * scale).to(getattr(torch, dtype))
        tensor[count // 2 : count // 2 + 64] = 0
        packed, absmax = encode_all(dtype, quant_type, tensor, 4096)
        theirs, their_absmax = torch.ops.bitsandbytes.quantize_4bit.default(tensor, 64, quant_type, torch.uint8)
        assert_same_bits(packed, theirs)
        assert_same_bits(absmax, their_absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_infinities_and_nans_get_their_codes(dtype: str, quant_type: str) -> None:
    tensor = torch.randn(512).to(getattr(torch, dtype))
    tensor[5], tensor[70], tensor[200] = float("inf"), float("-inf"), float("nan")
    packed, absmax = encode_all(dtype, quant_type, tensor, 512)
    theirs, their_absmax = torch.ops.bitsandbytes.quantize_4bit.default(tensor, 64, quant_type, torch.uint8)
    assert_same_bits(packed, theirs)
    assert np.array_equal(absmax, their_absmax.numpy(), equal_nan=True)


@given(data=st.data(), quant_type=st.sampled_from(["nf4", "fp4"]))
@settings(max_examples=60, deadline=None)
def test_any_halves_get_their_codes(data: st.DataObject, quant_type: str) -> None:
    bits = np.array(data.draw(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=200)), np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] = 0x7BFF
    tensor = torch.from_numpy(bits.view(np.float16))
    packed, absmax = encode_all("float16", quant_type, tensor, 128)
    theirs, their_absmax = torch.ops.bitsandbytes.quantize_4bit.default(tensor, 64, quant_type, torch.uint8)
    assert_same_bits(packed, theirs)
    assert_same_bits(absmax, their_absmax)


@pytest.mark.parametrize("count", [1, 5, 7, 8, 33, 255, 256, 1000, 32767, 32768, 65537, 262144])
def test_double_quantized_absmax_is_theirs_to_the_last_bit(count: int, threads: int) -> None:
    absmax = torch.rand(count) * 0.1 + 0.01
    offset = absmax.mean()
    codes, state = bnb_functional.quantize_blockwise(absmax - offset, blocksize=256)
    ours, our_offset = quantize_absmax(absmax.numpy(), float(offset)), mean(absmax.numpy(), threads)
    assert_same_bits(np.asarray(our_offset), offset)
    assert_same_bits(ours.codes, codes)
    assert_same_bits(ours.absmax, state.absmax)


@given(st.integers(1, 70000), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_mean_is_torchs_for_any_length(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).random(count, np.float32)
    assert_same_bits(np.asarray(mean(values, torch.get_num_threads())), torch.from_numpy(values).mean())


def test_constant_absmax_has_blocks_of_zero() -> None:
    absmax = torch.full((600,), 0.25)
    codes, state = bnb_functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    ours = quantize_absmax(absmax.numpy(), float(mean(absmax.numpy(), 1)))
    assert_same_bits(ours.codes, codes)
    assert_same_bits(ours.absmax, state.absmax)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_state_blob_is_theirs(dtype: str, double: bool) -> None:
    weight = torch.randn(96, 40).to(getattr(torch, dtype))
    _, state = bnb_functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    offset = state.offset.item() if double else None
    theirs = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    assert quant_state("nf4", dtype, (96, 40), offset) == bytes(theirs.numpy())
    state = state_of(bytes(theirs.numpy()), "nf4", (96, 40), double=double)
    assert (state.dtype, state.shape, state.nested_offset) == (dtype, (96, 40), offset)


def state_of(content: bytes, quant_type: str, shape: tuple[int, int], *, double: bool) -> State:
    """What is said beside the codes of a matrix of this shape, where these bytes say it."""
    packing = FourBit(quant_type, double)
    stored = {part.suffix: (part.dtype, part.shape) for part in packing.stored(shape, "float16")}
    stored[f"weight.quant_state.bitsandbytes__{quant_type}"] = ("uint8", (len(content),))
    parts = {suffix: TensorInfo(f"m.{suffix}", *found, Path("f"), 0) for suffix, found in stored.items()}
    return packing.state(parts, lambda part: content)


@pytest.mark.parametrize(
    "odd",
    [
        b"", b"\xff\xfe", b"[1]", b"[" * 5000, b'{"shape": ' + b"[" * 4000 + b"]" * 4000 + b"}", b" " * 20_000,
        {"shape": 5}, {"shape": None}, {"shape": "ab"}, {"shape": [10**30, 40]}, {"shape": [-96, -40]},
        {"shape": [96.0, 40.0]}, {"shape": [96, 41]}, {"shape": [3840]}, {"blocksize": [64]}, {"blocksize": 0},
        {"blocksize": 128}, {"dtype": 5}, {"dtype": "load"}, {"quant_type": "fp4"}, {"nested_offset": "x"},
        {"nested_offset": float("nan")}, {"nested_dtype": ["float32"]}, {"nested_blocksize": 1},
    ],
    ids=lambda odd: str(odd)[:30],
)  # fmt: skip
def test_a_state_that_cannot_be_is_refused_by_name(odd: bytes | dict[str, Any]) -> None:
    said = json.loads(quant_state("nf4", "float16", (96, 40), 0.5))
    content = odd if isinstance(odd, bytes) else json.dumps({**said, **odd}).encode()
    with pytest.raises(InvalidCheckpoint, match=r"f: tensor 'm\.weight\.quant_state\..*': is no state"):
        state_of(content, "nf4", (96, 40), double=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_double_quantized_scales_may_be_of_any_dtype_that_bitsandbytes_saves(dtype: str) -> None:
    said = json.loads(quant_state("nf4", "float16", (96, 40), 0.5))
    content = json.dumps({**said, "nested_dtype": dtype}).encode()
    assert state_of(content, "nf4", (96, 40), double=True).nested_dtype == dtype


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 2048), (7, 9000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_theirs_through_fp16(shape: tuple[int, int], dtype: str) -> None:
    for scale in (1.0, 0.02, 6e-8, 1e4, 1e6):
        weight = (torch.randn(shape) * scale).to(getattr(torch, dtype))
        weight[-1] = 0
        theirs = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
        codes, scales = Int8Encoder().encode(convert(bits_of(weight), dtype, "float16"))
        assert_same_bits(codes, theirs.CB)
        assert_same_bits(scales, theirs.SCB)


def test_int8_row_with_a_nan_is_zeros() -> None:
    weight = torch.randn(3, 10).half()
    weight[1, 4] = float("nan")
    codes, scales = Int8Encoder().encode(bits_of(weight))
    assert not codes[1].any()
    assert np.isnan(scales).tolist() == [False, True, False]


@pytest.mark.parametrize("source", [*DTYPES, "float64"])
@pytest.mark.parametrize("target", DTYPES)
def test_casts_round_as_torch_rounds(source: str, target: str) -> None:
    bits = (
        np.random.default_rng(1)
        .integers(0, 2**64, 4000, np.uint64)
        .view(np.float64 if source == "float64" else np.uint64)
    )
    values = torch.from_numpy(bits.view(np.float64)).to(getattr(torch, source))
    values = torch.cat(
        [
            values,
            (torch.randn(4000) * 100).to(values.dtype),
            torch.tensor([0.0, -0.0, 65519.0, 65520.0]).to(values.dtype),
        ]
    )
    values = values[~values.isnan()]
    assert_same_bits(
        convert(bits_of(values), source, target),
        values.to(getattr(torch, target)).view(
            {2: torch.uint16, 4: torch.uint32}[torch.empty(0, dtype=getattr(torch, target)).element_size()]
        ),
    )
    nan = torch.tensor([float("nan")], dtype=getattr(torch, source))
    back = torch.from_numpy(convert(bits_of(nan), source, target)).view(getattr(torch, target))
    assert back.isnan().all()
