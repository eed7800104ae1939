"""Files made to hurt: an InvalidCheckpoint or the right bytes, never a crash, never much memory, never foreign code."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attack.mutations import mutant
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.errors import InvalidCheckpoint


def header_file(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ('{"a":' + F32 + ',"a":' + F32 + "}", 4, "stands twice"),
        ('{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4, "stands twice in one object"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4, "takes 8 bytes, but data_offsets say 4"),
        ('{"a":' + F32 + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}', 6, "overlaps"),
        ('{"a":' + F32 + ',"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', 12, "leaves a hole after byte"),
        ('{"a":' + F32 + "}", 5, "belong to no tensor"),
        ('{"a":' + F32 + "}", 3, "is cut short"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', 4, "its entry is not"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', 4, "its entry is not"),
        ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', 4, "its entry is not"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}', 4, "its entry is not"),
        ('{"a":{"dtype":"F32","shape":[9223372036854775807,9,9],"data_offsets":[0,4]}}', 4, "takes"),
        ('{"a":{"dtype":"F32","shape":[' + "1," * 70 + '1],"data_offsets":[0,4]}}', 4, "its entry is not"),
        ('{"a":{"dtype":"F32","shape":[' + "1" * 5000 + '],"data_offsets":[0,4]}}', 4, "not JSON"),
        ('{"a":{"dtype":"F6_E2M3","shape":[1],"data_offsets":[0,4]}}', 4, "not one torch has"),
        ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,4]}}', 4, "does not fill whole bytes"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", 0, "not described by a JSON object"),
        ('{"a":{"x":' + "[" * 100_000, 0, "longer than 65536 bytes"),
        ('{"a":{"x":' + "[" * 9_000 + "]" * 9_000 + "}}", 0, "not JSON"),
        ('{"\\ud800":' + F32 + "}", 4, "not valid Unicode"),
        ('{"__metadata__":{"format":1},"a":' + F32 + "}", 4, "strings only"),
        ('{"__metadata__":' + F32 + "}", 4, "strings only"),
        ('{"__metadata__":{},"__metadata__":{}}', 0, "stands twice"),
        ('{"a":' + F32 + "}x", 4, "after the end of the header"),
        ('{"a":' + F32 + ",}", 4, "name is missing"),
        ('{"a":' + F32, 4, "',' is missing"),
        ("[]", 0, "does not start with"),
        (b'{"\xff":' + F32.encode() + b"}", 4, "not UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_header_is_refused_with_its_place(tmp_path, header, data, message):
    with pytest.raises(InvalidCheckpoint, match=message) as caught:
        open_checkpoint(header_file(tmp_path / "model.safetensors", header, b"\0" * data))
    assert str(tmp_path / "model.safetensors") in caught.value.cause
    assert caught.value.cure


@pytest.mark.parametrize("length", [0, 3, 8])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * length)
    with pytest.raises(InvalidCheckpoint):
        open_checkpoint(tmp_path)


def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path):
    file = header_file(tmp_path / "model.safetensors", "{}")
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(InvalidCheckpoint, match="4611686018427387904 bytes"):
        open_checkpoint(file)
    with open(file, "wb") as sparse:
        sparse.write(struct.pack("<Q", 33_554_433))
        sparse.truncate(200_000_000)
    with pytest.raises(InvalidCheckpoint, match="33554433 bytes"):
        open_checkpoint(file)


def test_an_empty_header_with_spaces_is_a_checkpoint_without_tensors(tmp_path):
    assert not open_checkpoint(header_file(tmp_path / "model.safetensors", "{}      ")).tensors
    metadata = open_checkpoint(header_file(tmp_path / "model.safetensors", '{ "__metadata__" : {"a":"}{"} } ')).metadata
    assert metadata == {"a": "}{"}


def torch_zip(path: Path, pickled: bytes, files: dict[str, bytes] | None = None, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in {"byteorder": b"little", "data/0": b"\0" * 8, "version": b"3\n", **(files or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def tensor_pickle(
    *, name=b"X\x01\0\0\0a", offset=b"K\0", shape=b"K\x02\x85", strides=b"K\x01\x85", storage=None
) -> bytes:
    storage = storage or b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return b"\x80\x02}" + name + rebuild + storage + offset + shape + strides + b"\x89ccollections\nOrderedDict\n)RtRs."


def test_the_hand_made_file_is_one_that_torch_reads(tmp_path):
    file = torch_zip(tmp_path / "pytorch_model.bin", tensor_pickle())
    assert torch.load(file, weights_only=True)["a"].tolist() == [0.0, 0.0]
    assert open_checkpoint(file).read("a") == b"\0" * 8


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor_pickle(shape=b"K\x03\x85"), "reaches beyond the end of its storage"),
        (tensor_pickle(offset=b"K\x01"), "reaches beyond"),
        (tensor_pickle(offset=b"J\xff\xff\xff\xff"), "a size is not a number"),
        (tensor_pickle(strides=b"J\xff\xff\xff\xff\x85"), "a size is not a number"),
        (tensor_pickle(strides=b"K\0\x85", shape=b"M\xff\xff\x85"), "shows the same elements several times"),
        (tensor_pickle(strides=b"K\x01K\x01\x86"), "its shape and strides do not fit"),
        (tensor_pickle(shape=b"\x88\x85"), "a size is not a number"),
        (tensor_pickle(storage=b"K\x01"), "no typed storage"),
        (tensor_pickle(name=b"K\x01"), "is not a tensor"),
        (tensor_pickle(name=b"]"), "a key that is not a string"),
        (b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.", "refers to 'posix.system'"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "refers to 'posix.system'"),
        (b"\x80\x02cbuiltins\neval\nX\x01\0\0\x001\x85R.", "refers to 'builtins.eval'"),
        (b"\x80\x02ctorch\nload\nX\x01\0\0\x001\x85R.", "refers to 'torch.load'"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "refers to"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "not a rebuilding function"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "uses the pickle operation"),
        (b"(S'true'\nios\nsystem\n.", "uses the pickle operation"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "numbers its values out of order"),
        (b"\x80\x02j\xff\xff\xff\xff.", "refers to a value that is not there"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "ends in the middle of a value"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "uses the pickle operation"),
        (b"\x80\x02" + b"(" * 1000 + b".", "nests more than"),
        (b"\x80\x02}" + b")" * 1_600_000 + b".", "makes more than"),
        (b"\x80\x02}(" + b")" * 500_000 + b"u.", "a key that is not a string"),
        (b"\x80\x02)" + b"\x85" * 300_000 + b".", "holds no state dict"),
        (b"\x80\x02}", "cut short or damaged"),
        (b"", "cut short or damaged"),
        (b"\x80\x020.", "cut short or damaged"),
        (b"\x80\x02K\x01.", "holds no state dict"),
    ],
)  # fmt: skip
def test_a_bad_pickle_is_refused_and_never_run(tmp_path, pickled, message):
    with pytest.raises(InvalidCheckpoint, match=message) as caught:
        open_checkpoint(torch_zip(tmp_path / "pytorch_model.bin", pickled))
    assert caught.value.cure


class Attack:
    """Whatever it reduces to must never be called."""

    called = False

    def __reduce__(self):
        return Attack.run, ()

    @staticmethod
    def run():
        Attack.called = True


def test_a_pickled_attack_beside_real_tensors_is_refused_by_name(tmp_path):
    torch.save(collections.OrderedDict(a=torch.zeros(2), b=Attack()), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match=r"refers to '.*'; a state dict of tensors does not"):
        open_checkpoint(tmp_path)
    assert not Attack.called


def test_what_is_no_torch_zip_of_tensors_is_refused_with_the_cure(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidCheckpoint, match="not a zip file") as caught:
        open_checkpoint(file)
    assert "torch.save(torch.load(path, weights_only=True), path)" in caught.value.cure
    torch_zip(file, tensor_pickle(), {"constants.pkl": pickle.dumps(())})
    with pytest.raises(InvalidCheckpoint, match="TorchScript"):
        open_checkpoint(file)
    torch_zip(file, tensor_pickle(), {"byteorder": b"big"})
    with pytest.raises(InvalidCheckpoint, match="byte order is 'big'"):
        open_checkpoint(file)
    torch.save({"model": {"a": torch.zeros(2)}, "epoch": 3}, file)
    with pytest.raises(InvalidCheckpoint, match="'model' is not a tensor") as caught:
        open_checkpoint(file)
    assert "['model']" in caught.value.cure
    torch.save({"a": torch.zeros(2, device="meta")}, file)
    with pytest.raises(InvalidCheckpoint, match="_rebuild_meta_tensor_no_storage"):
        open_checkpoint(file)
    torch.save({"a": torch.zeros(2, dtype=torch.complex64).conj()}, file)
    with pytest.raises(InvalidCheckpoint, match="conjugate"):
        open_checkpoint(file)


def test_a_zip_with_tricks_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch_zip(file, tensor_pickle(), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidCheckpoint, match="is compressed"):
        open_checkpoint(file)
    torch_zip(file, tensor_pickle(), {"data/0": b"\0" * 4})
    with pytest.raises(InvalidCheckpoint, match="should have 8 bytes and has 4"):
        open_checkpoint(file)
    whole = torch_zip(file, tensor_pickle()).read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.rindex(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(encrypted)
    with pytest.raises(InvalidCheckpoint, match="encrypted"):
        open_checkpoint(file)
    file.write_bytes(whole + b"more")
    with pytest.raises(InvalidCheckpoint, match="bytes after its zip directory"):
        open_checkpoint(file)
    second = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)
    file.write_bytes(whole[: second + 42] + struct.pack("<L", 0) + whole[second + 46 :])
    with pytest.raises(InvalidCheckpoint, match="overlaps another"):
        open_checkpoint(file)
    doubled = torch_zip(file, tensor_pickle(), {"data/1": b"\1" * 8}).read_bytes()
    file.write_bytes(doubled.replace(b"archive/data/1", b"archive/data/0"))
    with pytest.raises(InvalidCheckpoint, match="holds 'archive/data/0' twice"):
        open_checkpoint(file)
    file.write_bytes(whole.replace(b"FloatStorage", b"FloatStorbge"))
    with pytest.raises(InvalidCheckpoint, match="wrong CRC"):
        open_checkpoint(file)


def an_index(folder: Path, weight_map: dict, **extra) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **extra}))
    return folder


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", "a\0b", 7, None]
)
def test_an_index_may_name_plain_files_only(tmp_path, name):
    with pytest.raises(InvalidCheckpoint, match="not a plain file name"):
        open_checkpoint(an_index(tmp_path, {"a": name}))


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    file = "model-00001-of-00001.safetensors"
    with pytest.raises(InvalidCheckpoint, match="which is not there"):
        open_checkpoint(an_index(tmp_path, {"a": "model-00002-of-00002.safetensors"}))
    with pytest.raises(InvalidCheckpoint, match="it is nowhere"):
        open_checkpoint(an_index(tmp_path, {"a": file, "b": file}))
    half = "model-00001-of-00002.safetensors"
    save_file({"a": torch.zeros(2)}, tmp_path / half)
    with pytest.raises(InvalidCheckpoint, match="names 1 of 2 shards"):
        open_checkpoint(an_index(tmp_path, {"a": half}))
    (tmp_path / half).unlink()
    with pytest.raises(InvalidCheckpoint, match="no weight_map"):
        open_checkpoint(an_index(tmp_path, {}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{file}", "a": "{file}"}}}}')
    with pytest.raises(InvalidCheckpoint, match="stands twice"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": file, "b": "other.safetensors"}}))
    with pytest.raises(InvalidCheckpoint, match="another file of this model"):
        open_checkpoint(tmp_path)


def test_an_index_of_the_largest_models_is_read(tmp_path):
    """60 layers of 384 experts with three matrices, each stored as three tensors."""
    layer = "language_model.model.layers"
    parts = [
        f"{matrix}_proj.weight_{part}" for matrix in ("gate", "up", "down") for part in ("packed", "scale", "shape")
    ]
    names = (f"{layer}.{n}.mlp.experts.{e}.{part}" for n in range(1, 61) for e in range(384) for part in parts)
    map_ = {name: "model-00001-of-00001.safetensors" for name in names}
    with pytest.raises(InvalidCheckpoint, match="it is nowhere"):
        open_checkpoint(an_index(tmp_path, map_))


def test_what_is_larger_than_is_read_is_not_called_damaged(tmp_path):
    with open(an_index(tmp_path, {}) / "model.safetensors.index.json", "wb") as sparse:
        sparse.truncate(2**25 + 1)
    with pytest.raises(InvalidCheckpoint, match="larger than 33554432 bytes") as caught:
        open_checkpoint(tmp_path)
    assert "damaged" not in caught.value.cure


def test_metadata_is_read_up_to_a_limit_that_is_named(tmp_path):
    def opened(size):
        told = '{"__metadata__":{"a":"}' + "x" * size + '"}}'
        return open_checkpoint(header_file(tmp_path / "model.safetensors", told))

    assert len(opened(5_000_000).metadata["a"]) == 5_000_001
    with pytest.raises(InvalidCheckpoint, match="or its description is longer than 8388608 bytes"):
        opened(9_000_000)


def test_links_may_lead_to_blobs_and_objects_but_nowhere_else(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "secret")
    folder = tmp_path / "models--o--n" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    link = folder / "model.safetensors"
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidCheckpoint, match="outside the checkpoint"):
        open_checkpoint(folder)
    for place in (tmp_path / "models--o--n" / "blobs" / ("a" * 64), tmp_path / "store" / "objects" / ("b" * 64)):
        place.parent.mkdir(parents=True)
        place.write_bytes((tmp_path / "secret").read_bytes())
        link.unlink()
        link.symlink_to(os.path.relpath(place, folder))
        assert open_checkpoint(folder).tensors
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(InvalidCheckpoint, match="outside the checkpoint"):
        open_checkpoint(folder)


def test_a_fifo_a_directory_and_a_dangling_link_are_refused_at_once(tmp_path):
    target = tmp_path / "model.safetensors"
    os.mkfifo(target)
    with pytest.raises(InvalidCheckpoint, match="not a regular file"):
        open_checkpoint(tmp_path)
    target.unlink()
    target.symlink_to(tmp_path / "nothing")
    with pytest.raises(InvalidCheckpoint, match="cannot be opened"):
        open_checkpoint(tmp_path)
    target.unlink()
    target.symlink_to(target)
    with pytest.raises(InvalidCheckpoint, match="cannot be opened"):
        open_checkpoint(tmp_path)


def originals(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """A file of each kind, with the range that holds its header, or its directory and pickle."""
    state = {
        "a.weight": torch.arange(12).reshape(3, 4).float(), "b": torch.arange(6).half(), "c": torch.tensor(True),
        "d": torch.arange(4, dtype=torch.int64), "e": torch.zeros(0, 2), "f": torch.arange(8).to(torch.uint16),
    }  # fmt: skip
    safe, plain = folder / "model.safetensors", folder / "pytorch_model.bin"
    save_file(state, safe)
    state["tied"] = state["a.weight"]
    state["view"] = state["a.weight"].t()
    torch.save(state, plain)
    size = plain.stat().st_size
    return {
        "safetensors": (safe, 0, 8 + int.from_bytes(safe.read_bytes()[:8], "little")),
        "pickle": (plain, 0, plain.read_bytes().index(b"PK\x07\x08")),
        "directory": (plain, plain.read_bytes().index(b"PK\x01\x02"), size),
    }


def watch_mutants(file: Path, start: int, end: int, count: int, first: int = 0) -> list[dict]:
    command = [sys.executable, "-m", "attack.mutations", str(file), *map(str, (start, end, first, count))]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def digest_of(tensor: torch.Tensor) -> list:
    flat = tensor.detach().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(content).hexdigest()]


def check_mutants(folder: Path, kind: str, count: int) -> None:
    """Where a damaged file is accepted, it reads as the whole one did, or as the library of its format reads it.

    torch.load gives uninitialised memory for some damaged directories; ours are then the bytes of the whole file.
    """
    file, start, end = originals(folder)[kind]
    answers = watch_mutants(file, start, end, count)
    assert len(answers) == count
    accepted = [answer for answer in answers if "tensors" in answer]
    assert len(accepted) < count / 2
    copy, load = (
        folder / f"copy{file.suffix}",
        load_file if kind == "safetensors" else partial(torch.load, weights_only=True),
    )
    whole = {name: digest_of(tensor) for name, tensor in load(file).items()}
    for answer in accepted:
        copy.write_bytes(mutant(file.read_bytes(), start, end, answer["mutant"]))
        try:
            theirs = {name: digest_of(tensor) for name, tensor in load(copy).items()}
        except Exception:  # noqa: S112  what they refuse, we may read: padding, names of other devices
            continue
        for name, tensor in answer["tensors"].items():
            assert tensor in (whole.get(name), theirs.get(name)), (answer["mutant"], name)


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "directory"])
def test_damaged_files_give_an_error_or_the_right_bytes(tmp_path, kind):
    check_mutants(tmp_path, kind, 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "directory"])
def test_ten_thousand_damaged_files(tmp_path, kind):
    check_mutants(tmp_path, kind, 3_400)


def test_a_wide_header_stays_within_the_memory_of_its_entries(tmp_path):
    """50,000 tensors: a mixture-of-experts model. Read within the limits of the watched process."""
    entry = '"layers.%d.experts.%d.weight":{"dtype":"BF16","shape":[0,7168],"data_offsets":[0,0]}'
    header = "{" + ",".join(entry % (number // 256, number % 256) for number in range(50_000)) + "}"
    file = header_file(tmp_path / "model.safetensors", header)
    assert len(watch_mutants(file, -1, -1, 1, first=-1)[0]["tensors"]) == 50_000


def flood_of_tensors() -> bytes:
    entries = ",".join(f'"{number:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(560_000))
    return f"{{{entries}}}".encode()


def flood_of_metadata() -> bytes:
    pairs = ",".join(f'"{number:x}":""' for number in range(2_000_000))
    return f'{{"__metadata__":{{{pairs}}}}}'.encode()


def flood_of_entries() -> bytes:
    entry = struct.Struct("<4s6H3L5H2L")
    names = (f"a/data/{number:x}".encode() for number in range(300_000))
    directory = b"".join(
        entry.pack(b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name for name in names
    )
    return directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)


@pytest.mark.parametrize("flood", [flood_of_tensors, flood_of_metadata, flood_of_entries])
def test_a_file_made_to_fill_memory_is_refused_before_it_does(tmp_path, flood):
    file = tmp_path / ("model.bin" if flood is flood_of_entries else "model.safetensors")
    if flood is flood_of_entries:
        file.write_bytes(flood())
    else:
        header_file(file, flood())
    assert watch_mutants(file, -1, -1, 1, first=-1)[0].get("error") == "InvalidCheckpoint"
