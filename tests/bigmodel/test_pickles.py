"""The restricted reader of torch files: what it reads, and how little of a file it needs."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field

import pytest
import torch
from support.models import make_checkpoint, tiny_model

from bigpipe.bigmodel.checkpoint import FileSource, open_checkpoint
from bigpipe.bigmodel.checkpoint.bytesource import compact_chunks
from bigpipe.bigmodel.checkpoint.pickles import read_torch_file
from bigpipe.bigmodel.writing import PlannedTensor, ShardPlan
from bigpipe.bigmodel.writing.containers import TorchZip
from bigpipe.errors import InvalidCheckpoint


@dataclass
class CountingSource:
    """A file behind a slow line: counts what is asked for."""

    content: bytes
    name: str = "https://example.org/pytorch_model.bin"
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        self.reads.append((offset, length))
        return self.content[offset : offset + length]


class SpanSource(FileSource):
    """Notes how much is read at a time."""

    def __init__(self, path):
        super().__init__(path)
        self.lengths = []

    def read(self, offset, length):
        self.lengths.append(length)
        return super().read(offset, length)


def test_shapes_and_ties_of_a_remote_file_take_three_short_ranges(tmp_path):
    state = {f"layers.{number}.weight": torch.zeros(1000, 100) for number in range(20)}
    state["head"] = state["layers.0.weight"]
    torch.save(state, tmp_path / "model.bin")
    source = CountingSource((tmp_path / "model.bin").read_bytes())
    found = read_torch_file(source, tmp_path / "model.bin", placed=False)
    assert found.outline == {f"layers.{number}.weight": ("float32", (1000, 100)) for number in range(20)}
    assert found.tied == {"head": "layers.0.weight"}
    assert len(source.reads) == 3
    assert sum(length for _, length in source.reads) < 100_000 < source.size / 50


def test_tensors_without_elements_share_nothing(tmp_path):
    empty = torch.zeros(0, 3)
    torch.save({"a": empty, "b": empty}, tmp_path / "model.bin")
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    assert (list(checkpoint.tensors), checkpoint.tied) == (["a", "b"], {})


def test_a_directory_longer_than_the_first_read_is_read_whole(tmp_path):
    state = {f"{number:04d}{'x' * 100}": torch.zeros(1) for number in range(1200)}
    torch.save(state, tmp_path / "model.bin")
    source = CountingSource((tmp_path / "model.bin").read_bytes())
    assert len(read_torch_file(source, tmp_path, placed=False).tensors) == 1200
    assert len(source.reads) == 4


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_saves_is_read(tmp_path, protocol):
    state = tiny_model("gpt2").state_dict()  # an OrderedDict with `_metadata`
    state["parameter"] = torch.nn.Parameter(torch.ones(3))
    torch.save(state, tmp_path / "model.pt", pickle_protocol=protocol)
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    assert {*checkpoint.tensors, *checkpoint.tied} == set(state)
    assert checkpoint.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_views_of_a_storage_are_read_as_contiguous_bytes_in_little_memory(tmp_path):
    base = torch.arange(3 * 5 * 7 * 640, dtype=torch.float32).reshape(3, 5, 7, 640)
    views = {
        "permuted": base.permute(3, 1, 0, 2), "sliced": base[:, 1:4:2, :, 5:600:7], "row": base[1, 2, 3],
        "column": base[:, :, :, 9], "transposed": base.reshape(105, -1).t(), "scalar": base[1, 1, 1, 1],
        "one": base[:1].transpose(0, 1),
    }  # fmt: skip
    torch.save(views, tmp_path / "model.bin")
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    for name, view in views.items():
        expected = view.contiguous().numpy().tobytes()
        assert b"".join(bytes(piece) for piece in checkpoint.chunks(name, 1000)) == expected, name
        assert checkpoint.read(name) == expected, name
        stored = checkpoint.tensors[name]
        assert (stored.view is None) == view.is_contiguous() == (stored.offset >= 0)


def test_a_view_larger_than_memory_may_hold_is_gathered_in_pieces(tmp_path):
    matrix = torch.arange(300 * 200, dtype=torch.int16).reshape(300, 200)
    torch.save({"t": matrix.t(), "s": matrix[::3, ::5]}, tmp_path / "model.bin")
    tensors = open_checkpoint(tmp_path / "model.bin").tensors
    with SpanSource(tmp_path / "model.bin") as source:
        found = {name: b"".join(compact_chunks(source, tensors[name], 10**6, span=4096)) for name in ("t", "s")}
    assert found["t"] == matrix.t().contiguous().numpy().tobytes()
    assert found["s"] == matrix[::3, ::5].contiguous().numpy().tobytes()
    assert max(source.lengths) <= 4096 < matrix.nbytes


def test_files_beyond_four_gigabytes_are_written_as_torch_reads_them(tmp_path):
    """Headers only: the data are holes in a sparse file, and the sums over them are left at 0."""
    tensors = [PlannedTensor(f"t{number}", "uint8", (size,)) for number, size in enumerate((5 * 2**30, 3, 7))]
    container = TorchZip(ShardPlan("pytorch_model.bin", tuple(tensors)))
    file = tmp_path / "pytorch_model.bin"
    offsets = {}
    with open(file, "wb") as writing:
        writing.write(container.head)
        for tensor in tensors:
            offsets[tensor.name] = writing.tell()
            writing.seek(tensor.nbytes, os.SEEK_CUR)
            writing.write(container.after(tensor.name, 0))
        writing.write(container.tail(dict.fromkeys(offsets, 0)))
    assert file.stat().st_size == container.size
    theirs = torch.load(file, weights_only=True, mmap=True)
    ours = open_checkpoint(file)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in ours.tensors.items()
    }
    assert {name: tensor.offset for name, tensor in ours.tensors.items()} == offsets
    assert all(offset % 64 == 0 for offset in offsets.values())


def test_a_pickle_of_thirty_thousand_tensors_is_read(tmp_path):
    tensors = tuple(PlannedTensor(f"layers.{number}.weight", "float16", (2, 3)) for number in range(30_000))
    container = TorchZip(ShardPlan("pytorch_model.bin", tensors))
    crcs = {tensor.name: 0 for tensor in tensors}
    parts = [container.head, *(bytes(12) + container.after(tensor.name, 0) for tensor in tensors), container.tail(crcs)]
    source = CountingSource(b"".join(parts))
    assert len(read_torch_file(source, tmp_path, placed=False).tensors) == len(tensors)
    assert len(source.content) == container.size


def test_accelerates_own_index_and_plain_files_are_checkpoints(tmp_path):
    torch.save({"linear1.weight": torch.ones(2, 2), "linear1.bias": torch.zeros(2)}, tmp_path / "first_state_dict.bin")
    torch.save({"linear2.weight": torch.ones(2, 2)}, tmp_path / "second_state_dict.bin")
    index = {
        "linear1.weight": "first_state_dict.bin", "linear1.bias": "first_state_dict.bin",
        "linear2.weight": "second_state_dict.bin",
    }  # fmt: skip
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(tmp_path).tensors) == set(index)
    assert set(open_checkpoint(tmp_path / "index.json").tensors) == set(index)
    assert set(open_checkpoint(tmp_path / "second_state_dict.bin").tensors) == {"linear2.weight"}
    (tmp_path / "index.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"which of first_state_dict\.bin, second_state_dict\.bin"):
        open_checkpoint(tmp_path)


def test_what_trainers_leave_beside_a_model_is_not_the_model(tmp_path):
    make_checkpoint(tmp_path, "opt", format="bin")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights.pt")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    torch.save({"Ethan": {"ref_mel": torch.zeros(2)}}, tmp_path / "spk_dict.pt")  # voices: those are read beside it
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == ["weights.pt"]
    assert {"config.json", "tokenizer.json", "spk_dict.pt"} <= {file.name for file in checkpoint.extras}
    assert not {"weights.pt", "training_args.bin", "optimizer.pt"} & {file.name for file in checkpoint.extras}


def test_side_files_include_subfolders_but_not_other_models(tmp_path):
    make_checkpoint(tmp_path, "opt")
    for name in ("templates/chat.jinja", "onnx/model.onnx", "onnx/readme.txt", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = {str(file.relative_to(tmp_path)) for file in open_checkpoint(tmp_path).extras}
    assert "templates/chat.jinja" in names
    assert not {"onnx/model.onnx", "onnx/readme.txt", ".git/config"} & names


def test_reading_a_truncated_file_says_where_it_ends(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "model.bin")
    checkpoint = open_checkpoint(tmp_path / "model.bin")
    with open(tmp_path / "model.bin", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(InvalidCheckpoint, match="ends at byte 2000"):
        checkpoint.read("w")


WEIGHTS = {"a": torch.zeros(2), "b": torch.zeros(3)}


@pytest.mark.parametrize(
    ("saved", "cure"),
    [
        ({"epoch": 1, "state_dict": WEIGHTS, "best": torch.ones(1)}, "['state_dict'], path)"),
        ({"iteration": 5, "ema": WEIGHTS, "model": WEIGHTS | {}}, "['ema'], path), or ['model']"),
        ({"run": 1, "saved": {"model": {"weights": WEIGHTS}}}, "['saved']['model']['weights'], path)"),
        ({**WEIGHTS, "step": 5, "more": {"lr": 0.1}}, "if torch.is_tensor(v)}, path)"),
        ({"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "['model'], path)"),
        ({"epoch": 1}, "save tensors only"),
        ({"a": torch.eye(3).to_sparse()}, ".to_dense()"),
        ({"a": torch.zeros(2).numpy()}, "torch.from_numpy(array)"),
        ({**WEIGHTS, "shape": torch.Size([2])}, "save tensors only"),
        ({"model": WEIGHTS, "options": argparse.Namespace(lr=1)}, "save tensors only"),
    ],
)
def test_what_a_training_program_saved_has_a_cure_that_works(tmp_path, saved, cure):
    """Whatever comes first in it."""
    path = tmp_path / "model.bin"
    torch.save(saved, path)
    with pytest.raises(InvalidCheckpoint) as refused:
        open_checkpoint(path)
    assert cure in refused.value.cure
    assert "trust" not in refused.value.cure
    if "torch.load" in cure or "path)" in cure:
        exec(refused.value.cure.partition("alone: ")[2].partition(", or ")[0], {"torch": torch, "path": path})  # noqa: S102
        assert set(open_checkpoint(path).tensors) == set(WEIGHTS)
