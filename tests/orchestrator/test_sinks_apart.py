"""What a sink's process does with lines as a run hands them to it: names that a system would refuse, and errors of the
system that it survives."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.workshop import environment

KNOWN: dict[str, Any] = {
    "time": 1.0, "run": "1", "recipe": "r", "manifest": "r.yaml", "repository": "/srv/a b", "git": None, "version": "1",
    "params": {"x y": 1}, "nodes": {"a": {"kind": "write", "params": {}, "inputs": [], "sources": []}},
}  # fmt: skip
FINISHED: dict[str, Any] = {
    "time": 2.0, "event": "node_finished", "node": "a", "status": "succeeded", "key": "k", "digest": None,
    "verdict": "", "error": "", "gates": [], "metrics": {}, "seconds": 1, "peak_rss": 1, "uri": None,
}  # fmt: skip
ENDED = {"time": 3.0, "event": "run_finished", "status": "succeeded"}


def tell(sink: str, folder: Path, *told: Any, **own: str) -> tuple[int, str]:
    """How its process ended, and what it said. Its lines do not end before it does, however slow the machine is."""
    with subprocess.Popen(
        [sys.executable, "-m", "bigpipe.orchestrator.sinks.child", sink], cwd=folder,
        env={**environment(folder), **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"".join(json.dumps(each).encode() + b"\n" for each in told))
        child.stdin.flush()
        said = child.stdout.read().decode()
        return child.wait(), said


def by_mlflow(folder: Path, *told: Any) -> tuple[tuple[int, str], Path]:
    """What it answers, and the run in its own files."""
    there = folder / "mlruns"
    done = tell("mlflow", folder, *told, MLFLOW_TRACKING_URI=there.as_uri(), MLFLOW_ALLOW_FILE_STORE="true")
    (found,) = [path for path in there.glob("*/*") if (path / "tags").is_dir()]
    return done, found


def test_names_and_numbers_that_mlflow_would_refuse_are_told_apart(tmp_path: Path) -> None:
    """One of them would fail the whole batch."""
    longest = "m" * 300
    metrics = {
        "f1@5": 1,
        "f1:5": 2,
        "F1-5": 3,
        "x/../y//": 4,
        longest: 5,
        "large": 10**400,
        "nan": math.nan,
        "yes": True,
    }
    done, run = by_mlflow(tmp_path, KNOWN, {**FINISHED, "metrics": metrics}, ENDED)
    assert done == (0, "")
    told = {path.name: float(path.read_text().split()[1]) for path in (run / "metrics").iterdir()}
    assert {value for name, value in told.items() if "1-5-" in name} == {1, 2, 3}
    assert told["a.x-..-y--"] == 4
    assert [value for name, value in told.items() if "mmm" in name and len(name) == 250] == [5]
    assert math.isinf(told["a.large"])
    assert math.isnan(told["a.nan"])
    assert told["a.yes"] == 1
    assert "status: 3" in (run / "meta.yaml").read_text(), "FINISHED"


def test_mlflow_learns_how_a_run_ended_whatever_could_not_be_told_before(tmp_path: Path) -> None:
    done, run = by_mlflow(tmp_path, KNOWN, {**FINISHED, "gates": [{}]}, FINISHED, ENDED)
    assert done[0] == 1
    assert "KeyError" in done[1]
    assert "status: 3" in (run / "meta.yaml").read_text(), "FINISHED"
    assert (run / "tags" / "bigpipe.status.a").read_text() == "succeeded"


def test_a_server_of_openlineage_that_was_away_learns_how_a_run_ended(tmp_path: Path) -> None:
    heard: list[str] = []

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["eventType"])
            self.send_response(403 if len(heard) == 1 else 201)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        done = tell("openlineage", tmp_path, KNOWN, FINISHED, ENDED, OPENLINEAGE_URL=address)
    finally:
        server.shutdown()
        server.server_close()
    assert heard == ["START", "START", "COMPLETE", "COMPLETE"]
    assert done[0] == 1
    assert "403" in done[1]


@pytest.mark.parametrize(
    ("repository", "address"),
    [("/srv/a b", "file:///srv/a%20b"), ("github.com/o/a b", "https://github.com/o/a%20b"), ("", None)],
)
def test_where_a_recipe_lies_is_an_address(tmp_path: Path, repository: str, address: str | None) -> None:
    git = {"commit": "0" * 40, "dirty": False}
    file = tmp_path / "events.jsonl"
    transport = {"TYPE": "file", "LOG_FILE_PATH": str(file), "APPEND": "true"}
    own = {f"OPENLINEAGE__TRANSPORT__{name}": value for name, value in transport.items()}
    metrics = {"key": "of another", "n": 1}
    told = {**KNOWN, "git": git, "repository": repository}
    done = tell("openlineage", tmp_path, told, {**FINISHED, "metrics": metrics}, ENDED, **own)
    assert done == (0, "")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert events[0]["job"]["facets"].get("sourceCodeLocation", {}).get("url") == address
    tags = {each["key"]: each["value"] for each in events[2]["run"]["facets"]["tags"]["tags"]}
    assert (tags["key"], tags["n"]) == ("k", "1")
