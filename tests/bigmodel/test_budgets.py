"""What a placement says a device must hold is all that a process ever holds: the kernel kills it for more.

Pages of files count too while they are in use, and go where memory is asked for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.memory_groups import memory_group, there
from support.models import make_checkpoint

from bigpipe.allocator import ALLOCATOR
from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.footprint import Workload
from bigpipe.bigmodel.placement import Placement, batches_together, place
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.machine import detect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not there(), reason="needs root and control groups of memory"),
]
BATCHES, ROWS, LENGTH, MADE = 4, 4, 56, 8
BESIDE = 32 * 2**20
"""Bytes that Python and torch take for code, kernels and tables when they are first used."""
KERNELS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""What says how many compiled products torch and oneDNN keep: one for each number of rows, and a mixture has many. They
are no model's, 130 MiB at the most, and part of what a plan reckons for a process."""
WIDTHS: dict[str, Any] = {"hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512, "num_hidden_layers": 24}
EXPERTS: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_local_experts": 16,
}  # fmt: skip
CHILD = f"""
import json, os, sys
import torch
from pathlib import Path
from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.placement import Placement

tiny, source, placement, together, group = sys.argv[1:]
placement = Placement.from_json(json.loads(placement))
torch.set_num_threads(1)

def generate(model, together):
    tokens = torch.randint(5, 200, ({BATCHES}, {ROWS}, {LENGTH}), generator=torch.Generator().manual_seed(0))
    made = {{}}

    def work(number):
        with torch.inference_mode():
            made[number] = model.generate(
                tokens[number], attention_mask=torch.ones_like(tokens[number]), max_new_tokens={MADE},
                min_new_tokens={MADE}, do_sample=False).tolist()

    loaded(model).stream.together(model, work, range({BATCHES}), together)
    return [made[number] for number in range({BATCHES})]

generate(load(tiny, {{"": "disk"}}, dtype=placement.compute_dtype), int(together))  # what code takes is no model's
Path(group, "cgroup.procs").write_text(str(os.getpid()))
print(json.dumps(generate(load(source, placement), int(together))))
"""


def generated(tiny: Path, source: Path, placement: Placement, together: int, limit: int) -> Any:
    """What is made by a process that may hold `limit` bytes more than before it knew the model; None: it was killed."""
    environment = {**os.environ, "GLIBC_TUNABLES": ALLOCATOR, **dict.fromkeys(KERNELS, "8")}
    with memory_group() as group:
        group.set(limit)
        command = [sys.executable, "-c", CHILD, tiny, source, json.dumps(placement.as_json()), str(together)]
        found = subprocess.run([*command, group.path], capture_output=True, timeout=280, check=False, env=environment)
    assert found.returncode in (0, -signal.SIGKILL), found.stderr[-800:]
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else None


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None, int]] = {
    "all of it on disk, as stored": ("opt", WIDTHS, {"device_map": {"": "disk"}, "compute_dtype": "stored"}, None, 1),
    "cast at each use": ("opt", WIDTHS, {"device_map": {"": "disk"}, "compute_dtype": "float32"}, None, 1),
    "some of it in RAM": ("opt", WIDTHS, {"max_memory": {"cpu": "60MiB", "disk": "1GiB"}}, None, 1),
    "four batches together": ("opt", WIDTHS, {"device_map": {"": "disk"}, "compute_dtype": "stored"}, None, BATCHES),
    "nf4": ("opt", WIDTHS, {"device_map": {"": "disk"}}, "nf4", 1),
    "experts": ("mixtral", EXPERTS, {"device_map": {"": "disk"}, "compute_dtype": "stored"}, None, 1),
    "experts that stay": ("mixtral", EXPERTS, {"max_memory": {"cpu": "64MiB", "disk": "1GiB"}}, None, 1),
}


def model(folder: Path, architecture: str, scheme: str | None, **widths: Any) -> Path:
    source = make_checkpoint(folder / "plain", architecture, dtype="bfloat16", **widths)
    if scheme:
        quantize_checkpoint(source, folder / scheme, scheme=scheme)
    return folder / (scheme or "plain")


@pytest.mark.parametrize("case", CASES)
def test_holds_what_the_placement_says(tmp_path: Path, case: str) -> None:
    architecture, widths, asked, scheme, together = CASES[case]
    tiny, source = (model(tmp_path / name, architecture, scheme, **w) for name, w in (("tiny", {}), ("large", widths)))
    placement = place(source, batch_size=ROWS, sequence_length=LENGTH + MADE, **asked)
    workload = Workload(batch_size=ROWS, sequence_length=LENGTH + MADE)
    dtype = placement.compute_dtype or "bfloat16"
    waiting = batches_together(
        placement, describe_architecture(source), workload, dtype, detect(tmp_path), asked=together
    ).more  # fmt: skip
    need = placement.needs["cpu"].total + placement.kept_experts + waiting
    made = generated(tiny, source, placement, together, need + BESIDE)
    assert made is not None
    assert made == generated(tiny, source, placement, together, 2**33)


def test_a_process_that_holds_more_is_killed(tmp_path: Path) -> None:
    architecture, widths, asked, *_ = CASES["cast at each use"]
    tiny, source = model(tmp_path / "tiny", architecture, None), model(tmp_path / "large", architecture, None, **widths)
    placement = place(source, batch_size=ROWS, sequence_length=LENGTH + MADE, **asked)
    assert generated(tiny, source, placement, 1, placement.needs["cpu"].total // 2) is None
