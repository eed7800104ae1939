"""Systems that are told of runs: what they are told is what their schemas and clients say, no secret is in it, and
whatever becomes of them, a run is what it would have been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.listening import CREATED, refusing, serving, silent
from support.workshop import Workshop, environment, statuses

from bigpipe.orchestrator import commands
from bigpipe.orchestrator.contract import Event, LogLine
from bigpipe.orchestrator.sinks import SINKS, Feeds, feeding, table

ROOT = Path(__file__).parents[2]
RECIPE = """\
version: 1
name: told
params: {text: hello, most: 9, inner: {a: [1, 2]}}
secrets: [API_KEY]
sinks: [SINK]
stages:
  a:
    uses: write
    secrets: [API_KEY]
    with: {text: "${params.text}", source: words}
    gates: ["characters <= ${params.most}"]
  b: {uses: join, matrix: {x: [p, q]}, inputs: {first: a}, with: {separator: "${matrix.x}"}, gates: ["parts < 5"]}
  c: {uses: join, inputs: {first: a}, when: "${stages.a.metrics.characters} > 1000"}
"""


@pytest.fixture
def told(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("API_KEY", "sesame-of-the-stage")
    (workshop.folder / "words").write_text("!")
    return workshop


def run(there: Workshop, sink: str, *, times: list[float] | None = None, **options: Any) -> tuple[Any, list[str]]:
    """What a run came to, and what was said of its sinks. times: gets when each of its own events came."""
    said: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, LogLine) and event.node in SINKS:
            said.append(f"{event.node}: {event.line}")
        elif times is not None:
            times.append(time.monotonic())

    return there.run(RECIPE.replace("SINK", sink), progress=hear, **options), said


# OpenLineage


@pytest.fixture
def lineage(told: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that events are written to."""
    events = told.folder / "events.jsonl"
    for name, value in (("TYPE", "file"), ("LOG_FILE_PATH", str(events)), ("APPEND", "true")):
        monkeypatch.setenv(f"OPENLINEAGE__TRANSPORT__{name}", value)
    return events


def lines(events: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in events.read_text().splitlines()]


def of(events: Path) -> list[tuple[str, str]]:
    return [(each["job"]["name"], each["eventType"]) for each in lines(events)]


@pytest.fixture(scope="module")
def check() -> Callable[[Any, str], None]:
    """Hold something against a schema of OpenLineage's, by its address, which they have in them."""
    import jsonschema
    from referencing import Registry, Resource

    held = json.loads((ROOT / "tests/data/openlineage.schemas.json").read_text(encoding="utf-8"))
    held.pop("$comment")
    registry: Any = Registry().with_resources([(name, Resource.from_contents(each)) for name, each in held.items()])
    formats = jsonschema.FormatChecker(["uuid", "uri", "date-time"])

    def check(value: Any, address: str) -> None:
        jsonschema.Draft202012Validator({"$ref": address}, registry=registry, format_checker=formats).validate(value)

    return check


def facets(event: Any) -> Iterator[dict[str, Any]]:
    """Every facet in an event, wherever it stands."""
    if isinstance(event, dict):
        if "_schemaURL" in event:
            yield event
        for inner in event.values():
            yield from facets(inner)
    elif isinstance(event, list):
        for inner in event:
            yield from facets(inner)


def test_events_of_openlineage_are_as_its_schema_says(
    told: Workshop, lineage: Path, check: Callable[[Any, str], None]
) -> None:
    subprocess.run(["git", "init", "-q"], cwd=told.folder, check=True)
    own = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *own, "commit", "-q", "--allow-empty", "-m", "one"], cwd=told.folder, check=True)
    result, said = run(told, "openlineage")
    assert (result.status, said) == ("succeeded", [])
    assert of(lineage)[:3] == [("told", "START"), ("told.a", "START"), ("told.a", "COMPLETE")]
    assert of(lineage)[-1] == ("told", "COMPLETE")
    assert sorted(of(lineage)[3:-1]) == [(f"told.b@x={x}", state) for x in "pq" for state in ("COMPLETE", "START")]
    for event in lines(lineage):
        check(event, event["schemaURL"])
        for facet in facets(event):
            check(facet, facet["_schemaURL"])
    a, b = (next(each for each in lines(lineage) if of_node(each, name)) for name in ("a", "b@x=q"))
    gate = {
        "name": "characters <= 9",
        "status": "pass",
        "type": "gate",
        "actual": "6",
    }
    assert a["run"]["facets"]["test"]["tests"][0].items() >= gate.items()
    tags = {each["key"]: each["value"] for each in a["run"]["facets"]["tags"]["tags"]}
    assert (tags["key"], tags["digest"], tags["characters"]) == (result["a"].key, result["a"].digest, "6")
    assert a["inputs"] == [{"namespace": "file", "name": str(told.folder / "words"), "facets": {}, "inputFacets": {}}]
    assert a["outputs"][0]["facets"]["version"]["datasetVersion"] == result["a"].digest
    assert a["outputs"][0]["facets"]["dataSource"]["uri"] == Path(result["a"].path).as_uri()
    assert (b["inputs"][0]["name"], b["inputs"][0]["facets"]["version"]["datasetVersion"]) == (
        "told.a",
        result["a"].digest,
    )
    assert b["run"]["facets"]["parent"]["run"]["runId"] == lines(lineage)[0]["run"]["runId"]
    assert len(a["job"]["facets"]["sourceCodeLocation"]["version"]) == 40


