"""A row for each rule of what a machine must have, one where there is too little and one where there is just enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo

import bigpipe
from bigpipe.errors import BigpipeError
from bigpipe.fit import Misfit
from bigpipe.machine import Gpu, Machine
from bigpipe.orchestrator.planning.fit import another
from bigpipe.orchestrator.planning.misfits import asked_misfits, foreseen_misfits
from bigpipe.orchestrator.recipe import ResourcesSpec
from bigpipe.orchestrator.stage import Forecast

GIB = 2**30
L4 = Gpu(0, "L4", 24 * GIB, 24 * GIB)
BOX = Machine(
    "box", cpus=4, memory=64 * GIB, memory_available=60 * GIB, disk_free=10**12, gpus=(L4, replace(L4, index=1))
)
BARE = replace(BOX, gpus=())
UNEQUAL = replace(BOX, gpus=(replace(L4, memory=16 * GIB), replace(L4, index=1)))


@dataclass
class Row:
    too_much: dict[str, Any]
    enough: dict[str, Any]
    cause: str
    cure: str = ""
    machine: Machine = BOX


ROWS = {
    "RAM": Row({"ram": 64 * GIB + 1}, {"ram": 64 * GIB}, "needs 64.0 GiB of RAM; box has 64.0 GiB"),
    "resources.ram": Row(
        {"resources": {"ram": "65GiB"}}, {"resources": {"ram": "64GiB"}, "ram": 65 * GIB},
        "needs 65.0 GiB of RAM; box has 64.0 GiB", "set resources.ram to 64GiB",
    ),
    "CPUs": Row(
        {"resources": {"cpus": 5}}, {"resources": {"cpus": 4}}, "asks for 5 CPUs; box has 4", "set resources.cpus to 4"
    ),
    "GPUs": Row(
        {"resources": {"gpus": 3}}, {"resources": {"gpus": 2}}, "asks for 3 GPUs; box has 2", "set resources.gpus to 2"
    ),
    "no GPU": Row(
        {"resources": {"gpus": 1}}, {"resources": {"gpus": 0}, "vram": {0: 1}},
        "asks for 1 GPU; box has 0", "set resources.gpus to 0", BARE,
    ),
    "GPUs that are foreseen": Row({"vram": {0: 1}}, {"vram": {}}, "needs 1 GPU; box has 0", machine=BARE),
    "memory of a GPU": Row(
        {"vram": {1: 24 * GIB + 1}}, {"vram": {0: 24 * GIB, 1: 24 * GIB}},
        "needs 24.0 GiB on GPU 1 (L4), which has 24.0 GiB",
    ),
    "resources.gpu_memory": Row(
        {"resources": {"gpu_memory": "25GiB"}}, {"resources": {"gpu_memory": "24GiB"}},
        "asks for 25.0 GiB of GPU memory; no GPU here has it", "set resources.gpu_memory to 24GiB",
    ),
    "resources.gpu_memory of each": Row(
        {"resources": {"gpu_memory": "17GiB", "gpus": 2}}, {"resources": {"gpu_memory": "16GiB", "gpus": 2}},
        "asks for 17.0 GiB of GPU memory on each of 2 GPUs; 1 here with as much",
        "set resources.gpu_memory to 16GiB", UNEQUAL,
    ),
    "resources.gpu_memory of the largest": Row(
        {"resources": {"gpu_memory": "25GiB", "gpus": 1}}, {"resources": {"gpu_memory": "24GiB"}},
        "asks for 25.0 GiB of GPU memory; no GPU here has it", "set resources.gpu_memory to 24GiB", UNEQUAL,
    ),
    "resources.gpu_memory without a GPU": Row(
        {"resources": {"gpu_memory": "1GiB"}}, {"resources": {"gpu_memory": "1GiB", "gpus": 0}},
        "asks for 1.0 GiB of GPU memory; box has no GPU", "leave out gpu_memory", BARE,
    ),
    "no GPU, and memory of it": Row(
        {"resources": {"gpu_memory": "1GiB", "gpus": 1}}, {}, "asks for 1 GPU; box has 0",
        "set resources.gpus to 0", BARE,
    ),
}  # fmt: skip


def misfits(
    machine: Machine, *, resources: Any = None, found: tuple[Misfit, ...] = (), **foreseen: Any
) -> list[tuple[str, str]]:
    asked = ResourcesSpec(**resources or {})
    forecast = Forecast(misfits=found, **foreseen)
    said = [(misfit.cause, str(misfit.cure)) for misfit in asked_misfits(machine, asked)]
    return said + [(cause, "") for cause in foreseen_misfits(machine, asked, forecast)]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_too_much_is_refused_and_just_enough_is_not(row: Row) -> None:
    assert misfits(row.machine, **row.too_much) == [(row.cause, row.cure)]
    assert misfits(row.machine, **row.enough) == []


def test_what_a_kind_has_said_of_gpus_is_not_said_again() -> None:
    said = (Misfit("max_memory names GPU 2"),)
    assert misfits(BOX, vram={0: 30 * GIB, 1: 1, 2: 1}, found=said) == []
    assert len(misfits(BOX, resources={"cpus": 5}, ram=65 * GIB, found=said)) == 2


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


def cures(workshop: Any, machine: Machine) -> list[str]:
    return [error.cure for error in bigpipe.plan(workshop.manifest, machine=machine).errors()]


def test_memory_is_cured_by_a_field_that_was_tried(workshop: Any) -> None:
    workshop.manifest.write_text(RECIPE.replace("RAM", "65GiB").replace("CPUS", "4"))
    [cure] = cures(workshop, BARE)
    most = int(cure.removeprefix("set needs_ram to "))
    assert 63 * GIB < most <= 64 * GIB
    workshop.manifest.write_text(RECIPE.replace("RAM", str(most)).replace("CPUS", "4"))
    assert cures(workshop, BARE) == []


def test_a_field_under_which_a_forecast_knows_less_is_no_cure(workshop: Any) -> None:
    """`forgets` comes first, and with it no RAM is foreseen."""
    recipe = RECIPE.replace("RAM", "65GiB").replace("CPUS", "4")
    workshop.manifest.write_text(recipe.replace("text: hello", "forgets: all"))
    assert cures(workshop, BARE) == []
    workshop.manifest.write_text(recipe)
    assert cures(workshop, BARE)[0].startswith("set needs_ram to ")


def test_where_no_field_makes_it_fit_none_is_named(workshop: Any) -> None:
    workshop.manifest.write_text(RECIPE.replace("RAM", "65GiB").replace("CPUS", "4"))
    assert cures(workshop, replace(BARE, memory=0)) == [
        "none of its fields alone makes it fit: plan for another --machine"
    ]


DISK = """\
version: 1
name: disk
stages:
  a: {uses: write, resources: {disk: 50B}}
  b: {uses: join, inputs: {first: a}, resources: {disk: 60B}}
  c: {uses: join, inputs: {first: b}, resources: {disk: 50B}}
  d: {uses: join, inputs: {first: c}, resources: {disk: 50B}}
