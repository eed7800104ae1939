"""`plan --probe`: what is foreseen is taken on the real devices, told, and let go."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from support.workshop import Workshop, environment

import bigpipe
from bigpipe.errors import DoesNotFit, Transient, UsageError
from bigpipe.files import room_held
from bigpipe.machine import Gpu, Machine, detect
from bigpipe.orchestrator.contract import Forecast
from bigpipe.orchestrator.launch import RAM, holding
from bigpipe.orchestrator.running import probe, shortages
from bigpipe.orchestrator.running.probing import groups, shares

MIB = 2**20
RECIPE = """\
version: 1
params: {ram: 200MiB, disk: 1MiB}
stages:
  a: {uses: write, with: {needs_ram: "${params.ram}"}, resources: {disk: "${params.disk}"}}
  b: {uses: write, needs: [a], with: {needs_ram: 100MiB, text: b}}
"""


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    workshop.manifest.write_text(RECIPE)
    return workshop


def command(shop: Workshop, *more: str, limited: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "plan", "recipe.yaml", "--probe", *more], cwd=shop.folder,
        env=environment(shop.folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limited,
    )  # fmt: skip


def holders(parent: int) -> list[psutil.Process]:
    """Processes of a command that hold memory."""
    found = psutil.Process(parent).children(recursive=True)
    return [process for process in found if any("launch.holding" in word for word in process.cmdline())]


def awaited_holder(running: subprocess.Popen[str], size: int) -> psutil.Process:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for process in holders(running.pid):
            if process.memory_info().rss >= size:
                return process
        time.sleep(0.01)
    raise AssertionError("nobody holds so much")


def test_every_need_is_taken_and_let_go(shop: Workshop) -> None:
    running = command(shop, "--json")
    taken = awaited_holder(running, 190 * MIB)
    assert int(Path(f"/proc/{taken.pid}/oom_score_adj").read_text()) == 500, "the kernel kills it rather than others"
    assert b"CUDA_DEVICE_ORDER=PCI_BUS_ID" in Path(f"/proc/{taken.pid}/environ").read_bytes(), "GPUs as plans have them"
    told, _ = running.communicate()
    assert running.returncode == 0
    rows = json.loads(told)["probe"]
    assert [(row["node"], row["device"], row["predicted"], row["ok"]) for row in rows] == [
        ("a", "RAM", 200 * MIB, True),
        ("b", "RAM", 100 * MIB, True),
        ("the run", "disk", MIB + 1, True),
    ]
    assert all(row["held"] == row["predicted"] for row in rows)
    assert not taken.is_running()
    assert not (shop.folder / "journal").exists(), "nothing runs"
    assert shop.json("plan", "recipe.yaml")["probe"] is None


def test_less_than_foreseen_is_told_with_exit_code_4(shop: Workshop) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1200 * MIB, 1200 * MIB))

    running = command(shop, "-p", "ram=1500MiB", limited=limit)
    told, errors = running.communicate()
    assert running.returncode == DoesNotFit.exit_code, errors
    assert "✗ short" in told
    assert "a: 1.5 GiB of RAM are foreseen" in errors
    assert "could be had" in errors


def test_a_process_that_the_system_kills_is_told_of(shop: Workshop) -> None:
    running = command(shop)
    awaited_holder(running, 150 * MIB).kill()
    told, errors = running.communicate()
    assert running.returncode == DoesNotFit.exit_code
    assert "memory ran out" in told
    assert "memory ran out" in errors


def test_interrupted_it_leaves_nobody(shop: Workshop) -> None:
    running = command(shop)
    taken = awaited_holder(running, 150 * MIB)
    running.send_signal(signal.SIGINT)
    running.communicate()
    assert running.returncode == 130
    assert not taken.is_running()


def test_killed_it_leaves_nobody(shop: Workshop) -> None:
    running = command(shop)
    taken = awaited_holder(running, 150 * MIB)
    running.kill()
    running.communicate()
    _, left = psutil.wait_procs([taken], timeout=5)
    assert left == []


def test_what_is_not_free_is_not_even_tried(shop: Workshop) -> None:
    free = detect(shop.folder).memory_available
    planned = bigpipe.plan(shop.manifest, params={"ram": free + 2**30})
    rows = probe(planned, seconds=0)
    errors = shortages(planned, rows)
    assert (rows[0].node, rows[0].held) == ("a", None)
    assert rows[0].short
    assert "free now" in str(errors[0])


def test_a_disk_that_is_too_small(shop: Workshop) -> None:
    planned = bigpipe.plan(shop.manifest, params={"disk": "900TiB"})
    rows = probe(planned, seconds=0)
    errors = shortages(planned, rows)
    assert (rows[-1].device, rows[-1].short) == ("disk", True)
    assert "disk" in str(errors[-1])


def test_room_is_set_aside_in_a_file_without_a_name(tmp_path: Path) -> None:
    before = os.statvfs(tmp_path)
    with room_held(tmp_path, 64 * MIB) as held:
        assert held
        assert os.listdir(tmp_path) == []
        now = os.statvfs(tmp_path)
        assert (before.f_bfree - now.f_bfree) * before.f_frsize > 32 * MIB
    with pytest.raises(OSError, match=r"space|large"), room_held(tmp_path, 2**55):
        pass


def test_never_beside_another_run(shop: Workshop) -> None:
    other = shop.folder / "other.yaml"
    other.write_text("version: 1\nname: other\nstages: {a: {uses: sleep, with: {seconds: 60}}}\n")
    run = subprocess.Popen(
        [sys.executable, "-m", "bigpipe", "run", "other.yaml"], cwd=shop.folder, env=environment(shop.folder),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not (shop.folder / "pid-a").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(Transient, match="of other goes on"):
            probe(bigpipe.plan(shop.manifest))
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(30)


def test_other_machines_cannot_be_probed(shop: Workshop) -> None:
    here, there = bigpipe.plan(shop.manifest), bigpipe.plan(shop.manifest, machine=detect(shop.folder))
    on_cluster = replace(here, session=replace(here.session, cluster=True))  # type: ignore[arg-type]  # any is enough
    for planned in (there, on_cluster):
        with pytest.raises(UsageError, match="other machines"):
            probe(planned, seconds=0)


@pytest.mark.parametrize("option", ["--machine=machine.json", "--executor=ray:127.0.0.1:1"])
def test_other_machines_are_refused_before_anything_is_asked(shop: Workshop, option: str) -> None:
    (shop.folder / "machine.json").write_text("no description")
    done = shop.command("plan", "recipe.yaml", "--probe", option)
    assert done.returncode == UsageError.exit_code
    assert "other machines cannot be probed from here\n  probe there, without --machine and --executor" in done.stderr


def test_what_is_wrong_with_a_device_is_told() -> None:
    command = [sys.executable, "-m", "bigpipe.orchestrator.launch.holding", '{"GPU 99": 1000}']
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    failed, last = map(json.loads, done.stdout.splitlines())
    assert failed["device"] == "GPU 99"
    assert "there is no GPU 99 here" in failed["failed"]
    assert last == {"done": True}


class Torch(ModuleType):
    """Of a GPU with 10,000 MiB, of which its context takes 500 once torch looks at it."""

    uint8 = "uint8"

    def __init__(self) -> None:
        super().__init__("torch")
        self.taken: list[int] = []
        self.looked = False
        self.cuda = SimpleNamespace(mem_get_info=self.mem_get_info)

    def device(self, kind: str, index: int) -> str:
        return f"{kind}:{index}"

    def mem_get_info(self, place: str) -> tuple[int, int]:
        self.looked = True
        return 9500 * MIB - sum(self.taken), 10_000 * MIB

    def ones(self, length: int, **where: str) -> None:
        assert self.looked
        self.taken.append(length)


def test_what_torch_takes_of_a_device_is_part_of_what_is_foreseen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = (Gpu(0, "A100", 10_000 * MIB, 10_000 * MIB),)
    monkeypatch.setattr(holding, "detect", lambda path: Machine("box", 1, 2**34, 2**34, 2**40, gpus))
    monkeypatch.setattr(holding, "stand_in_for_parent", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setitem(sys.modules, "torch", torch := Torch())
    holding.main(json.dumps({RAM: MIB, "GPU 0": 800 * MIB}))
    assert sum(torch.taken) == 300 * MIB
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    devices = [each["device"] for each in told if "device" in each]
    assert list(dict.fromkeys(devices)) == ["GPU 0", RAM], "RAM last: torch fills some of it"
    assert {each["device"]: each["held"] for each in told if "held" in each} == {"GPU 0": 800 * MIB, RAM: MIB}


def test_ranks_take_their_shares_and_gpus_of_their_own(shop: Workshop) -> None:
    node = bigpipe.plan(shop.manifest).nodes["a"]
    ranks = replace(node, processes=2, forecast=Forecast(ram=100, vram={0: 5, 1: 6, 2: 7, 3: 8}))
    assert shares(ranks) == [{RAM: 50, "GPU 0": 5, "GPU 1": 6}, {RAM: 50, "GPU 2": 7, "GPU 3": 8}]


def test_nodes_that_pass_files_on_are_tried_together(workshop: Workshop) -> None:
    workshop.manifest.write_text("""\
version: 1
stages:
  pour: {uses: pour}
  strain: {uses: strain, inputs: {first: pour}}
  sip: {uses: sip, inputs: {first: strain}}
  b: {uses: write}
""")
    planned = bigpipe.plan(workshop.manifest)
    assert [[node.node.name for node in group] for group in groups(planned)] == [["pour", "strain", "sip"], ["b"]]
