"""Any set of tensors survives `.bin` → safetensors → reshard → `.bin` → reshard unchanged."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings, strategies as st

from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.writing import save_checkpoint

DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16",
    "uint32", "uint64", "complex64", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def filled(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes in a tensor's shape; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    content = torch.randint(0, 2 if dtype == "bool" else 256, (*shape, width), dtype=torch.uint8, generator=generator)
    return content.view(getattr(torch, dtype)).reshape(shape)


def contiguous(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
tensors = st.builds(filled, st.sampled_from(DTYPES), shapes, st.integers(0, 1000))


@st.composite
def state_dicts(draw) -> dict[str, torch.Tensor]:
    state = draw(st.dictionaries(names, tensors, min_size=1, max_size=8))
    for name in draw(st.lists(names, max_size=4)):
        tensor = state[draw(st.sampled_from(sorted(state)))]
        how = draw(st.sampled_from(["same", "transposed", "sliced", "strided", "shifted"]))
        if how == "transposed" and tensor.ndim > 1:
            tensor = tensor.transpose(0, -1)
        elif how == "sliced" and tensor.ndim:
            tensor = tensor[1:]
        elif how == "strided" and tensor.ndim:
            tensor = tensor[..., ::2]
        elif how == "shifted" and tensor.numel() > 1:
            tensor = tensor.reshape(-1)[1:]
        state.setdefault(name, tensor)
    return {name: tensor for name, tensor in state.items() if name != "__metadata__"}


@settings(max_examples=25, deadline=None)
@given(state=state_dicts(), limit=st.integers(1, 500))
def test_any_set_of_tensors_survives_four_conversions(state, limit):
    with tempfile.TemporaryDirectory() as folder:
        steps = [Path(folder, step) for step in ("start.pt", "safe", "resharded", "bin", "again")]
        torch.save(state, steps[0])
        save_checkpoint(steps[0], steps[1], max_shard_size=limit)
        save_checkpoint(steps[1], steps[2], max_shard_size=2 * limit)
        save_checkpoint(steps[0], steps[3], max_shard_size=limit, format="bin")
        save_checkpoint(steps[3], steps[4], max_shard_size=limit // 2 + 1, format="bin")
        for step in steps:
            checkpoint = open_checkpoint(step)
            aliases = open_checkpoint(steps[0]).tied
            assert {*checkpoint.tensors, *checkpoint.tied} | set(aliases) == set(state)
            for name, tensor in state.items():
                stored = checkpoint.tensors[
                    checkpoint.tied.get(name, name if name in checkpoint.tensors else aliases.get(name))
                ]
                assert (stored.dtype, stored.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
                assert checkpoint.read(stored.name) == contiguous(tensor), (step.name, name)
        for file in (*steps[3].glob("*.bin"), *steps[4].glob("*.bin")):
            for name, tensor in torch.load(file, weights_only=True).items():
                assert contiguous(tensor) == contiguous(state[name])
