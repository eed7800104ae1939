"""What a model needs, before it is downloaded: bigpipe against `accelerate estimate-memory`, on a loopback Hub.

    python benchmarks/estimate.py [--rounds 5]

Two repositories. `headers`: Llama-3.1-405B's config and index with 191 shards; bigpipe answers from the index.
`config`: a bare config of a family that is in no snapshot (Cohere), so that it too must build the class;
once with nothing remembered, once with the answer of before. Whole processes, start to exit, alternating.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import alternate, facts, median, whole_process

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
COHERE: dict[str, Any] = {"model_type": "cohere", "architectures": ["CohereForCausalLM"]}
SHARDS = 191


def repositories(hub: Any) -> None:
    from bigpipe.bigmodel.architecture import known_architecture

    architecture = known_architecture(LLAMA)
    assert architecture is not None, "there is no snapshot of this transformers version: make snapshot"
    names = [tensor.name for tensor in architecture.tensors() if tensor.persistent]
    shards = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]
    weight_map = {name: shards[at * SHARDS // len(names)] for at, name in enumerate(names)}
    index = {"metadata": {"total_size": 811_706_777_600}, "weight_map": weight_map}
    files: dict[str, bytes] = {"config.json": json.dumps(LLAMA).encode()}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    counts = {"parameters": {"BF16": 405_853_388_800}, "total": 405_853_388_800}
    hub.create("bench/headers", {**files, **dict.fromkeys(shards, b"nobody reads this")}, told_counts=counts)
    hub.create("bench/config", {"config.json": json.dumps(COHERE).encode()})


def bigpipe(model: str, store: Path, environment: dict[str, str]) -> list[str]:
    return [sys.executable, "-m", "bigpipe", "estimate", model, "--json", "--store", str(store)]


def accelerate(model: str) -> list[str]:
    entry = "import sys; from accelerate.commands.accelerate_cli import main; sys.argv[0] = 'accelerate'; main()"
    return [sys.executable, "-c", entry, "estimate-memory", model, "--library_name", "transformers"]


def measure(model: str, folder: Path, environment: dict[str, str], rounds: int) -> dict[str, Any]:
    number = iter(range(10**6))

    def run(command: list[str]) -> tuple[float, int, float]:
        before = processor_seconds()
        seconds, peak = whole_process(command, env=environment)
        return seconds, peak, processor_seconds() - before

    arms: dict[str, Callable[[], tuple[float, int, float]]] = {
        "bigpipe": lambda: run(bigpipe(model, folder / f"new{next(number)}", environment)),
        "bigpipe, again": lambda: run(bigpipe(model, folder / "kept", environment)),
        "accelerate": lambda: run(accelerate(model)),
    }
    results = alternate(arms, rounds)
    return {
        name: {
            "seconds": median([seconds for seconds, _, _ in runs]),
            "processor_seconds": median([busy for _, _, busy in runs]),
            "peak_mb": round(max(peak for _, peak, _ in runs) / 10**6),
        }
        for name, runs in results.items()
    }


def processor_seconds() -> float:
    """Of all children so far, and theirs: what a machine with other work does not change much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def fetched(model: str, environment: dict[str, str], folder: Path) -> int:
    command = bigpipe(model, folder / "counted", environment)
    answer = subprocess.run(command, env=environment, capture_output=True, check=True)
    size: int = json.loads(answer.stdout)["fetched_bytes"]
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    from support.hub import LoopbackHub

    report: dict[str, Any] = {"benchmark": "estimate", "machine": facts(), "arms": {}}
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repositories(hub)
        environment = {**os.environ, **hub.environment(folder / "home"), "OMP_NUM_THREADS": "1"}
        for model in ("headers", "config"):
            found = measure(f"bench/{model}", folder, environment, rounds)
            report["arms"] |= {f"{model}: {arm}": numbers for arm, numbers in found.items()}
            theirs = found["accelerate"]
            report[f"ratio of seconds, {model}"] = round(theirs["seconds"] / found["bigpipe"]["seconds"], 1)
            report[f"ratio of seconds, {model}, again"] = round(
                theirs["seconds"] / found["bigpipe, again"]["seconds"], 1
            )
            report[f"ratio of processor seconds, {model}"] = round(
                theirs["processor_seconds"] / found["bigpipe"]["processor_seconds"], 1
            )
            report[f"ratio of memory, {model}"] = round(theirs["peak_mb"] / found["bigpipe"]["peak_mb"], 1)
            report["arms"][f"{model}: bigpipe"]["fetched_bytes"] = fetched(f"bench/{model}", environment, folder)
        index = hub.repositories["bench/headers"].commits[hub.repositories["bench/headers"].branches["main"]]
        report["index_bytes"] = index["model.safetensors.index.json"].size
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
