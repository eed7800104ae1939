"""Checkpoints that are read while they are being written."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.hub.heads import are_the_model, directory_heads, may_pass
from bigpipe.bigmodel.writing import Conversion, convert, save_checkpoint
from bigpipe.errors import InvalidCheckpoint
from bigpipe.passing import OpenInlet, OpenOutlet

TENSORS = {f"layer.{i}.weight": np.random.default_rng(i).random((50, 40), np.float32) for i in range(6)}


@pytest.fixture(params=["safetensors", "bin"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Three files of two tensors each."""
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_checkpoint(tmp_path / "one.safetensors", tmp_path / "source", max_shard_size=16_500, format=request.param)
    (tmp_path / "source" / "config.json").write_text('{"model_type": "opt"}')
    return tmp_path / "source"


def ends(tmp_path: Path) -> tuple[OpenOutlet, OpenInlet]:
    for name in ("handover/files", "out"):
        (tmp_path / name).mkdir(parents=True)
    return OpenOutlet(tmp_path / "handover", tmp_path / "out"), OpenInlet(tmp_path / "handover", "reader")


def deliver(outlet: OpenOutlet, source: Path, name: str, content: bytes | None = None) -> None:
    content = (source / name).read_bytes() if content is None else content
    (outlet.out / name).write_bytes(content)
    outlet.finished(name, hashlib.sha256(content).hexdigest(), len(content))


def test_reading_waits_for_the_file_it_needs(tmp_path: Path, source: Path) -> None:
    outlet, inlet = ends(tmp_path)
    weights = may_pass(path.name for path in source.iterdir())
    (outlet.out / "config.json").write_bytes((source / "config.json").read_bytes())
    outlet.announce(directory_heads(source, weights))
    arriving = open_checkpoint(inlet)
    assert arriving.tensors.keys() == TENSORS.keys()
    assert arriving.config == {"model_type": "opt"}

    read: dict[str, bytes] = {}
    thread = threading.Thread(target=lambda: read.update({name: arriving.read(name) for name in TENSORS}))
    thread.start()
    for name in weights:
        time.sleep(0.05)
        assert thread.is_alive()
        deliver(outlet, source, name)
    thread.join(10)
    assert read == {name: tensor.tobytes() for name, tensor in TENSORS.items()}


def test_other_bytes_than_announced_are_refused(tmp_path: Path, source: Path) -> None:
    outlet, inlet = ends(tmp_path)
    [first, *_] = weights = may_pass(path.name for path in source.iterdir())
    outlet.announce(directory_heads(source, weights))
    other = (source / first).read_bytes().replace(b"layer.1.weight", b"layer.9.weight")
    if first.endswith(".bin"):  # the same size, and whole: only its names are others
        (tmp_path / "other").mkdir()
        save_file({"layer.0.weight": TENSORS["layer.0.weight"], "layer.9.weight": TENSORS["layer.1.weight"]},
                  tmp_path / "other.safetensors")  # fmt: skip
        save_checkpoint(tmp_path / "other.safetensors", tmp_path / "other", format="bin")
        renamed = (tmp_path / "other" / "pytorch_model.bin").rename(tmp_path / "other" / first)
        other = renamed.read_bytes()
    assert other != (source / first).read_bytes()
    deliver(outlet, source, first, other)
    with pytest.raises(InvalidCheckpoint, match="another header than was announced"):
        open_checkpoint(inlet).read("layer.0.weight")