def of_node(event: dict[str, Any], node: str) -> bool:
    return event["job"]["name"] == f"told.{node}" and event["eventType"] == "COMPLETE"


def test_a_gate_that_fails_is_told_with_its_error(
    told: Workshop, lineage: Path, check: Callable[[Any, str], None]
) -> None:
    result, said = run(told, "openlineage", params={"most": 3})
    assert (result.exit_code, said) == (3, [])
    assert of(lineage) == [("told", "START"), ("told.a", "START"), ("told.a", "FAIL"), ("told", "FAIL")]
    failed = lines(lineage)[2]["run"]["facets"]
    assert failed["test"]["tests"][0]["status"] == "fail"
    assert "characters <= 3" in failed["errorMessage"]["message"]
    for facet in facets(lines(lineage)):
        check(facet, facet["_schemaURL"])


def test_what_is_in_the_store_is_told_all_the_same(told: Workshop, lineage: Path) -> None:
    run(told, "openlineage")
    lineage.unlink()
    result, _ = run(told, "openlineage")
    assert set(statuses(result).values()) == {"cached", "skipped"}
    assert ("told.a", "COMPLETE") in of(lineage)


SLOW = """\
version: 1
name: told
sinks: [openlineage]
stages: {a: {uses: sleep, with: {seconds: 60}}}
"""


@pytest.mark.parametrize(("number", "ends", "node"), [(signal.SIGINT, 130, "FAIL"), (signal.SIGKILL, -9, "ABORT")])
def test_a_run_that_is_stopped_or_killed_is_told_as_aborted(
    told: Workshop, lineage: Path, number: signal.Signals, ends: int, node: str
) -> None:
    """And leaves no process, of its sinks neither."""
    told.manifest.write_text(SLOW)
    child = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml"], cwd=told.folder, env=environment(told.folder),
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: lineage.exists() and ("told.a", "START") in of(lineage))
    below = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(number)
    assert child.wait(20) == ends
    wait_for(lambda: of(lineage)[-2:] == [("told.a", node), ("told", "ABORT")])
    wait_for(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in below))


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


# MLflow


