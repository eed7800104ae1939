"""A row for each rule of whether a placement fits a machine: what is said, and that the change it names does fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from bigpipe.bigmodel.architecture import known_architecture
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.placement import Placement, PlacementRequest, find_misfits, place_model
from bigpipe.errors import DoesNotFit
from bigpipe.fit import Cure, Misfit, as_fields, as_options, as_parameters, fits, lacking, nearest
from bigpipe.machine import Gpu, Machine

GIB = 2**30
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
"""7.7 GiB of weights; a quarter a MiB of keys and values per token."""


def machine_of(*gpus: float, memory: float = 64) -> Machine:
    there = tuple(Gpu(index, "L4", int(size * GIB), int(size * GIB)) for index, size in enumerate(gpus))
    ram = int(memory * GIB)
    return Machine("box", cpus=8, memory=ram, memory_available=ram, disk_free=10**13, gpus=there)


def attempted(machine: Machine) -> Any:
    architecture = known_architecture(CONFIG)
    assert architecture is not None
    model = ModelDescription(config=CONFIG, tensors=None, format=None, tied={}, path=None, custom=None)

    def attempt(request: PlacementRequest) -> Placement:
        return place_model(model, architecture, request, machine)

    return attempt


@dataclass
class Row:
    machine: Machine
    request: dict[str, Any]
    cause: str
    cure: str


ROWS = {
    "keys and values of the batch": Row(
        machine_of(16), {"max_memory": {0: "14GiB"}, "batch_size": 16}, "needs 19.9 GiB on GPU 0 (L4), which has 16.0",
        "set batch_size to 10",
    ),
    "weights": Row(
        machine_of(6), {"max_memory": {0: "9GiB", "cpu": "20GiB"}}, "which has 6.0 GiB: 7.7 GiB of weights, ",
        "set max_memory.0 to ",
    ),
    "weights, and nowhere else to go": Row(
        machine_of(6), {"max_memory": {0: "9GiB"}}, "GPU 0 (L4), which has 6.0 GiB", " and max_memory.disk to 7.8GiB",
    ),
    "RAM": Row(
        machine_of(memory=7), {"max_memory": {"cpu": "20GiB"}}, "on the CPU, which has 7.0 GiB", "max_memory.cpu to ",
    ),
    "a GPU that is not there": Row(
        machine_of(24), {"max_memory": {"0-3": "20GiB", "cpu": "20GiB"}}, "max_memory names GPU 1, 2, 3; box has 1 GPU",
        "set max_memory to {0: 20GiB, cpu: 20GiB}; the model fits on GPU 0",
    ),
    "a GPU that is not there, and no room without it": Row(
        machine_of(24), {"max_memory": {0: "4GiB", 1: "20GiB"}}, "max_memory names GPU 1; box has 1 GPU",
        "set max_memory.1 to 0 and max_memory.0 to ",
    ),
    "a range that names more GPUs than there are": Row(
        machine_of(24, 24, 24, 24), {"max_memory": {"0-7": "20GiB", "cpu": 64 * GIB}}, "names GPU 4, 5, 6, 7",
        "set max_memory to {0-3: 20GiB, cpu: 64GiB}; the model fits on ",
    ),
    "a first GPU, and a range that names more than there are": Row(
        machine_of(24, 24, 24, 24), {"max_memory": {0: "2GiB", "1-7": "20GiB"}}, "box has 4 GPUs",
        "set max_memory to {0: 2GiB, 1-3: 20GiB}; the model fits on ",
    ),
    "a range too long, and caps too small": Row(
        machine_of(24), {"max_memory": {"0-1": "2GiB"}}, "max_memory names GPU 1; box has 1 GPU",
        "set max_memory to {0: 7.8GiB}",
    ),
    "a map over the cap of a range": Row(
        machine_of(24, 24), {"device_map": {"": 0, "lm_head": 1}, "max_memory": {"0-1": "1MiB"}},
        "device_map puts 7.5 GiB of weights on GPU 0; max_memory leaves it 1.0 MiB", "set max_memory.0-1 to 7.5GiB",
    ),
    "a map over several caps, one of which has another name": Row(
        machine_of(24), {"device_map": {"": 0, "lm_head": "cpu"}, "max_memory": {"cuda:0": "1MiB", "cpu": "1MiB"}},
        "GPU 0; max_memory leaves it 1.0 MiB", " and max_memory.cpu to 250.0MiB",
    ),
    "a map over a cap, and of a batch that is too large": Row(
        machine_of(10), {"device_map": {"": 0}, "max_memory": {0: "1MiB"}, "batch_size": 64}, "leaves it 1.0 MiB",
        "set max_memory.0 to 7.8GiB and batch_size to ",
    ),
    "caps that are too small": Row(
        machine_of(24), {"max_memory": {0: "4GiB"}}, "the model's weights and buffers take 7.7 GiB",
        "set max_memory.0 to 7.8GiB, or add cpu to max_memory",
    ),
    "the batch of a detected machine": Row(
        machine_of(memory=10), {"batch_size": 64}, "beside what generating takes", "set batch_size to ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_what_does_not_fit_comes_with_a_change_that_does(row: Row) -> None:
    request, attempt = PlacementRequest(**row.request), attempted(row.machine)
    [misfit] = found(request, row.machine, attempt)
    assert row.cause in misfit.cause
    assert row.cure in str(misfit.cure)
    assert found(request.changed(misfit.change), row.machine, attempt) == ()


def found(request: PlacementRequest, machine: Machine, attempt: Any) -> tuple[Misfit, ...]:
    try:
        return find_misfits(request, attempt(request), machine, attempt)
    except DoesNotFit as error:
        return find_misfits(request, None, machine, attempt) or (Misfit.of(error),)


def test_a_map_that_names_a_gpu_that_is_not_there() -> None:
    request = PlacementRequest(device_map={"": 0, "lm_head": 2})
    [misfit] = found(request, machine_of(24), attempted(machine_of(24)))
    assert misfit.cause == "device_map names GPU 2; box has 1 GPU"
    assert misfit.cure == "map lm_head to a GPU below 1, cpu or disk"


def test_nothing_helps() -> None:
    request = PlacementRequest(device_map={"": 0}, sequence_length=64)
    [misfit] = found(request, machine_of(6), attempted(machine_of(6)))
    assert misfit.cure == "quantize first, give more devices, or plan for another --machine"


def test_a_cap_of_a_map_that_no_gpu_could_have_is_not_offered() -> None:
    request = PlacementRequest(device_map={"": 0}, max_memory={0: "1GiB"}, sequence_length=64)
    [misfit] = found(request, machine_of(6), attempted(machine_of(6)))
    assert not misfit.change
    assert misfit.cure == Cure({}, "quantize first, move parts elsewhere, or give more devices")


def test_nothing_is_offered_for_a_gpu_that_is_not_there_where_the_rest_is_too_small() -> None:
    request = PlacementRequest(device_map={"": 0}, max_memory={0: "9GiB", 1: "20GiB"}, sequence_length=64)
    [misfit] = found(request, machine_of(5), attempted(machine_of(5)))
    assert not misfit.change
    assert str(misfit.cure).startswith("set max_memory.1 to 0, and ")


def test_what_fits_says_nothing() -> None:
    assert found(PlacementRequest(max_memory={0: "14GiB"}), machine_of(16), attempted(machine_of(16))) == ()


def test_the_comparison() -> None:
    assert fits(5, 5)
    assert not fits(6, 5)
    assert fits(10**30, None)
    assert lacking({"a": 5, "b": 6, "c": 1, "d": 7}, {"a": 5, "b": 5, "d": None}) == {"b": 1, "c": 1}


@pytest.mark.parametrize("limit", range(1, 20))
def test_the_search(limit: int) -> None:
    assert nearest(1, 20, lambda number: number <= limit) == limit
    assert nearest(20, 0, lambda number: number >= limit) == limit
    coarse = nearest(1, 20, lambda number: number <= limit, step=3)
    assert coarse is not None
    assert coarse <= limit < coarse + 3


def test_the_search_where_nothing_holds() -> None:
    assert nearest(1, 20, lambda number: False) is None


def test_a_cure_in_words() -> None:
    change = {"batch_size": 1, "max_memory.0": "22GiB", "double_quant": True}
    assert as_fields(change) == "set batch_size to 1 and max_memory.0 to 22GiB and double_quant to True"
    assert as_options({"batch_size": 1, "double_quant": True}) == "--batch-size 1 --double-quant"
    assert as_parameters({"batch": "1", "memory": "{cpu: 1GiB}"}) == "-p batch=1 -p 'memory={cpu: 1GiB}'"
    assert str(Cure({"batch_size": 1})) == "set batch_size to 1"
    assert str(Misfit("x", Cure({"batch_size": 1}, "take less")).cure) == "take less"
    error = Misfit("x", Cure({"batch_size": 1})).error()
    assert (error.cause, error.cure, error.change) == ("x", "set batch_size to 1", {"batch_size": 1})
    assert Misfit.of(error).change == {"batch_size": 1}
