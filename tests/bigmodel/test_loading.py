"""What `load` gives is what `from_pretrained` gives: the same bits, for every architecture, format and dtype."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import CAUSAL, forward, make_checkpoint, sample_inputs, tiny_model
from support.tinygpt import GPT
from torch.utils._python_dispatch import TorchDispatchMode

from bigpipe.bigmodel.adapters.unpacking import unpacked
from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.execution import HostMemory, load, loaded
from bigpipe.bigmodel.formats import named, set_apart
from bigpipe.bigmodel.quantization import quantize_checkpoint
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.writing import save_checkpoint
from bigpipe.errors import DoesNotFit, InvalidCheckpoint, UsageError
from bigpipe.trust import Trust

SUPPORT = Path(__file__).parents[1]


def reference(path: Path, **options: Any) -> Any:
    import transformers

    name = json.loads((path / "config.json").read_bytes())["architectures"][0]
    return getattr(transformers, name).from_pretrained(path, **options).eval()


@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2", "bloom", "mixtral", "bert", "t5", "bart", "vit"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_gives_the_logits_of_from_pretrained(tmp_path: Path, architecture: str, stored: str) -> None:
    make_checkpoint(tmp_path, architecture, dtype=stored)
    model, plain = load(tmp_path), reference(tmp_path, dtype=torch.float32)
    assert torch.equal(forward(model), forward(plain))
    assert not model.training
    flags = [{name: parameter.requires_grad for name, parameter in made.named_parameters()} for made in (model, plain)]
    assert flags[0] == flags[1]
    assert model.hf_device_map == {"": "cpu"}


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_multiplies_as_from_pretrained_does(tmp_path: Path, architecture: str, home: str) -> None:
    # for the last tokens of several sequences torch copies a head that takes no gradients once for each
    make_checkpoint(tmp_path, architecture, dtype="float32")
    tokens = sample_inputs(tiny_model(architecture))["input_ids"].repeat(3, 1)
    assert products(load(tmp_path, {"": home}), tokens) == products(reference(tmp_path), tokens)


def products(model: Any, tokens: torch.Tensor) -> Counter[str]:
    """How often each operator that multiplies matrices, or copies, runs while three tokens are made."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(operator)
            seen[name] += name.startswith(("aten.mm", "aten.bmm", "aten.addmm", "aten.clone", "aten.expand"))
            return operator(*args, **(kwargs or {}))

    seen = Counter[str]()
    with torch.no_grad(), Seen():
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    return +seen


