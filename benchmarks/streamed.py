"""Generate for a set of prompts with a model whose layers are mostly on disk: bigpipe against accelerate.

    python benchmarks/streamed.py [--size 1.3B] [--dtype bfloat16] [--prompts 64] [--batch 8] [--tokens 16]
        [--resident 0.25] [--compute auto] [--home cpu] [--away disk] [--rounds 1]
        [--arms "accelerate,one by one,together"] [--folder DIR]

A quarter of the layers stays in RAM, the rest is on disk; with `--home 0` they stay on the first GPU, which computes,
and the rest is in RAM (`--away cpu`) or on disk. Both arms hold the same layers, and accelerate gets its
offload folder. Every arm is a process of its own. Set-up is from the checkpoint to a model that can run; accelerate's
writes the offloaded weights. Generating starts with the page cache emptied of the model's files. `one by one` takes a
batch after the other, `together` all of them through each layer. Outputs must be equal, unless ours computes in float32
because this CPU multiplies that much faster (`--compute stored` forbids it). Beside each arm of ours stands the most
that this machine allows, what bounds it, and the share of it that was reached.
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
from pathlib import Path
from typing import Any

from machine import alternate, facts, median
from reshard import SHAPES, forget, make_source

PROMPT = 24
"""Tokens."""
FIGURES = ("setup", "seconds", "tokens_per_second", "peak_mib", "gpu_peak_mib")


def device_map(layers: int, resident: float, home: int | str = "cpu", away: str = "disk") -> dict[str, int | str]:
    kept = round(layers * resident)
    blocks = {f"model.decoder.layers.{layer}": home if layer < kept else away for layer in range(layers)}
    outside = ("embed_tokens", "embed_positions", "final_layer_norm")
    return {**{f"model.decoder.{name}": home for name in outside}, "lm_head": home, **blocks}


def prompts(count: int, vocabulary: int, length: int = PROMPT) -> Any:
    import torch

    return torch.randint(5, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def child(arm: str, source: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    import accelerate
    import transformers
    from transformers.models.opt import modeling_opt  # noqa: F401  what both arms import is no set-up of either

    dtype, layers = getattr(torch, options.dtype), SHAPES[options.size][2]
    home = int(options.home) if options.home.isdecimal() else options.home
    placed = device_map(layers, options.resident, home, options.away)
    device = torch.device("cuda", home) if isinstance(home, int) else torch.device(home)
    torch.zeros(1, device=device)  # its start is no set-up of a model
    started = time.perf_counter()
    if arm == "accelerate":
        config = transformers.AutoConfig.from_pretrained(source)
        with accelerate.init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        model = accelerate.load_checkpoint_and_dispatch(
            model, str(source), device_map=placed, offload_folder=str(folder / "offload"), dtype=dtype
        ).eval()
        each = None
    else:
        from bigpipe.bigmodel.execution import load, loaded
        from bigpipe.bigmodel.placement import Placement

        model = load(source, Placement.from_json(json.loads((source.parent / "plan.json").read_text())["placement"]))
        each = loaded(model).stream
    ready = time.perf_counter()
    for path in (source, folder / "offload"):
        if path.exists():
            forget(path)
    tokens = prompts(options.prompts, model.config.vocab_size).to(device)
    batches = tokens.split(options.batch)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        with torch.inference_mode():
            found[number] = model.generate(
                batches[number], attention_mask=torch.ones_like(batches[number]), max_new_tokens=options.tokens,
                min_new_tokens=options.tokens, do_sample=False,
            )  # fmt: skip

    generating = time.perf_counter()
    together = len(batches) if arm == "together" else 1
    if each is None:
        for number in range(len(batches)):
            work(number)
    else:
        each.together(model, work, range(len(batches)), together)
    ended = time.perf_counter()
    made = torch.cat([found[number] for number in range(len(batches))])
    return {
        "setup": ready - started,
        "seconds": ended - generating,
        "tokens_per_second": tokens.shape[0] * options.tokens / (ended - generating),
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "read": each.bytes_read if each else None,
        "digest": hash(tuple(made.flatten().tolist())),
    }


def plan(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The placement of our arms, and how fast this machine can be with it."""
    from bigpipe.bigmodel.architecture import describe_architecture
    from bigpipe.bigmodel.checkpoint import describe_checkpoint
    from bigpipe.bigmodel.placement import Work, limit_here, place
    from bigpipe.machine import detect

    home = int(options.home) if options.home.isdecimal() else options.home
    placed = device_map(SHAPES[options.size][2], options.resident, home, options.away)
    memo, machine = source.parent / "memo", detect(source.parent)
    placement = place(source, device_map=placed, compute_dtype=options.compute, batch_size=options.batch, memo=memo)
    computed, batches = placement.compute_dtype or options.dtype, -(-options.prompts // options.batch)
    read, made = options.prompts * PROMPT, options.prompts * options.tokens
    limits = {}
    for arm, together in (("one by one", 1), ("together", batches)):
        work = Work(rows=options.prompts, read=read, made=made, batch_size=options.batch, together=together)
        model = describe_checkpoint(source)
        found = limit_here(placement, describe_architecture(source), model, computed, work, machine, memo)
        if found is not None:
            limits[arm] = {"limit": found.tokens_per_second, "bound_by": found.bound_by, "why": found.describe()}
    return {"placement": placement.as_json(), "limits": limits, "computed in": computed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.3B", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--resident", type=float, default=0.25)
    parser.add_argument("--compute", default="auto", help="auto, stored, or a dtype: what a CPU computes in")
    parser.add_argument(
        "--home", default="cpu", help="what computes, and holds the resident layers: cpu, or a GPU's number"
    )
    parser.add_argument("--away", choices=("cpu", "disk"), default="disk")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", default="accelerate,one by one,together")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        arm, source, folder = options.child
        if arm == "plan":
            (Path(folder) / "plan.json").write_text(json.dumps(plan(Path(source), options)))
            return
        print(json.dumps(child(arm, Path(source), Path(folder), options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "source"
        code = (
            "import sys; from pathlib import Path; from streamed import write; write(Path(sys.argv[1]), *sys.argv[2:])"
        )
        subprocess.run(
            [sys.executable, "-c", code, source, options.size, options.dtype],
            check=True,
            cwd=Path(__file__).parent,
            stderr=subprocess.DEVNULL,
        )

        def begin(arm: str, folder: str) -> subprocess.CompletedProcess[bytes]:
            command = [sys.executable, *sys.argv, "--child", arm, str(source), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONHASHSEED": "0"}
            return subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )

        begin("plan", name)
        planned = json.loads((Path(name) / "plan.json").read_text())

        def run(arm: str) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                return dict(json.loads(begin(arm, folder).stdout.splitlines()[-1]))

        arms = {arm: (lambda arm=arm: run(arm)) for arm in options.arms.split(",")}
        results = alternate(arms, options.rounds, warm_up=False)  # every arm is a new process, and its files are cold
        report(results, planned, options)


def write(folder: Path, size: str, dtype: str) -> None:
    """A checkpoint of OPT's shape, stored in the dtype it is computed in."""
    make_source(folder, size, "safetensors")
    if dtype != "float16":
        from bigpipe.bigmodel.writing import save_checkpoint

        target = folder.with_name("cast")
        save_checkpoint(folder, target, dtype=dtype)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        target.rename(folder)


def report(results: dict[str, list[dict[str, Any]]], planned: dict[str, Any], options: argparse.Namespace) -> None:
    digests = {run["digest"] for runs in results.values() for run in runs}
    arms = {
        arm: {key: median([run[key] for run in runs]) for key in FIGURES}
        | {"read_gb": round(runs[0]["read"] / 1e9, 2) if runs[0]["read"] else None}
        for arm, runs in results.items()
    }
    for arm, limit in planned["limits"].items():
        if arm in arms:
            arms[arm] |= {**limit, "share": round(arms[arm]["tokens_per_second"] / limit["limit"], 3)}
    best = arms.get("together") or arms["one by one"]
    ratios = {
        f"ratio of tokens/s to {arm}": round(best["tokens_per_second"] / row["tokens_per_second"], 2)
        for arm, row in arms.items()
    }
    print(
        json.dumps(
            {
                "benchmark": "streamed",
                "computed in": planned["computed in"],
                "equal outputs": len(digests) == 1,
                "arms": arms,
                **ratios,
                "options": {k: v for k, v in vars(options).items() if k not in ("child", "folder")},
                "machine": facts(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
