"""From Python: classes of the user's own, modules with or without weights, torch's dtypes and names of devices."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import make_checkpoint, tiny_model

import bigpipe
from bigpipe.bigmodel.architecture import describe_module
from bigpipe.bigmodel.formats import converted_modules, default_skips
from bigpipe.bigmodel.placement import devices_of
from bigpipe.errors import DoesNotFit, UsageError

NET = """
import torch

class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one = torch.nn.Linear(width, 128)
        self.two = torch.nn.Linear(128, width)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))

class Net(torch.nn.Module):
    def __init__(self, width=64, blocks=12):
        super().__init__()
        self.embed = torch.nn.Embedding(32, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = torch.nn.Linear(width, 32)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""
OWN = {"class": "ownnet:Net", "config": {"width": 64}}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A folder of weights without a config, and their class."""
    (tmp_path / "ownnet.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownnet", raising=False)
    import ownnet

    torch.manual_seed(0)
    bigpipe.save_checkpoint(ownnet.Net(), tmp_path / "bare")
    return tmp_path, ownnet.Net


def empty(net: Any) -> torch.nn.Module:
    with torch.device("meta"):
        found: torch.nn.Module = net()
    return found


class AsLinear(torch.nn.Linear):
    """With a beginning of its own."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.normal_(self.weight)


class Scaled(torch.nn.Linear):
    """With a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Headed(torch.nn.Module):
    def __init__(self, head: str, bias: bool, linear: type[torch.nn.Linear]) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 64)
        self.body = torch.nn.Sequential(linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        self.around = torch.nn.MultiheadAttention(64, 2)
        setattr(self, head, torch.nn.Linear(64, 32, bias=bias))


@pytest.mark.parametrize("linear", [torch.nn.Linear, AsLinear, Scaled])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head", ["lm_head", "head", "classifier", "output", "to_logits", "fc"])
def test_a_class_of_ones_own_keeps_its_head_as_accelerate_does(
    head: str, bias: bool, linear: type[torch.nn.Linear]
) -> None:
    """And has all packed that is a linear module; what computes in a way of its own is told."""
    from accelerate.utils.bnb import get_keys_to_not_convert

    model = Headed(head, bias, linear)
    architecture = describe_module(model)
    assert default_skips(architecture) == get_keys_to_not_convert(model) == [head]
    bodies = ["body.0", "body.2"][linear is Scaled :]
    assert [module.name for module in converted_modules(architecture)] == bodies
    akin = [module.name for module in architecture.modules if module.akin]
    assert akin == [*(["body.0"] if linear is Scaled else []), "around.out_proj"]


def test_what_computes_in_a_way_of_its_own_is_told_as_left(tmp_path: Path) -> None:
    model = Headed("head", True, Scaled)
    bigpipe.save_checkpoint(model, tmp_path / "plain")
    result = bigpipe.quantize_checkpoint(tmp_path / "plain", tmp_path / "small", scheme="int8", model=model)
    assert (result.quantized, result.skipped) == (("body.2",), ("body.0", "around.out_proj", "head"))


@pytest.mark.parametrize("linear", [AsLinear, Scaled])
def test_what_is_made_from_linear_computes_as_before_in_four_bits(
    tmp_path: Path, linear: type[torch.nn.Linear]
) -> None:
    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 64), linear(64, 64), torch.nn.Linear(64, 8))

    bigpipe.save_checkpoint(model := net().half(), tmp_path / "plain")
    bigpipe.quantize_checkpoint(tmp_path / "plain", tmp_path / "small", scheme="nf4", model=model)
    loaded = bigpipe.load(tmp_path / "small", model=net(), dtype="float16")
    assert (type(loaded[1]) is linear) == (linear is Scaled)
    x = torch.randn(4, 64).half()
    with torch.inference_mode():
        wanted = model(x)
        assert (loaded(x) - wanted).norm() < 0.3 * wanted.norm()


class Encoding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encode = torch.nn.TransformerEncoder(layer, 1)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        made: torch.Tensor = self.head(self.encode(x, src_key_padding_mask=padding))
        return made


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_encoders_of_torch_call_what_is_packed(tmp_path: Path, scheme: str) -> None:
    """In RAM and streamed alike: where nothing is hooked in, they multiply by the weights of their children."""
    torch.manual_seed(0)
    bigpipe.save_checkpoint(Encoding(), tmp_path / "plain")
    bigpipe.quantize_checkpoint(tmp_path / "plain", tmp_path / "small", scheme=scheme, model=Encoding())
    resident, streamed = (bigpipe.load(tmp_path / "small", {"": home}, model=Encoding()) for home in ("cpu", "disk"))
    x, padding = torch.randn(2, 3, 16).half(), torch.tensor([[False] * 3, [False, False, True]])
    with torch.inference_mode():
        assert torch.equal(resident(x), streamed(x))
        assert torch.equal(resident(x, padding)[~padding], streamed(x, padding)[~padding])


def test_a_class_of_ones_own_is_quantized_as_a_module_or_by_name(own: tuple[Path, Any]) -> None:
    folder, net = own
    ways: dict[str, dict[str, Any]] = {
        "empty": {"model": empty(net)}, "full": {"model": net()},
        "named": {"architecture": OWN, "trust": ["ownnet"], "base": folder},
    }  # fmt: skip
    written = {}
    for name, given in ways.items():
        result = bigpipe.quantize_checkpoint(folder / "bare", folder / name, scheme="int8", **given)
        assert (len(result.quantized), result.skipped) == (24, ("head",))
        written[name] = (folder / name / "model.safetensors").read_bytes()
    assert len(set(written.values())) == 1
    told = json.loads((folder / "named" / "bigpipe_architecture.json").read_text())
    assert told.items() >= OWN.items()
    model = bigpipe.load(folder / "named", trust=["ownnet"], base=folder)
    assert model(torch.arange(4)).isfinite().all()
    with pytest.raises(UsageError, match="not trusted"):
        bigpipe.quantize_checkpoint(folder / "bare", folder / "out", scheme="int8", architecture=OWN)


SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 3.0},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("scheme", SETTINGS)
def test_a_module_that_names_no_class_keeps_the_settings_it_was_quantized_with(
    own: tuple[Path, Any], scheme: str
) -> None:
    folder, net = own
    by_name: dict[str, Any] = {"architecture": OWN, "trust": ["ownnet"], "base": folder}
    bigpipe.quantize_checkpoint(folder / "bare", folder / "module", model=empty(net), **SETTINGS[scheme])
    bigpipe.quantize_checkpoint(folder / "bare", folder / "named", **by_name, **SETTINGS[scheme])
    assert read_weights(folder / "module") == read_weights(folder / "named")
    bigpipe.save_checkpoint(bigpipe.load(folder / "module", model=empty(net)), folder / "again")
    models = [bigpipe.load(folder / name, model=empty(net)) for name in ("module", "named", "again")]
    models.append(bigpipe.load(folder / "module", **by_name))
    for model in models:
        one: Any = model.get_submodule("blocks.0.one")
        settled = one.state.threshold if scheme == "int8" else one.compute_dtype
        assert settled == (3.0 if scheme == "int8" else torch.bfloat16)
        assert torch.equal(model(torch.arange(4)), models[0](torch.arange(4)))
    with pytest.raises(UsageError, match=r"module.bigpipe_architecture\.json names no class"):
        bigpipe.load(folder / "module")


def read_weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_it_is_estimated_placed_and_loaded(own: tuple[Path, Any]) -> None:
    folder, net = own
    asked: dict[str, Any] = {"architecture": OWN, "trust": ["ownnet"], "base": folder}
    ids, whole = torch.arange(4), bigpipe.load(folder / "bare", model=net())
    assert torch.equal(bigpipe.load(folder / "bare", **asked)(ids), whole(ids))
    size = sum(tensor.nbytes for tensor in whole.state_dict().values())
    limits: dict[int | str, int | str] = {"cpu": size // 2, "disk": "1GiB"}
    by_name = bigpipe.place(folder / "bare", max_memory=limits, no_split_module_classes="Block", **asked)
    for module in (empty(net), net(), net().half()):
        placed = bigpipe.place(module, max_memory=limits, no_split_module_classes="Block", dtype=torch.float32)
        assert placed.device_map == by_name.device_map
    held = [f"blocks.{number}" for number in range(12) if by_name.device_of(f"blocks.{number}.one.weight") == "cpu"]
    assert 0 < len(held) < 12
    assert held == [f"blocks.{number}" for number in range(len(held))]
    assert torch.equal(bigpipe.load(folder / "bare", by_name, model=empty(net))(ids), whole(ids))
    known = bigpipe.estimate(folder / "bare", dtypes=torch.float32, **asked)
    assert [budget.weights.bytes for budget in known.budgets] == [size]
    for module in (empty(net), net()):
        assert bigpipe.estimate(module, dtypes=[torch.float32]).metrics() == known.metrics()


def test_a_module_counts_at_the_dtype_it_has() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    size = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict().values()}.values())
    placed = bigpipe.place(model, max_memory={"cpu": "1GiB"})
    assert 0 <= placed.weights["cpu"] - size < 1000  # and buffers that it makes itself
    wide = bigpipe.place(
        model, max_memory={"cpu": "1GiB"}, dtype="float32", special_dtypes={"lm_head.weight": torch.half}
    )
    assert wide.special_dtypes == {"lm_head.weight": "float16"}
    assert size < wide.weights["cpu"] < 2 * size + 1000


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_dtypes_are_torchs_or_their_names(tmp_path: Path, dtype: Any) -> None:
    source = make_checkpoint(tmp_path / "llama", "llama")
    bigpipe.save_checkpoint(source, tmp_path / "cast", dtype=dtype)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "float16"
    bigpipe.quantize_checkpoint(source, tmp_path / "int8", scheme="nf4", dtype=dtype, bnb_4bit_compute_dtype=dtype)
    assert bigpipe.place(source, dtype=dtype, max_memory={"cpu": "1GiB"}).dtype == "float16"
    assert next(bigpipe.load(source, dtype=dtype).parameters()).dtype == torch.float16
    assert bigpipe.estimate(source, dtypes=[dtype], kv_dtype=dtype).budgets[0].dtype == "float16"


def test_auto_is_as_stored_and_a_mode(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "llama", "llama")
    bigpipe.save_checkpoint(source, tmp_path / "half", dtype="float16")
    model = bigpipe.load(tmp_path / "half", "auto", dtype="auto")
    assert next(model.parameters()).dtype == torch.float16
    assert model(torch.arange(4)[None]).logits.isfinite().all()
    assert bigpipe.place(source, dtype="auto", max_memory={"cpu": "1GiB"}).dtype is None
    with pytest.raises(UsageError, match="is neither a mode, nor a device"):
        bigpipe.load(source, "atuo")


def test_devices_have_torchs_names_too() -> None:
    assert [devices_of(key) for key in ("cuda", "cuda:3", 3, "2-4", "cpu")] == [[0], [3], [3], [2, 3, 4], ["cpu"]]
    assert devices_of(torch.device("cuda", 1)) == [1]  # type: ignore[arg-type]
    model = tiny_model("llama")
    by_torch, by_number = (
        bigpipe.place(model, max_memory={name: "1GiB"}, sequence_length=64) for name in ("cuda:0", 0)
    )
    assert by_torch == by_number
    with pytest.raises(UsageError, match="gives device 0 twice"):
        bigpipe.place(model, max_memory={"cuda:0": "1GiB", 0: "1GiB"})
    with pytest.raises(UsageError, match="'cuda:x' is not a device"):
        bigpipe.place(model, max_memory={"cuda:x": "1GiB"})


def test_numbered_blocks_are_placed_in_the_order_of_numbers(tmp_path: Path) -> None:
    weights = {f"h.{number}.attn.weight": torch.zeros(64, 64) for number in range(14)} | {
        "wte.weight": torch.zeros(32, 64)
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    placed = bigpipe.place(tmp_path, device_map="sequential", max_memory={"cpu": 120_000, "disk": "1GiB"})
    first = [number for number in range(14) if placed.device_of(f"h.{number}.attn.weight") == "cpu"]
    assert 2 < len(first) < 14
    assert first == list(range(len(first)))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int is no model"):
        bigpipe.place(3)  # type: ignore[arg-type]
    given: Any = torch.nn.Linear
    for call in (bigpipe.place, bigpipe.estimate, partial(bigpipe.load, tmp_path, model=given)):
        with pytest.raises(UsageError, match="the class Linear is no model"):
            call() if isinstance(call, partial) else call(given)


def test_the_order_of_devices_does_not_matter_and_one_of_them_has_room() -> None:
    model = tiny_model("llama")
    caps: dict[int | str, int | str] = {0: 100_000, 1: 100_000, "cpu": "1GiB", "disk": "1GiB"}
    ordered, turned = (bigpipe.place(model, max_memory=given) for given in (caps, dict(reversed(list(caps.items())))))
    assert ordered.device_map == turned.device_map
    with pytest.raises(DoesNotFit, match="no device with room"):
        bigpipe.place(model, max_memory={"disk": 0})


def test_parameters_of_the_root_are_placed_one_by_one() -> None:
    class Rooted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(300, 300))
            self.b = torch.nn.Parameter(torch.zeros(300, 300))
            self.layer = torch.nn.Linear(300, 300)

    placed = bigpipe.place(Rooted(), device_map="sequential", max_memory={"cpu": 800_000, "disk": "1GiB"})
    assert [placed.device_of(name) for name in ("a", "layer.weight")] == ["cpu", "disk"]
