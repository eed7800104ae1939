"""The same bytes from any number of ranks, really launched, with as many threads as there are cores for them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.inferring import start
from support.launching import MACHINE
from support.models import make_checkpoint

PROMPTS = ["Hello", "The", "Once upon a time", "a b c d", "Why?", "Hello, my name is", "abcdefg"]
TASKS: dict[str, dict[str, Any]] = {
    "features": {"task": "feature-extraction", "dtype": "float32"},
    "sampled": {"task": "text-generation", "max_new_tokens": 5, "generation": {"do_sample": True}, "seed": 3},
    "greedy": {"task": "text-generation", "max_new_tokens": 5},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fields", TASKS.values(), ids=TASKS)
def test_any_number_of_ranks_and_either_split_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    model = make_checkpoint(tmp_path / "model", "opt", dtype="float32")
    written = set()
    for ranks, split in ((1, "queue"), (2, "queue"), (2, "static"), (3, "queue"), (4, "queue"), (4, "static")):
        folder = tmp_path / f"{split}-{ranks}"
        start(folder, model, ranks, split=split, prompts=PROMPTS, batch_size=2, **fields)
        written.add((folder / "work" / "out" / "results.jsonl").read_bytes())
    assert len(written) == 1


def test_ranks_are_told_to_compute_the_same_bits_with_any_number_of_threads(tmp_path: Path) -> None:
    from bigpipe.orchestrator.launch.acceleration import accelerate
    from bigpipe.orchestrator.stage import Launch

    machine = replace(MACHINE, cpus=4)
    found = {
        ranks: accelerate(Launch(num_processes=ranks), tmp_path, machine).environment(machine) for ranks in (1, 2, 8)
    }
    assert [found[ranks]["OMP_NUM_THREADS"] for ranks in found] == ["4", "2", "1"], "ranks do not fight"
    assert {variables["MKL_CBWR"] for variables in found.values()} == {"AUTO,STRICT"}


BITS = """
import torch
torch.set_num_threads(int(__import__("sys").argv[1]))
generator = torch.Generator().manual_seed(0)
weights = torch.randn(768, 768, generator=generator)
print([torch.nn.functional.linear(torch.randn(rows, 768, generator=generator), weights).sum(0).tolist()
       for rows in (1, 2, 3, 5, 7, 9, 16)])
"""


def test_products_do_not_depend_on_threads_as_ranks_run() -> None:
    import subprocess
    import sys

    environment = {**os.environ, "MKL_CBWR": "AUTO,STRICT"}
    found = [
        subprocess.run([sys.executable, "-c", BITS, threads], env=environment, check=True, capture_output=True).stdout
        for threads in ("1", "2")
    ]
    assert found[0] == found[1]
