"""Attempts on other machines, without a cluster: what travels, what comes back, who is planned for what."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.launching import MACHINE, PARENT, make_job, wait_for
from support.workshop import Workshop

from bigpipe.errors import BigpipeError, DoesNotFit, Interrupted, UsageError
from bigpipe.machine import Gpu, Machine
from bigpipe.orchestrator.contract import Event, Forecast, LogLine
from bigpipe.orchestrator.launch import AttemptFolder, Host, Job, Needs, Outcome, jobs, worker as launched
from bigpipe.orchestrator.launch.clusters import Cluster, await_end, open_cluster
from bigpipe.orchestrator.launch.errands import Errand, work
from bigpipe.orchestrator.launch.executors import Executor
from bigpipe.orchestrator.launch.jobs import JobFile
from bigpipe.orchestrator.launch.lifeline import hold_work_folder
from bigpipe.orchestrator.planning.spreading import able, needs, planned_for
from bigpipe.orchestrator.recipe import Node, load_recipe
from bigpipe.plugins.quantize import STAGE as QUANTIZE
from bigpipe.versions import package_version


def prepared(job: Job) -> Job:
    """As `Executor.start` leaves it, which another machine finds."""
    for folder in (job.out, job.scratch, job.parts, job.memo, job.folder.path):
        folder.mkdir(parents=True, exist_ok=True)
    return job


def sent(job: Job) -> Iterator[Any]:
    """What a cluster does with an errand, but for the network."""
    errand = pickle.loads(pickle.dumps(Errand.of(prepared(job))))  # noqa: S301  our own
    return work(errand, "127.0.0.1")


def came(items: list[Any]) -> tuple[list[Event], Outcome]:
    *told, last = items
    return [event for events in told for event in events], Outcome.model_validate_json(last)


def test_an_errand_does_what_the_job_does(tmp_path: Path) -> None:
    job = make_job(tmp_path, params={"do": "talk", "text": "yes"}, environment={"SHOWN": "to the stage"})
    events, outcome = came(list(sent(job)))
    assert outcome.failure is None
    assert outcome.metrics["shown"] == "to the stage"
    lines = [event.line for event in events if isinstance(event, LogLine)]
    assert lines[0] == f"on {os.uname().nodename} (127.0.0.1)"
    assert "plain line" in lines
    assert "plain line" in (tmp_path / "attempt" / "log.txt").read_text()


def test_a_secret_goes_along_and_is_not_shown(tmp_path: Path) -> None:
    job = make_job(tmp_path, "HUB", params={"do": "talk"}, environment={"HF_TOKEN": "hf_canary"})
    job = replace(job, secrets=frozenset({"HF_TOKEN"}))
    assert "hf_canary" not in repr(Errand.of(job))
    assert "hf_canary" not in Errand.of(job).file
    events, _ = came(list(sent(job)))
    lines = [event.line for event in events if isinstance(event, LogLine)]
    assert "said ***" in lines
    assert "hf_canary" not in json.dumps(lines) + (tmp_path / "attempt" / "log.txt").read_text()


def test_what_belongs_to_a_machine_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # as Ray sets it
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/of/there")
    parent = {**PARENT, "PATH": "/of/here", "CUDA_VISIBLE_DEVICES": "3", "HF_HOME": "/shared/hub"}
    del parent["OMP_NUM_THREADS"]
    _, outcome = came(list(sent(make_job(tmp_path, parent_environment=parent))))
    seen = outcome.metrics["environment"]
    assert seen["PATH"].endswith(":/of/there")
    assert seen["HF_HOME"] == "/shared/hub"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""  # it asked for none
    assert "OMP_NUM_THREADS" not in seen


@pytest.mark.parametrize(
    ("do", "type_"), [("fail", "DoesNotFit"), ("transient", "Transient"), ("crash", "StageFailed")]
)
def test_errors_come_back_as_they_are(tmp_path: Path, do: str, type_: str) -> None:
    _, outcome = came(list(sent(make_job(tmp_path, params={"do": do}))))
    assert outcome.failure is not None
    assert outcome.failure.type == type_


def test_who_closes_it_ends_its_processes(tmp_path: Path) -> None:
    job = make_job(tmp_path, params={"do": "sleep", "seconds": 100})
    going = sent(job)
    next(going)
    asleep = wait_for(lambda: next(iter(job.scratch.glob("asleep-*")), None))
    process = int(wait_for(asleep.read_text))
    going.close()  # type: ignore[attr-defined]
    assert not Path(f"/proc/{process}").exists()


def test_another_version_is_refused(tmp_path: Path) -> None:
    errand = replace(Errand.of(prepared(make_job(tmp_path))), versions={"bigpipe-ml": "0.0.1"})
    _, outcome = came(list(work(errand, "127.0.0.1")))
    assert outcome.failure is not None
    assert "and the command bigpipe-ml 0.0.1" in outcome.failure.cause


def test_another_version_of_what_its_key_names_is_refused(tmp_path: Path) -> None:
    """Or what one version gave would be recorded as what another gives."""
    stage = replace(make_job(tmp_path).stage, packages=("psutil", "no-such-package"))
    errand = Errand.of(prepared(make_job(tmp_path, stage=stage)))
    assert errand.versions == {"bigpipe-ml": package_version("bigpipe-ml"), "psutil": package_version("psutil")}
    _, outcome = came(list(work(replace(errand, versions={**errand.versions, "psutil": "0.1"}), "127.0.0.1")))
    assert outcome.failure is not None
    assert f"has psutil {package_version('psutil')}, and the command psutil 0.1" in outcome.failure.cause


def test_a_machine_is_as_the_key_says_or_is_refused(tmp_path: Path) -> None:
    """How a 4-bit format rounds depends on the CPUs, which the key holds: those that the cluster gives out."""
    asked = {"scheme": "nf4", "bnb_4bit_use_double_quant": True}
    job = make_job(tmp_path, stage=QUANTIZE, module="bigpipe.plugins.quantize:STAGE", params=asked)
    errand = Errand.of(prepared(replace(job.within(machine=replace(MACHINE, cpus=3)))))
    assert errand.job(lambda event: None, threading.Event(), cpus=3).machine.cpus == 3
    with pytest.raises(UsageError, match="is not as the node was planned for: cpus 5, and not 3"):
        errand.job(lambda event: None, threading.Event(), cpus=5)


def test_modules_are_found_where_the_command_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    errand = Errand.of(make_job(tmp_path, parent_environment={"PYTHONPATH": f"own{os.pathsep}/else"}))
    assert errand.parent["PYTHONPATH"] == f"{tmp_path}/own:/else"


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    errand = replace(Errand.of(prepared(make_job(tmp_path))), file="no JSON")
    _, outcome = came(list(work(errand, "127.0.0.1")))
    assert outcome.failure is not None
    assert not outcome.failure.expected
    assert "Traceback" in (tmp_path / "attempt" / "log.txt").read_text()


def test_a_machine_that_does_not_see_the_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigpipe.orchestrator.launch import errands

    monkeypatch.setattr(errands, "SEEN_SECONDS", 0.2)
    job = replace(make_job(tmp_path), folder=AttemptFolder(tmp_path / "elsewhere"))
    _, outcome = came(list(work(Errand.of(job), "127.0.0.1")))
    assert outcome.failure is not None
    assert f"does not see the store: {tmp_path / 'elsewhere'} is not there" in outcome.failure.cause


@pytest.mark.parametrize("how", ["as an errand", "as ranks of another machine"])
def test_a_machine_that_does_not_see_what_inputs_refer_to_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A model in the Hub's cache, which lies in a home that the machines do not share."""
    monkeypatch.setattr(jobs, "SEEN_SECONDS", 0)
    (tmp_path / "model" / "unet").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "unet" / "weights").symlink_to(tmp_path / "home" / "blob")
    job = prepared(make_job(tmp_path, "RANKS", inputs={"model": (tmp_path / "model",)}))
    if how == "as an errand":
        _, outcome = came(list(sent(job)))
    else:
        JobFile.of(job).write(job.folder.job)
        assert launched.work(job.folder.job, "launch", 1) == 1
        outcome = Outcome.read(job.folder.outcome("launch", 1)) or Outcome()
    assert outcome.failure is not None
    assert outcome.failure.type == "UsageError"
    assert f"does not see weights of its input model: {tmp_path / 'home/blob'} is not there" in outcome.failure.cause


