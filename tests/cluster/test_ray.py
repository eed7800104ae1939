"""A recipe on a Ray cluster of two machines: raylets of their own on two addresses of the loopback device."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commanding import BIGPIPE, left_of
from support.launching import TESTS, wait_for
from support.raylets import Raylets, raylets
from support.workshop import Workshop, environment

from bigpipe.errors import UsageError
from bigpipe.orchestrator.store.store import Store

pytest.importorskip("ray", reason="pip install 'bigpipe-ml[ray]'")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of the loopback device, others have one address alone")
FULL = [pytest.mark.fault, pytest.mark.timeout(7200)]
ROOT = Path(__file__).parents[2]
FIRST, SECOND = "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """One at a time, whichever processes run tests: two would starve each other while they start."""
    with (Path(tempfile.gettempdir()) / f"bigpipe-raylets-{os.getuid()}.lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        with raylets((FIRST, "--labels", "place=first"), (SECOND, "--labels", "place=second")) as found:
            yield found


@pytest.fixture
def both(cluster: Raylets) -> Raylets:
    """Both machines are there, whatever earlier tests did to the second."""
    if SECOND not in cluster.machines:
        cluster.add(SECOND, "--labels", "place=second")
    return cluster


COMMAND = "import sys; sys.modules['torch'] = None; from bigpipe.__main__ import main; main()"
"""`bigpipe`, where importing torch fails: only its workers do."""


class On:
    """The command in a folder, on a cluster."""

    def __init__(self, folder: Path, cluster: Raylets) -> None:
        self.folder, self.cluster = folder, cluster
        self.events = folder / "events.jsonl"

    def start(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        around = {**environment(self.folder), **self.cluster.environment, **environ}
        around["PYTHONPATH"] += f"{os.pathsep}{TESTS}"
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments, "--executor", self.cluster.executor],
            cwd=self.folder, env=around, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, **environ: str) -> tuple[int, dict[str, Any], str]:
        """The exit status, the answer and what was said of `bigpipe run … --json`."""
        return self.ended(
            self.start("run", "recipe.yaml", "--json", "--events", str(self.events), *arguments, **environ)
        )

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
        out, said = process.communicate(timeout=240)
        return process.returncode, json.loads(out), said  # nothing but the answer, whatever Ray has to say

    @property
    def told(self) -> list[dict[str, Any]]:
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def places(self, node: str) -> list[str]:
        """The addresses where attempts of a node began, in their order."""
        lines = [event["line"] for event in self.told if event["event"] == "log" and event["node"] == node]
        return [line.partition("(")[2].rstrip(")") for line in lines if line.startswith("on ")]


@pytest.fixture
def on(tmp_path: Path, both: Raylets) -> On:
    return On(tmp_path, both)


BRANCHES = f"""\
version: 1
name: branches
stages:
  download: {{uses: download, with: {{path: {ROOT}/models/quickstart}}}}
  estimate: {{uses: estimate, inputs: download, with: {{dtypes: [float16, int8]}}}}
  shard: {{uses: shard, inputs: download, with: {{max_shard_size: 1MB, dtype: float16}}}}
  quantize:
    uses: quantize
    inputs: shard
    matrix: {{scheme: [int8, nf4]}}
    with: {{scheme: "${{matrix.scheme}}"}}
