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
import torch
import yaml
from support.hub import LoopbackHub
from support.hub_answers import Request
from support.hub_state import files_of
from support.layouts import LAYOUTS
from support.own_code import make_own_model
from support.workshop import Workshop, environment, statuses

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.writing import SyntheticModel
from bigpipe.errors import InvalidCheckpoint

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


BIN = SYNTHETIC.replace("max_shard_size: 6MB", "max_shard_size: 6MB, format: bin").replace(
    "{max_shard_size: 2MB}", "{max_shard_size: 2MB, format: bin}"
)


@pytest.mark.parametrize("text", [SYNTHETIC, BIN], ids=["safetensors", "bin"])
def test_side_by_side_gives_what_one_after_the_other_gives(workshop: Workshop, tmp_path: Path, text: str) -> None:
    together = workshop.run(recipe(text))
    assert set(statuses(together).values()) == {"succeeded"}
    assert "as they are made" in together.nodes["shard"].reason + together.nodes["quantize"].reason
    apart = workshop.run(jobs=1, store=tmp_path / "other")
    assert "as they are made" not in apart.nodes["shard"].reason + apart.nodes["quantize"].reason
    assert facts(together) == facts(apart)


def files_in(folder: Path) -> dict[int, int]:
    """inode → bytes on the disk."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                facts = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            found[facts.st_ino] = facts.st_blocks * 512
    return found


@contextmanager
def peak_use(folder: Path) -> Iterator[list[int]]:
    """The most bytes on the disk. What two walks in a row have met was there between them, all at the same time."""
    found, over = [0], threading.Event()

    def watch() -> None:
        before = files_in(folder)
        while not over.wait(0.002):
            now = files_in(folder)
            found[0] = max(found[0], sum(before[file] for file in before.keys() & now.keys()))
            before = now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def test_the_disk_holds_the_result_and_two_shards(workshop: Workshop) -> None:
    workshop.run(recipe(SYNTHETIC), nodes=["download"])
    before = sum(files_in(workshop.folder / "store").values())
    with peak_use(workshop.folder / "store") as peak:
        result = workshop.run()
    assert set(statuses(result).values()) == {"cached", "succeeded"}
    written = sum(file["size"] for file in result.nodes["quantize"].record.files.values())
    sizes = [file["size"] for name, file in result.nodes["shard"].record.files.items() if name.endswith("tensors")]
    assert len(sizes) >= 10
    assert result.path("shard") is None
    small_files = 2**20
    assert peak[0] - before <= written + 2 * max(sizes) + small_files


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = yaml.safe_load(MODEL)["config"]
    model = SyntheticModel(config, describe_architecture(config), max_shard_size="6MB", format=request.param)
    model.write(folder)
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.create("org/model", files_of(model))
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        yield server


def hold_the_last_file(hub: LoopbackHub, store: Path, last: str) -> None:
    """Send it only once the engine has told the download who takes its files, so that it still runs by then."""

    def wait(entry: Request) -> None:
        patience = time.monotonic() + 60
        while last in entry.path and entry.range is None and time.monotonic() < patience:
            if list(store.glob("tmp/*/*/consumers.json")):
                return
            time.sleep(0.01)

    hub.hold = wait


def test_from_the_hub(workshop: Workshop, hub: LoopbackHub, tmp_path: Path) -> None:
    hold_the_last_file(hub, workshop.folder / "store", "-00003-of-")
    together = workshop.run(recipe(FROM_HUB))
    hub.hold = None
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
        hub.fail("garbage", "-00003-of-", times=9)

    for name in ("-00001-of-", "-00002-of-"):
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


@pytest.mark.parametrize("model", ["bin"], indirect=True)
def test_what_has_come_is_converted_while_the_last_file_comes(workshop: Workshop, hub: LoopbackHub) -> None:
    """The last file waits until something was made of the first: were the consumer to wait for all, for ever."""
    store, seen = workshop.folder / "store", threading.Event()
    last = sorted(name for name in hub.names("org/model") if "-00003-of-" in name)[0]

    def watch() -> None:
        while not seen.wait(0.01):
            if list(store.glob("tmp/*/*/taken/shard/*00001*")):
                seen.set()

    hub.hold = lambda entry: last in entry.path and entry.range is None and not seen.wait(60)
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = workshop.run(recipe(FROM_HUB))
    converted = seen.is_set()
    seen.set()
    watcher.join()
    assert set(statuses(result).values()) == {"succeeded"}
    assert converted


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bin"], indirect=True)
def test_a_local_directory_is_followed(workshop: Workshop, model: Path, tmp_path: Path) -> None:
    text = recipe(FROM_HUB.replace("repo: org/model", f"path: {model}"))
    together = workshop.run(text)
    assert "as they are made" in together.nodes["shard"].reason
    assert facts(together) == facts(workshop.run(jobs=1, store=tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bin"], indirect=True)
def test_without_ranges_what_follows_waits_for_all_files(workshop: Workshop, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.ranges = False
    workshop.manifest.write_text(recipe(FROM_HUB))
    told = workshop.command("run", "recipe.yaml")
    assert told.returncode == 0, told.stderr
    assert "what follows starts when all files are here" in told.stdout + told.stderr
    hub.ranges = True
    record = workshop.run(jobs=1, store=tmp_path / "other")
    assert facts(workshop.run()) == facts(record)


OWN = """\
version: 1
name: own
trust: {remote_code: [org/own@COMMIT]}
stages:
  download: {uses: download, with: {repo: org/own, revision: REVISION}}
  quantize: {uses: quantize, inputs: download, with: {scheme: int8}}
