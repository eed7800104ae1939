"""Generate for prompts of log-normal lengths on several ranks: bigpipe's queue against a plain accelerate script.

    python benchmarks/ranks.py [--prompts 1000] [--ranks 2] [--batch 8] [--most 64] [--tokens 8] [--rounds 1]
        [--folder DIR]

The plain script splits the prompts with `split_between_processes`, pads batches of a fixed size in the order of the
prompts, and gathers the texts. Both start through `accelerate launch` with the same threads and the same MKL mode, and
generate greedily in float32 with the same model. Ours has as many tokens in a batch, at most, as the plain script may
have in its longest one, so that both need the same memory, and at most `--most` prompts; `--most 8` sorts and queues
alone. `makespan` is the time of the slowest rank from its first batch to its last, `whole` that of the command, with
imports and loading. Texts must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import alternate, facts, median

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "models/quickstart"
POSITIONS = 1024
PLAIN = """
import json, sys, time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

model, prompts, out, batch, tokens = sys.argv[1:]
state = PartialState(cpu=True)
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
texts, batch = [], int(batch)
state.wait_for_everyone()
started = time.perf_counter()
with state.split_between_processes(json.loads(Path(prompts).read_text())) as share, torch.inference_mode():
    for first in range(0, len(share), batch):
        inputs = tokenizer(share[first : first + batch], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        made = model.generate(**inputs, max_new_tokens=int(tokens), do_sample=False)
        texts += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
seconds = gather_object([time.perf_counter() - started])
texts = gather_object(texts)
if state.is_main_process:
    Path(out).write_text(json.dumps({"texts": texts, "seconds": seconds}))
"""
RECIPE = """
version: 1
name: ranks
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  generate:
    uses: distributed-infer
    inputs: download
    with:
      task: text-generation
      prompts: prompts.jsonl
      batch_size: {most}
      batch_tokens: {budget}
      max_new_tokens: {tokens}
      dtype: float32
    launch: {{num_processes: {ranks}}}
"""


def make_model(folder: Path) -> None:
    """OPT's shape, 256 wide and 4 layers deep, with the tokenizer of the quickstart's model."""
    import torch
    import transformers

    shutil.copytree(TOKENIZER, folder)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    given = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_hidden_layers": 4}
    config = transformers.OPTConfig(
        **{**given, **sizes, "num_attention_heads": 8, "max_position_embeddings": POSITIONS, "dtype": "float32"}
    )
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(folder)


def make_prompts(count: int, tokens: int) -> list[str]:
    """Words, exp(N(5, 1)) bytes of them, cut to what the model has positions for."""
    draw = random.Random(0)  # noqa: S311
    lengths = [min(int(draw.lognormvariate(5, 1)) + 2, POSITIONS - tokens - 8) for _ in range(count)]
    return [
        "".join(draw.choice("abcdefghijklmnopqrstuvwxyz    ") for _ in range(size)).strip() or "a" for size in lengths
    ]


def run_plain(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    out = folder / "plain.json"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")),
        *(str(folder / "plain.py"), str(folder / "model"), str(folder / "prompts.json"), str(out)),
        *(str(options.batch), str(options.tokens)),
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment(options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole = time.perf_counter() - started
    made = json.loads(out.read_text())
    idle = 1 - sum(made["seconds"]) / (len(made["seconds"]) * max(made["seconds"]))
    return {"makespan": max(made["seconds"]), "whole": whole, "idle": idle, "texts": made["texts"]}


def run_queue(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as store:
        command = [sys.executable, "-m", "bigpipe", "run", str(folder / "recipe.yaml"), "--store", store, "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, env=environment(options), capture_output=True, text=True)
        whole = time.perf_counter() - started
        node = json.loads(done.stdout.splitlines()[-1])["nodes"]["generate"]
        lines = (Path(node["path"]) / "results.jsonl").read_text().splitlines()
    metrics = node["metrics"]
    texts = [json.loads(line)["text"] for line in lines]
    makespan = metrics["tokens"] / metrics["tokens_per_second"]
    return {"makespan": makespan, "whole": whole, "idle": metrics["idle"], "texts": texts}


def environment(options: argparse.Namespace) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_CBWR": "AUTO,STRICT", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_model(folder / "model")
        prompts = make_prompts(options.prompts, options.tokens)
        (folder / "prompts.json").write_text(json.dumps(prompts))
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        (folder / "plain.py").write_text(PLAIN)
        (folder / "accelerate.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: 'no'\n"
            f"num_machines: 1\nmachine_rank: 0\nmain_process_port: 0\nnum_processes: {options.ranks}\n"
        )
        budget = options.batch * max(map(len, prompts))  # a token is reckoned as a byte
        recipe = RECIPE.format(
            model=folder / "model", most=options.most, budget=budget, tokens=options.tokens, ranks=options.ranks
        )
        (folder / "recipe.yaml").write_text(recipe)
        arms = {"plain": lambda: run_plain(folder, options), "queue": lambda: run_queue(folder, options)}
        report(alternate(arms, options.rounds, warm_up=False), options)


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    texts = {arm: runs[0]["texts"] for arm, runs in results.items()}
    arms = {
        arm: {key: round(median([run[key] for run in runs]), 3) for key in ("makespan", "whole", "idle")}
        for arm, runs in results.items()
    }
    different = sum(one != other for one, other in zip(texts["plain"], texts["queue"], strict=True))
    ratios = {f"ratio of {key}": round(arms["plain"][key] / arms["queue"][key], 2) for key in ("makespan", "whole")}
    shown = {key: value for key, value in vars(options).items() if key != "folder"}
    load = [round(each, 1) for each in os.getloadavg()]
    print(json.dumps(
        {"benchmark": "ranks", "arms": arms, **ratios, "different texts": different, "options": shown, "load": load,
         "machine": facts()}, indent=2,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
