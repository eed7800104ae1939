"""Reshard a checkpoint, or turn `.bin` into safetensors: bigpipe against transformers, accelerate and `cp`.

    python benchmarks/reshard.py [--size 1.3B] [--source safetensors|bin] [--rounds 3] [--cold] [--folder DIR]

Every arm is a whole process that reads the same made-up fp16 checkpoint and writes 200 MB shards (`cp`: the same
bytes), ending in a sync inside the timing; arms alternate and a first round is dropped. With --cold the source is put
out of the page cache before each run. Numbers depend on the disk and on the rest of the machine: trust the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from machine import alternate, facts, medians, whole_process

SHAPES = {
    "125M": (768, 3072, 12, 12), "1.3B": (2048, 8192, 24, 32),
    "7B": (4096, 16384, 32, 32), "13B": (5120, 20480, 40, 40),
}  # fmt: skip
"""Hidden size, feed-forward size, layers, heads of OPT."""
SHARD = "200MB"

BIGPIPE = """
import sys
from bigpipe.bigmodel.writing import save_checkpoint
save_checkpoint(sys.argv[1], sys.argv[2], max_shard_size=sys.argv[3])
"""
TRANSFORMERS = """
import os, sys, torch, transformers
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
model.save_pretrained(sys.argv[2], max_shard_size=sys.argv[3])
os.sync()
"""
ACCELERATE = """
import os, sys, torch, transformers
from accelerate import Accelerator, init_empty_weights, load_checkpoint_in_model
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
with init_empty_weights():
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
model.tie_weights()
load_checkpoint_in_model(model, sys.argv[1], device_map={"": "cpu"})
model.tie_weights()
Accelerator(cpu=True).save_model(model, sys.argv[2], max_shard_size=sys.argv[3])
os.sync()
"""


def make_source(folder: Path, size: str, source: str, max_shard_size: str = "5GB") -> None:
    """A checkpoint with a whole config, as published ones have."""
    from bigpipe.bigmodel.architecture import describe_architecture
    from bigpipe.bigmodel.writing import SyntheticModel

    hidden, feed_forward, layers, heads = SHAPES[size]
    config = {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": hidden, "ffn_dim": feed_forward,
        "num_hidden_layers": layers, "num_attention_heads": heads, "word_embed_proj_dim": hidden,
        "vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True, "dtype": "float16",
        "tie_word_embeddings": True, "activation_function": "relu", "dropout": 0.1, "attention_dropout": 0.0,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "layerdrop": 0.0, "init_std": 0.02,
    }  # fmt: skip
    architecture = describe_architecture(config)
    SyntheticModel(config, architecture, format=source, max_shard_size=max_shard_size).write(folder)


def forget(folder: Path) -> None:
    """Puts the files of a folder out of the page cache."""
    os.sync()
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(command: list[str], source: Path, out: Path, cold: bool) -> tuple[float, int]:
    if cold:
        forget(source)
    try:
        return whole_process(command, env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"})
    finally:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()


def arms_for(source: Path, out: Path, cold: bool, names: list[str]) -> dict[str, Callable[[], tuple[float, int]]]:
    scripts = {"bigpipe": BIGPIPE, "transformers": TRANSFORMERS, "accelerate": ACCELERATE}
    commands = {name: [sys.executable, "-c", code, str(source), str(out), SHARD] for name, code in scripts.items()}
    commands["cp + sync"] = ["sh", "-c", f"cp -r '{source}' '{out}' && sync"]
    return {name: partial(timed, commands[name], source, out, cold) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.3B")
    parser.add_argument("--source", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--arms", default="bigpipe,transformers,accelerate,cp + sync")
    parser.add_argument("--folder", default=None, help="on the disk to measure; a temporary folder otherwise")
    parser.add_argument("--make", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_source(Path(arguments.make), arguments.size, arguments.source)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = folder / "source"
        # In a process of its own: a child's peak memory counts from its parent's.
        make = [sys.executable, __file__, "--make", str(source), "--size", arguments.size, "--source", arguments.source]
        subprocess.run(make, check=True)
        subprocess.run([sys.executable, "-c", "import transformers, accelerate, torch"], check=True)
        arms = arms_for(source, folder / "out", arguments.cold, arguments.arms.split(","))
        results = alternate(arms, arguments.rounds)
        size = sum(file.stat().st_size for file in source.iterdir())
    table = medians(results)
    report = {
        "benchmark": f"reshard OPT-{arguments.size} fp16 {arguments.source}, {'cold' if arguments.cold else 'warm'}",
        "bytes": size,
        "rounds": arguments.rounds,
        "arms": table,
        "machine": facts(),
    }
    if "bigpipe" in table:
        ours = table["bigpipe"]["seconds"]
        peers = [table[name]["seconds"] for name in ("transformers", "accelerate") if name in table]
        if peers:
            report["ratio to the better library"] = round(min(peers) / ours, 2)
        report |= (
            {"ratio of ours to cp": round(ours / table["cp + sync"]["seconds"], 2)} if "cp + sync" in table else {}
        )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
