"""The writer in a process of its own: how much memory it takes, what a kill leaves, what a full disk does."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigpipe.bigmodel.checkpoint import open_checkpoint

CONVERT = """
import json, re, sys
from pathlib import Path
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.writing import Conversion, convert
from bigpipe.errors import BigpipeError
source, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
journal = Path(options.pop("journal")) if "journal" in options else None
Path("/proc/self/clear_refs").write_text("5")  # a child's peak would count from its parent's
try:
    saved = convert(open_checkpoint(source), Path(out), Conversion(**options), journal=journal)
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print(json.dumps({"files": saved.files, "peak": int(peak) * 1024}))
except BigpipeError as error:
    print(json.dumps({"error": type(error).__name__, "cause": error.cause}))
"""


def command(source: Path, out: Path, **options) -> list[str]:
    return [sys.executable, "-c", CONVERT, str(source), str(out), json.dumps({"max_shard_size": 10**9, **options})]


def convert(source: Path, out: Path, **options) -> dict:
    done = subprocess.run(command(source, out, **options), capture_output=True, text=True, timeout=250, check=True)
    return json.loads(done.stdout)


def sparse_model(path: Path, tensors: int, rows: int) -> Path:
    """A safetensors file of float16 matrices [rows, 4096], all zero, that takes no space on the disk."""
    header, end = {}, 0
    for number in range(tensors):
        begin, end = end, end + rows * 8192
        header[f"layers.{number:03d}.weight"] = {"dtype": "F16", "shape": [rows, 4096], "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"format": "bin"}], ids=["copy", "cast", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path, options):
    peaks = []
    for rows in (1024, 6144):  # 32 and 192 MiB, one matrix each of 8 and 48 MiB
        source = sparse_model(tmp_path / f"{rows}.safetensors", 4, rows)
        peaks.append(convert(source, tmp_path / "out", **options)["peak"])
        shutil.rmtree(tmp_path / "out")
    assert max(peaks) < 150 * 2**20
    assert peaks[1] - peaks[0] < 16 * 2**20


def kill_and_resume(folder: Path, moments: int) -> None:
    """Kills a conversion of 20 files at random moments, resumes it, and counts what was written twice."""
    chance = random.Random(moments)  # noqa: S311
    source = sparse_model(folder / "source.safetensors", 20, 512)
    whole = convert(source, folder / "whole", max_shard_size=512 * 8192)["files"]
    started = time.monotonic()
    convert(source, folder / "timed", max_shard_size=512 * 8192)
    seconds = time.monotonic() - started
    for moment in range(moments):
        out, journal = folder / f"out{moment}", folder / f"journal{moment}"
        options = {"max_shard_size": 512 * 8192, "journal": str(journal)}
        victim = subprocess.Popen(command(source, out, **options), stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1 * seconds, 1.1 * seconds))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        finished = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")} if out.exists() else {}
        assert convert(source, out, **options)["files"] == whole
        again = [name for name, inode in finished.items() if (out / name).stat().st_ino != inode]
        assert len(again) <= 2, f"written twice: {again}"
        assert len(open_checkpoint(out).tensors) == 20
        assert not list(out.glob("*.part"))
        shutil.rmtree(out)


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    kill_and_resume(tmp_path, 2)


@pytest.mark.fault
def test_a_conversion_killed_at_twenty_moments_repeats_what_was_under_way_only(tmp_path):
    kill_and_resume(tmp_path, 20)


FILL = """
import json, sys
from pathlib import Path
from bigpipe.bigmodel.writing import PlannedTensor, plan_shards
from bigpipe.bigmodel.writing import write_checkpoint
from bigpipe.errors import DoesNotFit, StageFailed
disk, early = Path(sys.argv[1]), sys.argv[2] == "early"
plans = plan_shards([PlannedTensor(f"t{n}", "uint8", (3_000_000,)) for n in range(3)], 3_000_000)
def fill():
    with open(disk / "somebody else's", "wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)): pass
        except OSError: pass
def produce(tensor):
    if tensor.name == "t1" and not early: fill()
    yield bytes(tensor.nbytes)
if early: fill()
try:
    write_checkpoint(disk / "out", plans, produce, journal=disk / "journal")
except (DoesNotFit, StageFailed) as error:
    left = sorted(path.name for path in (disk / "out").iterdir())
    print(json.dumps({"cause": error.cause, "cure": error.cure, "left": left}))
"""


@pytest.mark.fault
@pytest.mark.parametrize(
    ("when", "cause", "left"),
    [
        ("early", "9.0 MB are to be written, and the disk has", []),
        ("midway", "the disk is full: ", ["model-00001-of-00003.safetensors"]),
    ],
)
def test_a_full_disk_is_an_error_with_a_cure_and_keeps_what_was_finished(tmp_path, when, cause, left):
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    script = f'mount -t tmpfs -o size=12m tmpfs {tmp_path} && exec "$@"'
    inside = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", FILL, str(tmp_path), when]
    answer = json.loads(subprocess.run(inside, capture_output=True, text=True, check=True).stdout)
    assert cause in answer["cause"]
    assert "free" in answer["cure"]
    assert answer["left"] == left
