"""How fast work with streamed layers can be at the most, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.measured import GOOD_HALVES, HERE, knowing, rates
from support.models import make_checkpoint

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import describe_checkpoint, open_checkpoint
from bigpipe.bigmodel.placement import Limit, Speeds, Work, limit_here, limit_of, place
from bigpipe.bigmodel.placement.products import Products

FAST = Speeds(disk=1e30, link=1e30, ram=1e30)
QUICK = Products(rates(dict.fromkeys(("float32", "bfloat16", "float16"), (1e21, 1e21, 1e21))))
STREAMED = {"": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", dtype="float32")


def sizes(path: Path) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in open_checkpoint(path).tensors.items()}


def limit(path: Path, work: Work, speeds: Speeds = FAST, products: Products = QUICK) -> Limit:
    placement = place(path, device_map=STREAMED)
    architecture = describe_architecture(path)
    return limit_of(placement, architecture, sizes(path), "float32", "float32", work, speeds, products, 2)


def test_each_pass_moves_the_streamed_weights_once(llama: Path) -> None:
    layers = sum(size for name, size in sizes(llama).items() if ".layers." in name)
    alone = limit(llama, Work(rows=8, read=80, made=24, batch_size=2), replace(FAST, disk=1e6))
    assert alone.bandwidth == pytest.approx(4 * 3 * layers / 1e6)
    assert alone.bound_by == "bandwidth"
    assert alone.tokens_per_second == pytest.approx(24 / alone.bandwidth)
    together = limit(llama, Work(rows=8, read=80, made=24, batch_size=2, together=3), replace(FAST, disk=1e6))
    assert together.bandwidth == pytest.approx(2 * 3 * layers / 1e6)
    scored = limit(llama, Work(rows=8, read=80, batch_size=2, together=4), replace(FAST, disk=1e6))
    assert scored.bandwidth == pytest.approx(layers / 1e6)
    assert scored.tokens_per_second == pytest.approx(80 / scored.seconds)


def test_each_token_is_two_operations_with_each_weight(llama: Path) -> None:
    head = sizes(llama)["lm_head.weight"] // 4
    body = sum(size for name, size in sizes(llama).items() if "embed" not in name) // 4 - head
    slow = Products(rates(dict.fromkeys(("float32",), (1e-3, 2e-3, 4e-3))))
    found = limit(llama, Work(rows=8, read=80, made=24, batch_size=8), FAST, slow)
    assert found.bound_by == "compute"
    assert found.compute == pytest.approx((2 * body * 80 / 4e6 + 2 * (body * 16 + head * 24) / 2e6) / 2)
    step = limit(llama, Work(rows=8, made=8, batch_size=8), FAST, slow)
    assert step.compute == pytest.approx(2 * 8 * (body + head) / 2e6 / 2)


def test_each_batch_reads_each_weight_from_memory(llama: Path) -> None:
    weights = sum(size for name, size in sizes(llama).items() if "embed" not in name)
    found = limit(llama, Work(rows=8, read=80, made=24, batch_size=2, together=4), replace(FAST, ram=1e6))
    assert found.bound_by == "memory"
    assert found.memory == pytest.approx(4 * 3 * weights / 1e6)
    assert "tokens/s, bound by memory" in found.describe()


def test_is_of_this_machine_alone(tmp_path: Path, llama: Path) -> None:
    placement, model = place(llama, device_map=STREAMED), describe_checkpoint(llama)
    given = placement, describe_architecture(llama), model, "float32", Work(rows=1, made=1)
    knowing(tmp_path, GOOD_HALVES, replace(FAST, disk=1e6))
    found = limit_here(*given, HERE, tmp_path)
    assert found is not None
    assert found.bound_by == "bandwidth"
    assert limit_here(*given, replace(HERE, name="elsewhere"), tmp_path) is None