"""


def test_a_recipe_gives_the_bytes_that_it_gives_here(on: On) -> None:
    (on.folder / "recipe.yaml").write_text(BRANCHES)
    status, answer, said = on.run("--store", "there")
    assert status == 0, said
    here = Workshop(on.folder).json("run", "recipe.yaml", "--store", "here")
    for name, node in answer["nodes"].items():
        same = ("key", "digest", "metrics")
        assert {key: node[key] for key in same} == {key: here["nodes"][name][key] for key in same}, name
        assert node["status"] == "succeeded"
        assert len(on.places(name)) == (0 if name in INLINE else 1), name
    assert any(event["event"] == "progress" and event["node"] == "shard" for event in on.told)
    assert not [line for line in said.splitlines() if "raylet" in line]


@pytest.mark.fault
def test_the_quickstart_gives_the_bytes_that_it_gives_here(on: On) -> None:
    """But for the receipt of `save`, which says when."""
    shutil.copytree(ROOT / "manifests", on.folder / "manifests")
    (on.folder / "models").symlink_to(ROOT / "models")
    told = ("run", "manifests/quickstart.yaml", "--json", "--store")
    status, there, said = on.ended(on.start(*told, "there"))
    assert status == 0, said
    here = json.loads(Workshop(on.folder).command(*told, "here").stdout)
    assert {node["status"] for node in (there["nodes"] | here["nodes"]).values()} == {"succeeded"}
    keys, digests = (
        [{name: node[what] for name, node in run["nodes"].items() if name != "save"} for run in (there, here)]
        for what in ("key", "digest")
    )
    assert len(digests[0]) == 7
    assert keys[0] == keys[1]
    assert digests[0] == digests[1]


INLINE = {"estimate"}
"""Light kinds, which the command does itself."""


@pytest.mark.fault
def test_a_plan_is_for_the_machines_of_the_cluster(on: On) -> None:
    (on.folder / "recipe.yaml").write_text(BRANCHES + "    resources: {labels: {place: moon}}\n")
    status, answer, said = on.ended(on.start("plan", "recipe.yaml", "--json"))
    assert status == 4, said
    assert "no machine of Ray at" in said
    assert "they have place=first, place=second" in said
    (on.folder / "recipe.yaml").write_text(BRANCHES + "    resources: {cpus: 3}\n")
    status, answer, said = on.ended(on.start("plan", "recipe.yaml", "--json"))
    assert status == 4, said
    assert {misfit["node"] for misfit in answer["misfits"]} == {"quantize@scheme=int8", "quantize@scheme=nf4"}
    assert [machine["cpus"] for machine in answer["cluster"]["machines"]] == [2, 2]


SLEEPERS = """\
version: 1
name: sleepers
stages:
  nap: {uses: sleep, matrix: {bed: [a, b]}, with: {seconds: SECONDS, tag: "${matrix.bed}"}, resources: {cpus: 2}}
  wake: {uses: join, inputs: {first: "nap@bed=a", second: "nap@bed=b"}}
