"""Smoke runs as the engine does them: small params, a store of their own, conditions that are told and fail nothing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.errors import DoesNotFit, GateFailed, UsageError

KIND = '''\
import os

from bigpipe.orchestrator.stage import SMOKE, Forecast, Metrics, Params, Stage, StageResult, UsageError


class CountParams(Params):
    """Write a line per number, up to `most`."""

    most: int = 1000
    refuses: bool = False


class CountMetrics(Metrics):
    lines: int
    by: dict[str, int]


def run(params, context):
    (context.out / "text").write_text("".join(f"{number}\\n" for number in range(params.most)))
    (context.base / "seen").write_text(f"{context.environment.get(SMOKE)}\\n{os.environ.get(SMOKE)}")
    return StageResult(CountMetrics(lines=params.most, by={"cpu": params.most}))


def smoke(params, context):
    if params.refuses:
        raise UsageError("nothing small can be counted", "count as it is", field="refuses")
    return params.model_copy(update={"most": 3})


STAGE = Stage(
    kind="count", version=1, params=CountParams, metrics=CountMetrics, inputs={}, output="text", run=run,
    forecast=lambda params, context: Forecast(ram=params.most * 10**9, metrics={"lines": params.most}), smoke=smoke,
)
'''
RECIPE = """\
version: 1
name: counting
trust: {modules: [counting]}
params: {refuses: false}
stages:
  count:
    uses: counting:STAGE
    with: {most: 1000, refuses: "${params.refuses}"}
    resources: {ram: 900GiB}
    gates: ["lines == 1000"]
  written:
    uses: write
    needs: [count]
    when: "${stages.count.metrics.lines} > 500"
    with: {text: as it is}
