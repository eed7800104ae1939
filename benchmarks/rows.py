"""Classify a million short texts with a tiny model, Parquet to Parquet: a stage against a bare loop of the same model.

    python benchmarks/rows.py [--rows 1000000] [--batch 256] [--width 128] [--layers 2] [--rounds 1] [--folder DIR]

The bare loop has all texts in memory, sorted by their length in bytes as ours are; it tokenizes a batch, runs the model
and keeps label and score. Its seconds are those of the loop alone, without imports, loading or reading. Ours are told
twice: `loop` is the rank's, from its first batch to its last; `whole` is that of the stage, which reads Parquet, plans,
starts a rank, imports torch, loads the model, classifies, and writes Parquet. `processor` is user and system time:
of the bare loop alone, and of our whole command with all its children. Labels must be the same. Memory is the resident
set of the stage's largest process, looked at every half second: the largest while a tenth, a half, nine tenths and all
of the rows were done, and before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from machine import alternate, facts, median

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "models/quickstart"
BARE = """
import json, sys, time
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as parquet
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model, source, out, size = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
model = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
texts = parquet.read_table(source)["text"].to_pylist()
order, labels = sorted(range(len(texts)), key=lambda row: len(texts[row].encode())), {}
started, busy = time.perf_counter(), time.process_time()
with torch.inference_mode():
    for first in range(0, len(order), int(size)):
        rows = order[first : first + int(size)]
        inputs = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
        scores, found = model(**inputs).logits.softmax(-1).max(-1)
        for row, score, label in zip(rows, scores.tolist(), found.tolist()):
            labels[row] = (model.config.id2label[label], score)
seconds, busy = time.perf_counter() - started, time.process_time() - busy
found = [labels[row][0] for row in range(len(texts))]
Path(out).write_text(json.dumps({"seconds": seconds, "processor": busy, "labels": found}))
"""
RECIPE = """
version: 1
name: rows
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  classify:
    uses: distributed-infer
    inputs: download
    with:
      task: text-classification
      prompts: texts.parquet
      column: text
      batch_size: {batch}
      dtype: float32
      output_format: parquet
    launch: {{num_processes: 1}}
"""


def make_model(folder: Path, options: argparse.Namespace) -> None:
    import torch
    import transformers

    shutil.copytree(TOKENIZER, folder)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=2,
        intermediate_size=4 * options.width, num_labels=4, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_texts(path: Path, count: int) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    draw = random.Random(0)  # noqa: S311
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    with parquet.ParquetWriter(path, arrow.schema([("id", arrow.int64()), ("text", arrow.string())])) as writer:
        for first in range(0, count, 50_000):
            ids = list(range(first, min(count, first + 50_000)))
            texts = [" ".join(draw.choices(words, k=draw.randint(2, 6))) for _ in ids]
            writer.write_table(arrow.table({"id": ids, "text": texts}))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1), "HF_HUB_OFFLINE": "1"}


def run_bare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    out = folder / "bare.json"
    command = [sys.executable, str(folder / "bare.py"), folder / "model", folder / "texts.parquet", out]
    subprocess.run([*map(str, command), str(options.batch)], check=True, env=environment(), stderr=subprocess.DEVNULL)
    made = json.loads(out.read_text())
    return {"loop": made["seconds"], "whole": made["seconds"], "processor": made["processor"], "labels": made["labels"]}


class Watch(threading.Thread):
    """Notes the largest resident set among a process's children, with the seconds since it began."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._process, self._begun = process, time.monotonic()
        self.seen: list[tuple[float, int]] = []

    def run(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            sizes = []
            for each in [self._process, *self._process.children(recursive=True)]:
                try:
                    sizes.append(each.memory_info().rss)
                except psutil.Error:
                    continue
            self.seen.append((time.monotonic() - self._begun, max(sizes, default=0)))
            time.sleep(0.5)


def run_stage(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import pyarrow.parquet as parquet

    with tempfile.TemporaryDirectory(dir=folder) as store:
        events = folder / f"events-{time.monotonic_ns()}.jsonl"
        command = [
            *(sys.executable, "-m", "bigpipe", "run", str(folder / "recipe.yaml"), "--store", store, "--json"),
            *("--events", str(events)),
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            watch = Watch(psutil.Process(process.pid))
            started = time.time()
            watch.start()
            assert process.stdout is not None
            node = json.loads(process.stdout.read().splitlines()[-1])["nodes"]["classify"]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        labels = parquet.read_table(next(Path(node["path"]).glob("*.parquet")))["label"].to_pylist()
        told = [json.loads(line) for line in events.read_text().splitlines()]
    metrics = node["metrics"]
    return {
        "loop": metrics["tokens"] / metrics["tokens_per_second"], "whole": node["seconds"],
        "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "labels": labels,
        "memory": memory(watch.seen, told, started),
    }  # fmt: skip


def memory(seen: list[tuple[float, int]], told: list[dict[str, Any]], started: float) -> dict[str, int]:
    """MiB of the largest process by how far it had come."""
    progress = [event for event in told if event["event"] == "progress" and event.get("unit") == "prompts"]
    total = max(event["total"] for event in progress)
    ends = [
        next(_seconds(event) for event in progress if event["done"] >= share * total) - started
        for share in (0.1, 0.5, 0.9, 1)
    ]
    begin = _seconds(progress[0]) - started
    spans = zip(
        ["reading, planning", "to 10 %", "to 50 %", "to 90 %", "to 100 %", "writing"],
        [0, begin, *ends],
        [begin, *ends, 1e9],
        strict=True,
    )
    return {
        name: round(max((size for at, size in seen if first <= at < last), default=0) / 2**20)
        for name, first, last in spans
    }


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_model(folder / "model", options)
        make_texts(folder / "texts.parquet", options.rows)
        (folder / "bare.py").write_text(BARE)
        (folder / "recipe.yaml").write_text(RECIPE.format(model=folder / "model", batch=options.batch))
        arms = {"bare": lambda: run_bare(folder, options), "stage": lambda: run_stage(folder, options)}
        report(alternate(arms, options.rounds, warm_up=False), options)


def report(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    labels = {arm: runs[0]["labels"] for arm, runs in results.items()}
    different = sum(one != other for one, other in zip(labels["bare"], labels["stage"], strict=True))
    arms = {
        arm: {
            key: {"seconds": round(seconds, 1), "rows/s": round(options.rows / seconds)}
            for key in ("loop", "whole", "processor")
            for seconds in [median([run[key] for run in runs])]
        }
        for arm, runs in results.items()
    }
    least = {"loop": "loop", "whole": "loop", "processor": "processor"}
    shares = {
        key: round(median([run[bare] for run in results["bare"]]) / median([run[key] for run in results["stage"]]), 3)
        for key, bare in least.items()
    }
    shown = {key: value for key, value in vars(options).items() if key != "folder"}
    load = [round(each, 1) for each in os.getloadavg()]
    print(json.dumps(
        {"benchmark": "rows", "arms": arms, "share of the bare loop": shares, "different labels": different,
         "memory, MiB": [run["memory"] for run in results["stage"]], "options": shown, "load": load,
         "machine": facts()}, indent=2,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
