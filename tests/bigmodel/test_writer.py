"""What the writer writes, against the libraries whose formats these are."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
import zipfile

import pytest
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from support.models import forward, make_checkpoint, tiny_model

from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.writing import (
    Conversion,
    PlannedTensor,
    Traffic,
    convert,
    plan_shards,
    save_checkpoint,
    write_checkpoint,
)
from bigpipe.errors import DoesNotFit, InvalidCheckpoint, UsageError
from bigpipe.files import partial_name


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=200, deadline=None)
@given(
    # The hub takes all empty tensors for one shared storage, because torch gives them all the address 0.
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=20),
    limit=st.integers(1, 200),
    form=st.sampled_from(["safetensors", "bin"]),
)
def test_shard_plans_equal_those_of_huggingface_hub(sizes, limit, form):
    names = [f"layer.{(7 * number) % len(sizes)}.{number}" for number in range(len(sizes))]
    state = {name: torch.zeros(size, dtype=torch.uint8) for name, size in zip(names, sizes, strict=True)}
    pattern = {"safetensors": "model{suffix}.safetensors", "bin": "pytorch_model{suffix}.bin"}[form]
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit, filename_pattern=pattern)
    ours = plan_shards(
        [PlannedTensor(name, "uint8", (size,)) for name, size in zip(names, sizes, strict=True)], limit, form
    )
    assert {plan.file: [tensor.name for tensor in plan.tensors] for plan in ours} == theirs.filename_to_tensors
    assert sum(plan.nbytes for plan in ours) == theirs.metadata["total_size"]


def test_files_are_byte_for_byte_those_of_huggingface_hub(tmp_path):
    torch.manual_seed(0)
    state = {
        "b.weight": torch.randn(60, 50), "a.weight": torch.randn(50, 60).half(), "ü.bias": torch.randn(50),
        "a.zero": torch.zeros(0, 3), "a.scalar": torch.tensor(3), "c.mask": torch.tensor([True, False, True]),
        "c.code": torch.arange(7, dtype=torch.uint8), "c.f8": torch.randn(6).to(torch.float8_e4m3fn),
        "d.weight": torch.randn(40, 40).bfloat16(), "d.complex": torch.randn(5, dtype=torch.complex64),
    }  # fmt: skip
    (tmp_path / "theirs").mkdir()
    torch.save(state, tmp_path / "pytorch_model.bin")
    save_torch_state_dict(state, tmp_path / "theirs", max_shard_size=9000)
    saved = save_checkpoint(tmp_path / "pytorch_model.bin", tmp_path / "ours", max_shard_size=9000)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert saved.shards > 2
    assert names == sorted(saved.files)
    for name in names:
        theirs, ours = (tmp_path / "theirs" / name).read_bytes(), (tmp_path / "ours" / name).read_bytes()
        if name.endswith(".json"):
            assert json.loads(ours) == json.loads(theirs)
        else:
            assert ours == theirs
        assert saved.files[name] == (hashlib.sha256(ours).hexdigest(), len(ours))


@pytest.mark.parametrize("memory_map", [False, True])
def test_torch_reads_our_bin_files(tmp_path, memory_map):
    state = {
        "w": torch.randn(700, 500), "tied": torch.zeros(0), "h": torch.randn(3).half(), "s": torch.tensor(2.5),
        "e": torch.zeros(0, 4), "u": torch.tensor([1, 2]).to(torch.uint16), "f": torch.randn(4).to(torch.float8_e5m2),
        "c": torch.randn(2, dtype=torch.complex128), "m": torch.tensor([[True], [False]]), "l": torch.arange(5),
    }  # fmt: skip
    state["tied"] = state["w"]
    torch.save(state, tmp_path / "source.pt")
    save_checkpoint(tmp_path / "source.pt", tmp_path / "out", format="bin")
    file = tmp_path / "out" / "pytorch_model.bin"
    assert zipfile.ZipFile(file).testzip() is None
    loaded = torch.load(file, weights_only=True, mmap=memory_map)
    assert set(loaded) == set(state)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
        assert raw(tensor) == raw(state[name])
    assert loaded["tied"].data_ptr() == loaded["w"].data_ptr()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2", "bert", "t5", "mixtral"])
def test_from_pretrained_gives_the_same_logits_after_a_reshard(tmp_path, architecture, form):
    import transformers

    make_checkpoint(tmp_path / "source", architecture, format="bin" if form == "safetensors" else "safetensors")
    saved = save_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size="20KB", format=form)
    assert saved.shards > 1
    model = tiny_model(architecture)
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "out")
    assert torch.equal(forward(loaded), forward(model))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "bert", "roberta", "t5", "bart", "qwen2", "bloom"])
def test_the_same_aliases_are_dropped_as_save_pretrained_drops(tmp_path, architecture):
    make_checkpoint(tmp_path / "theirs", architecture)
    shutil.copytree(tmp_path / "theirs", tmp_path / "source", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny_model(architecture).state_dict(), tmp_path / "source" / "pytorch_model.bin")
    save_checkpoint(tmp_path / "source", tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert set(ours) == set(theirs)


def test_a_cast_changes_floating_tensors_and_the_config(tmp_path):
    import transformers

    make_checkpoint(tmp_path / "source", "llama")
    state = tiny_model("llama").state_dict()
    save_checkpoint(tmp_path / "source", tmp_path / "out", dtype="bfloat16", max_shard_size="30KB")
    checkpoint = open_checkpoint(tmp_path / "out")
    for name in checkpoint.tensors:
        assert checkpoint.read(name) == raw(state[name].bfloat16())
    assert checkpoint.config["dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_tensors_larger_than_a_piece_and_planned_in_any_order_are_hashed_right(tmp_path):
    contents = {"a": bytes(range(256)) * 80_000, "b": b"\x01" * 20_000_003, "c": b"\x02\x03" * 9}
    plan = plan_shards([PlannedTensor(name, "uint8", (len(data),)) for name, data in contents.items()], 10**9)
    for tensors in (plan[0].tensors, plan[0].tensors[::-1]):
        reordered = [type(plan[0])(plan[0].file, tensors)]
        saved = write_checkpoint(tmp_path, reordered, lambda tensor: [contents[tensor.name]])
        written = (tmp_path / "model.safetensors").read_bytes()
        assert saved.files["model.safetensors"] == (hashlib.sha256(written).hexdigest(), len(written))
        assert {name: bytes(open_checkpoint(tmp_path).read(name)) for name in contents} == contents


def test_whose_layout_the_tensors_have_is_kept(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model" / "model.safetensors", {"format": "mlx", "other": "x"})
    save_checkpoint(tmp_path / "model", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").metadata == {"format": "mlx"}


def test_a_save_replaces_the_files_of_an_earlier_one(tmp_path):
    def weights():
        return [path.name for path in sorted((tmp_path / "out").glob("*model*"))]

    make_checkpoint(tmp_path / "source", "opt")
    save_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size="10KB")
    save_checkpoint(tmp_path / "source", tmp_path / "out")
    assert weights() == ["model.safetensors"]
    for size in ("5GB", "10KB"):  # a loader would take the old safetensors before the new `.bin`
        save_checkpoint(tmp_path / "source", tmp_path / "out", max_shard_size=size)
        save_checkpoint(tmp_path / "source", tmp_path / "out", format="bin")
        assert weights() == ["pytorch_model.bin"]


@pytest.mark.parametrize("limit", ["5GB", "20KB"])
@pytest.mark.parametrize("way", ["disk", "module", "nf4"])
def test_a_save_that_is_broken_off_over_another_leaves_no_model(tmp_path, way, limit):
    """Files of the older one beside those of the newer would be taken for one whole model."""
    make_checkpoint(tmp_path / "new", "llama", seed=1)

    def stop(done, total):
        raise KeyboardInterrupt

    def save(**options):
        if way == "nf4":
            return quantize_checkpoint(
                tmp_path / "new", tmp_path / "out", scheme="nf4", max_shard_size=limit, **options
            )
        source = tiny_model("llama", seed=1) if way == "module" else tmp_path / "new"
        return save_checkpoint(source, tmp_path / "out", max_shard_size=limit, **options)

    files = save().files
    assert "config.json" in files
    with pytest.raises(KeyboardInterrupt):
        save(progress=stop)
    with pytest.raises(InvalidCheckpoint):
        open_checkpoint(tmp_path / "out")
    assert save().files == files


def test_a_save_removes_what_a_killed_one_left_unfinished(tmp_path):
    make_checkpoint(tmp_path / "source", "opt")
    (tmp_path / "out").mkdir()
    left = [partial_name(tmp_path / "out" / "config.json"), tmp_path / "out" / "model-00002-of-00007.safetensors"]
    for path in left:
        path.write_bytes(b"torn")
    save_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not any(path.exists() for path in left)


def test_one_worker_finishes_a_file_before_it_begins_the_next(tmp_path):
    plans = plan_shards([PlannedTensor(f"t{number}", "uint8", (1000,)) for number in range(3)], 1000)
    whole = []

    def produce(tensor):
        whole.append(len(list(tmp_path.glob("out/*.safetensors"))) + len(list(tmp_path.glob("journal/*"))))
        yield bytes(1000)

    write_checkpoint(tmp_path / "out", plans, produce, journal=tmp_path / "journal")
    assert whole == [0, 2, 4]


def test_finished_files_are_kept_after_a_crash_and_damaged_ones_are_not(tmp_path):
    plans = plan_shards([PlannedTensor(f"t{number}", "uint8", (1000,)) for number in range(4)], 1000)
    produced = []

    def produce(tensor):
        produced.append(tensor.name)
        if len(produced) == 4:
            raise KeyboardInterrupt
        yield tensor.name.encode() * 500

    journal = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", plans, produce, journal=journal)
    assert not list((tmp_path / "out").glob("*.part"))
    (tmp_path / "out" / plans[1].file).write_bytes(b"\0" * (tmp_path / "out" / plans[1].file).stat().st_size)
    saved = write_checkpoint(tmp_path / "out", plans, produce, journal=journal)
    assert produced == ["t0", "t1", "t2", "t3", "t1", "t3"]
    assert len(saved.files) == 5
    assert {tensor: open_checkpoint(tmp_path / "out").read(tensor) for tensor in ("t0", "t1", "t2", "t3")} == {
        f"t{number}": f"t{number}".encode() * 500 for number in range(4)
    }
    write_checkpoint(tmp_path / "out", plans, produce, journal=journal, fingerprint=lambda file: "another source")
    assert produced[6:] == ["t0", "t1", "t2", "t3"]


def test_side_files_of_another_attempt_do_not_stay(tmp_path):
    """It was given other files, and what lies in the output is published; what is finished is in the journal."""
    checkpoint, out = open_checkpoint(make_checkpoint(tmp_path / "model", "gpt2")), tmp_path / "out"

    def attempt():
        saved = convert(checkpoint, out, Conversion(max_shard_size=10**9), linked=True, journal=tmp_path / "journal")
        return saved, {path.relative_to(out).as_posix(): path.stat().st_ino for path in out.rglob("*")}

    saved, first = attempt()
    (out / "speech").mkdir()
    for name in ("speech/config.json", "README.md"):
        (out / name).write_text("{}")
    again, second = attempt()
    assert (second, again.files) == (first, saved.files)


def test_several_files_side_by_side_stop_together(tmp_path):
    plans = plan_shards([PlannedTensor(f"t{number}", "uint8", (2_000_000,)) for number in range(8)], 2_000_000)

    def produce(tensor):
        for piece in range(4):
            if (tensor.name, piece) == ("t5", 2):
                raise OSError("the source is gone")
            yield tensor.name.encode() * 250_000

    with pytest.raises(OSError, match="the source is gone"):
        write_checkpoint(tmp_path, plans, produce, workers=3)
    assert not list(tmp_path.glob("*.part"))
    assert not (tmp_path / plans[5].file).exists()
    seen = []
    saved = write_checkpoint(
        tmp_path,
        plans,
        lambda tensor: [tensor.name.encode() * 10**6],
        workers=3,
        traffic=Traffic(lambda *done: seen.append(done)),
    )
    assert seen[-1] == (16_000_000, 16_000_000)
    assert list(saved.files) == [*(plan.file for plan in plans), "model.safetensors.index.json"]
    checkpoint = open_checkpoint(tmp_path)
    assert all(checkpoint.read(name) == name.encode() * 10**6 for name in checkpoint.tensors)


def test_an_error_stops_the_other_workers_at_their_next_piece(tmp_path):
    plans = plan_shards([PlannedTensor(f"t{number}", "uint8", (1_000_000,)) for number in range(2)], 1_000_000)
    begun, made = threading.Event(), []

    def produce(tensor):
        if tensor.name == "t0":
            begun.wait()
            raise OSError("the source is gone")
        for piece in range(1000):
            begun.set()
            time.sleep(0.01)
            made.append(piece)
            yield bytes(1000)

    with pytest.raises(OSError, match="the source is gone"):
        write_checkpoint(tmp_path, plans, produce, workers=2)
    assert len(made) < 1000


def test_a_producer_that_gives_too_little_is_a_bug_and_leaves_nothing(tmp_path):
    plans = plan_shards([PlannedTensor("t", "uint8", (10,))], 100)
    with pytest.raises(ValueError, match="9 bytes were produced, 10 planned"):
        write_checkpoint(tmp_path, plans, lambda _: [b"123456789"])
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_on_the_disk_is_refused_before_writing(tmp_path):
    plans = plan_shards([PlannedTensor("t", "uint8", (2**60,))], 2**61)
    with pytest.raises(DoesNotFit, match="are to be written, and the disk has"):
        write_checkpoint(tmp_path, plans, lambda _: [])
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path, plan_shards([PlannedTensor("t", "uint8", (9,))], 100), lambda _: [b"123456789"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DoesNotFit, match="are to be written, and the disk has"):
        write_checkpoint(tmp_path, plans, lambda _: [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "what was saved before stays"


def test_refusals_name_the_cure(tmp_path):
    make_checkpoint(tmp_path, "opt")
    with pytest.raises(UsageError, match="is where the source is"):
        save_checkpoint(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="cannot be cast to"):
        save_checkpoint(tmp_path, tmp_path.with_name("out"), dtype="int8")
    torch.save({"z": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "z.pt")
    with pytest.raises(UsageError, match="safetensors has no complex128"):
        save_checkpoint(tmp_path / "z.pt", tmp_path / "out")