"""


@pytest.fixture
def shop(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "counting.py").write_text(KIND)
    workshop.manifest.write_text(RECIPE)
    return workshop


def left(shop: Workshop) -> list[Path]:
    """What smoke runs left behind."""
    return sorted((shop.folder / "temporary").glob("bigpipe-smoke-*"))


def test_each_kind_does_little_and_what_a_real_run_made_is_never_taken_for_it(shop: Workshop) -> None:
    result = shop.run(smoke=True)
    assert result.exit_code == 0, result.errors
    assert statuses(result) == {"count": "succeeded", "written": "succeeded"}
    assert result["count"].metrics["lines"] == 3
    assert result["written"].metrics["characters"] == len("as it is")
    again = shop.run(smoke=True)
    assert statuses(again) == statuses(result)
    assert {again["count"].key, again["written"].key}.isdisjoint({result["count"].key, result["written"].key})
    seen = (shop.folder / "seen").read_text().splitlines()
    assert seen[0] == seen[1] != "None"
    assert not Path(seen[0]).exists()


def test_a_kind_that_writes_elsewhere_and_does_not_say_how_it_is_tried_is_refused(shop: Workshop) -> None:
    kind = KIND.replace("smoke=smoke", "planning=Planning(writes=lambda params, context: {'most': ['/nowhere']})")
    (shop.folder / "counting.py").write_text(kind.replace("Params, Stage,", "Params, Planning, Stage,"))
    with pytest.raises(UsageError, match="writes outside of the store") as refused:
        shop.run(smoke=True)
    assert refused.value.node == "count"
    assert not (shop.folder / "seen").exists()
    assert left(shop) == []


def test_nothing_stays_and_the_store_knows_nothing_of_it(shop: Workshop) -> None:
    shop.run(smoke=True)
    assert left(shop) == []
    store = shop.folder / "store"
    assert not (store / "runs").exists()
    assert {path.name for path in store.glob("*")} <= {"memo"}
    actions = shop.json("status", "recipe.yaml")["nodes"]
    assert actions["written"]["reason"].endswith("first run")
    assert shop.json("ls")["runs"] == []


def test_conditions_are_told_and_fail_nothing(shop: Workshop) -> None:
    ran = shop.command("run", "recipe.yaml", "--smoke")
    assert ran.returncode == 0, ran.stderr
    assert "lines == 1000" in ran.stdout
    assert "does not hold" in ran.stdout
    assert "${stages.count.metrics.lines} > 500" in ran.stdout
    assert "smoke run" in ran.stdout
    assert "does not show" in ran.stdout
    told = shop.json("run", "recipe.yaml", "--smoke")
    assert told["exit_code"] == 0
    assert told["nodes"]["count"]["gates"] == [
        {"text": "lines == 1000", "measured": "3", "value": 3, "passed": False}
    ]  # fmt: skip
    assert {"path": "params.most", "old": 1000, "new": 3} in told["smoke"]["smaller"]["count"]
    assert told["smoke"]["not_shown"]
    assert told["nodes"]["count"]["path"] is None


def test_a_gate_on_what_is_not_measured_fails_as_it_would_in_earnest(shop: Workshop) -> None:
    shop.manifest.write_text(RECIPE.replace('"lines == 1000"', '"by.cqu <= 5"'))
    result = shop.run(smoke=True)
    assert result.exit_code == GateFailed.exit_code
    assert "by.cqu" in str(result.errors[0])
    assert result.errors[0].place is not None
    shop.manifest.write_text(RECIPE.replace('"lines == 1000"', '"by.0 <= 5"'))
    assert shop.run(smoke=True).exit_code == 0, "what only a GPU is measured on is none where there is no GPU"


def test_the_logs_of_a_failed_one_stay(shop: Workshop) -> None:
    shop.manifest.write_text(RECIPE.replace("uses: write", "uses: flaky").replace("{text: as it is}", "{fatal: true}"))
    ran = shop.command("run", "recipe.yaml", "--smoke")
    assert ran.returncode == 6
    assert "bigpipe log --store" in ran.stdout
    (folder,) = left(shop)
    assert str(folder) in ran.stdout
    assert shop.json("ls", "--store", str(folder / "store"))["runs"]
    assert not (shop.folder / "store" / "runs").exists()


def test_what_cannot_be_tried_is_refused_at_its_place(shop: Workshop) -> None:
    with pytest.raises(UsageError, match="nothing small can be counted") as refused:
        shop.run(smoke=True, params={"refuses": True})
    assert refused.value.node == "count"
    assert refused.value.place is not None
    assert refused.value.place.line == 8
    assert left(shop) == []


def test_what_is_held_is_as_little_as_what_is_foreseen(shop: Workshop) -> None:
    with pytest.raises(DoesNotFit):
        shop.run()
    assert bigpipe.plan(shop.manifest, smoke=True).errors() == []


def test_a_plan_of_it_says_what_is_smaller(shop: Workshop) -> None:
    planned = shop.command("plan", "recipe.yaml", "--smoke")
    assert planned.returncode == 0, planned.stderr
    assert "count: params.most 1000 → 3" in planned.stdout
    assert "it does not show" in planned.stdout
    told = json.loads(shop.command("plan", "recipe.yaml", "--smoke", "--json").stdout)
    assert told["smoke"]["smaller"]["count"]
    assert told["nodes"]["written"]["action"] == "run"
    assert shop.json("plan", "recipe.yaml")["smoke"] is None
    assert left(shop) == []


VARIANTS = """\
version: 1
stages:
  made: {uses: write, matrix: {text: [ab, abcd]}, with: {text: "${matrix.text}"}, gates: ["characters > 100"]}
  taken:
    uses: join
    inputs: {first: made}
    first: {axis: text, of: made}
"""


def test_every_variant_runs_and_the_first_one_is_taken(shop: Workshop) -> None:
    result = shop.run(VARIANTS, smoke=True)
    assert result.exit_code == 0, result.errors
    assert set(statuses(result).values()) == {"succeeded"}
    assert result["taken"].metrics["characters"] == 2
    with pytest.raises(GateFailed):
        shop.run(VARIANTS)


def test_an_interrupted_one_leaves_nothing(shop: Workshop) -> None:
    import os
    import signal
    import subprocess
    import sys
    import time

    from support.workshop import environment

    shop.manifest.write_text("version: 1\nstages: {a: {uses: sleep, with: {seconds: 60}}}\n")
    run = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "recipe.yaml", "--smoke"], cwd=shop.folder,
        env={**environment(shop.folder), "TMPDIR": str(shop.folder / "temporary")}, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (shop.folder / "pid-a").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    assert left(shop) == []
    assert not Path(f"/proc/{(shop.folder / 'pid-a').read_text()}").exists() or os.name != "posix"
