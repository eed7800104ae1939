"""Kinds of others with an ordinary mistake: each is told as theirs, never as a bug of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.errors import BigpipeError, StageFailed, UsageError
from bigpipe.modules import import_attribute
from bigpipe.orchestrator.contract.stage import Metrics, Params, Port, Stage, StageResult
from bigpipe.orchestrator.contract.types import Forecast
from bigpipe.orchestrator.launch import executors
from bigpipe.orchestrator.recipe.registry import load_stage
from bigpipe.trust import Trust

KINDS = """
import fractions
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from pydantic import SecretStr, field_validator
from bigpipe.orchestrator.stage import ContentField, Forecast, Metrics, Params, Planning, Stage, StageResult

class Number(Params):
    n: int = 1

class Told(Metrics):
    n: int = 0

class Other(Metrics):
    z: int = 0

def stage(**fields):
    given = {"kind": "mine", "version": 1, "params": Number, "metrics": Told, "inputs": {}, "output": None,
             "run": lambda params, context: StageResult(Told(n=params.n)), "runs_in": "inline",
             "forecast": lambda params, context: Forecast(write_bytes=10)}
    return Stage(**{**given, **fields})

def slip(*given):
    raise KeyError("slip")

@dataclass
class Shard:
    file: Path | None
    again: "list[Shard]"

class Given(Params):
    n: int = 1
    read: Annotated[Path | None, ContentField("file")] = None
    shards: list[Shard] = []

class Hidden(Params):
    token: SecretStr | None = None

class Validated(Params):
    n: int = 1

    @field_validator("n")
    @classmethod
    def check(cls, value):
        return slip(value)
"""
PLANNED = [
    ("forecast=lambda p, c: None", "`forecast` gave None"),
    ("forecast=lambda p, c: Forecast(ram='1GiB')", "Forecast: ram is '1GiB', and not a number of bytes"),
    ("forecast=lambda p, c: Forecast(vram=10)", "Forecast: vram is 10, and not GPU index"),
    ("forecast=slip", "KeyError: 'slip' ({file}:25)"),
    ("settled=slip", "`settled` fails: KeyError: 'slip' ({file}:25)"),
    ("settled=lambda p: None", "`settled` gave None"),
    ("unmeasured=slip", "`unmeasured` fails: KeyError: 'slip' ({file}:25)"),
    ("planning=Planning(facts=slip)", "`facts` fails: KeyError: 'slip' ({file}:25)"),
    ("planning=Planning(facts=lambda p, m: {'a': {1}})", "`facts`: TypeError: "),
    ("planning=Planning(apart=slip)", "`apart` fails: KeyError: 'slip' ({file}:25)"),
    ("planning=Planning(leads_to=slip)", "`leads_to` fails: KeyError: 'slip' ({file}:25)"),
    ("planning=Planning(leads_to=lambda p, b: ['none.txt'])", "`leads_to`: FileNotFoundError: "),
    ("planning=Planning(pin=lambda p, c: {'n': '3'})", "`pin` gave {{'n': '3'}}"),
    ("params=Validated", "a validator of kind mine: KeyError: 'slip' ({file}:25)"),
    ("params=Given", "its field shards.file is a Path, which says neither"),
    ("params=Hidden", "its field token is a SecretStr, which no job file may hold"),
    ("params=dict", "`params` is <class 'dict'>, and not a class of Params"),
    ("inputs={'model': 'checkpoint'}", "its input model is 'checkpoint', and not a Port"),
]
RUN = [
    ("run=slip", "a: KeyError: 'slip' ({file}:25)"),
    ("run=lambda p, c: StageResult(Other(z=1))", "kind mine returned metrics of Other"),
    ("planning=Planning(resumed=slip)", "`resumed` fails: KeyError: 'slip' ({file}:25)"),
]
RECIPE = """version: 1
trust: {{modules: [{module}]}}
stages:
  a: {{uses: '{module}:STAGE', with: {{n: 2}}, gates: ['n >= 0']}}
"""


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def write(workshop: Workshop, fields: str) -> Path:
    """A kind with these fields, in a module of its own, and the recipe that uses it."""
    name = f"kinds_{re.sub('[^a-z]', '_', fields.lower())}"
    file = workshop.folder / f"{name}.py"
    file.write_text(f"{KINDS}\nSTAGE = stage({fields})\n")
    workshop.manifest.write_text(RECIPE.format(module=name))
    return file


@pytest.mark.parametrize(("fields", "said"), PLANNED)
def test_what_a_plan_asks(workshop: Workshop, fields: str, said: str) -> None:
    file = write(workshop, fields)
    with pytest.raises(BigpipeError) as told:
        bigpipe.plan(workshop.manifest, store=workshop.folder / "store")
    assert said.format(file=file) in str(told.value)


@pytest.mark.parametrize(("fields", "said"), RUN)
def test_what_a_run_asks(workshop: Workshop, fields: str, said: str) -> None:
    file = write(workshop, fields)
    result = workshop.run(store=workshop.folder / "store")
    assert statuses(result) == {"a": "failed"}
    assert said.format(file=file) in str(result.errors[0])


@pytest.mark.parametrize(
    "fields",
    [
        "result_line=slip",
        "result_line=lambda metrics: None",
        "run=lambda p, c: c.log(42) or StageResult(Told(n=1))",
        "forecast=lambda p, c: Forecast(write_bytes=fractions.Fraction(10), ram=1e9)",
    ],
)
def test_what_is_not_worth_a_run(workshop: Workshop, fields: str) -> None:
    write(workshop, fields)
    result = workshop.run(store=workshop.folder / "store")
    assert (statuses(result), result["a"].result) == ({"a": "succeeded"}, "")


class Entry:
    name, value, dist, module = "slurm", "exe:EXEC", None, "exe"

    def __init__(self, found: Any) -> None:
        self.found = found

    def load(self) -> Any:
        return self.found if isinstance(self.found, executors.Executor) else import_attribute("no_such_module:EXEC")


def sends(job: Any) -> Any:
    raise RuntimeError("sbatch: error")


@pytest.mark.parametrize(
    ("found", "kind", "said"),
    [
        (executors.Executor(run=sends), StageFailed, "a: the executor slurm fails: RuntimeError: sbatch: error (.*py:"),
        (None, UsageError, "the executor 'slurm' cannot be loaded from exe:EXEC: ModuleNotFoundError"),
    ],
)
def test_an_executor_of_others(
    monkeypatch: pytest.MonkeyPatch, found: Any, kind: type[BigpipeError], said: str
) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **asked: [Entry(found)])
    executors.executor.cache_clear()
    with pytest.raises(kind, match=said.replace("(", r"\(")):
        executors.executor("slurm").run(type("Job", (), {"node": "a"}))  # type: ignore[arg-type]
    executors.executor.cache_clear()


def test_a_stage_is_as_its_types_say() -> None:
    given: dict[str, Any] = {"kind": "k", "version": 1, "params": Params, "metrics": Metrics, "output": None}
    given |= {"run": lambda p, c: StageResult(Metrics()), "forecast": lambda p, c: Forecast()}
    assert Stage(**given, inputs={"model": Port("checkpoint")}).port("model") == Port("checkpoint")
    with pytest.raises(TypeError, match="`metrics` is 3"):
        Stage(**{**given, "metrics": 3}, inputs={})


def test_built_in_kinds_are_taken_as_they_are() -> None:
    assert load_stage("shard", Trust()).forecast is load_stage("shard").forecast