def test_a_work_folder_is_free_once_no_worker_holds_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        hold_work_folder(tmp_path)
        (tmp_path / "held").touch()
        os.read(read, 1)  # until its parent lets go
        os._exit(0)
    wait_for((tmp_path / "held").exists)
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    with pytest.raises(Interrupted):
        await_end(tmp_path, cancelled)
    os.close(write)
    await_end(tmp_path, threading.Event())
    assert os.waitpid(child, 0)[1] == 0


@dataclass
class Machines:
    """A cluster that nothing can be sent to."""

    hosts: tuple[Host, ...]

    @property
    def value(self) -> Cluster:
        def run(job: Job) -> Outcome:
            raise BigpipeError("nothing is sent here")

        return Cluster(name="these", hosts=self.hosts, executor=Executor(run=run), close=lambda: None)


def machine(name: str, cpus: int = 4, memory: int = 2**34, gpus: int = 0, **labels: str) -> Host:
    had = tuple(Gpu(index, "A100", 2**35, 2**35) for index in range(gpus))
    return Host(id=name, machine=Machine(name, cpus, memory, memory, 2**40, had), ram=memory // 2, labels=labels)


SMALL, LARGE, GPUS = machine("small", 2, zone="a"), machine("large", 16, 2**38, zone="b"), machine("gpus", gpus=2)
CLUSTER = Machines((SMALL, LARGE, GPUS)).value


def node_of(workshop: Workshop, stage: str, name: str = "write") -> Node:
    workshop.manifest.write_text(
        f"version: 1\nname: one\nstages:\n  m: {{uses: download, with: {{path: m}}}}\n  {name}: {stage}\n"
    )
    return load_recipe(workshop.manifest).nodes[name]


@pytest.mark.parametrize(("resources", "planned", "wanted"), [
    ("{}", "gpus", Needs(cpus=1, ram=1000)),
    ("{cpus: 8}", "large", Needs(cpus=8, ram=1000)),
    ("{labels: {zone: a}}", "small", Needs(cpus=1, ram=1000, labels={"zone": "a"})),
    ("{gpus: 2}", "gpus", Needs(cpus=1, gpus=2, ram=1000)),
    ("{ram: 20GiB}", "large", Needs(cpus=1, ram=20 * 2**30)),
    ("{ram: 200GiB}", "large", Needs(cpus=1, ram=2**37)),  # all that is given out there: it runs alone
], ids=str)  # fmt: skip
def test_what_a_node_asks_for(workshop: Workshop, resources: str, planned: str, wanted: Needs) -> None:
    node = node_of(workshop, f"{{uses: write, resources: {resources}}}")
    assert planned_for(CLUSTER, node).id == planned
    assert needs(CLUSTER, node, Forecast(ram=1000), 1) == wanted


def test_more_ranks_than_cpus_ask_for_what_a_machine_gives_out(workshop: Workshop) -> None:
    node = node_of(workshop, "{uses: write}")
    assert needs(CLUSTER, node, Forecast(), 64).cpus == 16
    assert needs(CLUSTER, node, Forecast(), 64, machines=2).cpus == 4  # as two of them give out
    assert needs(CLUSTER, node, Forecast(), 64, machines=3).cpus == 2
    small_memory, few_cpus = machine("a", cpus=4, memory=2**36), machine("b", cpus=2, memory=2**37)
    both = Machines((small_memory, few_cpus)).value
    asked = needs(both, node, Forecast(ram=2**36), 8)  # 4 CPUs and 64 GiB are given out by none of them
    assert (asked.cpus, asked.ram) == (2, 2**36)


def test_gpus_up_to_the_last_that_is_used(workshop: Workshop) -> None:
    assert needs(CLUSTER, node_of(workshop, "{uses: write}"), Forecast(vram={1: 5}), 1).gpus == 2


def test_a_node_is_kept_from_gpus_that_are_too_small(workshop: Workshop) -> None:
    """Of Ray GPUs are asked by number alone."""
    tiny = replace(GPUS, id="tiny", machine=replace(GPUS.machine, gpus=(Gpu(0, "T4", 2**33, 2**33),) * 2))
    mixed = Machines((GPUS, tiny)).value
    node = node_of(workshop, "{uses: write}")
    assert needs(mixed, node, Forecast(vram={0: 2**34}), 1).hosts == ("gpus",)
    assert needs(mixed, node, Forecast(vram={0: 2**32}), 1).hosts == ()
    node = node_of(workshop, "{uses: write, resources: {gpus: 1, gpu_memory: 30GiB}}")
    assert needs(mixed, node, Forecast(), 1).hosts == ("gpus",)


def test_what_is_foreseen_may_fit_another_machine_than_the_one_with_most_gpus(workshop: Workshop) -> None:
    node = node_of(workshop, "{uses: write}")
    assert planned_for(CLUSTER, node).id == "gpus"
    assert [host.id for host in able(CLUSTER, node, Forecast(ram=2**36))] == ["large"]
    assert able(CLUSTER, node, Forecast(ram=2**36, vram={0: 1})) == []


def test_who_asks_for_few_gpus_is_planned_with_as_many(workshop: Workshop) -> None:
    node = node_of(workshop, "{uses: write, resources: {gpus: 1}}")
    assert len(planned_for(CLUSTER, node).machine.gpus) == 1


def test_a_node_whose_key_knows_the_machine_stays_on_those_alike(workshop: Workshop) -> None:
    node = node_of(workshop, "{uses: dispatch, inputs: m, with: {device_map: auto}}")
    # Its key says that there are two: it must see both, whatever it uses.
    assert needs(CLUSTER, node, Forecast(vram={0: 1}), 1) == Needs(cpus=1, gpus=2, hosts=("gpus",))
    fixed = node_of(workshop, "{uses: dispatch, inputs: m, with: {device_map: {'': cpu}}}")
    assert needs(CLUSTER, fixed, Forecast(), 1) == Needs(cpus=1)


def test_labels_that_no_machine_has_are_refused(workshop: Workshop) -> None:
    text = "version: 1\nname: one\nstages:\n  write: {uses: write, resources: {labels: {zone: c}}}\n"
    workshop.manifest.write_text(text)
    with pytest.raises(DoesNotFit, match="no machine of these has the labels zone=c") as error:
        planned_for(CLUSTER, load_recipe(workshop.manifest).nodes["write"])
    assert error.value.cure == "they have zone=a, zone=b"


def test_an_unknown_cluster_is_named(tmp_path: Path) -> None:
    with pytest.raises(BigpipeError, match="there is no executor 'slurm'"):
        open_cluster("slurm:somewhere", tmp_path)
