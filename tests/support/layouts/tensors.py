"""Tensors: tied, of mixed dtypes, missing, left over, under names of other days; and configs that fit them or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.models import make_checkpoint

from .families import family
from .layout import change_config, layout, llama, renamed, take, weights, write


@layout("equal")
def tied_and_stored_once(folder: Path) -> None:
    make_checkpoint(folder, "opt")


@layout("equal")
def tied_and_stored_twice(folder: Path) -> None:
    make_checkpoint(folder, "opt")
    tensors = weights(folder)
    write(folder, {**tensors, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()})


@layout("equal")
def tied_by_the_config_and_stored_apart(folder: Path) -> None:
    make_checkpoint(folder, "opt")
    tensors = weights(folder)
    write(folder, {**tensors, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"] + 1})


@layout("equal")
def tied_to_what_is_stored_under_another_name(folder: Path) -> None:
    """MADLAD's T5: no `shared`, an embedding of the decoder, and a head of its own."""
    make_checkpoint(folder, "t5", tie_word_embeddings=False)
    write(folder, renamed(take(folder), {"shared.weight": "decoder.embed_tokens.weight"}))
    change_config(folder, tie_word_embeddings=None)


@layout("equal")
def tied_and_only_the_head_is_stored(folder: Path) -> None:
    make_checkpoint(folder, "qwen2")
    tensors = weights(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write(folder, tensors)


@layout("equal")
def dtypes_mixed(folder: Path) -> None:
    tensors = llama(folder)
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    write(folder, {name: tensor.to(kinds[place % 4]) for place, (name, tensor) in enumerate(tensors.items())})


@layout("equal")
def float64(folder: Path) -> None:
    write(folder, {name: tensor.double() for name, tensor in llama(folder).items()})


@layout("equal")
def float8_without_scales(folder: Path) -> None:
    write(folder, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in llama(folder).items()})


@layout("equal")
def no_metadata(folder: Path) -> None:
    save_file(llama(folder), folder / "model.safetensors")


@layout("equal")
def metadata_that_is_null(folder: Path) -> None:
    llama(folder)
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'{"format":"pt"}', b"null           ")
    (folder / "model.safetensors").write_bytes(data[:8] + header + data[8 + length :])


@layout("equal")
def metadata_of_a_trainer(folder: Path) -> None:
    write(folder, llama(folder), format="pt", step="1000", author="Ünï")


@layout("bigpipe refuses", because="transformers makes up the tensor that is missing")
def tensor_missing(folder: Path) -> None:
    tensors = llama(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write(folder, tensors)


@layout(
    "bigpipe refuses",
    because="a tensor that belongs to nothing means another class was saved",
)
def tensor_of_nothing(folder: Path) -> None:
    write(folder, {**llama(folder), "model.layers.0.gate.weight": torch.ones(3)})


@layout("equal")
def tensors_that_the_class_ignores(folder: Path) -> None:
    """Buffers that earlier versions of transformers saved."""
    make_checkpoint(folder, "gpt2")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in range(2)}
    scalars = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    write(folder, {**weights(folder), **masks, **scalars})


@layout("equal")
def rotary_frequencies(folder: Path) -> None:
    """Stored by transformers before 4.31."""
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    write(folder, {**llama(folder), **frequencies})


@layout("equal")
def position_ids(folder: Path) -> None:
    make_checkpoint(folder, "bert")
    ids = {"bert.embeddings.position_ids": torch.arange(128).expand(1, -1).contiguous()}
    write(folder, {**weights(folder), **ids})


@layout("equal")
def layers_that_predict_more_tokens(folder: Path) -> None:
    """Published beside the model, and left out by its class on purpose."""
    family("qwen3_next")(folder)
    write(folder, {**take(folder), "mtp.fc.weight": torch.ones(64, 128), "mtp.norm.weight": torch.ones(64)})


@layout("equal")
def gamma_and_beta(folder: Path) -> None:
    """How TensorFlow names what a layer norm holds: the first BERTs."""
    make_checkpoint(folder, "bert")
    write(folder, renamed(take(folder), {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}))


@layout("equal")
def weight_norm_by_its_old_names(folder: Path) -> None:
    """Before torch's parametrizations."""
    family("wav2vec2")(folder)
    olds = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    write(folder, renamed(take(folder), olds))


@layout("equal")
def base_model_under_the_name_of_a_whole_one(folder: Path) -> None:
    """`architectures` says LlamaModel, and the names carry `model.` as in the class with a head."""
    tensors = llama(folder)
    del tensors["lm_head.weight"]
    write(folder, tensors)
    change_config(folder, architectures=["LlamaModel"])


@layout("equal")
def base_model_by_its_own_names(folder: Path) -> None:
    tensors = llama(folder)
    del tensors["lm_head.weight"]
    write(folder, renamed(tensors, {"model.": ""}))
    change_config(folder, architectures=["LlamaModel"])


