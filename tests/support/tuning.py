"""`python -m support.tuning FOLDER MODEL ROWS`: one rank of a training, which says each step, to be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bigpipe.bigmodel.tasks import read_prompts
from bigpipe.bigmodel.training import Lora, Training, Work, train_rank
from support.launching import TESTS

STEPS = 12


def train(folder: Path, model: Path, rows: Path, kill_after: int | None = None) -> list[int]:
    """Return the steps that it said; it is killed at once when it says `kill_after`."""
    command = [sys.executable, "-W", "ignore", "-m", "support.tuning", str(folder), str(model), str(rows)]
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(json.loads(line)[0])
            if said[-1] == kill_after:
                process.kill()
    assert process.returncode == (0 if kill_after is None else -9)
    return said


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def work(model: Path, rows: Path) -> Work:
    training = Training(
        lora=Lora(r=4), max_steps=STEPS, learning_rate=1e-2, batch_size=2, seed=7, save_steps=2
    )  # dropout of the adapter and of OPT: random numbers count
    return Work(model=model, training=training, rows=read_prompts(str(rows), "text", rows.parent))


def main(folder: str, model: str, rows: str) -> None:
    import torch

    torch.set_num_threads(1)

    def tell(done: int, total: int, words: str) -> None:
        sys.stdout.write(f"{json.dumps([done, total])}\n")
        sys.stdout.flush()

    train_rank(work(Path(model), Path(rows)), Path(folder), progress=tell)


if __name__ == "__main__":
    main(*sys.argv[1:])
