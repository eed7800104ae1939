"""Merging a rank-16 adapter into a synthetic model: bigpipe's stream against peft's `merge_and_unload`, side by side.

    python benchmarks/merge.py                    the shape of OPT-1.3B, bfloat16
    python benchmarks/merge.py --shape 7b         the shape of a Llama of 7 billion parameters

Each side runs in a process of its own, from the same files in the page cache; the bytes that come out are compared.
Peak: the largest resident memory of the process, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "1.3b": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 2048, "ffn_dim": 8192,
        "num_hidden_layers": 24, "num_attention_heads": 32, "word_embed_proj_dim": 2048, "vocab_size": 50272,
        "max_position_embeddings": 2048, "do_layer_norm_before": True,
    },
    "7b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj")
RANK = 16


def make(folder: Path, shape: str) -> None:
    """A model with made-up weights, and an adapter for every linear module of its blocks."""
    import torch
    from safetensors.torch import save_file

    from bigpipe.bigmodel.architecture import describe_architecture
    from bigpipe.bigmodel.writing import SyntheticModel, encode_config

    config, limit = SHAPES[shape], 5_000_000_000
    architecture = describe_architecture(config)
    SyntheticModel(config, architecture, dtype="bfloat16", seed=0, format="safetensors", max_shard_size=limit).write(
        folder / "base"
    )
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module in architecture.modules:
        if module.linear and module.name.endswith(TARGETS):
            rows, columns = module.tensors[0].shape
            name = f"base_model.model.{module.name}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
    (folder / "lora").mkdir()
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": list(TARGETS), "task_type": None}
    (folder / "lora" / "adapter_config.json").write_bytes(encode_config(settings))


def merge_with_bigpipe(folder: Path) -> None:
    from bigpipe import merge_adapter

    merge_adapter(folder / "base", folder / "lora", folder / "bigpipe")


def merge_with_peft(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    PeftModel.from_pretrained(model, str(folder / "lora")).merge_and_unload().save_pretrained(folder / "peft")


SIDES = {"bigpipe": merge_with_bigpipe, "peft": merge_with_peft}


def measured(side: str, folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--side", side, str(folder)], capture_output=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def differing(folder: Path) -> list[str]:
    """Names of tensors whose bytes are not the same on both sides."""
    from bigpipe import open_checkpoint

    ours, theirs = open_checkpoint(folder / "bigpipe"), open_checkpoint(folder / "peft")
    pairs = ((name, zip(ours.chunks(name), theirs.chunks(name), strict=True)) for name in theirs.tensors)
    return [name for name, chunks in pairs if not all(a == b for a, b in chunks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FOLDER"))
    options = parser.parse_args()
    if options.side:
        started = time.monotonic()
        SIDES[options.side[0]](Path(options.side[1]))
        seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": round(seconds, 1), "peak_mb": round(peak / 1e6)}))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, options.shape)
        for side in SIDES:
            print(side, measured(side, folder), flush=True)
        print("tensors that differ:", differing(folder) or "none")


if __name__ == "__main__":
    main()