@layout("equal")
def base_model_from_a_whole_one(folder: Path) -> None:
    llama(folder)
    change_config(folder, architectures=["LlamaModel"])


@layout("bigpipe refuses", because="transformers makes up the head")
def head_that_was_never_trained(folder: Path) -> None:
    make_checkpoint(folder, "bert")
    write(folder, {name: tensor for name, tensor in weights(folder).items() if name.startswith("bert.")})


@layout("bigpipe refuses", because="transformers makes up every tensor")
def names_of_torch_compile(folder: Path) -> None:
    write(folder, {f"_orig_mod.{name}": tensor for name, tensor in llama(folder).items()})


@layout("both refuse")
def vocabulary_of_another_size(folder: Path) -> None:
    llama(folder)
    change_config(folder, vocab_size=300)


@layout("bigpipe refuses", because="transformers makes up the layer that is missing")
def config_with_one_layer_more(folder: Path) -> None:
    llama(folder)
    change_config(folder, num_hidden_layers=3)


@layout(
    "bigpipe refuses",
    because="a third of the weights would be left out",
)
def config_with_one_layer_less(folder: Path) -> None:
    llama(folder)
    change_config(folder, num_hidden_layers=1)


@layout("equal")
def experts_one_by_one(folder: Path) -> None:
    """As Mixtral was published: the class holds them fused."""
    make_checkpoint(folder, "mixtral")
    assert any(".experts.3." in name for name in weights(folder))


@layout("both refuse")
def expert_missing(folder: Path) -> None:
    experts_one_by_one(folder)
    write(folder, {name: tensor for name, tensor in weights(folder).items() if ".experts.2.w1" not in name})


@layout("equal")
def names_of_llava_since_4_52(folder: Path) -> None:
    """transformers writes the older ones again since 5."""
    family("llava")(folder)
    names = {
        "language_model.lm_head": "lm_head", "language_model.model": "model.language_model",
        "vision_tower": "model.vision_tower", "multi_modal_projector": "model.multi_modal_projector",
    }  # fmt: skip
    write(folder, renamed(take(folder), names))


@layout("equal")
def torch_dtype_of_earlier_configs(folder: Path) -> None:
    llama(folder, dtype="float16")
    change_config(folder, dtype=None, torch_dtype="float16", transformers_version="4.20.0")


@layout("equal")
def config_with_a_key_twice(folder: Path) -> None:
    """The later one counts, as json reads it."""
    llama(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"num_hidden_layers": 7,', 1))


@layout("both refuse")
def config_that_is_missing(folder: Path) -> None:
    llama(folder)
    (folder / "config.json").unlink()


@layout("both refuse")
def config_cut_short(folder: Path) -> None:
    llama(folder)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:-20])


@layout("both refuse")
def config_of_a_type_nobody_knows(folder: Path) -> None:
    llama(folder)
    change_config(folder, model_type="llamma", architectures=["LlammaForCausalLM"])


@layout("bigpipe refuses", because="transformers goes by the type, and the weights fit both classes")
def config_of_another_type_than_its_class(folder: Path) -> None:
    llama(folder)
    change_config(folder, model_type="gemma")


@layout("equal")
def config_whose_class_another_type_shares(folder: Path) -> None:
    """transformers' own tables give InternLM 3 the class of Llama."""
    llama(folder)
    change_config(folder, model_type="internlm3")


@layout("both refuse")
def quantization_that_is_a_text(folder: Path) -> None:
    llama(folder)
    change_config(folder, quantization_config="int8")


@layout("equal")
def config_with_nan(folder: Path) -> None:
    llama(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"loss_weight": NaN, "bound": -Infinity,', 1))


def buffered() -> type[Any]:
    """With buffers of every dtype, a parameter without elements and one without dimensions."""
    import transformers

    class Buffered(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.linear = torch.nn.Linear(4, 3)
            self.norm = torch.nn.BatchNorm1d(3)
            self.nothing = torch.nn.Parameter(torch.empty(0, 5))
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.gamma = torch.nn.Parameter(torch.ones(3))  # of no layer norm
            kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool)
            for kind in kinds:
                self.register_buffer(f"of_{str(kind).removeprefix('torch.')}", torch.tensor([0, 1, 2, 3]).to(kind))
            self.post_init()

    return Buffered


@layout("equal", own=buffered)
def buffers_of_every_dtype(folder: Path) -> None:
    from transformers import LlamaConfig

    model = buffered()(LlamaConfig())
    for buffer in model.buffers():
        buffer.add_(1) if buffer.dtype != torch.bool else None
    model.save_pretrained(folder)


@layout("equal", own=buffered)
def buffers_in_a_torch_file(folder: Path) -> None:
    buffers_of_every_dtype(folder)
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