"""


@pytest.mark.parametrize(
    ("free", "cure"),
    [
        (210, []),
        (209, ["free 1 B, or `cache: false` on b: that needs 160 B"]),
        (159, ["free 51 B, or `cache: false` on b and a and c: that needs 110 B"]),
        (109, ["free 101 B"]),
    ],
)
def test_the_disk_is_cured_by_what_was_tried(workshop: Any, free: int, cure: list[str]) -> None:
    """What a stage's `resources.disk` asks for counts, whatever its kind foresees."""
    workshop.manifest.write_text(DISK)
    assert cures(workshop, replace(BARE, disk_free=free)) == cure


MODEL = Path(__file__).parents[2] / "models/quickstart"
PLACED = """\
version: 1
name: places
stages:
  download: {uses: download, with: {path: MODEL}}
  dispatch:
    uses: dispatch
    inputs: download
    with:
      FIELD
"""
MISFITS = {
    "max_memory: {0: 1GiB, cpu: 1GiB}": "max_memory names GPU 0",
    "max_memory: {cpu: 2kB}": "the model's weights and buffers take",
    "max_memory: {cpu: 0, disk: 0}": "leaves no device with room",
    'device_map: {model: cpu, "": 3}': "device_map names GPU 3",
    '{device_map: {"": cpu}, max_memory: {cpu: 2kB}}': "device_map puts",
    '{device_map: {"": cpu}, max_memory: {0: 2GB, cpu: 2GB}}': "max_memory names GPU 0",
}


