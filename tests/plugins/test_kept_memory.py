"""Whether ranks keep what is freed: where nobody limits their memory, and nowhere else."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from support.inferring import start
from support.models import make_checkpoint

from bigpipe.bigmodel.placement import place

TASK = """
import resource
import torch

def answer(model, rows):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        torch.ones(3 * 2**18)  # 3 MiB, or 768 pages
    return [{"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before} for row in rows]
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize("placed", [False, True])
def test_a_rank_keeps_what_is_freed_unless_its_memory_was_promised(tmp_path: Path, placed: bool) -> None:
    model = make_checkpoint(tmp_path / "model", "opt", dtype="float32")
    work = tmp_path / "work"
    work.mkdir()
    (work / "mytasks.py").write_text(TASK)
    (tmp_path / "placement.json").write_text(json.dumps(place(model, device_map={"": "cpu"}).as_json()))
    start(work, model, 1, placement=tmp_path if placed else None, task="mytasks:answer", prompts=["one"])
    (line,) = (work / "work/out/results.jsonl").read_text().splitlines()
    assert (json.loads(line)["faults"] < 5_000) == (not placed)