@pytest.mark.parametrize("architecture", CAUSAL)
def test_generates_what_from_pretrained_generates(tmp_path: Path, architecture: str) -> None:
    make_checkpoint(tmp_path, architecture, dtype="float16")
    tokens = sample_inputs(tiny_model(architecture))["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = reference(tmp_path, dtype=torch.float32).generate(tokens, **options)
    assert torch.equal(load(tmp_path).generate(tokens, **options), wanted)


@pytest.mark.parametrize("architecture", ["opt", "bert"])
def test_reads_sharded_torch_files_without_torch_load(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, architecture, format="bin", max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.bin"))) > 2
    wanted = forward(reference(tmp_path))
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(forward(load(tmp_path)), wanted)


@pytest.mark.parametrize(("dtype", "architecture"), [("bfloat16", "llama"), ("float16", "t5")])
def test_casts_as_from_pretrained_does(tmp_path: Path, dtype: str, architecture: str) -> None:
    make_checkpoint(tmp_path, architecture)
    wanted, model = reference(tmp_path, dtype=getattr(torch, dtype)), load(tmp_path, dtype=dtype)
    types = {name: parameter.dtype for name, parameter in wanted.named_parameters()}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == types
    assert torch.equal(forward(model), forward(wanted))


def test_some_weights_in_a_dtype_of_their_own(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt", dtype="float16")
    special = {"model.decoder.final_layer_norm.weight": "float32"}
    model = load(tmp_path, dtype="bfloat16", special_dtypes=special)
    wide = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    assert wide == list(special)


def test_buffers_that_no_checkpoint_holds_are_right(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    wanted = dict(reference(tmp_path, dtype=torch.bfloat16).named_buffers())
    found = dict(load(tmp_path, dtype="bfloat16").named_buffers())
    assert list(found) == list(wanted)
    for name, buffer in found.items():
        assert buffer.dtype == wanted[name].dtype
        assert torch.equal(buffer, wanted[name])


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt", dtype="float16")
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert loaded(model).held == {"cpu": held}


def test_weights_stored_apart_and_different_are_not_tied(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "opt")
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    assert torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight + 1)
    assert torch.equal(forward(model), forward(reference(tmp_path)))


def test_weights_in_the_dtype_they_compute_in_are_windows_into_the_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_quantized_checkpoints(tmp_path: Path, architecture: str, scheme: str, home: str) -> None:
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if scheme != "int8":
        options = {
            "load_in_4bit": True, "bnb_4bit_quant_type": scheme[:3],
            "bnb_4bit_use_double_quant": scheme.endswith("double"), "bnb_4bit_compute_dtype": torch.bfloat16,
        }  # fmt: skip
    widths = {"n_embd": 64} if architecture == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    plain = make_checkpoint(tmp_path / "plain", architecture, dtype="float16", **widths)
    config = BitsAndBytesConfig(**options)
    reference(plain, quantization_config=config, dtype=torch.float16).save_pretrained(tmp_path / "quantized")
    wanted = forward(reference(tmp_path / "quantized"))
    model = load(tmp_path / "quantized", {"": home})
    assert torch.equal(forward(model), wanted)
    assert torch.equal(forward(model), wanted)


WHOLE_TILES = {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64}
"""bitsandbytes packs no others for a CPU, and without bigpipe fails on them."""


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_four_bit_weights_are_saved_as_they_were_stored_once_they_have_computed(
    tmp_path: Path, scheme: str, double: bool
) -> None:
    """bitsandbytes packs them for CPUs with AVX512-BF16 at the first forward, and its way back loses the scales."""
    plain = make_checkpoint(tmp_path / "plain", "opt", dtype="float16", **WHOLE_TILES)
    quantize_checkpoint(plain, tmp_path / "small", scheme=scheme, bnb_4bit_use_double_quant=double)
    model: Any = load(tmp_path / "small")
    wanted = forward(model)
    save_checkpoint(model, tmp_path / "again")
    assert torch.equal(forward(model), wanted)
    model(torch.arange(5)[None]).logits.sum().backward()  # the kernel of packed weights has no gradient
    assert model.get_input_embeddings().weight.grad.any()
    forward(model)
    stored, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("small", "again"))
    for found in (again, model.state_dict()):  # the latter is what others save
        assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("double", [False, True])
def test_a_model_of_others_whose_scales_are_rounded_is_not_saved(tmp_path: Path, double: bool) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes packs nothing on this CPU")
    plain = make_checkpoint(tmp_path / "plain", "opt", dtype="float16", **WHOLE_TILES)
    quantize_checkpoint(plain, tmp_path / "small", scheme="nf4", bnb_4bit_use_double_quant=double)
    model = reference(tmp_path / "small")
    save_checkpoint(model, tmp_path / "before")
    forward(model)
    for _ in range(2):
        with pytest.raises(UsageError, match="bitsandbytes rounded the scales of"):
            save_checkpoint(model, tmp_path / "after")
        model.state_dict()


def custom_checkpoint(out: Path) -> Path:
    out.mkdir()
    config = {"vocab_size": 256, "block_size": 64}
    default = GPT.get_default_config()
    vars(default).update(config)
    torch.manual_seed(0)
    model = GPT(default)
    save_file(model.state_dict(), out / "model.safetensors")
    description = {"class": "support.tinygpt:GPT", "config": config, "no_split_module_classes": ["Block"]}
    (out / "bigpipe_architecture.json").write_text(json.dumps(description))
    return out


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_class_of_ones_own(tmp_path: Path, home: str) -> None:
    path = custom_checkpoint(tmp_path / "gpt")
    model = load(path, {"": home}, trust=["support"], base=SUPPORT)
    wanted = GPT(default_config())
    wanted.load_state_dict(load_file(path / "model.safetensors"))
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model.generate(tokens, 5), wanted.generate(tokens, 5))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_quantized_class_of_ones_own(tmp_path: Path, scheme: str, home: str) -> None:
    from bigpipe.bigmodel.quantization import quantize_checkpoint

    trusted: dict[str, Any] = {"trust": ["support"], "base": SUPPORT}
    path = custom_checkpoint(tmp_path / "gpt")
    architecture = describe_architecture(path, sources=Sources(trust=Trust(("support",)), base=SUPPORT))
    quantize_checkpoint(path, tmp_path / "small", scheme=scheme, architecture=architecture)
    model = load(tmp_path / "small", {"": home}, **trusted)
    tokens = torch.arange(12).view(2, 6)
    wanted, found = load(path, dtype="float16", **trusted)(tokens), model(tokens)
    assert found.dtype == torch.float16
    assert 0 < (found - wanted).abs().max() < 0.2
    assert torch.equal(model(tokens), found)


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (33, 128), (7, 192), (32, 100)])
def test_four_bit_matrices_of_any_shape(tmp_path: Path, rows: int, columns: int) -> None:
    import bitsandbytes

    wanted = torch.nn.Sequential(torch.nn.Linear(columns, rows))
    four = bitsandbytes.nn.Linear4bit(columns, rows, compute_dtype=torch.float32, quant_type="nf4")
    four.load_state_dict(wanted[0].state_dict())
    stored = torch.nn.Sequential(four.to("cpu")).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    inputs = torch.randn(3, columns)
    exact = wanted(inputs)
    model = load(tmp_path / "model.safetensors", model=wanted, dtype="float32")
    assert 0 < (model(inputs) - exact).abs().max() < 0.3