def test_a_torch_file_of_the_same_size_with_other_tensors_is_refused(tmp_path: Path) -> None:
    outlet, inlet = ends(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file({name: np.zeros(3, np.float32)}, tmp_path / name / "model.safetensors")
        save_checkpoint(tmp_path / name, tmp_path / f"{name}.bin", format="bin")
    outlet.announce(directory_heads(tmp_path / "one.bin", ["pytorch_model.bin"]))
    deliver(outlet, tmp_path / "two.bin", "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match="another header than was announced"):
        open_checkpoint(inlet).read("one")


def test_a_file_is_taken_once_all_that_is_made_of_it_is_written(tmp_path: Path, source: Path) -> None:
    """Resharded to files that hold three tensors: the second source file is needed by both."""
    outlet, inlet = ends(tmp_path)
    weights = may_pass(path.name for path in source.iterdir())
    outlet.announce(directory_heads(source, weights))
    for name in weights[:2]:
        deliver(outlet, source, name)
    thread = threading.Thread(
        target=convert,
        args=(open_checkpoint(inlet), tmp_path / "made", Conversion(max_shard_size=24_500)),
        daemon=True,
    )
    thread.start()
    while not (taken := outlet.handover.names("taken/reader")) and thread.is_alive():
        time.sleep(0.01)
    deliver(outlet, source, weights[2])
    thread.join(60)
    assert taken == {weights[0]}
    assert outlet.handover.names("taken/reader") == set(weights)
    save_checkpoint(source, tmp_path / "expected", max_shard_size=24_500)
    for file in open_checkpoint(tmp_path / "expected").files:
        assert (tmp_path / "made" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("names", "indexed", "whole"),
    [
        (["model.safetensors"], None, True),
        (["other.safetensors"], None, True),
        (["pytorch_model.bin"], None, True),
        (["weights.pt"], None, True),
        (["weights.pth", "optimizer.pt"], None, False),
        (["a.bin", "b.bin"], ["a.bin", "b.bin"], True),
        (["a.bin", "b.pt"], ["a.bin"], False),
        (["a.bin", "b.bin"], None, False),
        (["model.safetensors", "extra.safetensors"], None, False),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"], True),
        (["a.safetensors", "b.safetensors"], ["a.safetensors"], False),
        (["a.safetensors", "model.safetensors"], ["a.safetensors", "model.safetensors"], False),
        ([], None, False),
    ],
)
def test_only_what_would_be_opened_is_passed_on(
    tmp_path: Path, names: list[str], indexed: list[str] | None, whole: bool
) -> None:
    if indexed is not None:
        index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(indexed)}}
        kind = "pytorch_model.bin" if ".bin" in names[0] else "model.safetensors"
        (tmp_path / f"{kind}.index.json").write_text(json.dumps(index))
    assert are_the_model(names, tmp_path) is whole


def test_files_of_other_formats_are_not_passed_on() -> None:
    assert may_pass(["model.safetensors", "pytorch_model.bin", "config.json"]) == ["model.safetensors"]
    assert may_pass(["one.safetensors", "other.safetensors", "config.json"]) == []
    assert may_pass(["pytorch_model.bin", "training_args.bin", "optimizer.pt"]) == ["pytorch_model.bin"]
    assert may_pass(["weights.pth", "README.md"]) == ["weights.pth"]
    assert may_pass(["unet/model.safetensors", "model_index.json"]) == []


def announced(tmp_path: Path, file: Path, others: Mapping[str, bytes] | None = None) -> tuple[OpenOutlet, OpenInlet]:
    outlet, inlet = ends(tmp_path)
    for name, content in (others or {}).items():
        (outlet.out / name).write_bytes(content)
    outlet.announce(directory_heads(file.parent, [file.name]))
    return outlet, inlet


def test_torch_s_own_files_with_views_and_ties_are_read_as_they_come(tmp_path: Path) -> None:
    """Written by torch.save: a transposed view, a slice, a tied head, an empty tensor, a scalar, bfloat16."""
    import torch

    base = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    state = {
        "embed": base, "turned": base.t(), "part": base[2:4, 3:7], "head": base, "none": torch.empty(0, 4),
        "one": torch.tensor(3.5), "brain": base.to(torch.bfloat16),
    }  # fmt: skip
    (tmp_path / "source").mkdir()
    torch.save(state, tmp_path / "source" / "weights.pth")
    outlet, inlet = announced(tmp_path, tmp_path / "source" / "weights.pth")
    arriving = open_checkpoint(inlet)
    plain = open_checkpoint(tmp_path / "source")
    assert arriving.tied == plain.tied == {"head": "embed"}
    assert list(arriving.tensors) == list(plain.tensors)
    deliver(outlet, tmp_path / "source", "weights.pth")
    assert {name: arriving.read(name) for name in state} == {name: plain.read(name) for name in state}
    assert arriving.placed("turned") == replace(plain.tensors["turned"], file=arriving.placed("turned").file)


def test_an_index_that_is_wrong_is_found_before_anything_comes(tmp_path: Path, source: Path) -> None:
    outlet, inlet = ends(tmp_path)
    [file] = source.glob("*.index.json")
    index = json.loads(file.read_bytes())
    index["weight_map"]["layer.0.weight"] = index["weight_map"]["layer.5.weight"]
    (outlet.out / file.name).write_text(json.dumps(index))
    outlet.announce(directory_heads(source, may_pass(path.name for path in source.iterdir())))
    with pytest.raises(InvalidCheckpoint, match=r"layer\.0\.weight.*says this tensor is in .*00003"):
        open_checkpoint(inlet)
