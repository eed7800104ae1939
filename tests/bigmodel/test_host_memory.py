"""How much RAM a loaded model may fill, and the dtype that follows: a row per rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.execution import HostMemory, as_placement, cast_bytes, host_memory, loading_dtype
from bigpipe.bigmodel.execution.homes import SMALL
from bigpipe.bigmodel.placement import Products, products_here

MODEL = ModelDescription(
    config={}, format="safetensors", tied={}, path=None, custom=None,
    tensors={"a.weight": ("float16", (10, 10)), "b.weight": ("float32", (10,)), "c": ("int64", (3,))},
)  # fmt: skip
PACKED = replace(
    MODEL,
    config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    tensors={"a.weight": ("int8", (10, 10)), "a.SCB": ("float32", (200,)), "b.weight": ("float16", (10,))},
)
AMPLE = HostMemory(cast=1000, widen=1000)


@pytest.mark.parametrize(
    ("caps", "processes", "expected"),
    [
        ({}, 1, HostMemory(cast=300, widen=500)),
        ({}, 3, HostMemory(cast=100, widen=500)),
        ({"cpu": 200}, 1, HostMemory(cast=200, widen=200)),
        ({0: 10}, 1, HostMemory(cast=300, widen=500)),
    ],
)
def test_what_a_process_may_fill(caps: dict[Any, int], processes: int, expected: HostMemory) -> None:
    placement = replace(as_placement(None), max_memory=caps)
    assert host_memory(placement, total=1000, available=500, processes=processes) == expected


@pytest.mark.parametrize(
    ("device_map", "of_placement", "asked", "memory", "model", "expected"),
    [
        ({"": "cpu"}, None, None, AMPLE, MODEL, "float32"),
        ({"": "cpu"}, None, "bfloat16", AMPLE, MODEL, "bfloat16"),
        ({"": "cpu"}, "bfloat16", None, AMPLE, MODEL, "bfloat16"),
        ({"": "cpu"}, "bfloat16", "float16", AMPLE, MODEL, "float16"),
        ({"": "cpu"}, None, None, HostMemory(cast=0, widen=440), MODEL, "float32"),
        ({"": "cpu"}, None, None, HostMemory(cast=1000, widen=439), MODEL, "float16"),
        ({"": "disk"}, None, None, AMPLE, MODEL, "float16"),
        ({"": "cpu", "b": "disk"}, None, None, AMPLE, MODEL, "float16"),
        ({"": 0}, None, None, AMPLE, MODEL, "float16"),
        ({"": "disk"}, None, None, AMPLE, replace(MODEL, config={"dtype": "float32"}), "float32"),
        ({"": "disk"}, None, None, AMPLE, replace(MODEL, config={"torch_dtype": "bfloat16"}), "float16"),
        ({"": "cpu"}, None, None, AMPLE, PACKED, "float16"),
    ],
)
def test_the_dtype_that_weights_are_loaded_as(
    device_map: dict[str, Any],
    of_placement: str | None,
    asked: str | None,
    memory: HostMemory,
    model: ModelDescription,
    expected: str,
) -> None:
    placement = replace(as_placement(device_map), dtype=of_placement)
    assert loading_dtype(model, placement, memory, asked) == expected


@pytest.mark.parametrize(
    ("stored", "wide", "half", "expected"),
    [
        ("bfloat16", 40e9, 90e9, "bfloat16"),
        ("bfloat16", 90e9, 80e9, "bfloat16"),
        ("bfloat16", 90e9, 20e9, "float32"),
        ("float16", 40e9, 1e9, "float32"),
        ("float16", None, None, "float32"),
        ("float64", 90e9, 1e9, "float64"),
    ],
)
def test_of_a_large_model_the_faster_dtype(stored: str, wide: float | None, half: float | None, expected: str) -> None:
    model = replace(MODEL, tensors={"a.weight": (stored, (SMALL // 4 + 1,))})
    rates = wide and half and Products({"float32": {1: wide}, "bfloat16": {1: half}, "float16": {1: half}})
    memory = HostMemory(cast=0, widen=2**40, products=lambda: rates or None)
    assert loading_dtype(model, as_placement(None), memory) == expected


def test_of_a_small_one_nothing_is_measured() -> None:
    def refused() -> None:
        raise AssertionError

    model = replace(MODEL, tensors={"a.weight": ("float16", (SMALL // 4,))})
    memory = HostMemory(cast=0, widen=2**40, products=refused)
    assert loading_dtype(model, as_placement(None), memory) == "float32"


def test_measuring_leaves_the_threads_as_they_are() -> None:
    threads = torch.get_num_threads()
    assert set(products_here().rates) == {"float32", "bfloat16", "float16"}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("model", "dtype", "expected"),
    [(MODEL, "float32", 400), (MODEL, "float16", 20), (MODEL, "bfloat16", 220), (PACKED, "float16", 0)],
)
def test_bytes_that_are_cast(model: ModelDescription, dtype: str, expected: int) -> None:
    assert cast_bytes(model, dtype) == expected