def default_config() -> Any:
    config = GPT.get_default_config()
    config.vocab_size, config.block_size = 256, 64
    return config


def test_a_model_of_the_callers(tmp_path: Path) -> None:
    from accelerate import init_empty_weights

    path = custom_checkpoint(tmp_path / "gpt")
    (path / "bigpipe_architecture.json").unlink()
    with init_empty_weights(include_buffers=False):
        empty = GPT(default_config())
    model = load(path, model=empty)
    assert model is empty
    assert torch.equal(model.head.weight, load_file(path / "model.safetensors")["head.weight"])
    with init_empty_weights(include_buffers=True):
        hollow = GPT(default_config())
    with pytest.raises(UsageError, match=r"blocks\.0\.attention\.mask"):
        load(path, model=hollow)
    for block in hollow.blocks:  # a checkpoint may hold it, and this one does not
        block.attention.register_buffer("mask", block.attention.mask, persistent=True)
    with pytest.raises(UsageError, match=r"(?s)blocks\.0\.attention\.mask.*include_buffers=False"):
        load(path, model=hollow)


def test_refuses_a_class_nobody_trusts(tmp_path: Path) -> None:
    path = custom_checkpoint(tmp_path / "gpt")
    with pytest.raises(UsageError, match="trust"):
        load(path, base=SUPPORT)


def test_names_weights_that_are_missing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    told = r"(?s)holds no weights for model\.norm\.weight of LlamaForCausalLM.*, or `architecture` or model= for one of"
    with pytest.raises(InvalidCheckpoint, match=told):
        load(tmp_path)


