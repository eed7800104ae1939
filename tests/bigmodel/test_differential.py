"""Each layout of `support.layouts`, read by bigpipe and by transformers: equal tensors, or both refuse.

What bigpipe refuses and transformers reads is read there with tensors that nobody saved, or without some that somebody
did; what bigpipe reads alone is held against the model that was saved.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.layouts import FAMILIES, LAYOUTS, Layout, Tensors
from support.real import transformers_quietly

import bigpipe
from bigpipe.errors import BigpipeError

QUICK = {
    "llama", "llama-tied", "gpt2", "bloom", "mixtral", "qwen3_moe", "gpt_oss", "mamba", "bert", "resnet", "wav2vec2",
    "t5", "whisper", "llava", "blip-2 in bfloat16", "wav2vec2 in bfloat16", "deepseek_v3", "clip",
}  # fmt: skip
"""The families that are read whenever tests run."""


def with_verdict(verdict: str) -> list[Any]:
    """The names of layouts as parameters of a test."""
    found = [name for name, layout in LAYOUTS.items() if layout.verdict == verdict]
    slow = FAMILIES.keys() - QUICK
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in found]


def by_transformers(layout: Layout, folder: Path) -> Any:
    """What `from_pretrained` loads."""
    import transformers

    transformers_quietly()
    dtype = getattr(torch, layout.dtype) if layout.dtype else "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(folder, subfolder=layout.asked.get("subfolder", ""))
        model_class = layout.own() if layout.own else getattr(transformers, config.architectures[0])
        return model_class.from_pretrained(folder, dtype=dtype, **layout.asked)


def reads(layout: Layout, folder: Path) -> bool:
    """Does transformers? It raises whatever it happens upon."""
    try:
        by_transformers(layout, folder)
    except Exception:
        return False
    return True


def by_bigpipe(layout: Layout, folder: Path) -> Any:
    import transformers

    own = layout.own()(transformers.AutoConfig.from_pretrained(folder)) if layout.own else None
    return bigpipe.load(folder / layout.below, dtype=layout.dtype, model=own)


def assert_equal(found: Any, wanted: Any) -> None:
    """The same tensors under the same names, in the same order; buffers that no checkpoint holds among them."""
    for kind in ("state_dict", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(wanted, kind)())
        assert list(ours) == list(theirs)
        assert [name for name in ours if not same(ours[name], theirs[name])] == []


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit: NaNs and signs of zero included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def stored(folder: Path) -> Tensors:
    """Every tensor of the weight files, as safetensors and torch themselves read them."""
    tensors: Tensors = {}
    for file in bigpipe.open_checkpoint(folder).files:
        is_safe = file.suffix == ".safetensors"
        tensors |= load_file(file) if is_safe else torch.load(file, weights_only=True, map_location="cpu")
    return tensors


@pytest.mark.parametrize("name", with_verdict("equal"))
def test_equal(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    layout.make(tmp_path)
    assert_equal(by_bigpipe(layout, tmp_path), by_transformers(layout, tmp_path))


@pytest.mark.parametrize("name", with_verdict("both refuse"))
def test_both_refuse(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    layout.make(tmp_path)
    assert not reads(layout, tmp_path)
    with pytest.raises(BigpipeError):
        by_bigpipe(layout, tmp_path)


@pytest.mark.parametrize("name", with_verdict("bigpipe refuses"))
def test_bigpipe_refuses(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    layout.make(tmp_path)
    assert reads(layout, tmp_path)
    with pytest.raises(BigpipeError) as refused:
        by_bigpipe(layout, tmp_path)
    assert layout.because
    assert str(tmp_path) in refused.value.cause


PLAN = """\
version: 1
name: plan
stages:
  download: {uses: download, with: {path: checkpoint}}
  dispatch: {uses: dispatch, inputs: download, with: {device_map: auto, max_memory: {cpu: 1GB}}}
"""


@pytest.mark.parametrize("name", [*with_verdict("both refuse"), *with_verdict("bigpipe refuses")])
def test_what_is_refused_is_refused_by_the_plan(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    LAYOUTS[name].make(tmp_path / "checkpoint")
    (tmp_path / "recipe.yaml").write_text(PLAN)
    with pytest.raises(BigpipeError) as refused:
        raise bigpipe.plan(tmp_path / "recipe.yaml", store=tmp_path / "store").errors()[0]
    assert re.search(r"recipe\.yaml:[45]:\d+: ", str(refused.value))
    assert refused.value.cure


@pytest.mark.parametrize("name", with_verdict("bigpipe reads"))
def test_bigpipe_reads(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    saved = layout.make(tmp_path)
    assert not reads(layout, tmp_path)
    assert layout.because
    assert_equal(by_bigpipe(layout, tmp_path), saved)


@pytest.mark.parametrize("name", with_verdict("equal"))
def test_what_is_stored_is_read_byte_for_byte(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    layout.make(tmp_path)
    checkpoint, wanted = bigpipe.open_checkpoint(tmp_path / layout.below), stored(tmp_path / layout.below)
    assert {*checkpoint.tensors, *checkpoint.tied} == wanted.keys()
    for tensor in wanted:
        given = torch.frombuffer(bytearray(checkpoint.read(tensor) or b"\0"), dtype=torch.uint8)
        assert same(wanted[tensor].contiguous().reshape(-1).view(torch.uint8), given[: wanted[tensor].nbytes]), tensor


@pytest.mark.parametrize("name", with_verdict("equal"))
def test_what_is_written_anew_reads_the_same(tmp_path: Path, name: str) -> None:
    """In the other format and in shards, `save_checkpoint` gives a folder that transformers reads as the first."""
    layout = LAYOUTS[name]
    layout.make(tmp_path / "here")
    form: Any = "safetensors" if list(tmp_path.glob("here/*.bin")) else "bin"
    bigpipe.save_checkpoint(tmp_path / "here" / layout.below, tmp_path / "anew", format=form, max_shard_size="30KB")
    plain = Layout(make=layout.make, verdict="equal", own=layout.own, dtype=layout.dtype)
    assert_equal(by_transformers(plain, tmp_path / "anew"), by_transformers(layout, tmp_path / "here"))
