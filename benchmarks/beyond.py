"""Generate with a model larger than the memory it may have: a recipe run by the command, held to the cap by the kernel.

    python benchmarks/beyond.py [--shape opt-13b|gpt-neox-20b] [--scheme int8|nf4|none] [--dtype float16]
        [--memory 8GiB] [--prompts 32] [--batch 8] [--tokens 16] [--folder DIR]

Weights are made up. What makes the model (and quantizes it) runs first, without a cap. Then it is placed and generates
in a control group of memory that holds every process of the run, and every page of a file that they use, to `--memory`:
for the run that is the machine's RAM, what does not fit is on disk, and the kernel ends what holds more. Needs root,
and disk for the model: 38.8 GB for a while for OPT-13B in int8, 41.1 GB for GPT-NeoX-20B as it is. Prints what the run
says of itself, and the most memory that was ever held and no file's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import yaml
from machine import facts

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from support.memory_groups import MemoryGroup, memory_group, there  # noqa: E402

PROMPT = 24
"""Tokens."""
SHAPES: dict[str, dict[str, Any]] = {
    "opt-13b": json.loads((ROOT / "benchmarks" / "opt13b" / "config.json").read_text()),
    "gpt-neox-20b": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 6144,
        "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432,
        "max_position_embeddings": 2048, "rotary_pct": 0.25, "hidden_act": "gelu_fast", "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip
TASK = """
import torch

def generate(model, rows, *, max_new_tokens, **_):
    ids = torch.tensor([[int(word) for word in row["prompt"].split()] for row in rows])
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                              min_new_tokens=max_new_tokens, do_sample=False)
    answers = [each[ids.shape[1]:].tolist() for each in made]
    counts = {"tokens": max_new_tokens, "prompt_tokens": ids.shape[1]}
    return [{"text": " ".join(map(str, answer)), **counts} for answer in answers]
"""


def recipe(options: argparse.Namespace) -> dict[str, Any]:
    numbers = random.Random(0)  # noqa: S311  not for secrets
    texts = [" ".join(str(numbers.randrange(5, 50000)) for _ in range(PROMPT)) for _ in range(options.prompts)]
    needs = {"batch_size": options.batch, "sequence_length": PROMPT + options.tokens}
    made = {"uses": "download", "with": {"synthetic": {"config": "config.json", "dtype": options.dtype}}}
    stages: dict[str, Any] = {"model": made}
    if options.scheme != "none":
        stages["model"] = {"uses": "quantize", "inputs": "made", "with": {"scheme": options.scheme}}
        stages["made"] = {**made, "cache": False}
    stages["place"] = {
        "uses": "dispatch", "inputs": "model",
        "with": {"device_map": "auto", "verify": "load", **needs},
    }  # fmt: skip
    stages["generate"] = {
        "uses": "distributed-infer", "inputs": {"model": "model", "placement": "place"},
        "with": {"task": "numbers_of_tokens:generate", "prompts": texts, "batch_size": options.batch,
                 "micro_batches": -(-options.prompts // options.batch), "max_new_tokens": options.tokens},
    }  # fmt: skip
    return {"version": 1, "name": options.shape, "trust": {"modules": ["numbers_of_tokens"]}, "stages": stages}


def run(folder: Path, *more: str, group: MemoryGroup | None = None) -> dict[str, Any]:
    """`bigpipe run --json`, each process of it in the group."""
    command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--json", *more]
    join = f'echo $$ > "{group.path}/cgroup.procs"; exec "$@"' if group else 'exec "$@"'
    environment = {**os.environ, "BIGPIPE_HOME": str(folder / "store")}
    done = subprocess.run(
        ["sh", "-c", join, "sh", *command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"bigpipe run exited with {done.returncode}: {done.stdout[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Watch(threading.Thread):
    """The most bytes of a group that are no file's pages, asked for ten times a second."""

    def __init__(self, group: MemoryGroup) -> None:
        super().__init__(daemon=True)
        self.group, self.most, self.ended = group, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.1):
            rows = dict(line.split() for line in (self.group.path / "memory.stat").read_text().splitlines())
            self.most = max(self.most, int(rows.get("anon") or rows["total_rss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-13b", choices=SHAPES)
    parser.add_argument("--scheme", default="int8", choices=("int8", "nf4", "none"))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, help="fewer, to see that it works")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if not there():
        raise SystemExit("this needs root and control groups of memory")
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        config = SHAPES[options.shape]
        config["num_hidden_layers"] = options.layers or config["num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "numbers_of_tokens.py").write_text(TASK)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(options), sort_keys=False))
        run(folder, "model")
        with memory_group() as group:
            group.set(parsed(options.memory))
            watch = Watch(group)
            watch.start()
            result = run(folder, group=group)
            watch.ended.set()
            watch.join()
    nodes = result["nodes"]
    answer = {"dispatch": nodes["place"]["metrics"], "generate": nodes["generate"]["metrics"]}
    print(
        json.dumps(
            {"facts": facts(), "options": vars(options), "most_anonymous": watch.most, **answer}, indent=1, default=str
        )
    )


def parsed(size: str) -> int:
    from bigpipe.sizes import parse_size

    return parse_size(size)


if __name__ == "__main__":
    main()
