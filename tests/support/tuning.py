"""`python -m support.tuning FOLDER MODEL ROWS`: one rank of a training, which says each step, to be killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bigpipe.bigmodel.tasks import read_prompts
from bigpipe.bigmodel.training import Lora, Training, Work, train_rank

STEPS = 12


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