def test_names_weights_of_the_wrong_shape(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(InvalidCheckpoint, match=r"model\.embed_tokens\.weight has shape \[264, 32\]"):
        load(tmp_path)


def test_a_device_map_must_cover_everything_and_name_real_devices(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(UsageError, match=r"no device for model\.layers\.1.* and \d+ more"):
        load(tmp_path, {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.norm": "cpu"})
    with pytest.raises(UsageError, match="'tape' is not a device"):
        load(tmp_path, {"": "tape"})
    if not torch.cuda.is_available():
        with pytest.raises(DoesNotFit, match="names GPU 1, and this machine has none"):
            load(tmp_path, {"": "cpu", "model.layers.0": 1})


def test_what_a_streamed_model_cannot_do_says_what_to_do(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path / "model", "llama"), {"": "disk"})
    does: list[tuple[str, Callable[[], object]]] = [
        ("save_checkpoint", lambda: model.save_pretrained(tmp_path / "out")),
        ("a second time", lambda: copy.deepcopy(model)),
        *(("in that dtype", getattr(model, name)) for name in ("half", "bfloat16", "float", "double")),
        ("in that dtype", lambda: model.to(torch.float16)),
        ("in that dtype", lambda: model.to("cpu", dtype=torch.bfloat16)),
        ("load it there", lambda: model.to("cuda")),
    ]
    for cure, doing in does:
        with pytest.raises(UsageError, match="the weights of this LlamaForCausalLM are streamed") as error:
            doing()
        assert cure in error.value.cure
    assert model.to("cpu") is model
    assert not (tmp_path / "out").exists()


def test_a_streamed_weight_tells_of_itself_and_gives_no_numbers(tmp_path: Path) -> None:
    """Some of torch's products on a CPU take a tensor on meta, and give memory that nobody has written."""
    model = load(make_checkpoint(tmp_path / "model", "llama"), {"": "cpu", "lm_head": "disk"})
    weight, hidden, file = model.lm_head.weight, torch.ones(1, 32), tmp_path / "state.pt"
    assert (weight.device, weight.dtype, weight.shape) == (torch.device("cpu"), torch.float32, (264, 32))
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.requires_grad
    assert "lm_head.weight, streamed" in repr(weight)
    does: list[Callable[[], object]] = [
        lambda: torch.nn.functional.linear(hidden, weight),
        lambda: hidden @ weight.T,
        lambda: torch.addmm(torch.ones(264), hidden, mat2=weight.t()),
        lambda: weight[torch.tensor([5])],
        lambda: weight.data,
        lambda: model.lm_head.half(),
        lambda: torch.save(model.state_dict(), file),
        lambda: copy.deepcopy(model.lm_head),
    ]
    for doing in does:
        with pytest.raises(UsageError, match=r"lm_head\.weight is streamed") as error:
            doing()
        assert "device_map: {lm_head: cpu}" in error.value.cure
    assert not file.exists()
    cast = load(tmp_path / "model", dtype="float16", memory=HostMemory(cast=0, widen=0))
    with pytest.raises(UsageError) as error:
        hidden @ cast.lm_head.weight.T
    keeping = {"lm_head.weight": "float16"}
    assert "special_dtypes: {lm_head.weight: float16}" in error.value.cure
    kept = load(tmp_path / "model", dtype="float16", special_dtypes=keeping, memory=HostMemory(cast=0, widen=0))
    assert not kept.lm_head.weight.is_meta


def test_the_device_of_a_streamed_model_is_where_its_inputs_belong(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    model = load(tmp_path, {"": "disk"})
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    tokens = torch.tensor([[5, 6, 7]]).to(model.device)
    assert torch.equal(
        model.generate(tokens, max_new_tokens=3, prompt_lookup_num_tokens=2),
        load(tmp_path).generate(tokens, max_new_tokens=3, prompt_lookup_num_tokens=2),
    )


def test_what_is_said_beside_four_bit_codes_is_not_believed(tmp_path: Path) -> None:
    """Before bitsandbytes is handed it, and before an adapter is merged into it."""
    pytest.importorskip("bitsandbytes")
    quantize_checkpoint(make_checkpoint(tmp_path / "model", "llama"), tmp_path / "packed", scheme="nf4")
    file = tmp_path / "packed/model.safetensors"
    tensors = load_file(file)
    projection = "model.layers.0.mlp.up_proj"
    name = f"{projection}.weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(tensors[name].numpy()))
    for shape, told in ((said["shape"][::-1], r"shape is \[32, 64\], not \[64, 32\]"), (5, "shape is 5")):
        state = torch.frombuffer(bytearray(json.dumps({**said, "shape": shape}).encode()), dtype=torch.uint8)
        save_file({**tensors, name: state}, file, {"format": "pt"})
        with pytest.raises(InvalidCheckpoint, match=f"{name}.*{told}"):
            load(tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / "packed")
    with pytest.raises(InvalidCheckpoint, match=f"{name}.*shape is 5"):
        unpacked(checkpoint, projection, set_apart(checkpoint.tensors, named("nf4"))[1][projection])
