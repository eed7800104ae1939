"""Executors are values: three of ours, and one that a distribution brings along in one file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.workshop import TOYS, Workshop

from bigpipe.errors import UsageError
from bigpipe.orchestrator.launch.executors import EXECUTORS, executor

POLITE = '''\
"""Runs a stage in a child process that gives way to others, and a kind that does so."""

import os
import subprocess

from bigpipe.orchestrator.launch import Executor, JobFile, Outcome, worker_command, worker_environment
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult, UsageError


def run(job):
    JobFile.of(job).write(job.folder.job)
    command = ["nice", "-n", "7", *worker_command(job.folder.job, "run")]
    environment = worker_environment(job.stage, job.surroundings, job.parent_environment)
    subprocess.run(command, env=environment, cwd=job.base, check=False)
    outcome = Outcome.read(job.folder.outcome("run"))
    if outcome.failure is not None:
        raise outcome.failure.error(job.node, job.folder.log)
    return outcome


POLITE = Executor(run=run)


class NapParams(Params):
    refuse: bool = False


class NapMetrics(Metrics):
    niceness: int
    pid: int


def nap(params, context):
    if params.refuse:
        raise UsageError("not tired", "work more")
    (context.out / "dream").write_text(context.node)
    return StageResult(NapMetrics(niceness=os.nice(0), pid=os.getpid()))


NAP = Stage(
    kind="nap", version=1, params=NapParams, metrics=NapMetrics, inputs={}, output="report", run=nap,
    forecast=lambda params, context: Forecast(), runs_in="polite",
)
'''
RECIPE = """\
version: 1
name: polite
params: {refuse: false}
stages:
  nap: {uses: nap, with: {refuse: "${params.refuse}"}LAUNCH}
"""


@pytest.fixture
def site(workshop: Workshop) -> str:
    """The PYTHONPATH on which the distribution lies."""
    site = workshop.folder / "site"
    installed = site / "polite-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: polite\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[bigpipe.stages]\nnap = polite:NAP\n[bigpipe.executors]\npolite = polite:POLITE\n"
    )
    (site / "polite.py").write_text(POLITE)
    return os.pathsep.join([str(site), str(TOYS), str(Path(__file__).parents[2] / "src")])


def run(workshop: Workshop, site: str, *arguments: str, launch: str = "") -> subprocess.CompletedProcess[str]:
    workshop.manifest.write_text(RECIPE.replace("LAUNCH", launch))
    return workshop.command("run", "recipe.yaml", "--json", *arguments, PYTHONPATH=site)


def test_an_executor_in_one_file_runs_in_a_recipe(workshop: Workshop, site: str) -> None:
    first = json.loads(run(workshop, site).stdout)["nodes"]["nap"]
    assert first["status"] == "succeeded"
    assert first["metrics"]["niceness"] == os.nice(0) + 7
    assert (Path(first["path"]) / "dream").read_text() == "nap"
    assert json.loads(run(workshop, site).stdout)["nodes"]["nap"]["status"] == "cached"
    failed = run(workshop, site, "-p", "refuse=true")
    assert failed.returncode == UsageError.exit_code
    assert "not tired" in failed.stderr


def test_only_an_executor_that_takes_launch_has_it_in_a_recipe(workshop: Workshop, site: str) -> None:
    refused = run(workshop, site, launch=", launch: {num_processes: 2}")
    assert refused.returncode == UsageError.exit_code
    assert "launch" in refused.stderr
    assert {name for name, found in EXECUTORS.items() if found.takes_launch} == {"ranks"}


def test_an_executor_that_nobody_offers_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there is no executor 'moon'"):
        executor("moon")


def test_a_recipe_whose_kind_needs_an_executor_that_nobody_offers_is_refused_with_its_place(
    workshop: Workshop, site: str
) -> None:
    (workshop.folder / "site" / "polite.py").write_text(POLITE.replace('runs_in="polite"', 'runs_in="moon"'))
    workshop.manifest.write_text(RECIPE.replace("LAUNCH", ""))
    refused = workshop.command("plan", "recipe.yaml", PYTHONPATH=site)
    assert refused.returncode == UsageError.exit_code
    assert "recipe.yaml:5:15: error[BP109]: there is no executor 'moon'" in refused.stderr
