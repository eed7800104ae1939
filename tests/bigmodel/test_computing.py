"""What a CPU computes in: measured once, chosen where it is much faster, shown, and the same bits as in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.measured import GOOD_HALVES, HERE, KEY, NO_HALVES, knowing, rates
from support.models import forward, make_checkpoint, sample_inputs, tiny_model

from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.placement import Placement, place
from bigpipe.bigmodel.placement.products import DTYPES, Products, computing_dtype, measure, products_of
from bigpipe.errors import UsageError


@pytest.mark.parametrize(
    ("figures", "stored", "rows", "chosen"),
    [
        (NO_HALVES, "bfloat16", 1, "float32"),
        (NO_HALVES, "bfloat16", 8, "float32"),
        (NO_HALVES, "float16", 1, "float16"),  # 18.5 against 17.8: one row is bound by memory
        (NO_HALVES, "float16", 2, "float16"),
        (NO_HALVES, "float16", 8, "float32"),
        (NO_HALVES, "float16", 1000, "float32"),
        (GOOD_HALVES, "bfloat16", 8, "bfloat16"),
        ({**GOOD_HALVES, "bfloat16": (10, 40, 54)}, "bfloat16", 8, "bfloat16"),  # 1.2 times is too little
    ],
)
def test_float32_where_it_is_much_faster(
    figures: Mapping[str, tuple[int, ...]], stored: str, rows: int, chosen: str
) -> None:
    found, why = computing_dtype(stored, rows, Products(rates(figures)))
    assert found == chosen
    assert ("at least 1.5" in why) == (chosen == "float32")


def test_rates_are_measured_and_plausible() -> None:
    found = measure()
    assert set(found) == set(DTYPES)
    assert all(1e6 < rate < 1e14 for each in found.values() for rate in each.values())


def test_measured_once_and_remembered(tmp_path: Path) -> None:
    first = products_of(HERE, tmp_path)
    assert first is not None
    [file] = (tmp_path / "speeds").iterdir()
    known = recall(file)
    known["rates"]["float32"]["8"] = 123.0
    remember(file, known)
    again = products_of(HERE, tmp_path)
    assert again is not None
    assert again.rate("float32", 9) == 123.0
    remember(file, {**known, "key": [KEY[0], "another torch", *KEY[2:]]})
    anew = products_of(HERE, tmp_path)
    assert anew is not None
    assert anew.rate("float32", 9) != 123.0


@pytest.mark.parametrize("harm", [{}, {"float32": 3}, {"float32": {"1": 1}}, {**rates(NO_HALVES), "float16": {"1": 0}}])
def test_of_what_cannot_be_measured_or_is_elsewhere_nothing_is_known(tmp_path: Path, harm: dict[str, Any]) -> None:
    assert products_of(replace(HERE, name="elsewhere"), tmp_path) is None
    knowing(tmp_path, NO_HALVES)
    [file] = (tmp_path / "speeds").iterdir()
    remember(file, {**recall(file), "rates": harm})
    assert products_of(HERE, tmp_path) is None


MIXED = {"": "cpu", "model.layers.1": "disk"}


def placed(path: Path, memo: Path, figures: Mapping[str, tuple[int, ...]] = NO_HALVES, **fields: Any) -> Placement:
    given = {"device_map": MIXED, "batch_size": 8, "sequence_length": 64, "machine": HERE, **fields}
    return place(path, memo=knowing(memo, figures), **given)


class TestPlacement:
    def test_says_what_is_computed_in_and_why(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path / "model", "llama", dtype="bfloat16")
        placement = placed(tmp_path / "model", tmp_path)
        assert (placement.dtype, placement.compute_dtype) == (None, "float32")
        assert Placement.from_json(placement.as_json()) == placement
        [said] = [line for line in placement.explanation if "Computed in" in line]
        assert said == "Computed in float32: a core multiplies at least 1.5 times as fast in it as in bfloat16."
        assert placement.measured == ("A core multiplies 53 GFLOP/s in float32, 8 in bfloat16.",)

    def test_counts_what_it_takes(self, tmp_path: Path) -> None:
        path = make_checkpoint(tmp_path / "model", "llama", dtype="bfloat16")
        stored = placed(path, tmp_path, compute_dtype="stored").needs["cpu"]
        wide, placement = placed(path, tmp_path).needs["cpu"], placed(path, tmp_path, compute_dtype="stored")
        assert placement.compute_dtype is None
        assert wide.weights == stored.weights
        assert wide.kv_cache == 2 * stored.kv_cache > 0
        assert wide.activations > 1.5 * stored.activations
        layer = max(
            sum(4 * parameter.numel() for parameter in module.parameters())
            for module in (load(path).model.layers[1], load(path).lm_head)  # type: ignore[union-attr]
        )
        assert wide.streaming == stored.streaming + 2 * layer

    @pytest.mark.parametrize(
        ("stored", "fields", "expected"),
        [
            ("float16", {}, "float32"),
            ("float16", {"batch_size": 1}, None),
            ("float16", {"figures": GOOD_HALVES}, None),
            ("float32", {}, None),
            ("float16", {"dtype": "bfloat16"}, None),
            ("float16", {"device_map": {"": "cpu"}}, None),
            ("float16", {"device_map": {"": 0, "model.layers.1": "disk"}}, None),
            ("float16", {"device_map": {"": "cpu"}, "compute_dtype": "float32"}, "float32"),
            ("float32", {"compute_dtype": "bfloat16"}, "bfloat16"),
            ("float16", {"compute_dtype": torch.float16}, None),
            ("float16", {"machine": replace(HERE, name="elsewhere")}, None),
        ],
        ids=str,
    )
    def test_only_where_a_cpu_streams_halves_and_nobody_says(
        self, tmp_path: Path, stored: str, fields: dict[str, Any], expected: str | None
    ) -> None:
        make_checkpoint(tmp_path / "model", "llama", dtype=stored)
        assert placed(tmp_path / "model", tmp_path, **fields).compute_dtype == expected

    @pytest.mark.parametrize(
        ("fields", "cause"),
        [
            ({"compute_dtype": "int8"}, "'int8' is not one that weights are cast to"),
            ({"compute_dtype": "float32", "dtype": "bfloat16"}, "float32 is not what bfloat16 weights compute in"),
            ({"compute_dtype": "float32", "device_map": {"": 0, "model.layers.1": "disk"}}, "is not what float16"),
        ],
        ids=str,
    )
    def test_refuses_what_cannot_be(self, tmp_path: Path, fields: dict[str, Any], cause: str) -> None:
        make_checkpoint(tmp_path / "model", "llama", dtype="float16")
        with pytest.raises(UsageError, match=cause):
            placed(tmp_path / "model", tmp_path, **fields)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "t5", "mixtral"])
def test_the_bits_are_those_in_memory_and_weights_are_held_as_stored(
    tmp_path: Path, architecture: str, stored: str
) -> None:
    path = make_checkpoint(tmp_path / "model", architecture, dtype=stored)
    wanted = load(path, dtype="float32")
    blocks = {"t5": {"": "cpu", "encoder.block.1": "disk", "decoder.block.0": "disk"}}.get(architecture, MIXED)
    placement = placed(path, tmp_path, device_map=blocks)
    model = load(path, placement)
    assert model.dtype == torch.float32
    assert torch.equal(forward(model), forward(wanted))
    tokens = sample_inputs(tiny_model(architecture))["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), wanted.generate(tokens, **options))
    assert loaded(model).held["cpu"] == placement.weights["cpu"]
    assert load(path, placement, dtype=stored).dtype == getattr(torch, stored)
