"""Models on a GPU, whole or with parts in RAM and on disk: the bits that transformers computes there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CAUSAL, make_checkpoint, sample_inputs

from bigpipe.bigmodel.execution import load, loaded
from bigpipe.bigmodel.execution.crossing import BLOCK, Crossing
from bigpipe.bigmodel.placement import Device, place
from bigpipe.bigmodel.quantization import quantize_checkpoint

pytestmark = pytest.mark.gpu
FAMILIES = ("opt", "llama", "gpt2", "bloom", "mixtral", "phi", "bert", "t5", "bart", "vit")
AWAY = {"all there": [], "half in RAM": ["cpu"], "half on disk": ["disk"], "RAM and disk": ["cpu", "disk"]}
"""Homes of the blocks, in turn, after the first."""
SCHEMES = ("int8", "nf4", "fp4")


def transformers_model(path: Path, device: str, **options: Any) -> Any:
    import transformers

    name = json.loads((path / "config.json").read_bytes())["architectures"][0]
    return getattr(transformers, name).from_pretrained(path, device_map={"": device}, **options).eval()


def spread(model: Any, home: Device, away: list[str]) -> dict[str, Device]:
    """A device map with every second block away from `home`."""
    kinds = set(model._no_split_modules)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return {"": home, **{name: away[i // 2 % len(away)] for i, name in enumerate(blocks) if away and i % 2}}


def logits(model: Any, device: str) -> torch.Tensor:
    inputs = {name: tensor.to(device) for name, tensor in sample_inputs(model).items()}
    with torch.inference_mode():
        return model(**inputs).logits.float().cpu()


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(tmp_path: Path, device: str, home: Device, family: str, dtype: str, away: str) -> None:
    make_checkpoint(tmp_path, family, dtype=dtype)
    wanted = transformers_model(tmp_path, device, dtype=getattr(torch, dtype))
    model = load(tmp_path, spread(wanted, home, AWAY[away]), dtype=dtype)
    assert torch.equal(logits(model, device), logits(wanted, device))
    assert torch.equal(logits(model, device), logits(wanted, device))  # a second pass brings the same weights again
    assert model.device.type == device
    if device == "cuda":
        assert all(parameter.device.type in ("cuda", "meta") for parameter in model.parameters())


def tables(model: Any) -> list[str]:
    """The input embedding and the output head, under all names that lead to their weights."""
    ends = [found() for found in (model.get_input_embeddings, model.get_output_embeddings)]
    weights = {id(end.weight) for end in ends}
    return [name for name, module in model.named_modules() if id(getattr(module, "weight", None)) in weights]


@pytest.mark.parametrize("away", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_logits_with_the_embedding_and_the_head_away(
    tmp_path: Path, device: str, home: Device, family: str, dtype: str, away: str
) -> None:
    make_checkpoint(tmp_path, family, dtype=dtype)
    wanted = transformers_model(tmp_path, device, dtype=getattr(torch, dtype))
    placed = tables(wanted)
    assert len(placed) > 1
    model = load(tmp_path, {"": home, **dict.fromkeys(placed, away)}, dtype=dtype)
    for _ in range(2):
        assert torch.equal(logits(model, device), logits(wanted, device))


def test_logits_of_a_map_that_is_optimal(tmp_path: Path, device: str, home: Device) -> None:
    """With room for all but a little: of the embedding's table a token needs one row."""
    make_checkpoint(tmp_path, "llama", dtype="float16", vocab_size=4096)
    wanted = transformers_model(tmp_path, device, dtype=torch.float16)
    away, size = "cpu" if home == 0 else "disk", sum(each.nbytes for each in wanted.parameters())
    placement = place(tmp_path, device_map="optimal", dtype="float16", max_memory={home: size - 1, away: 2**30})
    assert placement.device_map["model.embed_tokens"] == away
    assert placement.device_map["lm_head"] == home
    model = load(tmp_path, placement)
    for _ in range(2):
        assert torch.equal(logits(model, device), logits(wanted, device))


def test_a_gpu_that_lags_behind_reads_its_weights_before_others_are_laid_over_them(
    tmp_path: Path, device: str, home: Device
) -> None:
    make_checkpoint(tmp_path, "llama", dtype="float16", num_hidden_layers=8)
    wanted = transformers_model(tmp_path, device, dtype=torch.float16)
    model = load(tmp_path, {"": home, "model.layers": "cpu"}, dtype="float16")

    def lag(module: torch.nn.Module, arguments: Any) -> None:
        if device == "cuda":
            torch.cuda._sleep(20_000_000)  # cycles: some milliseconds, many times as long as its copies take

    for block in model.model.layers:
        block.register_forward_pre_hook(lag)
    for _ in range(3):
        assert torch.equal(logits(model, device), logits(wanted, device))


@pytest.mark.parametrize(("stored", "made"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "float16")])
def test_what_crosses_in_many_pieces_arrives(device: str, stored: str, made: str) -> None:
    if device != "cuda":
        pytest.skip("copies to a GPU alone have a way of their own")
    crossing, generator = Crossing(torch.device("cuda", 0)), torch.Generator().manual_seed(1)
    source = torch.randn(5, BLOCK // 4 + 77, generator=generator).to(getattr(torch, stored))
    target = torch.empty_like(source, dtype=getattr(torch, made), device="cuda")
    for part in (source, source.flip(0)):
        with crossing.after_this() as copy:
            copy(target, part)
        assert torch.equal(target.cpu(), part.to(target.dtype))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("family", CAUSAL)
def test_generation(tmp_path: Path, device: str, home: Device, family: str, away: str, together: int) -> None:
    """Also in several lanes that share what is brought."""
    make_checkpoint(tmp_path, family, dtype="float16")
    wanted = transformers_model(tmp_path, device, dtype=torch.float16)
    model = load(tmp_path, spread(wanted, home, AWAY[away]), dtype="float16")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompts = [sample_inputs(wanted, seed=seed)["input_ids"].to(device) for seed in range(together)]
    made: dict[int, torch.Tensor] = {}

    def generate(number: int) -> None:
        with torch.inference_mode():
            made[number] = model.generate(prompts[number], **options)

    loaded(model).stream.together(model, generate, range(together), together)
    for number, prompt in enumerate(prompts):
        assert torch.equal(made[number], wanted.generate(prompt, **options))


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized(tmp_path: Path, device: str, home: Device, family: str, scheme: str, away: str) -> None:
    pytest.importorskip("bitsandbytes")
    widths = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    plain = make_checkpoint(tmp_path / "plain", family, dtype="float16", **widths)
    quantize_checkpoint(plain, tmp_path / "quantized", scheme=scheme)
    wanted = transformers_model(tmp_path / "quantized", device)
    model = load(tmp_path / "quantized", spread(wanted, home, AWAY[away]))
    assert torch.equal(logits(model, device), logits(wanted, device))
    assert torch.equal(logits(model, device), logits(wanted, device))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_there_gives_the_same_bytes(tmp_path: Path, device: str, scheme: str) -> None:
    plain = make_checkpoint(tmp_path / "plain", "llama", dtype="float16", hidden_size=64, intermediate_size=128)
    for name in ("cpu", device):
        quantize_checkpoint(plain, tmp_path / f"on-{name}", scheme=scheme, device=name)
    one, other = (sorted((tmp_path / f"on-{name}").glob("*.safetensors")) for name in ("cpu", device))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
