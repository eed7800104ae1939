from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import stages
from support.launching import TESTS, Launched, make_job, read_pid
from support.models import make_checkpoint
from support.workshop import Workshop

from bigpipe.errors import DoesNotFit, ManifestError, StageFailed, UsageError
from bigpipe.orchestrator.contract.contexts import Surroundings
from bigpipe.orchestrator.contract.events import LogLine, RankHello
from bigpipe.orchestrator.contract.types import Gpu, Launch, Machine
from bigpipe.orchestrator.launch.acceleration import accelerate, effective_launch
from bigpipe.orchestrator.launch.environment import worker_environment
from bigpipe.orchestrator.launch.jobs import AttemptFolder, Outcome
from bigpipe.orchestrator.launch.processes import signed_in
from bigpipe.orchestrator.planning import open_session
from bigpipe.orchestrator.planning.smoke import smaller
from bigpipe.orchestrator.recipe import load_recipe

TWO = Launch(num_processes=2)
GPUS = tuple(Gpu(index, "A100", 80 * 2**30, 79 * 2**30) for index in range(2))


def machine_with(gpus: int) -> Machine:
    return Machine("m", 8, 2**36, 2**35, 2**40, GPUS[:gpus])


def settings_of(launch: Launch, base: Path, gpus: int = 0) -> dict[str, object]:
    return dict(accelerate(launch, base, machine_with(gpus)).settings)


def test_two_ranks_come_up_on_the_cpu_and_are_merged(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "talk"}))
    outcome = launched.run()
    assert (tmp_path / "work/scratch/plan").read_text() == "talk"
    assert (tmp_path / "work/out/merged").read_text() == "0/2 1/2"
    assert outcome.metrics["world_size"] == 2
    assert outcome.metrics["modules"] == []
    hellos = {(event.rank, event.world_size) for event in launched.of(RankHello)}
    assert hellos == {(0, 2), (1, 2)}
    printed = {event.rank for event in launched.of(LogLine) if event.line == "plain line"}
    assert printed == {0, 1}
    assert "[rank 1] plain line" in (tmp_path / "attempt/log.txt").read_text()
    folder = AttemptFolder(tmp_path / "attempt")
    ranks = [Outcome.model_validate_json(folder.outcome("rank", rank).read_bytes()).peak_rss for rank in range(2)]
    assert min(ranks) > 100 * 2**20
    assert outcome.peak_rss >= sum(ranks)


@pytest.mark.slow
def test_one_rank_goes_the_same_way(tmp_path: Path) -> None:
    Launched(make_job(tmp_path, "RANKS")).run()
    assert (tmp_path / "work/out/merged").read_text() == "0/1"
    assert yaml.safe_load((tmp_path / "attempt/accelerate.yaml").read_text())["distributed_type"] == "NO"


@pytest.mark.parametrize(("use_cpu", "gpus", "seen"), [(True, 1, ""), (False, 0, ""), (False, 1, "0")])
def test_ranks_see_the_gpus_that_the_plan_counts(tmp_path: Path, use_cpu: bool, gpus: int, seen: str) -> None:
    """None where the launch file says so, and none where the plan has found none, whatever torch would find; whatever
    library the file wants for what these ranks do not do."""
    asked = f"use_cpu: {str(use_cpu).lower()}\ngpu_ids: '0'\ndistributed_type: DEEPSPEED\n"
    (tmp_path / "launch.yaml").write_text(asked)
    launch = Launch(config_file="launch.yaml")
    Launched(make_job(tmp_path, "REPLACED", launch=launch, machine=machine_with(gpus))).run()
    rank = Outcome.read(AttemptFolder(tmp_path / "attempt").outcome("rank", 0))
    assert rank is not None
    assert rank.metrics["environment"]["CUDA_VISIBLE_DEVICES"] == seen