def test_a_run_of_mlflow_has_params_metrics_gates_and_tags(told: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own client, in a folder; `make exports` has its server."""
    there = told.folder / "mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result, said = run(told, "mlflow", params={"text": "bye"})
    assert (result.status, said) == ("succeeded", [])
    (found,) = [path for path in there.glob("*/*") if (path / "params").is_dir()]
    held = {kind: {path.name: path.read_text() for path in (found / kind).iterdir()} for kind in ("params", "tags")}
    assert held["params"] == {
        "text": "bye", "most": "9", "inner.a": "[1, 2]", "a.text": "bye", "a.source": "words", "b-x-p.separator": "p",
        "b-x-q.separator": "q",
    }  # fmt: skip
    assert held["tags"].items() >= {
        "bigpipe.gates.a": "characters <= 9: 4 (passed)", "bigpipe.key.a": result["a"].key, "bigpipe.run": result.run,
        "bigpipe.digest.b-x-q": result["b@x=q"].digest, "bigpipe.model.a": Path(result["a"].path).as_uri(),
        "bigpipe.status.c": "skipped", "mlflow.source.name": str(told.manifest),
    }.items()  # fmt: skip
    metrics = {path.name: float(path.read_text().split()[1]) for path in (found / "metrics").iterdir()}
    assert metrics.items() >= {"a.characters": 4, "a.gate.1": 1, "a.detail.upper": 0, "b-x-p.parts": 1}.items()
    assert "status: 3" in (found / "meta.yaml").read_text(), "FINISHED"
    assert "name: told" in (found.parent / "meta.yaml").read_text()


EXPERIMENT = """\
artifact_location: file:///nowhere
creation_time: 1
experiment_id: '{number}'
last_update_time: 1
lifecycle_stage: {stage}
name: {name}
"""


def test_an_experiment_of_mlflow_is_found_as_its_own_programs_find_it(
    told: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = told.folder / "mlruns"
    for folder, number, stage, name in (there / ".trash", 7, "deleted", "told"), (there, 8, "active", "other"):
        (folder / str(number)).mkdir(parents=True)
        text = EXPERIMENT.format(number=number, stage=stage, name=name)
        (folder / str(number) / "meta.yaml").write_text(text)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _, said = run(told, "mlflow")
    assert "the experiment told is deleted" in said[0]
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "8")
    _, said = run(told, "mlflow")
    assert said == []
    assert [path.name for path in there.iterdir() if any(path.glob("*/params"))] == ["8"]


# What becomes of a sink is no matter of the run's


RUBBISH = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n\xff{[\x00\x1b"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nforbidden"
AWAY: dict[str, Callable[[], Any]] = {
    "down": refusing, "silent": silent, "forbidden": lambda: serving(FORBIDDEN),
    "no HTTP": lambda: serving(b"\x00\xff" * 99), "rubbish": lambda: serving(RUBBISH),
}  # fmt: skip


CAUSES = {
    "down": "Connection refused", "silent": "did not answer within 4 s", "forbidden": "403", "no HTTP": "Error",
    "rubbish": "Exception",
}  # fmt: skip
ADDRESSES = {"openlineage": "OPENLINEAGE_URL", "mlflow": "MLFLOW_TRACKING_URI"}


@pytest.mark.parametrize(
    ("sink", "away"),
    [*(("openlineage", away) for away in AWAY if away != "rubbish"), ("mlflow", "silent"), ("mlflow", "rubbish")],
)
def test_a_system_that_is_in_trouble_costs_a_run_one_line(
    told: Workshop, monkeypatch: pytest.MonkeyPatch, sink: str, away: str
) -> None:
    """Of an answer, OpenLineage's client reads the status alone: rubbish is none to it."""
    monkeypatch.setattr(feeding, "PATIENCE", patience := 4.0 if away == "silent" else 60.0)
    times: list[float] = []
    with AWAY[away]() as address:
        monkeypatch.setenv(ADDRESSES[sink], address)
        result, said = run(told, sink, times=times)
        took = time.monotonic() - times[-1]
    assert statuses(result) == {"a": "succeeded", "b@x=p": "succeeded", "b@x=q": "succeeded", "c": "skipped"}
    assert result.exit_code == 0
    assert took < patience + 3.0
    assert len(said) == 1
    assert said[0].startswith(f"{sink}: told of this run in part at most: ")
    assert CAUSES[away] in said[0]
    assert "\n" not in said[0]


def test_an_address_and_a_key_are_all_that_openlineage_needs(told: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str | None, bytes]] = []
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "sesame-sesame")
    with serving(CREATED, heard) as address:
        monkeypatch.setenv("OPENLINEAGE_URL", address)
        result, said = run(told, "openlineage")
    assert (result.status, said) == ("succeeded", [])
    assert {(path, key) for path, key, _ in heard} == {("/api/v1/lineage", "Bearer sesame-sesame")}
    assert json.loads(heard[-1][2])["eventType"] == "COMPLETE"
    monkeypatch.setenv("OPENLINEAGE_CONFIG", "nowhere.yml")
    _, said = run(told, "openlineage")
    assert "OPENLINEAGE_CONFIG names nowhere.yml, which is no file" in said[0]


IMPATIENT = """\
from bigpipe.orchestrator.sinks import child
child.AFTER = 1
child.main("openlineage")
"""


def test_a_process_that_nobody_waits_for_ends_by_itself(told: Workshop) -> None:
    """Its run was killed, and the system never answers."""
    known = {"run": "1", "recipe": "r", "params": {}, "git": None, "version": "1", "nodes": {}, "time": 1.0}
    with silent() as address:
        ended = subprocess.run(
            [sys.executable, "-c", IMPATIENT], input=json.dumps(known).encode() + b"\n", check=False, timeout=30,
            env={**environment(told.folder), "OPENLINEAGE_URL": address}, capture_output=True,
        )  # fmt: skip
    assert ended.returncode == -signal.SIGALRM


