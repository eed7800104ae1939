"""Quantize a checkpoint on disk: bigpipe against transformers with bitsandbytes, on the CPU.

    python benchmarks/quantize.py [--size 1.3B] [--scheme nf4] [--rounds 3] [--cold] [--folder DIR]

Both arms are whole processes that read the same made-up fp16 checkpoint and write a quantized one, ending in a sync
inside the timing; they alternate and a first round is dropped. Afterwards every tensor is compared, byte by byte.
nf4 and fp4 are double-quantized. Numbers depend on the disk and on the rest of the machine: trust the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from machine import alternate, facts, medians
from reshard import SHAPES, make_source, timed

BIGPIPE = """
import sys
from bigpipe.bigmodel.quantization import quantize_checkpoint
double = sys.argv[3] != "int8"
quantize_checkpoint(sys.argv[1], sys.argv[2], scheme=sys.argv[3], bnb_4bit_use_double_quant=double)
"""
TRANSFORMERS = """
import os, sys, torch, transformers
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": sys.argv[3], "bnb_4bit_use_double_quant": True}
options = {"load_in_8bit": True} if sys.argv[3] == "int8" else four_bit
config = transformers.BitsAndBytesConfig(**options)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16, quantization_config=config)
model.save_pretrained(sys.argv[2])
os.sync()
"""
SCRIPTS = {"bigpipe": BIGPIPE, "transformers + bitsandbytes": TRANSFORMERS}


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not the same bytes in both checkpoints."""
    from bigpipe.bigmodel.checkpoint import open_checkpoint

    left, right = open_checkpoint(one), open_checkpoint(other)
    different = [name for name in left.tensors if name in right.tensors and left.read(name) != right.read(name)]
    return sorted({*different, *(left.tensors.keys() ^ right.tensors.keys())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.3B")
    parser.add_argument("--scheme", choices=("int8", "nf4", "fp4"), default="nf4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--arms", default=",".join(SCRIPTS))
    parser.add_argument("--folder", default=None, help="on the disk to measure; a temporary folder otherwise")
    parser.add_argument("--make", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_source(Path(arguments.make), arguments.size, "safetensors")
        return
    names = arguments.arms.split(",")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder_name:
        folder = Path(folder_name)
        source = folder / "source"
        # In a process of its own: a child's peak memory counts from its parent's.
        subprocess.run([sys.executable, __file__, "--make", str(source), "--size", arguments.size], check=True)
        out = folder / "out"
        commands = {
            name: [sys.executable, "-c", SCRIPTS[name], str(source), str(out), arguments.scheme] for name in names
        }
        arms = {name: partial(timed, command, source, out, arguments.cold) for name, command in commands.items()}
        results = alternate(arms, arguments.rounds)
        size = sum(file.stat().st_size for file in source.iterdir())
        different = None
        if len(names) == len(SCRIPTS):
            kept = [folder / f"kept{number}" for number in range(len(names))]
            for name, target in zip(names, kept, strict=True):
                command = [*commands[name][:4], str(target), arguments.scheme]
                environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
                subprocess.run(command, check=True, capture_output=True, env=environment)
            different = differing(*kept)
    table = medians(results)
    report = {
        "benchmark": f"{arguments.scheme}, OPT-{arguments.size} fp16, {'cold' if arguments.cold else 'warm'}",
        "bytes": size,
        "rounds": arguments.rounds,
        "arms": table,
        "machine": facts(),
    }
    if different is not None:
        ours, theirs = (table[name] for name in SCRIPTS)
        report["tensors that differ"] = different
        report["ratio of seconds"] = round(theirs["seconds"] / ours["seconds"], 2)
        report["ratio of memory"] = round(theirs["peak_mib"] / ours["peak_mib"], 1)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
