"""Hundreds of runs over one store, with edits, kills, garbage collection and checks between them: at the end, every
result is the one that an empty store gives."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from support.commanding import left_of, start
from support.workshop import Workshop

ROOT = Path(__file__).parents[2]
RUNS = int(os.environ.get("BIGPIPE_TEST_RUNS", "500"))
RECIPE = """version: 1
name: soak
params: {scheme: int8, size: 1MB, word: one, to: dist/a}
stages:
  download: {uses: download, with: {path: model}}
  estimate: {uses: estimate, inputs: download, with: {dtypes: [float16, int8]}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: "${params.size}", dtype: float16}, cache: KEEP}
  quantize: {uses: quantize, inputs: shard, with: {scheme: "${params.scheme}"}}
  save:
    uses: save
    inputs: {model: quantize, reports: [estimate]}
    with: {to: "${params.to}", overwrite: true, card: {tags: ["${params.word}"]}}
"""
CHOICES = {
    "scheme": ["int8", "nf4", "fp4"],
    "size": ["1MB", "300KB"],
    "word": ["one", "two"],
    "to": ["dist/a", "dist/b"],
}


class Soak:
    """A workshop with a model, an edit at a time."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.workshop = Workshop(folder)
        self.folder, self.store = folder, folder / "store"
        self.draw = random.Random(seed)  # noqa: S311
        self.counts: Counter[str] = Counter()
        self.params = {name: values[0] for name, values in CHOICES.items()}
        self.seconds = 3.0
        shutil.copytree(ROOT / "models" / "quickstart", folder / "model")
        self.workshop.manifest.write_text(RECIPE.replace("KEEP", "true"))

    def arguments(self) -> list[str]:
        return [part for name, value in self.params.items() for part in ("-p", f"{name}={value}")]

    def turn(self, number: int) -> None:
        self.edit()
        how = self.draw.choices(["run", "kill", "stop", "two"], [5, 4, 2, 1])[0]
        self.counts[how] += 1
        getattr(self, how)()
        assert left_of(self.store) == []
        if number % 10 == 9:
            self.look_after()

    def edit(self) -> None:
        name = self.draw.choice([*CHOICES, "config", "keep", "dist", "nothing"])
        if name in CHOICES:
            self.params[name] = self.draw.choice(CHOICES[name])
        elif name == "config":
            config = self.folder / "model" / "config.json"
            data = json.loads(config.read_text())
            config.write_text(json.dumps({**data, "edited": self.draw.randrange(3)}, indent=1))
        elif name == "keep":
            self.workshop.manifest.write_text(RECIPE.replace("KEEP", self.draw.choice(["true", "false"])))
        elif name == "dist":
            shutil.rmtree(self.folder / "dist", ignore_errors=True)

    def run(self) -> None:
        began = time.monotonic()
        done = self.workshop.command("run", "recipe.yaml", *self.arguments())
        assert done.returncode == 0, done.stderr
        self.seconds = max(1.0, (self.seconds + time.monotonic() - began) / 2)
        self.saved()

    def kill(self, number: int = signal.SIGKILL) -> None:
        process = start(self.workshop, "run", "recipe.yaml", *self.arguments())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.draw.uniform(0.1, 1.5 * self.seconds))
        process.send_signal(number)
        said = process.communicate(timeout=120)[1].decode()
        assert process.returncode in (0, -number, 128 + number), said
        self.counts["hit"] += process.returncode != 0

    def stop(self) -> None:
        self.kill(self.draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))

    def two(self) -> None:
        others = [start(self.workshop, "run", "recipe.yaml", *self.arguments()) for _ in range(2)]
        for process in others:
            said = process.communicate(timeout=300)[1].decode()
            assert process.returncode == 0, said

    def look_after(self) -> None:
        collected = self.workshop.command("gc", "--older-than", "0d", "--yes")
        assert collected.returncode == 0, collected.stderr
        verified = self.workshop.command("verify")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        self.counts["gc and verify"] += 1

    def saved(self) -> dict[str, str]:
        """Digest by name of what lies at the destination, which is whole."""
        folder = self.folder / self.params["to"]
        files = json.loads((folder / "provenance.json").read_text())["files"]
        found = {name: files[name]["sha256"] for name in files if name.endswith((".safetensors", "config.json"))}
        assert all((folder / name).stat().st_size == files[name]["size"] for name in files)
        return found


@pytest.mark.parametrize("runs", [3, pytest.param(RUNS, marks=[pytest.mark.fault, pytest.mark.timeout(4 * 3600)])])
def test_many_runs_over_one_store(in_memory, seed, runs, monkeypatch):
    soak = Soak(in_memory, seed)
    for number in range(runs):
        soak.turn(number)
    soak.look_after()
    soak.run()
    kept = soak.saved()
    shutil.rmtree(soak.store)
    shutil.rmtree(soak.folder / "dist", ignore_errors=True)
    soak.run()
    assert soak.saved() == kept
    print(f"{runs} runs: {dict(soak.counts)}")  # noqa: T201
