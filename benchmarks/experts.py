"""Generate with mixtures of experts whose layers are on disk: bigpipe, expert by expert, against accelerate.

    python benchmarks/experts.py [--shape mixtral|qwen3_moe] [--layers 8] [--prompts 4] [--tokens 16]
        [--keep 0.0] [--rounds 1] [--arms "accelerate,one by one,together"] [--folder DIR]

All layers are on disk, embeddings and head in RAM; both arms hold the same, and accelerate gets its offload folder.
Every arm is a process of its own. After each token the page cache is emptied of the model's files, so that weights come
from the disk, as those of a model do that is larger than memory. Prompts go one by one, or `together` through each
layer. `--keep`: the share of the experts that bigpipe may keep in RAM. Outputs must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import alternate, facts, median
from streamed import prompts

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16,
        "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    },
    "qwen3_moe": {
        "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 384, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 32000,
    },
}  # fmt: skip
"""Mixtral 8x7B's and Qwen3-30B-A3B's proportions, a quarter or half as wide and with fewer layers."""


def write(folder: Path, shape: str, layers: int) -> None:
    """A checkpoint in bfloat16 with an entry for each expert, as published ones have."""
    import torch
    import transformers

    torch.manual_seed(0)
    fields = {**SHAPES[shape], "num_hidden_layers": layers, "tie_word_embeddings": False, "dtype": "bfloat16"}
    config = transformers.AutoConfig.for_model(shape, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def forget(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def load_arm(arm: str, source: Path, offload: Path, keep: float) -> Any:
    import torch
    import transformers

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    placed = {**outside, **{f"model.layers.{layer}": "disk" for layer in range(layers)}}
    if arm == "accelerate":
        import accelerate

        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
        return accelerate.dispatch_model(model, placed, main_device="cpu", offload_dir=str(offload))
    from bigpipe.bigmodel.execution import as_placement, host_memory, load

    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    placement = replace(as_placement(placed), kept_experts=int(keep * size))
    memory = host_memory(placement, 2**40, 2**40)
    return load(source, placement, dtype="bfloat16", memory=memory)


def child(arm: str, source: Path, offload: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    started = time.perf_counter()
    model = load_arm(arm, source, offload, options.keep)
    ready = time.perf_counter()
    os.sync()
    tokens = prompts(options.prompts, model.config.vocab_size)
    found: dict[int, Any] = {}

    class Forget(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: Any, **named: Any) -> torch.Tensor:
            forget(source)
            forget(offload)
            return torch.zeros(len(ids), dtype=torch.bool)

    def work(number: int) -> None:
        batch = tokens[number : number + 1]
        with torch.inference_mode():
            found[number] = model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=options.tokens,
                min_new_tokens=options.tokens, do_sample=False, stopping_criteria=[Forget()],
            )  # fmt: skip

    forget(source)
    forget(offload)
    generating, read = time.perf_counter(), None
    if arm == "accelerate":
        for number in range(len(tokens)):
            work(number)
    else:
        from bigpipe.bigmodel.execution import loaded

        stream = loaded(model).stream
        stream.together(model, work, range(len(tokens)), len(tokens) if arm == "together" else 1)
        read = stream.bytes_read
    seconds = time.perf_counter() - generating
    return {
        "setup": ready - started,
        "seconds": seconds,
        "tokens_per_second": len(tokens) * options.tokens / seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "read": read,
        "digest": hash(tuple(torch.cat([found[number] for number in range(len(tokens))]).flatten().tolist())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mixtral", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--keep", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", default="accelerate,one by one,together")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        arm, source, offload = options.child
        print(json.dumps(child(arm, Path(source), Path(offload), options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "source"
        write(source, options.shape, options.layers)

        def run(arm: str) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=options.folder) as offload:
                command = [sys.executable, *sys.argv, "--child", arm, str(source), offload]
                environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONHASHSEED": "0"}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
                return dict(json.loads(done.stdout.splitlines()[-1]))

        arms = {arm: (lambda arm=arm: run(arm)) for arm in options.arms.split(",")}
        report(alternate(arms, options.rounds, warm_up=options.rounds > 1), options)


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    measured = ("setup", "seconds", "tokens_per_second", "peak_mib")
    arms = {
        arm: {key: median([run[key] for run in runs]) for key in measured}
        | {"read_gb": runs[0]["read"] and round(runs[0]["read"] / 1e9, 2)}
        for arm, runs in results.items()
    }
    best = max(row["tokens_per_second"] for arm, row in arms.items() if arm != "accelerate")
    ratios = {arm: round(best / row["tokens_per_second"], 2) for arm, row in arms.items()}
    told = {
        "benchmark": "experts",
        "equal outputs": len({run["digest"] for runs in results.values() for run in runs}) == 1,
        "arms": arms,
        "best of bigpipe, in tokens/s to each": ratios,
        "options": {key: value for key, value in vars(options).items() if key not in ("child", "folder")},
        "machine": facts(),
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
