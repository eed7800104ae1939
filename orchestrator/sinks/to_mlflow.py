"""Runs as runs of MLflow (https://mlflow.org/docs/latest/ml/tracking/): an experiment for each recipe, in it
a run for each run, with params, metrics, gates and tags that are called after the nodes.

Where: MLFLOW_TRACKING_URI; the experiment also by MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any

from bigpipe.errors import UsageError
from bigpipe.names import plain_names
from bigpipe.tables import as_text

from .values import flat, gate_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

AT_A_TIME = 100
"""Params or tags of one request (https://mlflow.org/docs/latest/api_reference/rest-api.html#request-limits)."""
LONGEST = 5000
"""Characters of a param's or tag's value."""
LONGEST_NAME = 250
"""Characters of a param's or metric's."""
ENDS = {"succeeded": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
CLIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Seconds and further attempts of its client, unless the environment says otherwise."""


def tell(about: Mapping[str, Any], events: Iterator[Mapping[str, Any]], failed: Callable[[Exception], None]) -> None:
    """failed: told of what could not be logged; how the run ended is told all the same."""
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment, began = _experiment(client, about["recipe"]), _milliseconds(about)
    run = client.create_run(experiment, began, tags=_tags(about), run_name=about["run"]).info.run_id
    with _surviving(failed):
        _log(client, run, began, params=_params(about))
    plain, status, ended = plain_names(about["nodes"]), "KILLED", None
    for event in events:
        ended = _milliseconds(event)
        if event["event"] == "node_finished":
            node = plain[event["node"]]
            with _surviving(failed):
                _log(client, run, ended, metrics=_metrics(node, event), tags=_became(node, event))
        elif event["event"] == "run_finished":
            status = ENDS[event["status"]]
            break
    client.set_terminated(run, status=status, end_time=ended)


@contextmanager
def _surviving(failed: Callable[[Exception], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of its client, about any server
        failed(error)


def _milliseconds(what: Mapping[str, Any]) -> int:
    return int(what["time"] * 1000)


def _experiment(client: MlflowClient, recipe: str) -> str:
    """As MLflow's own programs: by the number that the environment says, else by name."""
    from mlflow.exceptions import MlflowException

    if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return number
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or recipe
    try:
        return str(client.create_experiment(name))
    except MlflowException:  # it is there
        if (found := client.get_experiment_by_name(name)) is None:
            raise
    if found.lifecycle_stage == "deleted":
        raise UsageError(f"the experiment {name} is deleted", "restore it, or set MLFLOW_EXPERIMENT_NAME to another")
    return str(found.experiment_id)


def _tags(about: Mapping[str, Any]) -> dict[str, str]:
    git = about["git"] or {}
    found = {
        "mlflow.source.name": about["manifest"],
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": git.get("commit"),
        "bigpipe.git.dirty": as_text(git["dirty"]) if git else None,
        "bigpipe.run": about["run"],
        "bigpipe.version": about["version"],
    }
    return {name: value for name, value in found.items() if value}


def _params(about: Mapping[str, Any]) -> dict[str, str]:
    """The recipe's, and of each node what stands under `with`."""
    plain = plain_names(about["nodes"])
    found = dict(flat(about["params"]))
    for node, each in about["nodes"].items():
        found |= {f"{plain[node]}.{name}": value for name, value in flat(each["params"]) if value is not None}
    names = _names(found)
    return {names[name]: as_text(value)[:LONGEST] for name, value in found.items()}


def _metrics(node: str, event: Mapping[str, Any]) -> dict[str, float]:
    measured = {**event["metrics"], "seconds": event["seconds"], "peak_rss": event["peak_rss"]}
    gates = {f"gate.{number}": gate["passed"] for number, gate in enumerate(event["gates"], 1)}
    values = {f"{node}.{name}": value for name, value in flat({**measured, **gates})}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    names = _names(numbers)
    return {names[name]: _float(value) for name, value in numbers.items()}


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _became(node: str, event: Mapping[str, Any]) -> dict[str, str]:
    found = {
        **{name: event[name] for name in ("status", "key", "digest", "verdict", "error")},
        "gates": "; ".join(map(gate_text, event["gates"])),
        "model": event["uri"],
    }
    return {f"bigpipe.{name}.{node}": as_text(value)[:LONGEST] for name, value in found.items() if value}


def _names(names: Iterable[str]) -> dict[str, str]:
    """Return of each name one that MLflow takes, without `/`, by which it would be a path. No two are the same,
    whatever their case: those that would be, or are too long, end in a digest."""
    plain = {name: re.sub(r"[^\w. -]", "-", name, flags=re.ASCII) for name in names}
    often = Counter(each.lower() for each in plain.values())
    return {
        name: text if often[text.lower()] == 1 and len(text) <= LONGEST_NAME else _told_apart(text, name)
        for name, text in plain.items()
    }


def _told_apart(text: str, name: str) -> str:
    return f"{text[: LONGEST_NAME - 7]}-{sha256(name.encode()).hexdigest()[:6]}"


def _log(
    client: MlflowClient,
    run: str,
    now: int,
    *,
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    for some in _some((params or {}).items()):
        client.log_batch(run, params=[Param(name, value) for name, value in some])
    for many in _some((metrics or {}).items()):
        client.log_batch(run, metrics=[Metric(name, value, now, 0) for name, value in many])
    for few in _some((tags or {}).items()):
        client.log_batch(run, tags=[RunTag(name, value) for name, value in few])


def _some(items: Iterable[Any]) -> Iterator[list[Any]]:
    left = iter(items)
    while some := list(islice(left, AT_A_TIME)):
        yield some
