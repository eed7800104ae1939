"""A real server of MLflow shows what its sink told it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from support.systems import program
from support.workshop import Workshop

from bigpipe.orchestrator.sinks import feeding

pytestmark = pytest.mark.exports
RECIPE = """\
version: 1
name: told
params: {text: hello, most: 9}
sinks: [mlflow]
stages:
  a: {uses: write, with: {text: "${params.text}", source: words}, gates: ["characters <= ${params.most}"]}
  b: {uses: join, matrix: {x: [p, q]}, inputs: {first: a}, with: {separator: "${matrix.x}"}}
"""


@pytest.fixture
def server(tmp_path: Path, port: int) -> Iterator[str]:
    folder = tmp_path / "server"
    folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command = [program("MLFLOW"), "server", *where, "--artifacts-destination", folder / "files", "--workers", "1"]
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(command, cwd=folder, env=kept, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address)
            yield address
        finally:
            started.terminate()
            started.wait(30)


def _wait(address: str) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            requests.get(f"{address}/health", timeout=5).raise_for_status()
        except requests.RequestException:
            assert time.monotonic() < until
            time.sleep(0.5)
        else:
            return


def asked(address: str, path: str, **fields: Any) -> dict[str, Any]:
    answer = requests.post(f"{address}/api/2.0/mlflow/{path}", json=fields, timeout=30)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_a_server_of_mlflow_shows_the_runs(workshop: Workshop, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is: how long a run waits is tested elsewhere."""
    monkeypatch.setattr(feeding, "PATIENCE", 120.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    (workshop.folder / "words").write_text("!")
    said: list[Any] = []
    results = [
        workshop.run(RECIPE, params={"most": most, "text": text}, progress=lambda event: said.append(event))
        for most, text in ((9, "hello"), (3, "other"))
    ]
    assert [result.exit_code for result in results] == [0, 3]
    assert not [event for event in said if event.name == "log"]
    (experiment,) = [
        each for each in asked(server, "experiments/search", max_results=9)["experiments"] if each["name"] == "told"
    ]
    runs = asked(server, "runs/search", experiment_ids=[experiment["experiment_id"]])["runs"]
    shown = {run["info"]["run_name"]: run for run in runs}
    good, bad = (shown[result.run] for result in results)
    assert (good["info"]["status"], bad["info"]["status"]) == ("FINISHED", "FAILED")
    params, metrics, tags = (_table(good["data"][kind]) for kind in ("params", "metrics", "tags"))
    assert params["most"] == "9"
    assert (metrics["a.characters"], metrics["a.gate.1"]) == (6, 1)
    assert tags["bigpipe.key.b-x-p"] == results[0]["b@x=p"].key
    assert _table(bad["data"]["metrics"])["a.gate.1"] == 0
    assert "characters <= 3" in _table(bad["data"]["tags"])["bigpipe.error.a"]


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["key"]: row["value"] for row in rows}