RECIPE = """
version: 1
name: r
stages:
  download: {uses: download, with: {path: model}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {task: text-generation, prompts: [a]}
    launch: {config_file: mine.yaml}
"""


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_smoke_run_has_the_gpus_that_the_launch_file_leaves(workshop: Workshop, use_cpu: bool) -> None:
    machines = {"num_machines": 3, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    written = {"num_processes": 6, "use_cpu": use_cpu, "gpu_ids": "4,5", "distributed_type": "DEEPSPEED", **machines}
    (workshop.folder / "mine.yaml").write_text(yaml.safe_dump(written))
    make_checkpoint(workshop.folder / "model", "opt")
    workshop.manifest.write_text(RECIPE)
    session = open_session(workshop.manifest, params={}, given_machine=machine_with(1))
    tried = smaller(session, workshop.folder / "tried")[0]
    around = tried.surroundings(tried.recipe.nodes["generate"])
    assert len(around.machine.gpus) == (0 if use_cpu else 1)
    assert (around.launch.num_processes, around.launch.num_machines) == (2 if use_cpu else 1, 1)
    assert around.launch.main_process_ip is None
    assert around.launch.config_file == ("mine.yaml" if use_cpu else None), "GPUs 4 and 5 need not be here"


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_plan_counts_no_gpu_where_the_launch_file_says_so(workshop: Workshop, use_cpu: bool) -> None:
    (workshop.folder / "mine.yaml").write_text(f"num_processes: 2\nuse_cpu: {str(use_cpu).lower()}\n")
    workshop.manifest.write_text(RECIPE)
    session = open_session(workshop.manifest, params={}, given_machine=machine_with(1))
    node = session.recipe.nodes["generate"]
    assert len(session.surroundings(node).machine.gpus) == (0 if use_cpu else 1)
    facts = {"memory": 2**36} if use_cpu else {"gpus": ["A100"]}
    assert session.identity(node).as_json["facts"] == facts
    assert session.asking(node).resources.gpus == (0 if use_cpu else None)
    assert len(session.machine_of(session.recipe.nodes["download"]).gpus) == 1


def test_an_error_of_one_rank_comes_back_as_itself(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="rank 1: 20 GiB do not fit"):
        Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "fail", "rank": 1})).run()


def test_an_error_in_prepare_starts_no_rank(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="the plan does not fit"):
        Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "fail-prepare"})).run()
    assert not (tmp_path / "attempt/accelerate.yaml").exists()


def test_a_killed_rank_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    launched = Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "barrier"}))

    def kill() -> None:
        read_pid(tmp_path / "work/scratch/asleep-0")
        os.kill(read_pid(tmp_path / "work/scratch/asleep-1"), signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(StageFailed, match="rank 1 was ended by SIGKILL"):
        launched.run()
    assert all(not worker.alive for worker in signed_in(tmp_path / "attempt/processes"))


@pytest.mark.slow
def test_fewer_ranks_than_asked_for_do_no_work(tmp_path: Path) -> None:
    """A rank started by hand comes up alone, as `accelerate launch --cpu --num_processes 2` would start it."""
    with pytest.raises(DoesNotFit):  # leaves a job file for two ranks behind
        Launched(make_job(tmp_path, "RANKS", launch=TWO, params={"do": "fail-prepare"})).run()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    job = tmp_path / "attempt/job.json"
    done = subprocess.run(
        [sys.executable, "-m", "bigpipe.orchestrator.launch.worker", str(job), "rank"], env=environment, check=False
    )
    assert done.returncode == 1
    failure = json.loads((tmp_path / "attempt/rank-0.json").read_text())["failure"]
    assert "2 ranks were asked for, but rank 0 of 1 came up" in failure["cause"]
    assert "accelerate.yaml" in failure["cure"]
    assert not (tmp_path / "work/scratch/rank-0").exists()


def test_the_launcher_is_told_everything(tmp_path: Path) -> None:
    one, two = settings_of(Launch(), tmp_path), settings_of(TWO, tmp_path)
    assert (one["distributed_type"], two["distributed_type"]) == ("NO", "MULTI_GPU")
    assert two["use_cpu"] is True
    assert two["num_processes"] == 2
    assert two["main_process_port"] == 0
    assert settings_of(TWO, tmp_path, gpus=2)["use_cpu"] is False
    assert settings_of(TWO, tmp_path, gpus=1)["use_cpu"] is True


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("asked", [
    {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
    {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}},
    {"distributed_type": "MULTI_XPU"},
    {"distributed_type": "MULTI_GPU", "parallelism_config": {"parallelism_config_tp_size": 2}},
])  # fmt: skip
def test_ranks_without_an_accelerator_come_up_alike_however_one_would_train(
    tmp_path: Path, asked: dict[str, object], gpus: int
) -> None:
    both = {"num_processes": 2, "use_cpu": False, "gpu_ids": "all"}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({**both, "distributed_type": "NO"}))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**both, **asked}))
    found, plain = (
        accelerate(Launch(config_file=f"{name}.yaml"), tmp_path, machine_with(gpus), mixes=False)
        for name in ("mine", "plain")
    )
    assert found.settings == {**plain.settings, "distributed_type": "MULTI_GPU", "use_cpu": not gpus}
    heeded = accelerate(Launch(config_file="mine.yaml"), tmp_path, machine_with(gpus)).settings
    assert asked.items() <= heeded.items()


def test_explicit_keys_override_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: NO\nnum_processes: 4\nmixed_precision: bf16\n"
        "gpu_ids: '0,1'\nmain_training_function: main\nmachine_rank: 0\nuse_cpu: true\n"
    )
    launch = Launch(config_file="mine.yaml")
    assert effective_launch(launch, tmp_path).num_processes == 4
    settings = settings_of(launch, tmp_path, gpus=2)
    assert settings["num_processes"] == 4
    assert settings["distributed_type"] == "MULTI_GPU"
    assert settings["mixed_precision"] == "bf16"
    assert settings["gpu_ids"] == "0,1"
    assert settings["use_cpu"] is True
    explicit = Launch(config_file="mine.yaml", num_processes=2)
    assert settings_of(explicit, tmp_path)["num_processes"] == 2


