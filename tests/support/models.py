"""Tiny real models of many architectures, saved the ways real ones are, with a tokenizer that takes any text.

`make_checkpoint(tmp_path / "opt", "opt")` gives a directory that `from_pretrained` loads. A model has well under a
million parameters; its weights depend on the seed alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

BYTES = 256
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
VOCABULARY = 264
"""The tokenizer's 260 tokens, rounded up as real models do."""

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
"""What git-lfs leaves in place of a file that was not fetched."""

_POSITIONS = {"max_position_embeddings": 128}
_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        **_POSITIONS,
    }),
    "llama": ("Llama", {**_WIDTHS, "num_key_value_heads": 2, **_POSITIONS, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", {**_WIDTHS, **_POSITIONS, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {**_WIDTHS, "num_key_value_heads": 2, **_POSITIONS}),
    "mixtral": ("Mixtral", {
        **_WIDTHS, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        **_POSITIONS,
    }),
    "qwen2": ("Qwen2", {**_WIDTHS, "num_key_value_heads": 2, **_POSITIONS, "tie_word_embeddings": True}),
    "phi": ("Phi", {**_WIDTHS, **_POSITIONS}),
}  # fmt: skip
_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "BertForMaskedLM", {**_WIDTHS, **_POSITIONS}),
    "roberta": ("Roberta", "RobertaForMaskedLM", {**_WIDTHS, "max_position_embeddings": 130}),
    "t5": ("T5", "T5ForConditionalGeneration", {
        "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    }),
    "bart": ("Bart", "BartForConditionalGeneration", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **_POSITIONS,
    }),
    "vit": ("ViT", "ViTForImageClassification", {**_WIDTHS, "image_size": 32, "patch_size": 8}),
}  # fmt: skip

ARCHITECTURES = (*_CAUSAL, *_OTHERS)
CAUSAL = tuple(_CAUSAL)


def tiny_config(architecture: str = "opt", **changes: Any) -> Any:
    """A transformers config of a tiny model; `changes` override its fields."""
    import transformers

    if architecture in _CAUSAL:
        prefix, fields = _CAUSAL[architecture]
    else:
        prefix, _, fields = _OTHERS[architecture]
    tokens = {} if architecture == "vit" else _TOKENS
    return getattr(transformers, f"{prefix}Config")(**{**tokens, **fields, **changes})


def tiny_model(architecture: str = "opt", *, seed: int = 0, dtype: str = "float32", **changes: Any) -> Any:
    """A tiny model with random weights, in evaluation mode."""
    import torch
    import transformers

    config = tiny_config(architecture, **changes)
    name = f"{_CAUSAL[architecture][0]}ForCausalLM" if architecture in _CAUSAL else _OTHERS[architecture][1]
    if architecture == "gpt2":
        name = "GPT2LMHeadModel"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = getattr(transformers, name)(config)
        for parameter in model.parameters():
            # Zero biases would hide a swapped pair, and small weights a quantization that is off.
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(getattr(torch, dtype)).eval()


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges: one token per UTF-8 byte, after four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


WORDS = ("the", "cat", "sat", "on", "a", "mat", "hello", "world", "paris", "is", "in", "france")


def word_tokenizer() -> Any:
    """A tokenizer of word pieces as BERT's: words of `WORDS`, else letters; it has a mask, and tells pairs apart."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    tokens = [
        *special.values(),
        *WORDS,
        *(f"{mark}{letter}" for mark in ("", "##") for letter in letters if letter != "a" or mark),
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)


def make_with_head(out: Path, architecture: str, head: str, *, tokenizer: Any = None, **changes: Any) -> Path:
    """A saved tiny model of the class that ends with `head` (`ForSequenceClassification`), and a tokenizer: left out,
    `word_tokenizer`; False: none."""
    import torch
    import transformers

    prefix = _CAUSAL[architecture][0] if architecture in _CAUSAL else _OTHERS[architecture][0]
    config = tiny_config(architecture, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}{head}")(config)
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=float(norm), std=0.05 if parameter.ndim == 1 else 0.3)
    save_model(model.eval(), out, tokenizer=False)
    if tokenizer is not False:
        (tokenizer or word_tokenizer()).save_pretrained(out)
    return out


def save_model(
    model: Any,
    out: Path,
    *,
    format: Literal["safetensors", "bin"] = "safetensors",
    max_shard_size: int | str = "5GB",
    tokenizer: bool = True,
) -> Path:
    """Saves a transformers model as a checkpoint directory: weights, config and, unless it sees, a tokenizer."""
    if format == "safetensors":
        model.save_pretrained(out, max_shard_size=max_shard_size)
    else:
        from huggingface_hub import save_torch_model

        out.mkdir(parents=True, exist_ok=True)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(out)
        if model.can_generate():
            model.generation_config.save_pretrained(out)
        save_torch_model(model, out, max_shard_size=max_shard_size, safe_serialization=False)
    if tokenizer and model.config.model_type != "vit":
        tiny_tokenizer().save_pretrained(out)
    return out


def make_checkpoint(
    out: Path,
    architecture: str = "opt",
    *,
    format: Literal["safetensors", "bin"] = "safetensors",
    max_shard_size: int | str = "5GB",
    dtype: str = "float32",
    seed: int = 0,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A saved tiny model of one of `ARCHITECTURES`."""
    model = tiny_model(architecture, seed=seed, dtype=dtype, **changes)
    return save_model(model, out, format=format, max_shard_size=max_shard_size, tokenizer=tokenizer)


def sample_inputs(model: Any, *, length: int = 7, seed: int = 0) -> dict[str, Any]:
    """Inputs for one forward pass of a tiny model: two rows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator, dtype=model.dtype)}
    tokens = torch.randint(4, BYTES, (2, length), generator=generator)
    extra = {"decoder_input_ids": tokens[:, :3]} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, **extra}


def forward(model: Any) -> Any:
    """The logits of `sample_inputs`, as float32."""
    import torch

    with torch.inference_mode():
        return model(**sample_inputs(model)).logits.float()