@pytest.mark.parametrize("field", MISFITS)
def test_what_does_not_fit_points_at_the_field_that_says_so(field: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(PLACED.replace("MODEL", str(MODEL)).replace("FIELD", field))
    try:
        errors = bigpipe.plan(tmp_path / "recipe.yaml", machine=BARE, store=tmp_path / "store").errors()
    except BigpipeError as error:
        errors = [error]
    assert MISFITS[field] in errors[0].cause
    place = errors[0].place
    assert place is not None
    assert place.line == 9, place
    assert place.column > 7, "the value, not the stage"


INFERRED = """\
version: 1
name: infers
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  infer:
    uses: distributed-infer
    inputs: download
    with: {{task: text-generation, batch_size: {batch_size}, limit: 64, prompts: [{prompts}]{more}}}
"""


@pytest.mark.parametrize(("batch_size", "more", "memory", "cure"), [
    (64, "", 545, "set batch_size to "), (64, ", max_new_tokens: 8", 532, "set batch_size to "),
    (1, ", max_new_tokens: 250, generation: {num_beams: 64}", 545, "set max_new_tokens to "),
])  # fmt: skip
def test_an_inference_that_does_not_fit_is_cured_by_less_at_a_time_and_stays_the_task_it_is(
    tmp_path: Path, batch_size: int, more: str, memory: int, cure: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    prompts = ", ".join(f"text {number} of many" for number in range(64))
    recipe.write_text(INFERRED.format(model=MODEL, batch_size=batch_size, more=more, prompts=prompts))
    small = replace(BARE, memory=memory * 2**20)
    [error] = bigpipe.plan(recipe, machine=small, store=tmp_path / "store").errors()
    assert error.cure.startswith(cure)


@pytest.mark.parametrize(
    ("value", "least", "most", "found"),
    [
        (2**17, 1, 5000, range(4489, 5001)),
        (2**17, 2, 5000, range(4489, 5001)),  # of windows, which score what follows their first token
        (2**17, 512, 600, range(512, 601)),  # with a stride of 512
        (2**17, 2, 1, [None]),
        (2, 2, 1, [None]),
        (None, 2, 5000, [4096]),  # as many as there are positions
        (None, 512, 600, [512]),
        (None, 2, 1, [None]),
    ],
)
def test_a_number_that_fits_is_found_among_those_that_may_stand_there(
    value: int | None, least: int, most: int, found: Any
) -> None:
    field = FieldInfo.from_annotation(int | None)  # type: ignore[arg-type]
    assert another(field, value, lambda tried: tried >= least, lambda tried: least <= tried <= most) in found


LONG = """\
version: 1
name: long
stages:
  download: {{uses: download, with: {{path: {model}}}}}
  work: {{uses: {kind}, inputs: download, with: {{data: long.jsonl, {fields}}}}}
"""


@pytest.mark.parametrize(
    ("kind", "field", "value", "more"),
    [
        ("evaluate", "sequence_length", 256, ""),
        ("evaluate", "sequence_length", None, ""),
        ("finetune", "max_length", 256, ", max_steps: 1, gradient_checkpointing: false"),
    ],
)
def test_shorter_texts_are_the_cure_where_only_they_fit(
    tmp_path: Path, kind: str, field: str, value: int | None, more: str
) -> None:
    (tmp_path / "long.jsonl").write_text('{"text": "' + "a long text " * 64 + '"}\n')

    def plan(memory: int, length: int | None) -> Any:
        fields = f"{field}: {'null' if length is None else length}{more}, batch_size: 1, dtype: float32"
        (tmp_path / "recipe.yaml").write_text(LONG.format(model=MODEL, kind=kind, fields=fields))
        return bigpipe.plan(tmp_path / "recipe.yaml", machine=replace(BARE, memory=memory), store=tmp_path / "store")

    long, short = (plan(2**40, length).nodes["work"].forecast.ram for length in (value, 128))
    assert short < long
    [error] = plan((short + long) // 2, value).errors()
    assert error.cure.startswith(f"set {field} to ")
    assert 64 <= int(error.cure.split()[-1]) < 256