def test_a_plan_asks_the_configuration_file_too(workshop: Workshop) -> None:
    (workshop.folder / "mine.yaml").write_text("num_processes: 4\n")
    workshop.manifest.write_text("""
version: 1
name: r
stages:
  download: {uses: download, with: {path: model}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {task: text-generation, prompts: [a]}
    launch: {config_file: mine.yaml}
""")
    session = open_session(workshop.manifest, params={})
    node = session.recipe.nodes["generate"]
    assert session.check_context(node).launch.num_processes == 4
    assert session.surroundings(node) is session.surroundings(node)


def test_a_bare_no_in_yaml_is_understood(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("distributed_type: NO\nmixed_precision: no\n")
    settings = settings_of(Launch(config_file="c.yaml"), tmp_path)
    assert (settings["distributed_type"], settings["mixed_precision"]) == ("NO", "no")


@pytest.mark.parametrize(
    ("launch", "cause"),
    [
        (Launch(config_file="absent.yaml"), "absent.yaml"),
        (Launch(config_file="list.yaml"), "holds no map"),
        (Launch(config_file="sagemaker.yaml"), "AMAZON_SAGEMAKER"),
        (Launch(config_file="tpu.yaml"), "XLA"),
        (Launch(config_file="text.yaml"), "num_processes: Input should be a valid integer"),
        (Launch(config_file="none.yaml"), "num_processes: Input should be greater than or equal to 1"),
        (Launch(config_file="odd.yaml"), "num_machines: .*true is not a whole number"),
        (Launch(num_processes=3, num_machines=2, main_process_ip="10.0.0.1"), "evenly"),
        (Launch(num_processes=2, num_machines=2, main_process_ip="10.0.0.1"), "main_process_port"),
        (Launch(num_processes=2, num_machines=2, config_file="no_port.yaml"), "main_process_ip and main_process_port"),
        (
            Launch(
                num_processes=2, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1", main_process_port=29500
            ),
            "driven from machine 0",
        ),
    ],
)
def test_what_cannot_be_launched_is_a_usage_error(tmp_path: Path, launch: Launch, cause: str) -> None:
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "sagemaker.yaml").write_text("compute_environment: AMAZON_SAGEMAKER")
    (tmp_path / "tpu.yaml").write_text("distributed_type: XLA")
    (tmp_path / "text.yaml").write_text("num_processes: many")
    (tmp_path / "none.yaml").write_text("num_processes: 0")
    (tmp_path / "odd.yaml").write_text("num_machines: true")
    (tmp_path / "no_port.yaml").write_text("main_process_port: 0")
    with pytest.raises(UsageError, match=cause):
        accelerate(launch, tmp_path, machine_with(0))


def test_a_precision_that_nothing_heeds_is_refused_where_it_stands(workshop: Workshop) -> None:
    text = """
version: 1
name: r
stages:
  download: {uses: download, with: {path: model}}
  generate:
    uses: distributed-infer
    inputs: download
    with: {task: text-generation, prompts: [a]}
    launch: {LAUNCH}
"""
    workshop.manifest.write_text(text.replace("LAUNCH", "mixed_precision: bf16"))
    told = "bf16 would change nothing; say what to compute in under `with`: dtype: bfloat16"
    with pytest.raises(ManifestError, match=rf"(?s)recipe\.yaml:10:.*{told}"):
        load_recipe(workshop.manifest, {})
    (workshop.folder / "mine.yaml").write_text("mixed_precision: bf16\n")
    workshop.manifest.write_text(text.replace("LAUNCH", "config_file: mine.yaml"))
    session = open_session(workshop.manifest, params={})
    with pytest.raises(UsageError, match="bf16 would change nothing") as error:
        session.surroundings(session.recipe.nodes["generate"])
    assert error.value.place is not None
    workshop.manifest.write_text(text.replace("LAUNCH", "config_file: mine.yaml, mixed_precision: 'no'"))
    session = open_session(workshop.manifest, params={})
    assert session.surroundings(session.recipe.nodes["generate"]).launch.mixed_precision == "no"


def test_who_asks_servers_is_given_the_passwords_of_proxies(tmp_path: Path) -> None:
    around = Surroundings(base=tmp_path, machine=machine_with(0), memo=tmp_path)
    parent = {"HTTPS_PROXY": "http://me:word-of-pass@proxy:3128"}
    plain, asks = (worker_environment(replace(stages.PROCESS, asks=asks), around, parent) for asks in (False, True))
    assert (plain["HTTPS_PROXY"], asks["HTTPS_PROXY"]) == ("http://proxy:3128", parent["HTTPS_PROXY"])
