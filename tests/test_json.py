"""Every `--json` is one JSON object in every outcome, as docs/reference/json.md says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from support.hub import LoopbackHub
from support.workshop import environment

import bigpipe
from bigpipe import errors
from bigpipe.orchestrator import report
from bigpipe.orchestrator.report import ANSWERS

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "json.md").read_text(encoding="utf-8")
DOCUMENTED = {
    schema: set(re.findall(r"`(\w+)`", fields))
    for schema, fields in re.findall(r"^\| `(bigpipe\.\w+/\d)` \| [^|]+ \| (.*?) ?\|$", PAGE, re.MULTILINE)
}
OUTPUTS = json.loads((Path(__file__).parents[1] / "schema" / "outputs.schema.json").read_text(encoding="utf-8"))
EVERYWHERE = {"schema", "exit_code", "errors"}
FIELDS = {"code", "cause", "cure", "file", "line", "column", "node"}
MODEL = str(Path(__file__).parents[1] / "models" / "quickstart")
HEAD = "version: 1\nname: told\nparams: {text: hello}\nstages:\n"
GOOD = HEAD + '  a: {uses: write, with: {text: "${params.text}"}}\n  b: {uses: join, inputs: {first: a}}\n'


def valid(value, name: str) -> None:
    """Hold a value against its part of the published schema."""
    place = f"#/$defs/{name.replace('/', '~1')}"
    jsonschema.Draft202012Validator({**OUTPUTS, "anyOf": [{"$ref": place}]}).validate(value)


def answer(workshop, *arguments: str, code: int, **environ: str):
    """The one object that a command prints, as its page says."""
    done = workshop.command(*arguments, "--json", **environ)
    assert done.returncode == code, done.stderr
    return checked(done.stdout, code)


def checked(text: str, code: int):
    told = json.loads(text)
    assert told["exit_code"] == code
    assert bool(told["errors"]) == bool(code)
    assert all(error.keys() == FIELDS for error in told["errors"])
    assert all(error["cause"] and "Traceback" not in error["cause"] for error in told["errors"])
    valid(told, told["schema"])
    own = DOCUMENTED[told["schema"]]
    assert own == told.keys() - EVERYWHERE or told["schema"] == "bigpipe.estimate/1"
    return told


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| ([^|]*) \|", PAGE, re.MULTILINE)
    table = {name: codes for codes, names in rows for name in re.findall(r"`(\w+)`", names)}
    own = {
        error.__name__: error
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.BigpipeError)
    }
    assert table.keys() == own.keys()
    for name, error in own.items():
        assert str(error.exit_code) in table[name].split(", "), name


def test_every_command_that_takes_json_has_its_schema(workshop) -> None:
    from bigpipe.cli import cli

    with_json = {name for name, one in cli.commands.items() if any(option.name == "as_json" for option in one.params)}
    rows = re.findall(r"^\| `bigpipe\.\w+/\d` \| ([^|]+) \|", PAGE, re.MULTILINE)
    documented = {name for names in rows for name in re.findall(r"`(\w+)`", names)}
    assert with_json - {"schema"} == documented
    assert {*DOCUMENTED} == {*OUTPUTS["$defs"]} & {*ANSWERS} == {*ANSWERS}
    assert cli.commands.keys() - with_json == {"ui"}, "what it answers is a page"


def test_answers_of_a_run_and_of_what_looks_back(workshop) -> None:
    workshop.manifest.write_text(GOOD)
    run = answer(workshop, "run", "recipe.yaml", "-p", "text=bye", code=0)
    assert run["status"] == "succeeded"
    assert run["params"] == {"text": "bye"}
    assert run["git"] is None
    node = {
        "status", "kind", "after", "key", "digest", "path", "seconds", "peak_rss", "metrics", "result", "gates",
        "foreseen", "reason", "verdict", "tried", "error",
    }  # fmt: skip
    assert run["nodes"]["a"].keys() == node
    answer(workshop, "run", "recipe.yaml", code=0)
    for command in (
        "log last", "log last a", "init new.yaml --model org/model", "completion fish", "shard model --print-recipe",
        "plan recipe.yaml", "validate recipe.yaml", "status recipe.yaml", "why recipe.yaml a", "graph recipe.yaml",
        "export github recipe.yaml", "export argo recipe.yaml -o argo.yaml",
        "lock recipe.yaml", "lock recipe.yaml --check", "kinds", "kinds write", "ls", "ps", "show",
        f"diff {run['run']} last", "diff recipe.yaml.lock recipe.yaml.lock", "get a taken",
        "push recipe.yaml --remote shared", "pull recipe.yaml --remote shared", "status recipe.yaml --remote shared",
        "report", "gc --dry-run", "rm last --dry-run", "verify",
        f"estimate {MODEL}", f"estimate {MODEL} {MODEL} --compare",
        f"estimate {MODEL} --memory 64GiB",
    ):  # fmt: skip
        answer(workshop, *command.split(), code=0)
    assert "is there already" in answer(workshop, "get", "a", "taken", code=2)["errors"][0]["cause"]
    taken = {path.name: path.read_text() for path in (workshop.folder / "taken").iterdir()}
    there = Path(json.loads(workshop.command("run", "recipe.yaml", "--json").stdout)["nodes"]["a"]["path"])
    assert taken == {path.name: path.read_text() for path in there.iterdir()}
    assert not any(path.is_symlink() for path in (workshop.folder / "taken").iterdir())


REFUSED = {
    "no manifest": (2, "run nowhere.yaml", "", None),
    "manifest error": (2, "run recipe.yaml", HEAD + "  a: {uses: write, wiht: {}}\n", (5, 20)),
    "wrong argument": (2, "run recipe.yaml -p texd=1", GOOD, (3, 1)),
    "unknown node": (2, "run recipe.yaml c", GOOD, None),
    "unknown run": (2, "show 1999", GOOD, None),
    "wrong option": (2, "run recipe.yaml --odd", GOOD, None),
    "unknown kind": (2, "kinds nothing", "", None),
    "manifests": (2, "validate recipe.yaml", HEAD + "  a: {uses: wriet}\n", (5, 13)),
    "misfit": (4, "run recipe.yaml", HEAD + "  a: {uses: write, with: {misfit: true}}\n", (5, 3)),
    "planned misfit": (4, "plan recipe.yaml", HEAD + "  a: {uses: write, with: {misfit: true}}\n", (5, 3)),
    "no dtype fits": (4, f"estimate {MODEL} --memory 1MiB", "", None),
    "stale": (10, "status recipe.yaml --exit-code", GOOD, None),
    "no Hub": (75, "estimate org/model", "", None),
    "no module": (2, "schema nowhere:STAGE", "", None),
    "two readers": (2, "log last --follow", GOOD, None),
    "nothing to complete": (2, "completion powershell", "", None),
    "nobody to ask": (2, "gc", GOOD, None),
    "nothing to remove": (2, "rm a --yes", GOOD, None),
    "no target": (2, "export gitlab recipe.yaml", GOOD, None),
    "no remote store": (2, "push recipe.yaml", GOOD, None),
    "a remote store that is away": (75, "pull recipe.yaml --remote http://127.0.0.1:9/x", GOOD, None),
    "nothing to get": (2, "get a .", GOOD, None),
}


@pytest.mark.parametrize("outcome", REFUSED)
def test_why_there_is_no_answer_is_an_answer(workshop, outcome: str) -> None:
    code, command, recipe, place = REFUSED[outcome]
    if recipe:
        workshop.manifest.write_text(recipe)
    told = answer(workshop, *command.split(), code=code, HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1")
    if command.startswith("run recipe") and outcome != "wrong option":
        assert told["schema"] == "bigpipe.run/1"
        assert (told["run"], told["status"]) == (None, "refused")
        assert {name: node["status"] for name, node in told["nodes"].items()} == ({"a": "pending"} if code == 4 else {})
    if place is not None:
        assert (told["errors"][0]["line"], told["errors"][0]["column"]) == place
        assert told["errors"][0]["file"] == "recipe.yaml"


def test_a_run_that_its_plan_refuses_tells_the_params_and_what_was_foreseen(workshop) -> None:
    gate = '  a: {uses: write, with: {text: "${params.text}"}, gates: ["characters >= ${params.least}"]}\n'
    workshop.manifest.write_text(HEAD.replace("text: hello", "text: hello, least: 99") + gate)
    with pytest.raises(errors.GateFailed) as caught:
        workshop.run(params={"text": "bye"})
    refused = report.refused("run", caught.value, {"manifest": workshop.manifest, "params": {"text": "bye"}})
    told = checked(json.dumps(refused), 3)
    assert told["params"] == {"text": "bye", "least": 99}
    node = told["nodes"]["a"]
    assert (node["status"], node["key"] is None, node["digest"]) == ("pending", False, None)
    assert [(each["value"], each["passed"]) for each in node["gates"]] == [(3, False)]


def test_every_field_of_an_event_says_what_it_is() -> None:
    bare = [
        f"{event['title']}.{name}"
        for event in OUTPUTS["$defs"]["event"]["anyOf"]
        for name, field in event["properties"].items()
        if not {"description", "const", "format"} & field.keys()
    ]
    assert bare == []


def test_events_are_as_published(workshop) -> None:
    workshop.manifest.write_text(GOOD + "  c: {uses: flaky, with: {times: 1}, retries: 2}\n")
    workshop.command("run", "recipe.yaml", "--events", "events")
    lines = [json.loads(line) for line in (workshop.folder / "events").read_text().splitlines()]
    for line in lines:
        valid(line, "event")
    assert {line["event"] for line in lines} >= {"run_started", "node_started", "node_finished", "run_finished"}
    with pytest.raises(jsonschema.ValidationError):
        valid({**lines[0], "more": 1}, "event")


FAILING = {
    "gate in the run": (3, "  a: {uses: write, with: {source: recipe.yaml}, gates: ['characters > 10000']}\n"),
    "stage": (6, "  a: {uses: flaky, with: {fatal: true}}\n"),
    "bug of a stage": (6, "  a: {uses: flaky, with: {bug: true}}\n"),
    "transient": (75, "  a: {uses: flaky, with: {times: 9}}\n"),
}


@pytest.mark.parametrize("outcome", FAILING)
def test_a_run_that_fails_says_where(workshop, outcome: str) -> None:
    code, stages = FAILING[outcome]
    workshop.manifest.write_text(HEAD + stages + "  b: {uses: join, inputs: {first: a}}\n")
    told = answer(workshop, "run", "recipe.yaml", code=code)
    assert told["status"] == "failed"
    assert told["errors"][0]["node"] == "a"
    assert told["nodes"]["a"]["status"] == "failed"
    assert told["nodes"]["a"]["error"]
    assert told["nodes"]["b"]["status"] == "skipped"
    if code == 3:
        (gate,) = told["nodes"]["a"]["gates"]
        assert gate == {
            "text": "characters > 10000",
            "measured": f"{told['nodes']['a']['metrics']['characters']:,}",
            "value": told["nodes"]["a"]["metrics"]["characters"],
            "passed": False,
        }
        assert told["errors"][0]["line"] == 5


def test_an_interrupted_run_is_an_answer(workshop) -> None:
    workshop.manifest.write_text(HEAD + "  a: {uses: sleep, with: {seconds: 60}}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--json", "--events", "events"],
        cwd=workshop.folder, env=environment(workshop.folder), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    events = workshop.folder / "events"
    while not events.exists() or "node_started" not in events.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    told = checked(out, 143)
    assert told["status"] == "interrupted"


SLOW = """
import dataclasses, pathlib, time, weakref
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Planning, Stage
class Nothing(Params): pass
class None_(Metrics): pass
def check(params, context):
    pathlib.Path("checking").touch()
    time.sleep(60)
