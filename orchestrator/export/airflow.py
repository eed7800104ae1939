"""A DAG of Airflow 3: one task for each of the recipe's, which ends as the command's exit code says
(https://airflow.apache.org/docs/task-sdk/stable/).

Texts of the recipe stand in it as Python's literals, and reach the command as words: no shell reads them, no template.
"""

from __future__ import annotations

import pprint
from typing import Any

from .targets import Target
from .work import Work

HEAD = '''\
"""Written by `bigpipe export airflow`: write it anew when the recipe has other stages or parameters.

BIGPIPE in the environment of a worker names the command, which may have a Python of its own. Secrets are taken from
that environment, or from Airflow's variables of the same name. All workers must see the same store (BIGPIPE_HOME), and
the same cache of the Hub (HF_HOME), into which it leads.
"""

'''
CODE = '''
import json
import os
import signal
import subprocess
import tempfile
from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, BaseOperator, Param, Variable

try:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
except ImportError:  # Airflow 3.0
    from airflow.exceptions import AirflowException, AirflowFailException, AirflowSkipException

BIGPIPE = os.environ.get("BIGPIPE", "bigpipe")
FOLDER = Path(__file__).parent
TRY_AGAIN = 75


class Nodes(BaseOperator):
    """Runs nodes of the recipe; those that they stand on are in the store by then. Returns what became of them."""

    template_fields = ()

    def __init__(self, *, nodes, **options):
        super().__init__(**options)
        self.nodes = nodes
        self.child = None

    def execute(self, context):
        given = {name: value for name, value in context["params"].items() if value not in (None, "")}
        words = [word for name, value in given.items() for word in ("-p", f"{name}={value}")]
        command = [BIGPIPE, "run", RECIPE, *self.nodes, *OPTIONS, "--json", *words]
        found = {name: Variable.get(name, default=None) for name in SECRETS if name not in os.environ}
        secrets = {name: value for name, value in found.items() if value is not None}
        with tempfile.TemporaryFile() as answer:
            self.child = subprocess.Popen(
                command, cwd=FOLDER, env={**os.environ, **secrets}, stdout=answer, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace",
            )
            for line in self.child.stderr:
                self.log.info("%s", line.rstrip())
            status = self.child.wait()
            answer.seek(0)
            last = answer.read().decode().strip().rpartition("\\n")[2]
        return self.became(status, json.loads(last) if last else None, context)

    def became(self, status, result, context):
        causes = "; ".join(error["cause"] for error in result["errors"]) if result else ""
        if status == TRY_AGAIN:
            raise AirflowException(causes or "try again")
        if status != 0:
            raise AirflowFailException(f"exit code {status}: {causes}")
        nodes = {name: node for name, node in result["nodes"].items() if name in self.nodes}
        told = {"run": result["run"], "status": result["status"], "nodes": nodes}
        if all(node["status"] == "skipped" for node in nodes.values()):
            context["ti"].xcom_push(key="return_value", value=told)
            raise AirflowSkipException("; ".join(node["reason"] for node in nodes.values()))
        return told

    def on_kill(self):
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait()


with DAG(
    dag_id=NAME,
    schedule=None,
    catchup=False,
    max_active_runs=1,
    max_active_tasks=SIDE_BY_SIDE,
    params={name: Param(value, type="string") for name, value in PARAMS.items()},
    default_args={
        "retries": 3,
        "retry_delay": timedelta(seconds=RETRY_SECONDS),
        "retry_exponential_backoff": True,
        "trigger_rule": "none_failed",  # whether a task has anything to do after one that was skipped, bigpipe decides
    },
) as dag:
    tasks = {name: Nodes(task_id=name, nodes=task["nodes"]) for name, task in TASKS.items()}
    for name, task in TASKS.items():
        for before in task["after"]:
            tasks[before] >> tasks[name]
'''


def dag(work: Work) -> str:
    constants: dict[str, tuple[Any, str]] = {
        "NAME": (work.plain, ""),
        "RECIPE": (work.manifest, "from the folder of this file"),
        "OPTIONS": (["--locked"] * work.locked, ""),
        "PARAMS": ({each.name: each.given for each in work.parameters}, "empty: as the recipe says"),
        "SECRETS": (list(work.secrets), ""),
        "RETRY_SECONDS": (60, "before what ended with 75 is tried again; longer each time"),
        "SIDE_BY_SIDE": (1, "tasks at a time; more where workers are several machines"),
        "TASKS": ({task.name: {"nodes": list(task.asks), "after": list(task.after)} for task in work.tasks}, ""),
    }
    lines = [_constant(name, value, note) for name, (value, note) in constants.items()]
    return HEAD + "\n".join(lines) + "\n" + CODE


def _constant(name: str, value: Any, note: str) -> str:
    text = pprint.pformat(value, width=110, sort_dicts=False)
    return f"{name} = {text}{f'  # {note}' if note else ''}"


TARGET = Target(title="Airflow", write=dag, beside=True)