"""


def begun(on: On) -> dict[str, int]:
    """The sleepers that have begun, and their processes."""
    return {path.name.removeprefix("pid-"): int(path.read_text() or 0) for path in on.folder.glob("pid-*")}


def killed(on: On, moment: float) -> int:
    """A run whose second machine is gone at this moment after both sleepers have begun, or, negative, after the run
    has; return how many attempts were lost."""
    (on.folder / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "2"))
    process = on.start("run", "recipe.yaml", "--json", "--events", str(on.events))
    if moment >= 0:
        wait_for(lambda: len(begun(on)) == 2 or process.poll() is not None, seconds=60)
    else:
        wait_for(lambda: on.told or process.poll() is not None, seconds=60)
    time.sleep(abs(moment))
    on.cluster.kill(SECOND)
    status, answer, said = on.ended(process)
    assert status == 0, said
    assert {node["status"] for node in answer["nodes"].values()} == {"succeeded"}
    assert (Path(answer["nodes"]["wake"]["path"]) / "text").read_text() == "a b"
    assert left_of(on.folder / "store") == []
    finished = [event["node"] for event in on.told if event["event"] == "node_finished"]
    assert sorted(finished) == ["nap@bed=a", "nap@bed=b", "wake"]
    lost = [event["line"] for event in on.told if event["event"] == "log" and "worker was lost" in event["line"]]
    marks = Workshop(on.folder).ran
    assert len(marks) <= 3 + len(lost), (marks, lost)
    for line in lost:
        assert "it is run again (1 of 3)" in line
    with Store(on.folder / "store") as store:
        assert store.verify().clean
    return len(lost)


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=FULL), pytest.param(signal.SIGHUP, 129, marks=FULL)
])  # fmt: skip
def test_an_interrupted_run_leaves_nobody(on: On, number: int, status: int) -> None:
    (on.folder / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "100"))
    process = on.start("run", "recipe.yaml", "--json", "--events", str(on.events))
    wait_for(lambda: len(begun(on)) == 2, seconds=60)
    began = time.monotonic()
    process.send_signal(number)
    ended, answer, said = on.ended(process)
    assert (ended, answer["status"]) == (status, "interrupted"), said
    assert time.monotonic() - began < 15
    assert left_of(on.folder / "store", seconds=0.0) == []


def test_what_a_lost_machine_was_at_is_run_again_elsewhere(on: On) -> None:
    assert killed(on, 0.5) == 1
    (again,) = [node for node in ("nap@bed=a", "nap@bed=b") if len(on.places(node)) == 2]
    assert on.places(again) == [SECOND, FIRST]


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_a_machine_is_lost_at_twenty_moments(cluster: Raylets, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311
    lost = 0
    for number in range(20):
        if SECOND not in cluster.machines:
            cluster.add(SECOND, "--labels", "place=second")
        folder = tmp_path / str(number)
        folder.mkdir()
        lost += killed(On(folder, cluster), dice.uniform(-3, 4))
    assert lost > 0


HELD = """\
version: 1
name: held
stages:
  before: {uses: write}
  nap:
    uses: sleep
    needs: [before]
    matrix: {bed: [a, b]}
    with: {seconds: 40, tag: "${matrix.bed}"}
    resources: {cpus: 2}
"""


@pytest.mark.fault
@pytest.mark.parametrize("what", ["its process alone", "its machine"])
def test_a_head_that_is_lost_ends_the_run_and_the_same_command_goes_on(tmp_path: Path, what: str) -> None:
    (tmp_path / "recipe.yaml").write_text(HELD)
    with raylets((FIRST,), (SECOND,)) as lost:
        on = On(tmp_path, lost)
        process = on.start("run", "recipe.yaml", "--json", "--events", str(on.events))
        wait_for(lambda: len(begun(on)) == 2 or process.poll() is not None, seconds=120)
        began = time.monotonic()
        lost.kill(FIRST) if what == "its machine" else lost.head().kill()
        status, answer, said = on.ended(process)
        assert status == 75, (answer, said)
        assert time.monotonic() - began < 100
        assert answer["status"] == "failed"
        assert "the head of the Ray cluster at" in answer["errors"][0]["cause"]
        assert "start it again; the same command continues" in answer["errors"][0]["cure"]
        assert "raylet" not in said
        assert left_of(on.folder / "store", seconds=60.0) == []
    with raylets((FIRST,), (SECOND,)) as again:
        on = On(tmp_path, again)
        status, answer, said = on.run()
        assert status == 0, said
        assert {name: node["status"] for name, node in answer["nodes"].items()} == {
            "before": "cached", "nap@bed=a": "succeeded", "nap@bed=b": "succeeded",
        }  # fmt: skip
    with Store(tmp_path / "store") as store:
        assert store.verify().clean


@pytest.mark.fault
def test_a_killed_command_leaves_nobody(on: On) -> None:
    (on.folder / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "100"))
    process = on.start("run", "recipe.yaml", "--json")
    wait_for(lambda: len(begun(on)) == 2, seconds=60)
    process.kill()
    process.communicate()
    assert left_of(on.folder / "store", seconds=20.0) == []


RANKS = """\
version: 1
name: ranks
trust: {modules: [support]}
stages:
  work:
    uses: support.stages:RANKS
    with: {do: DO, seconds: 100}
    launch: {num_processes: 2, num_machines: 2, join_seconds: 60}