"""


@pytest.mark.parametrize("branch", [False, True], ids=["commit", "branch"])
def test_a_model_whose_own_code_is_trusted_is_quantized_while_it_comes(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branch: bool
) -> None:
    with LoopbackHub() as server:
        commit = server.create("org/own", files_of(make_own_model(tmp_path / "own")))
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        text = OWN.replace("COMMIT", commit).replace("REVISION", "main" if branch else commit)
        hold_the_last_file(server, workshop.folder / "store", "-00002-of-")
        together = workshop.run(text)
        server.hold = None
        assert set(statuses(together).values()) == {"succeeded"}, together.errors
        assert "as they are made" in together.nodes["quantize"].reason
        assert facts(together) == facts(workshop.run(jobs=1, store=tmp_path / "other"))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("model", ["bin"], indirect=True)
def test_a_hostile_file_is_named_and_nothing_runs(workshop: Workshop, hub: LoopbackHub, model: Path) -> None:
    files = files_of(model)
    hostile = next(name for name in files if "-00002-of-" in name)
    torch.save({"weight": Evil()}, workshop.folder / hostile)
    hub.create("org/model", {**files, hostile: workshop.folder / hostile})
    for repository in ("org/model", 'org/model, include: ["*"]'):
        with pytest.raises(InvalidCheckpoint, match=f"{hostile}.*posix.system"):
            workshop.run(recipe(FROM_HUB.replace("org/model", repository)))


@pytest.mark.fault
@pytest.mark.parametrize("text", [SYNTHETIC, BIN], ids=["safetensors", "bin"])
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_goes_on_to_the_same_bytes(workshop: Workshop, tmp_path: Path, seed: int, text: str) -> None:
    workshop.manifest.write_text(recipe(text))
    chance = random.Random(seed)  # noqa: S311
    command = [sys.executable, "-m", "bigpipe", "run", "recipe.yaml"]
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


PACKED = """\
version: 1
name: chain
stages:
  download: {uses: download, with: {path: fp8}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 20KB}, cache: false}
  plain: {uses: shard, inputs: shard, with: {max_shard_size: 50KB, dtype: bfloat16}}
  quantize: {uses: quantize, inputs: shard, with: {scheme: nf4, dtype: bfloat16}}
"""


def test_codes_and_scales_that_come_in_other_files_are_decoded_as_they_come(workshop: Workshop, tmp_path: Path) -> None:
    (workshop.folder / "fp8").mkdir()
    LAYOUTS["fp8 with a scale per block"].make(workshop.folder / "fp8")
    workshop.manifest.write_text(PACKED)
    planned = workshop.json("plan", "recipe.yaml")["nodes"]
    together = workshop.run()
    assert set(statuses(together).values()) == {"succeeded"}
    assert "as they are made" in together.nodes["quantize"].reason + together.nodes["plain"].reason
    for node in ("plain", "quantize"):
        assert planned[node]["forecast"]["metrics"]["bytes"] == together.nodes[node].metrics["bytes"]
    apart = workshop.run(jobs=1, store=tmp_path / "other")
    assert facts(together) == facts(apart)