def test_no_secret_and_no_variable_of_others_reaches_a_sink(
    told: Workshop, lineage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sesame-open-sesame"
    for name in ("API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "team")
    (told.folder / "words").write_text("!" * 9)
    result, _ = run(told, "openlineage", params={"text": f"of {secret}"})
    assert result.exit_code == 3, "the error tells the value"
    assert secret not in lineage.read_text()
    assert {each["job"]["namespace"] for each in lines(lineage)} == {"team"}
    feeds = Feeds(lambda name, line: pytest.fail(line))
    feeds.begin(["openlineage"], {**os.environ, "OPENLINEAGE_API_KEY": ""})
    seen = psutil.Process(feeds.feeds[0].child.pid).environ()
    feeds.end()
    feeds.feeds[0].child.wait()
    assert secret not in seen.values()
    assert seen["OPENLINEAGE_NAMESPACE"] == "team"
    assert "OPENLINEAGE_API_KEY" not in seen, "an empty one is none"


def test_a_module_beside_the_recipe_is_not_taken_for_a_client(told: Workshop, lineage: Path) -> None:
    told.manifest.write_text(RECIPE.replace("SINK", "openlineage"))
    for name in ("openlineage", "requests"):
        (told.folder / f"{name}.py").write_text("open('taken', 'w')\n")
    assert "told of this run" not in told.command("run", "recipe.yaml").stderr
    assert of(lineage)[-1] == ("told", "COMPLETE")
    assert not (told.folder / "taken").exists()


def test_a_sink_that_cannot_be_told_is_said_and_no_more(told: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    result, said = run(told, "openlineage, mlflow")
    assert result.status == "succeeded"
    assert said == [
        "openlineage: not told of this run: OPENLINEAGE_URL or OPENLINEAGE_CONFIG is not set",
        "mlflow: not told of this run: MLFLOW_TRACKING_URI is not set",
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    result, said = run(told, "mlflow")
    assert result.status == "succeeded"
    assert said == ["mlflow: not told of this run: it needs mlflow: pip install 'bigpipe-ml[mlflow]'"]


def test_validate_says_which_sink_a_run_does_without_and_which_parameter_nothing_reads(
    told: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line: no run fails of it."""
    told.manifest.write_text(RECIPE.replace("SINK", "mlflow"))
    unread = "no stage reads the parameter 'inner': write ${params.inner} where it belongs, or remove it"
    said: list[str] = []
    assert commands.validate([told.manifest], None, said.append) == {}
    assert said == [f"{told.manifest}:3:32: {unread}"]
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    assert commands.validate([told.manifest], None, said.append) == {}
    needs = "mlflow is told of no run here: it needs mlflow: pip install 'bigpipe-ml[mlflow]'"
    assert said[2:] == [f"{told.manifest}:5:9: {needs}"]
    told.manifest.write_text(RECIPE.replace("SINK", "mlfow"))
    (problem,) = commands.validate([told.manifest])[told.manifest].problems
    assert (problem.code, problem.place.line, problem.place.column) == ("BP105", 5, 9)
    assert problem.cure == "did you mean 'mlflow'?"


def test_sinks_are_in_no_key(told: Workshop) -> None:
    result, _ = run(told, "openlineage")
    again, _ = run(told, "mlflow")
    assert {statuses(again)[name] for name in ("a", "b@x=p", "b@x=q")} == {"cached"}
    assert [again[name].key for name in again.nodes] == [result[name].key for name in result.nodes]


def test_every_sink_is_an_extra() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(SINKS) <= set(project["optional-dependencies"])


def test_the_commands_of_track_runs(told: Workshop) -> None:
    page = (ROOT / "docs/how-to/track-runs.md").read_text(encoding="utf-8")
    (told.folder / "openlineage.yml").write_text(
        re.findall(r"^```yaml\n(transport.*?)```", page, re.DOTALL | re.MULTILINE)[0]
    )
    told.manifest.write_text(RECIPE.replace("SINK", "openlineage"))
    script = "\n".join(re.findall(r"^laptop\$ (.+)$", page, re.MULTILINE))
    script = script.replace("bigpipe run", f"{sys.executable} -m bigpipe run")
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=told.folder,
        env=environment(told.folder),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "4"