"""


@pytest.mark.fault
def test_ranks_are_on_two_machines(on: On) -> None:
    (on.folder / "recipe.yaml").write_text(RANKS.replace("DO", "succeed"))
    status, answer, said = on.run()
    assert status == 0, said
    assert (Path(answer["nodes"]["work"]["path"]) / "merged").read_text() == "0/2 1/2"
    assert left_of(on.folder / "store") == []


@pytest.mark.fault
def test_a_token_that_is_not_the_clusters_is_refused(on: On) -> None:
    (on.folder / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "1"))
    status, _, said = on.run(RAY_AUTH_TOKEN="another" * 4)
    assert status == 5, said
    assert "refuses: its token is another, or is not here" in said


@pytest.mark.fault
def test_a_cluster_that_others_reach_must_be_guarded(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigpipe.orchestrator.launch.rayguard import require_guard

    for name, value in on.cluster.environment.items():
        monkeypatch.setenv(name, value)
    require_guard(on.cluster.address, ["10.0.0.1", FIRST])  # the cluster asks for a token


@pytest.mark.fault
def test_an_open_cluster_that_others_reach_is_refused(tmp_path: Path) -> None:
    from bigpipe.orchestrator.launch.rayguard import require_guard

    with raylets((FIRST,), token=None) as opened:
        require_guard(opened.address, [FIRST])  # nobody else reaches it
        with pytest.raises(UsageError, match="takes tasks from anybody") as error:
            require_guard(opened.address, [FIRST, "10.0.0.1"])
        assert "RAY_AUTH_MODE=token" in error.value.cure


def test_where_no_cluster_is_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "1"))
    done = Workshop(tmp_path).command("plan", "recipe.yaml", "--executor", "ray:127.0.0.1:1", RAY_AUTH_MODE="disabled")
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr
    assert "ray start --head" in done.stderr
    done = Workshop(tmp_path).command("plan", "recipe.yaml", "--executor", "slurm")
    assert "there is no executor 'slurm'" in done.stderr


PAGE = (ROOT / "docs/how-to/on-a-cluster.md").read_text()


@pytest.mark.fault
def test_the_commands_of_the_page_work(on: On) -> None:
    commands = re.findall(r"^\$ (bigpipe .+?)(?:  #.*)?$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    (on.folder / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "0.1"))
    for command in commands:
        words = command.replace("10.0.0.1:6379", on.cluster.address).split()
        done = subprocess.run(
            [*BIGPIPE, *words[1:]], cwd=on.folder, env={**environment(on.folder), **on.cluster.environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "3 succeeded" in done.stderr + done.stdout or "wake" in done.stdout


SRUN = f"""\
#!/bin/bash
# SLURM's srun, as far as the script of the page asks for it: one task, on the second machine of two.
while [[ $1 == --* ]]; do shift; done
SLURMD_NODENAME={SECOND} SLURM_NODEID=1 exec "$@"
"""


@pytest.mark.slow
def test_the_script_for_slurm_works(tmp_path: Path) -> None:
    """What SLURM would say is said by variables; its machines are two addresses of this one."""
    (tmp_path / "recipe.yaml").write_text(SLEEPERS.replace("SECONDS", "1"))
    (tmp_path / "ray.sbatch").write_text(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[0])
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "srun").chmod(0o755)
    given = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "2",
        "SLURMD_NODENAME": FIRST, "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "127.0.0.[2-3]", "HOME": str(tmp_path),
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_worker_niceness": "0", "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),
    }  # fmt: skip
    command = ["bash", "ray.sbatch", "recipe.yaml", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment(tmp_path), **given}, capture_output=True, text=True, check=False
    )
    shutil.rmtree(given["RAY_TMPDIR"], ignore_errors=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {node["status"] for node in answer["nodes"].values()} == {"succeeded"}
    assert {line.partition("(")[2] for line in re.findall(r"on .* \(127.0.0.\d\)", done.stderr)} == {
        f"{FIRST})", f"{SECOND})"
    }  # fmt: skip
    wait_for(lambda: left_of(tmp_path, seconds=0.0) == [])
