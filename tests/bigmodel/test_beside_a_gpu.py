"""A model that computes on another device than the CPU, which holds a part of it. Where there is no GPU, `meta` is that
other device: it takes tensors like one, and computes shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import tuned
from support.models import make_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from bigpipe.bigmodel.adapters import attach, attachment
from bigpipe.bigmodel.architecture import describe_module
from bigpipe.bigmodel.checkpoint import describe_opened, open_adapter, open_checkpoint
from bigpipe.bigmodel.execution import HostMemory, as_placement, loaded
from bigpipe.bigmodel.execution.crossing import BLOCK, pieces
from bigpipe.bigmodel.execution.empty import build_empty, emptied
from bigpipe.bigmodel.execution.homes import Homes
from bigpipe.bigmodel.execution.loading import _fill
from bigpipe.bigmodel.execution.offload import Arena
from bigpipe.bigmodel.sources import Sources

ELSEWHERE = torch.device("meta", 0)


def load_elsewhere(path: Path, device_map: dict[str, str], model: torch.nn.Module | None = None) -> Any:
    """As `load` does it, with what is placed on cpu or disk computed elsewhere."""
    checkpoint = open_checkpoint(path)
    described = describe_opened(checkpoint)
    if model is None:
        made = build_empty(checkpoint.folder, described, torch.float32, Sources())
    else:
        made = emptied(model, torch.float32)
    homes = Homes(as_placement(device_map))
    homes.main = ELSEWHERE
    _fill(made, checkpoint, described, homes, torch.float32, HostMemory(cast=0, widen=0))
    return made.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_rows_of_an_embedding_that_the_map_names_are_looked_up_where_its_table_lies(
    tmp_path: Path, architecture: str, home: str
) -> None:
    make_checkpoint(tmp_path, architecture)
    name = next(name for name, found in named_embeddings(tmp_path) if "position" not in name)
    model = load_elsewhere(tmp_path, {"": "cpu", name: home})
    table, met = model.get_submodule(name), []
    table.register_forward_pre_hook(lambda module, rows: met.append((rows[0].device, module.weight.device)))
    whole = architecture == "bert" and home == "cpu"  # then its block comes at once
    called = model.bert.embeddings if whole else table
    with torch.inference_mode():
        assert called(torch.tensor([[5, 6, 7]])).device.type == "meta"
    ((rows, weight),) = met
    assert rows == weight


def named_embeddings(path: Path) -> list[tuple[str, torch.nn.Module]]:
    described = describe_opened(open_checkpoint(path))
    model = build_empty(path, described, torch.float32, Sources())
    return [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Embedding]


class Scaled(torch.nn.Module):
    """Checkpoints of it hold no scale: it begins at one."""

    _keys_to_ignore_on_load_missing = ("inner.scale",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)
        self.inner.register_parameter("scale", torch.nn.Parameter(torch.zeros(3)))

    def _init_weights(self, module: torch.nn.Module) -> None:
        with torch.no_grad():
            module.scale.fill_(1.0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(hidden) * self.inner.scale
        return found


def test_a_parameter_that_checkpoints_leave_out_lies_where_it_computes(tmp_path: Path) -> None:
    stored = {name: value for name, value in Scaled().inner.state_dict(prefix="inner.").items() if "scale" not in name}
    save_file(stored, tmp_path / "model.safetensors")
    model = load_elsewhere(tmp_path / "model.safetensors", {"": "cpu"}, Scaled())
    assert isinstance(model.inner.scale, torch.nn.Parameter)
    assert model.inner.scale.device.type == "meta"
    assert loaded(model).held == {"cpu": 4 * (9 + 3), 0: 4 * 3}
    assert model(torch.ones(1, 3, device="meta")).shape == (1, 3)


@pytest.mark.filterwarnings("ignore")  # of what peft saves beside
def test_an_adapter_of_an_embedding_multiplies_where_its_matrices_lie(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = make_checkpoint(tmp_path / "base", "llama")
    adapter = open_adapter(tuned(base, tmp_path / "lora", r=4, target_modules=["embed_tokens"]))
    model = load_elsewhere(base, {"": "cpu", "model.embed_tokens": "cpu"})
    found = attachment(adapter.described, describe_opened(open_checkpoint(base)), describe_module(model))
    held = attach(model, found, adapter, "float32", loaded(model).homes.execution)
    assert {device.type for device in held} == {"meta"}
    with torch.no_grad(), LookUps() as looked_up:
        assert model.model.embed_tokens(torch.tensor([[5, 6, 7]])).shape == (1, 3, 32)
    assert looked_up.devices == [["cpu", "cpu"], ["meta", "meta"]]  # in the table, in the adapter's


class LookUps(TorchDispatchMode):
    """Where the table and the rows of each look-up lie; `meta` takes rows that lie elsewhere, which a GPU does not."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[list[str]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.embedding.default:
            self.devices.append([tensor.device.type for tensor in args[:2]])
        return function(*args, **(kwargs or {}))


def test_what_crosses_in_pieces_is_the_whole() -> None:
    source = torch.arange(3 * (BLOCK // 4) + 5, dtype=torch.int32).view(-1, 1).expand(-1, 2).t()
    target = torch.zeros(source.shape, dtype=torch.int32)
    sizes = []
    for there, here in pieces(target, source):
        sizes.append(there.nbytes)
        there.copy_(here)
    assert torch.equal(target, source)
    assert max(sizes) == BLOCK
    assert len(sizes) == 7
    assert [part.numel() for part, _ in pieces(torch.zeros(()), torch.ones(()))] == [1]


def test_weights_that_are_laid_into_reused_memory_begin_as_torch_begins_them_on_a_gpu() -> None:
    """At multiples of 512 bytes: by less, libraries might choose other ways to multiply."""
    arena = Arena(torch.device("cpu"))
    arena.reserve([3, 600, 8])
    first = arena.take((3,), torch.uint8).data_ptr()
    assert [arena.take((n,), torch.uint8).data_ptr() - first for n in (600, 8)] == [512, 512 + 1024]
