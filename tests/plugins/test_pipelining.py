"""download, shard and quantize, file by file: the bytes of one after the other, on a disk with room for two shards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from support.hub import LoopbackHub
from support.hub_state import files_of
from support.workshop import Workshop, environment, statuses

from bigpipe.bigmodel.architecture.structure import describe_architecture
from bigpipe.bigmodel.writing.synthetic import write_synthetic

MODEL = """\
config: {model_type: gpt2, architectures: [GPT2LMHeadModel], n_layer: 12, n_embd: 256, n_head: 4, vocab_size: 1000,
         n_positions: 128}
"""
STEPS = """\
  shard: {uses: shard, inputs: download, with: {max_shard_size: 2MB}, cache: false}
  quantize: {uses: quantize, inputs: shard, with: {scheme: SCHEME, dtype: float16}}
"""
SYNTHETIC = f"""\
version: 1
name: chain
params: {{scheme: int8}}
stages:
  download: {{uses: download, with: {{synthetic: {{{MODEL.strip()}, max_shard_size: 6MB}}}}}}
{STEPS}"""
FROM_HUB = f"""\
version: 1
name: chain
params: {{scheme: nf4}}
stages:
  download: {{uses: download, with: {{repo: org/model}}}}
{STEPS}"""


def recipe(text: str) -> str:
    return text.replace("SCHEME", '"${params.scheme}"').replace("\n         ", " ")


def facts(result) -> dict[str, tuple[str | None, str | None]]:
    return {name: (state.key, state.digest) for name, state in result.nodes.items()}


def test_side_by_side_gives_what_one_after_the_other_gives(workshop: Workshop, tmp_path: Path) -> None:
    together = workshop.run(recipe(SYNTHETIC))
    assert set(statuses(together).values()) == {"succeeded"}
    assert "as they are made" in together.nodes["shard"].reason + together.nodes["quantize"].reason
    apart = workshop.run(jobs=1, store=tmp_path / "other")
    assert "as they are made" not in apart.nodes["shard"].reason + apart.nodes["quantize"].reason
    assert facts(together) == facts(apart)


def used(folder: Path) -> int:
    """Bytes on the disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue
    return total


@contextmanager
def peak_use(folder: Path) -> Iterator[list[int]]:
    found, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            found[0] = max(found[0], used(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def test_the_disk_holds_the_result_and_two_shards(workshop: Workshop) -> None:
    workshop.run(recipe(SYNTHETIC), nodes=["download"])
    before = used(workshop.folder / "store")
    with peak_use(workshop.folder / "store") as peak:
        result = workshop.run()
    assert set(statuses(result).values()) == {"cached", "succeeded"}
    written = sum(file["size"] for file in result.nodes["quantize"].record.files.values())
    sizes = [file["size"] for name, file in result.nodes["shard"].record.files.items() if name.endswith("tensors")]
    assert len(sizes) >= 10
    assert result.path("shard") is None
    small_files = 2**20
    assert peak[0] - before <= written + 2 * max(sizes) + small_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = yaml.safe_load(MODEL)["config"]
    write_synthetic(config, describe_architecture(config), folder, max_shard_size="6MB")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.create("org/model", files_of(model))
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        yield server


def test_from_the_hub(workshop: Workshop, hub: LoopbackHub, tmp_path: Path) -> None:
    together = workshop.run(recipe(FROM_HUB))
    assert set(statuses(together).values()) == {"succeeded"}
    assert "as they are made" in together.nodes["shard"].reason
    apart = workshop.run(jobs=1, store=tmp_path / "other")
    assert facts(together) == facts(apart)
    assert hub.bytes_sent("/cdn/") < 1.2 * together.nodes["download"].record.metrics["bytes"]


def test_bytes_garbled_on_the_way_reach_no_artifact(workshop: Workshop, hub: LoopbackHub) -> None:
    """A file comes wrong, twice, after others were passed on: what was made of those goes nowhere."""

    def spoil() -> None:
        while not list((workshop.folder / "store").glob("tmp/*/*/contents.json")):
            time.sleep(0.01)
        hub.fail("garbage", "model-00003", times=9)

    for name in ("model-00001", "model-00002"):
        hub.fail("slow", name, times=9, rate=3_000_000)
    spoiler = threading.Thread(target=spoil)
    spoiler.start()
    result = workshop.run(recipe(FROM_HUB))
    spoiler.join()
    assert statuses(result) == {"download": "failed", "shard": "skipped", "quantize": "skipped"}
    assert "came twice with other bytes" in str(result.errors[0])
    assert result.nodes["shard"].reason == "download failed"
    assert not list((workshop.folder / "store" / "keys").glob("*"))
    hub.faults.clear()
    assert set(statuses(workshop.run()).values()) == {"succeeded"}


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(workshop: Workshop, tmp_path: Path, seed: int) -> None:
    workshop.manifest.write_text(recipe(SYNTHETIC))
    chance = random.Random(seed)  # noqa: S311
    command = [sys.executable, "-m", "bigpipe.cli", "run", "recipe.yaml"]
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=workshop.folder, env=environment(workshop.folder), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not list((workshop.folder / "store").glob("work/*/out/config.json")):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = workshop.run()
    assert set(statuses(result).values()) <= {"cached", "succeeded"}
    assert facts(workshop.run(jobs=1, store=tmp_path / "other")) == facts(result)
    assert workshop.command("verify").returncode == 0
