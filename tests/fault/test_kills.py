"""SIGKILL while a recipe runs: what was finished is cached, nothing is damaged, nobody is left."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from support.commanding import left_of
from support.workshop import environment

from bigpipe.orchestrator.store.store import Store

ROOT = Path(__file__).parents[2]
NODES = ["download", "estimate", "shard", "quantize", "evaluate", "dispatch", "generate", "save"]
QUICKSTART = "manifests/quickstart.yaml"
WITHOUT_RANKS = """\
version: 1
name: without-ranks
stages:
  download: {uses: download, with: {path: ../models/quickstart}}
  estimate: {uses: estimate, inputs: download, with: {dtypes: [float16, int8]}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 100KB, dtype: float16}}
  quantize: {uses: quantize, inputs: shard, with: {scheme: int8}}
  dispatch: {uses: dispatch, inputs: quantize, with: {max_memory: {cpu: 1GiB}}}
  save: {uses: save, inputs: {model: quantize}, with: {to: ../dist}}
"""

FULL = [pytest.mark.fault, pytest.mark.timeout(7200)]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")


@pytest.fixture
def quickstart(tmp_path) -> Path:
    for name in ("manifests", "models"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "manifests" / "without-ranks.yaml").write_text(WITHOUT_RANKS)
    return tmp_path


def started(events: Path, node: str) -> bool:
    return ("node_started", node) in {(line["event"], line.get("node")) for line in told(events)}


def told(events: Path) -> list[dict]:
    lines = events.read_text().splitlines() if events.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def command(manifest: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "bigpipe", "run", manifest, "--json", *options]


def start(folder: Path, manifest: str, *options: str) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command(manifest, *options), cwd=folder, env=environment(folder), **quiet)


def ended(folder: Path, manifest: str) -> dict[str, dict]:
    """The nodes of a run that nobody disturbs."""
    run = command(manifest)
    done = subprocess.run(run, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["nodes"]


@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_kill_in_every_node(quickstart):
    for number, node in enumerate(NODES):
        events = quickstart / f"events-{number}"
        process = start(quickstart, QUICKSTART, "--jobs", "1", "--events", str(events))
        while process.poll() is None and not started(events, node):
            time.sleep(0.01)
        time.sleep(0.05 * number)  # not always at the very beginning of the node
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert left_of(quickstart / "store") == []
        with Store(quickstart / "store") as store:
            assert store.verify().clean, node
    nodes = ended(quickstart, QUICKSTART)
    assert [nodes[name]["status"] for name in NODES[:-2]] == ["cached"] * 6
    assert {node["status"] for node in ended(quickstart, QUICKSTART).values()} == {"cached"}


@pytest.mark.parametrize(
    ("manifest", "kills"),
    [
        ("manifests/without-ranks.yaml", 1),
        pytest.param("manifests/without-ranks.yaml", 300, marks=FULL),
        pytest.param(QUICKSTART, 20, marks=FULL),
    ],
)
def test_kills_at_random_moments(quickstart, seed, manifest, kills):
    """Each run goes on where the killed one was; a recipe that ends begins anew in an empty store. What the events of a
    run called finished is never done again."""
    dice = random.Random(seed)  # noqa: S311
    right, longest = {}, 3.0
    if kills > 1:
        began = time.monotonic()
        right, longest = digests(quickstart, manifest), time.monotonic() - began
        begin_anew(quickstart)
    finished: set[str] = set()
    done = whole = 0
    while done < kills:
        events = quickstart / "events"
        events.unlink(missing_ok=True)
        process = start(quickstart, manifest, "--events", str(events))
        try:
            process.wait(dice.uniform(0.1, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            done += 1
        assert process.wait() in (0, -signal.SIGKILL)
        assert left_of(quickstart / "store") == []
        again = {line["node"] for line in told(events) if line["event"] == "node_started"}
        assert not again & finished, done
        finished |= {line["node"] for line in told(events) if line["event"] == "node_finished" and is_made(line)}
        with Store(quickstart / "store") as store:
            assert store.verify().clean, done
        if process.returncode == 0:
            whole += 1
            assert not right or digests(quickstart, manifest) == right
            begin_anew(quickstart)
            finished = set()
    print(f"{done} kills, {whole} whole runs")  # noqa: T201
    last = digests(quickstart, manifest)
    assert last == (right or last)


def digests(folder: Path, manifest: str) -> dict[str, str | None]:
    """What the nodes of an undisturbed run give, and the weights that were saved; what `save` notes tells the time."""
    nodes = ended(folder, manifest)
    found = {name: node["digest"] for name, node in nodes.items() if name != "save"}
    reports = {name: Path(node["path"]) / "report.json" for name, node in nodes.items() if node.get("path")}
    told = {
        str(path.name): path.read_text() for path in reports.values() if path.is_file()
    }  # so that a failure says what
    weights = sorted(folder.glob("**/dist/**/*.safetensors"))
    return {**found, **told, "saved": sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()}


def begin_anew(folder: Path) -> None:
    shutil.rmtree(folder / "store")
    for saved in folder.glob("**/dist"):
        shutil.rmtree(saved)


def is_made(line: dict) -> bool:
    return line["status"] == "succeeded" and line["node"] != "save"  # which looks at what lies outside
