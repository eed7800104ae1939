"""Fine-tune made-up weights of OPT's shapes, and compare the memory that a plan foresees with what a step takes.

    python benchmarks/finetune.py [--size 125M|350M|1.3B|6.7B] [--scheme none|int8|nf4] [--steps 2] [--batch 1]
        [--length 128] [--no-checkpointing] [--folder DIR]

The recipe downloads (makes up), quantizes and trains, as any other. Foreseen: `ram` of the plan; taken: `peak.cpu`, the
resident memory of the rank, windows into the files of frozen weights included. On a GPU `vram` without the context,
and `peak.0`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import bigpipe
from bigpipe.bigmodel.footprint.budgets import CONTEXT

SHAPES = {
    "tiny": (256, 4, 4),
    "125M": (768, 12, 12),
    "350M": (1024, 24, 16),
    "1.3B": (2048, 24, 32),
    "6.7B": (4096, 32, 32),
}
"""Width, layers, heads of OPT (arXiv 2205.01068, table 1)."""
TOKENIZER = Path(__file__).parents[1] / "models" / "quickstart"


def config(size: str) -> dict[str, Any]:
    width, layers, heads = SHAPES[size]
    return {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": width, "ffn_dim": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "word_embed_proj_dim": width, "vocab_size": 50272,
        "max_position_embeddings": 2048, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip


def recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write a recipe whose model gets a tokenizer before it is trained."""
    stages: dict[str, Any] = {
        "download": {"uses": "download", "with": {"synthetic": {"config": config(arguments.size), "dtype": "float16"}}}
    }
    if arguments.scheme != "none":
        stages["quantize"] = {"uses": "quantize", "inputs": "download", "with": {"scheme": arguments.scheme}}
    return dump(folder / "model.yaml", stages)


def dump(path: Path, stages: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": 1, "name": "finetune-benchmark", "stages": stages}))
    return path


def with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def tuning(folder: Path, model: Path, arguments: argparse.Namespace) -> Path:
    text = "a row that is long enough to be cut to the length that was asked for " * 200
    options = {
        "data": [text[number:] for number in range(2 * arguments.batch)], "max_steps": arguments.steps,
        "batch_size": arguments.batch, "max_length": arguments.length,
        "gradient_checkpointing": arguments.checkpointing, "lora": {"r": 16},
    }  # fmt: skip
    stages = {
        "model": {"uses": "download", "with": {"path": str(model)}},
        "finetune": {"uses": "finetune", "inputs": "model", "with": options},
    }
    return dump(folder / "tune.yaml", stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="1.3B")
    parser.add_argument("--scheme", choices=("none", "int8", "nf4"), default="int8")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        folder = Path(made)
        store = folder / "store"
        stages = bigpipe.run(recipe(folder, arguments), store=store)
        last = "download" if arguments.scheme == "none" else "quantize"
        model = with_tokenizer(stages.path(last), folder / "model")
        manifest = tuning(folder, model, arguments)
        foreseen = bigpipe.plan(manifest, store=store).nodes["finetune"].forecast
        result = bigpipe.run(manifest, store=store).nodes["finetune"]
        on_gpu = bool(foreseen.vram)
        # What the driver keeps is not in `peak.0`, torch's own count
        planned = foreseen.vram[0] - CONTEXT[-1] if on_gpu else foreseen.ram
        taken = int(result.metrics["peak"]["0" if on_gpu else "cpu"])
        print(
            f"{arguments.size} {arguments.scheme} batch {arguments.batch} × {arguments.length}, "
            f"checkpointing {arguments.checkpointing}, load {os.getloadavg()[0]:.1f}"
        )
        print(f"foreseen {planned / 2**20:,.0f} MiB ({foreseen.details[0]})")
        print(f"taken    {taken / 2**20:,.0f} MiB: {taken / planned:.3f} of it")
        print(json.dumps({"foreseen": planned, "taken": taken, **result.metrics}))


if __name__ == "__main__":
    main()
