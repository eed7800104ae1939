"""kill -9 in every node of the quickstart: what was finished is cached, nothing is damaged, nobody is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.workshop import environment

ROOT = Path(__file__).parents[1]
NODES = ["download", "estimate", "shard", "quantize", "dispatch", "generate", "save"]


def processes_of(store: Path) -> list[int]:
    """Live processes that were told of this store, and are not this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = f"{store}".encode() in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if told and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def started(events: Path, node: str) -> bool:
    if not events.exists():
        return False
    lines = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")]
    return any(line["event"] == "node_started" and line["node"] == node for line in lines)


@pytest.mark.fault
@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
def test_kill_in_every_node(tmp_path):
    for name in ("manifests", "models"):
        shutil.copytree(ROOT / name, tmp_path / name)
    told = environment(tmp_path)
    command = [sys.executable, "-m", "bigpipe", "run", "manifests/quickstart.yaml", "--json", "--jobs", "1"]
    for number, node in enumerate(NODES):
        events = tmp_path / f"events-{number}"
        process = subprocess.Popen(
            [*command, "--events", str(events)], cwd=tmp_path, env=told,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not started(events, node):
            time.sleep(0.01)
        time.sleep(0.05 * number)  # not always at the very beginning of the node
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while (left := processes_of(tmp_path / "store")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], node
        check = [sys.executable, "-m", "bigpipe", "verify"]
        verify = subprocess.run(check, cwd=tmp_path, env=told, capture_output=True, text=True, check=False)
        assert verify.returncode == 0, verify.stdout
    done = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status = {name: node["status"] for name, node in json.loads(done.stdout.splitlines()[-1])["nodes"].items()}
    assert [status[name] for name in NODES[:-2]] == ["cached"] * 5
    again = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, check=True)
    assert {node["status"] for node in json.loads(again.stdout.splitlines()[-1])["nodes"].values()} == {"cached"}
