"""The exported DAG in a real Airflow 3: scheduler, API server and workers, as `airflow standalone` starts them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from support.systems import program

from bigpipe.orchestrator import commands

pytestmark = pytest.mark.exports
RECIPE = """\
version: 1
name: chain
params: {text: hello, most: 90, times: 0}
stages:
  a: {uses: write, with: {text: "${params.text}"}}
  b: {uses: join, matrix: {x: [p, q]}, inputs: {first: a}, with: {separator: "${matrix.x}"}}
  c: {uses: flaky, needs: [a], with: {times: "${params.times}"}}
  d: {uses: join, inputs: {first: a, rest: [b]}, needs: [c], gates: ["characters <= ${params.most}"]}
  e: {uses: join, inputs: {first: d}, when: "${stages.d.metrics.characters} > 900"}
  f: {uses: join, inputs: {first: d}, needs: [e]}
"""
SECONDS = 180


class Airflow:
    def __init__(self, folder: Path, command: Path, port: int) -> None:
        self.program, self.home = program("AIRFLOW"), folder / "airflow"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = {
            **kept,
            "PATH": f"{self.program.parent}:{kept['PATH']}",
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
            "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": "0",
            "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": "0",
            "BIGPIPE": str(command),
            "BIGPIPE_HOME": str(folder / "store"),
        }

    def say(self, *words: str) -> None:
        subprocess.run([self.program, *words], env=self.environment, check=True, capture_output=True)

    def rows(self, question: str, *values: str) -> list[tuple[Any, ...]]:
        """None where there is no such table yet."""
        with closing(sqlite3.connect(self.home / "airflow.db", timeout=20)) as base, suppress(sqlite3.OperationalError):
            return base.execute(question, values).fetchall()
        return []

    def wait(self, question: str, *values: str) -> list[tuple[Any, ...]]:
        until = time.monotonic() + SECONDS
        while not (self.home / "airflow.db").exists() or not (found := self.rows(question, *values)):
            assert time.monotonic() < until, question
            time.sleep(1)
        return found

    def run(self, name: str, **params: str) -> tuple[str, dict[str, tuple[str, int]]]:
        """Trigger the DAG, and wait. Return how it ended, and how each task did, in how many tries."""
        self.say("dags", "trigger", "chain", "--run-id", name, "--conf", json.dumps(params))
        ended = "SELECT state FROM dag_run WHERE run_id = ? AND state IN ('success', 'failed')"
        ((state,),) = self.wait(ended, name)
        tasks = self.rows("SELECT task_id, state, try_number FROM task_instance WHERE run_id = ?", name)
        return state, {task: (state, tries) for task, state, tries in tasks}


@pytest.fixture
def airflow(tmp_path: Path, command: Path, port: int) -> Iterator[Airflow]:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "dags").mkdir()
    (tmp_path / "recipes/chain.yaml").write_text(RECIPE)
    dag = tmp_path / "dags/chain.py"
    text = commands.export("airflow", tmp_path / "recipes/chain.yaml", out=dag).text
    dag.write_text(text.replace("RETRY_SECONDS = 60", "RETRY_SECONDS = 1"))
    found = Airflow(tmp_path, command, port)
    with (tmp_path / "standalone.log").open("w") as log:
        started = subprocess.Popen(
            [found.program, "standalone"], env=found.environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            found.wait("SELECT dag_id FROM serialized_dag")
            found.say("dags", "unpause", "chain")
            yield found
        finally:
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # what it left of its group
            started.wait()


@pytest.mark.usefixtures("workshop")
def test_a_dag_runs_tries_again_skips_and_fails_as_the_recipe_says(airflow: Airflow) -> None:
    ended, tasks = airflow.run("one", text="bye; touch pwned", times="1")
    assert ended == "success"
    assert tasks.pop("c") == ("success", 2), "it ended with 75 once"
    assert tasks.pop("e") == ("skipped", 1)
    assert tasks.pop("f") == ("skipped", 1)
    assert set(tasks.values()) == {("success", 1)}
    told = {
        task: json.loads(value)
        for task, value in airflow.rows("SELECT task_id, value FROM xcom WHERE key = 'return_value'")
    }
    node = told["d"]["nodes"]["d"]
    assert (node["status"], node["metrics"]["parts"], node["gates"][0]["passed"]) == ("succeeded", 3, True)
    assert "bye; touch pwned" in (Path(node["path"]) / "text").read_text()
    assert told["e"]["nodes"]["e"]["status"] == "skipped"

    ended, tasks = airflow.run("two", text="bye; touch pwned", most="5")
    assert ended == "failed"
    assert tasks["d"] == ("failed", 1), "a gate that fails is not tried again"
    assert tasks["e"] == tasks["f"] == ("upstream_failed", 0)
