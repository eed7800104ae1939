"""A class of one's own, built whole or built empty before its checkpoint is loaded: what memory that takes.

    python benchmarks/own_class.py [--layers 48] [--width 1600] [--folder DIR]

The class is a GPT, by default of gpt2-xl's sizes: 6.2 GB in float32, and as much on the disk. Each way has a process of
its own, which imports the libraries, builds the class, gives it to `bigpipe.load` and runs one forward. Peaks are those
of anonymous memory, looked at every 10 ms, above what the process held after its imports, and of all that is resident:
weights that are windows into their file count as resident once they are used, and not as anonymous.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import facts

WAYS = ("whole", "empty")
"""As `GPT(config)` builds it, and as that does under `init_empty_weights()`."""


def gpt(layers: int, width: int) -> Any:
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(width)
            self.attention = torch.nn.Linear(width, 4 * width)
            self.rise = torch.nn.Linear(width, 4 * width)
            self.fall = torch.nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.fall(torch.relu(self.rise(self.norm(x)))) + self.attention(x)[..., :width]

    class GPT(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50257, width)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(layers))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x

    return GPT()


def memory(kind: str) -> int:
    """Bytes: RssAnon, or VmHWM, the most that was resident."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measure(way: str, folder: Path, layers: int, width: int) -> dict[str, Any]:
    import torch
    import transformers  # noqa: F401
    from accelerate import init_empty_weights

    import bigpipe
    from bigpipe.bigmodel import execution  # noqa: F401

    before, peak, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    if way == "empty":
        with init_empty_weights():
            model = gpt(layers, width)
    else:
        model = gpt(layers, width)
    loaded = bigpipe.load(folder, model=model)
    with torch.inference_mode():
        loaded(torch.arange(8)[None])
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    return {"anonymous": peak - before, "resident": memory("VmHWM"), "seconds": round(seconds, 2)}


def make(folder: Path, layers: int, width: int) -> int:
    import bigpipe

    return bigpipe.save_checkpoint(gpt(layers, width), folder).bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--child", choices=["make", *WAYS], default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sizes = (given.folder, given.layers, given.width)
        print(json.dumps(make(*sizes) if given.child == "make" else measure(given.child, *sizes)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        child = [sys.executable, __file__, "--layers", str(given.layers), "--width", str(given.width), "--folder", name]

        def ask(what: str) -> Any:
            return json.loads(subprocess.run([*child, "--child", what], check=True, capture_output=True).stdout)

        size, arms = ask("make"), {way: ask(way) for way in WAYS}
    ratio = round(arms["whole"]["anonymous"] / arms["empty"]["anonymous"], 1)
    print(json.dumps({"machine": facts(), "weights": size, "arms": arms, "ratio anonymous": ratio}, indent=2))


if __name__ == "__main__":
    main()