STAGE = Stage(kind="slow", version=1, params=Nothing, metrics=None_, inputs={}, output="report", run=check,
              forecast=lambda params, context: Forecast(), planning=Planning(check=check))
"""


DROPPING = """
class Gone: pass
def begin(_):
    pathlib.Path("checking").touch()
    time.sleep(60)
def check(params, context):
    gone = Gone()
    gone_for_good = weakref.ref(gone, begin)
    del gone
    time.sleep(60)
STAGE = dataclasses.replace(STAGE, planning=Planning(check=check))
"""
"""The signal comes in what Python lets raise nothing."""


@pytest.mark.parametrize(
    ("number", "code", "more"),
    [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, DROPPING)],
)
def test_a_run_that_is_interrupted_before_it_began_is_an_answer(workshop, number: int, code: int, more: str) -> None:
    (workshop.folder / "slow.py").write_text(SLOW + more)
    workshop.manifest.write_text(
        "version: 1\ntrust: {modules: [slow]}\nparams: {text: hello}\nstages:\n  a: {uses: 'slow:STAGE'}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--json"], cwd=workshop.folder,
        env=environment(workshop.folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (workshop.folder / "checking").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    told = checked(out, code)
    assert told["status"] == "refused"
    assert ("interrupted" in told["errors"][0]["cause"]) == (number == signal.SIGINT)
    assert ("SIGTERM" in err) == (number == signal.SIGTERM)


def test_a_token_that_is_not_taken_is_an_answer(workshop, tmp_path) -> None:
    with LoopbackHub() as hub:
        hub.create("org/model", {"config.json": b"{}"}, private=True)
        workshop.manifest.write_text(HEAD + "  a: {uses: download, with: {repo: org/model}}\n")
        told = answer(workshop, "run", "recipe.yaml", code=5, **hub.environment(tmp_path / "hf"))
    assert told["errors"][0]["code"] == "NotAuthorised"
    assert (told["errors"][0]["line"], told["errors"][0]["node"]) == (5, "a")


def test_what_is_damaged_is_an_answer(workshop) -> None:
    workshop.manifest.write_text(GOOD)
    run = answer(workshop, "run", "recipe.yaml", code=0)
    path = (Path(run["nodes"]["a"]["path"]) / "text").resolve()
    path.chmod(0o600)
    path.write_text("other")
    assert answer(workshop, "get", "a", "taken", code=6)["errors"][0]["code"] == "StageFailed"
    assert not (workshop.folder / "taken").exists()
    assert answer(workshop, "verify", code=6)["findings"]


def test_where_a_model_comes_from_is_an_answer(workshop) -> None:
    made = workshop.folder / "made"
    bigpipe.quantize_checkpoint(MODEL, made, scheme="int8")
    asked = ("verify", "--reproduce", "made", "--source", MODEL)
    told = answer(workshop, *asked, code=0)
    assert (told["equal"], told["pinned"], told["differences"]) == (True, False, [])
    weights = made / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told = answer(workshop, *asked, code=6)
    assert [(each["file"], each["what"]) for each in told["differences"]] == [("model.safetensors", "bytes")]
    assert told["differences"][0]["name"] in told["errors"][0]["cause"]
    assert "--source" in answer(workshop, "verify", "--reproduce", "made", code=2)["errors"][0]["cure"]
    assert "--reproduce" in answer(workshop, "verify", "--source", MODEL, code=2)["errors"][0]["cure"]
    assert "--repair" in answer(workshop, *asked, "--repair", code=2)["errors"][0]["cause"]


def test_what_is_attested_and_checked_is_an_answer(workshop) -> None:
    made = workshop.folder / "made"
    bigpipe.quantize_checkpoint(MODEL, made, scheme="int8")
    assert "nothing says what" in answer(workshop, "verify", "made", code=2)["errors"][0]["cause"]
    told = answer(workshop, "attest", "made", code=0)
    assert told["files"] == ["made.attestations/bom.cdx.json", "made.attestations/model.sig"]
    assert answer(workshop, "verify", "made", "--offline", code=0)["documents"] == {"model.sig": "not signed"}
    (made / "config.json").write_text("{}")
    told = answer(workshop, "verify", "made", "--offline", code=6)
    assert told["findings"] == [{"file": "config.json", "problem": "changed", "against": "model.sig"}]
    assert "--key" in answer(workshop, "verify", "--key", "key.pub", code=2)["errors"][0]["cause"]
    assert "a directory" in answer(workshop, "verify", "made", "--repair", code=2)["errors"][0]["cause"]
    assert "one at a time" in answer(workshop, "verify", "made", "--reproduce", "made", code=2)["errors"][0]["cure"]
    assert (
        "private key" in answer(workshop, "attest", "made", "--key", "made/config.json", code=2)["errors"][0]["cause"]
    )


@pytest.mark.parametrize("broken", ["store", "bitsandbytes", "HF_ENDPOINT"])
def test_doctor_says_no(workshop, broken: str) -> None:
    (workshop.folder / "file").touch()
    package = workshop.folder / "broken" / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('cannot be loaded here')\n")
    path = {"PYTHONPATH": os.pathsep.join([str(package.parent), environment(workshop.folder)["PYTHONPATH"]])}
    where = {"BIGPIPE_HOME": str(workshop.folder / "file" / "store")}
    given = {"store": where, "bitsandbytes": path, "HF_ENDPOINT": {"HF_ENDPOINT": "huggingface.co"}}[broken]
    told = answer(workshop, "doctor", code=6 if broken == "bitsandbytes" else 2, **given)
    assert broken in told["errors"][0]["cause"]


def test_the_commit_is_told(workshop) -> None:
    """In the answer, the record; `dirty` while the manifest is not in it."""

    def git(*words: str) -> None:
        own = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *own, *words], cwd=workshop.folder, check=True, capture_output=True)

    workshop.manifest.write_text(GOOD)
    (workshop.folder / ".gitignore").write_text("store/\n")
    git("init", "-q")
    assert answer(workshop, "run", "recipe.yaml", code=0)["git"] is None
    git("add", ".gitignore")
    git("commit", "-qm", "one")
    assert answer(workshop, "run", "recipe.yaml", code=0)["git"]["dirty"]
    git("add", "recipe.yaml")
    git("commit", "-qm", "two")
    told = answer(workshop, "run", "recipe.yaml", code=0)["git"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=workshop.folder, capture_output=True, text=True, check=True)
    assert told == {"commit": head.stdout.strip(), "dirty": False}
    assert answer(workshop, "show", code=0)["git"] == told
    workshop.manifest.write_text(GOOD + "x-more: 1\n")
    assert answer(workshop, "run", "recipe.yaml", code=0)["git"]["dirty"]


NOT_UNDERSTOOD = (
    "run", "run recipe.yaml --odd", "run recipe.yaml -p x", "run recipe.yaml --jobs 0", "shard", "shard model --odd",
    "odd", "gc --older-than 5", "rm", "plan recipe.yaml --machine nowhere.json", "ls --store recipe.yaml",
)  # fmt: skip


@pytest.mark.parametrize("command", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_one_answer(workshop, command: str) -> None:
    """In one line where the command's other answers are one."""
    workshop.manifest.write_text(GOOD)
    done = workshop.command(*command.split(), "--json")
    told = checked(done.stdout, done.returncode)
    assert (told["schema"], told["exit_code"]) == ("bigpipe.error/1", 2)
    assert (done.stdout.count("\n") == 1) == (command.split()[0] in ("run", "shard"))


def test_what_a_remote_store_has_is_not_known_where_it_cannot_be_asked(workshop) -> None:
    workshop.manifest.write_text(GOOD)
    workshop.command("run", "recipe.yaml")
    told = answer(workshop, "status", "recipe.yaml", "--remote", "http://127.0.0.1:9/x", code=0, NO_PROXY="127.0.0.1")
    assert told["remote"]["away"]
    assert {node["shared"] for node in told["nodes"].values()} == {None}


def test_json_after_two_dashes_is_a_name(workshop) -> None:
    assert workshop.command("run", "--", "recipe.yaml", "--json").stdout == ""
