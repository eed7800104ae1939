"""A row for each rule of what a machine must have, one where there is too little and one where there is just enough."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

import bigpipe
from bigpipe.fit import Misfit
from bigpipe.machine import Gpu, Machine
from bigpipe.orchestrator.planning.fit import machine_misfits
from bigpipe.orchestrator.stage import Forecast

GIB = 2**30
L4 = Gpu(0, "L4", 24 * GIB, 24 * GIB)
BOX = Machine(
    "box", cpus=4, memory=64 * GIB, memory_available=60 * GIB, disk_free=10**12, gpus=(L4, replace(L4, index=1))
)
BARE = replace(BOX, gpus=())


@dataclass
class Row:
    too_much: dict[str, Any]
    enough: dict[str, Any]
    cause: str
    cure: str
    machine: Machine = BOX
    forecast: Forecast = field(default_factory=Forecast)


ROWS = {
    "RAM": Row({"ram": 64 * GIB + 1}, {"ram": 64 * GIB}, "needs 64.0 GiB of RAM; box has 64.0 GiB", "quantize first"),
    "CPUs": Row({"cpus": 5}, {"cpus": 4}, "asks for 5 CPUs; box has 4", "set resources.cpus to 4"),
    "GPUs": Row({"gpus": 3}, {"gpus": 2}, "asks for 3 GPUs; box has 2", "set resources.gpus to 2"),
    "no GPU": Row({"gpus": 1}, {"gpus": 0}, "asks for 1 GPUs; box has 0", "set resources.gpus to 0", BARE),
    "memory of a GPU": Row(
        {"vram": {1: 24 * GIB + 1}}, {"vram": {0: 24 * GIB, 1: 24 * GIB}},
        "needs 24.0 GiB on GPU 1 (L4), which has 24.0 GiB", "place less on it with `max_memory`",
    ),
    "resources.gpu_memory": Row(
        {"gpu_memory": 25 * GIB}, {"gpu_memory": 24 * GIB},
        "asks for 25.0 GiB of GPU memory; no GPU here has it", "set resources.gpu_memory to 24GiB",
    ),
}  # fmt: skip


def misfits(machine: Machine, *, vram: Any = None, found: tuple[Misfit, ...] = (), **asked: Any) -> list[Misfit]:
    forecast = Forecast(vram=vram or {}, misfits=found)
    return machine_misfits(machine, forecast, **{"ram": 0, "cpus": 0, "gpus": 0, "gpu_memory": None, **asked})


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_too_much_is_refused_and_just_enough_is_not(row: Row) -> None:
    [misfit] = misfits(row.machine, **row.too_much)
    assert misfit.cause == row.cause
    assert row.cure in str(misfit.cure)
    assert misfits(row.machine, **row.enough) == []


def test_what_a_kind_has_said_of_gpus_is_not_said_again() -> None:
    said = (Misfit("max_memory names GPU 2"),)
    assert misfits(BOX, gpus=3, vram={0: 30 * GIB}, found=said) == []
    assert len(misfits(BOX, cpus=5, ram=65 * GIB, found=said)) == 2


RECIPE = """\
version: 1
name: needs
params: {cpus: 64}
stages:
  write: {uses: write, with: {text: hello, needs_ram: RAM}, resources: {cpus: CPUS}}
"""


@pytest.mark.parametrize(
    ("ram", "cpus", "disk", "causes"),
    [
        ("1GiB", "4", 5, []),
        ("65GiB", "4", 5, ["write: needs 65.0 GiB of RAM; box has 64.0 GiB"]),
        ("1GiB", "5", 5, ["write: asks for 5 CPUs; box has 4"]),
        ("1GiB", "4", 4, ["write: needs 5 B of disk; 4 B are free"]),
    ],
    ids=["fits", "RAM", "CPUs", "disk"],
)
def test_a_plan_says_what_does_not_fit(workshop: Any, ram: str, cpus: str, disk: int, causes: list[str]) -> None:
    workshop.manifest.write_text(RECIPE.replace("RAM", ram).replace("CPUS", cpus))
    plan = bigpipe.plan(workshop.manifest, machine=replace(BARE, disk_free=disk))
    assert [error.cause for error in plan.errors()] == causes


def test_a_parameter_for_what_is_asked_is_tried(workshop: Any) -> None:
    workshop.manifest.write_text(RECIPE.replace("RAM", "1GiB").replace("CPUS", '"${params.cpus}"'))
    [error] = bigpipe.plan(workshop.manifest, machine=BARE).errors()
    assert error.cure == "-p cpus=4 fits (set resources.cpus to 4)"


def test_a_parameter_that_does_not_help_is_not_named(workshop: Any) -> None:
    workshop.manifest.write_text(RECIPE.replace("RAM", "65GiB").replace("CPUS", '"${params.cpus}"'))
    assert [error.cure for error in bigpipe.plan(workshop.manifest, machine=BARE).errors()][
        1
    ] == "set resources.cpus to 4"
