"""How many bytes the cache of keys, values and states takes while a model generates.

The shapes are those of transformers 5.23 (`cache_utils.py`), checked against the caches that real models fill: what
it stores is not always what the paper says (Falcon's grouped heads are cached once per query head).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, encodes, position_limit, text_config

from .stored_widths import cached_elements

Config = Mapping[str, Any]

SLIDING = frozenset({"sliding_attention", "hybrid_sliding", "reference_sliding_attention"})
LINEAR = frozenset({"linear_attention", "mamba", "mamba2", "hybrid", "hybrid_sliding", "conv"})
NO_CACHE = frozenset({"moe", "mlp", "dummy"})
ATTENTION = frozenset({"full_attention", "attention", "chunked_attention", "hybrid"}) | SLIDING
STATE_BYTES = 4
"""Recurrent states are kept in float32 whatever the model's dtype."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Sizes in bytes for the whole batch."""

    bytes: int
    """Once `length` tokens have been seen."""
    prefill_extra: int
    """Held besides until the first decoding step: a window is a view into the whole prompt's keys."""
    exact: bool
    """False where a layer is of a kind not known here and was counted as full attention or as one state per head."""
    kind: str
    """For people: `MLA, 61 layers`."""


NOTHING = Cache(0, 0, True, "none")


def cache_of(
    architecture: Architecture,
    batch_size: int,
    length: int,
    itemsize: int,
    output_length: int | None = None,
    *,
    headless: bool = False,
) -> Cache:
    """What a model caches: as observed of its class, else by the formulas of `kv_cache`, whose arguments these are.
    headless: its body runs alone; an encoder caches nothing."""
    if not architecture.generates or (headless and encodes(architecture.config)):
        return NOTHING
    if architecture.cache is None:
        found = kv_cache(architecture.config, batch_size, length, itemsize, output_length)
        return _at_most(found, architecture, batch_size * length * itemsize) if architecture.outlined else found
    total = extra = 0
    for tensor in architecture.cache:
        width = batch_size * tensor.count * (tensor.itemsize or itemsize)
        kept = length if tensor.window is None else min(length, tensor.window)
        elements = tensor.elements + int(kept * tensor.per_token)
        total += width * elements
        extra += width * max(int(length * tensor.viewed_per_token) - elements, 0)
    text = text_config(architecture.config)
    exact = all(tensor.per_token.is_integer() for tensor in architecture.cache)
    return Cache(total, extra, exact, _describe(text, layer_kinds(text)))


def _at_most(found: Cache, architecture: Architecture, tokens: int) -> Cache:
    """Of a model whose class is unknown: as wide as its projections are, and never exact. found: by its config alone,
    which counts where nothing is seen that attends, for encoder-decoders, that keep two kinds, and where layers keep
    states that are larger. tokens: their bytes at one element each."""
    elements = 0 if encodes(architecture.config) else cached_elements(architecture)
    states = not LINEAR.isdisjoint(layer_kinds(text_config(architecture.config)))
    if not elements or (states and found.bytes > elements * tokens):
        return replace(found, exact=False)
    return Cache(elements * tokens, 0, False, f"{elements} elements a token, as its projections are stored")


def kv_cache(config: Config, batch_size: int, length: int, itemsize: int, output_length: int | None = None) -> Cache:
    """The cache of a generating model with a complete config, `itemsize` bytes per key element.

    Encoder-decoders: `length` tokens of input and `output_length` of output (None: as many; no more than the decoder's
    positions are made for), for the cross and the self attention.
    """
    text = text_config(config)
    if encodes(config):
        return _encoder_decoder(text, batch_size, length, itemsize, length if output_length is None else output_length)
    kinds = layer_kinds(text)
    per_token = token_elements(text) * itemsize * batch_size
    total = extra = 0
    state = _state_bytes(text, itemsize)
    for kind in kinds:
        if kind in LINEAR:
            total += (_matrix_state(text) if state is None else state) * batch_size
        if kind in NO_CACHE or (kind in LINEAR and kind not in ATTENTION):
            continue
        kept = min(length, _window(text, kind, length))
        total += kept * per_token
        extra += (length - kept) * per_token
    known = all(kind in ATTENTION or kind in NO_CACHE or (kind in LINEAR and state is not None) for kind in kinds)
    return Cache(total, extra, known and bool(kinds), _describe(text, kinds))


def _describe(text: Config, kinds: list[str]) -> str:
    names = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    attention = _attention_name(text)
    parts = []
    for kind, count in names.items():
        words = {"full_attention": attention, "attention": attention, "sliding_attention": f"sliding {attention}"}
        parts.append(f"{count} × {words.get(kind, kind.replace('_', ' '))}")
    return ", ".join(parts)


def _attention_name(text: Config) -> str:
    if _latent(text):
        return "MLA"
    heads, queries = key_value_heads(text), _first(text, "num_attention_heads", "n_head", "num_heads") or 0
    return "MQA" if heads == 1 and queries > 1 else "GQA" if heads < queries else "MHA"


def layer_kinds(text: Config) -> list[str]:
    """The kind of each layer, in order: `layer_types`, or what transformers infers without it."""
    kinds = text.get("layer_types") or text.get("layers_block_type")
    if kinds:
        # Gemma 3n's last layers attend to the keys of earlier ones
        return [str(kind) for kind in kinds][: len(kinds) - int(_first(text, "num_kv_shared_layers") or 0)]
    count = _first(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0
    if text.get("model_type") == "longcat_flash":
        return ["full_attention"] * (2 * text["num_layers"])  # two in each layer
    if text.get("model_type") in ("jamba",):
        period, offset = text["attn_layer_period"], text["attn_layer_offset"]
        return ["full_attention" if index % period == offset else "mamba" for index in range(count)]
    if text.get("state_size") and not _first(text, "num_attention_heads", "n_head"):
        return ["mamba"] * count
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        return ["sliding_attention"] * count
    return ["chunked_attention" if text.get("attention_chunk_size") else "full_attention"] * count


def _window(text: Config, kind: str, length: int) -> int:
    """Tokens a layer keeps: one less than its window, for the next token completes it."""
    size = text.get("sliding_window") if kind in SLIDING else None
    if kind == "chunked_attention":
        size = text.get("attention_chunk_size")
    return max(int(size) - 1, 0) if size else length


def token_elements(text: Config) -> int:
    """Cached elements per token and attention layer."""
    if _latent(text):
        return int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])
    return 2 * key_value_heads(text) * head_dim(text)


def _latent(text: Config) -> bool:
    return bool(text.get("kv_lora_rank") and text.get("qk_rope_head_dim"))


def key_value_heads(text: Config) -> int:
    kind, queries = text.get("model_type"), int(_first(text, "num_attention_heads", "n_head", "num_heads") or 1)
    if kind == "falcon":
        return queries if text.get("new_decoder_architecture") or not text.get("multi_query", True) else 1
    if kind == "gpt_bigcode":
        return 1 if text.get("multi_query", True) else queries
    if kind in ("gpt_neox", "bloom"):
        return queries  # they ignore a stray num_key_value_heads
    return int(_first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or queries)


def head_dim(text: Config) -> int:
    explicit = _first(text, "head_dim", "d_kv", "kv_channels", "attention_head_dim")
    if explicit:
        return int(explicit)
    hidden = int(_first(text, "hidden_size", "d_model", "n_embd", "dim") or 0)
    return hidden // int(_first(text, "num_attention_heads", "n_head", "num_heads", "n_heads") or 1)


def _first(config: Config, *names: str) -> Any:
    """The first of these fields that is a number; pyramids have lists of them."""
    return next((config[name] for name in names if isinstance(config.get(name), int | float)), None)


def _state_bytes(text: Config, itemsize: int) -> int | None:
    """One linear-attention layer's states for one sequence: (last inputs of the convolution, recurrent state).

    None where the config tells their sizes in no way known here.
    """
    if text.get("linear_num_value_heads"):  # gated delta net: Qwen3-Next and its kin
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        recurrent = values * text["linear_key_head_dim"]
        return int((2 * keys + values) * text["linear_conv_kernel_dim"] * itemsize + recurrent * STATE_BYTES)
    if text.get("conv_L_cache"):  # LFM2: a short convolution alone
        return int(text["hidden_size"] * text["conv_L_cache"] * itemsize)
    fixed = text.get("model_type") in ("mamba", "falcon_mamba")
    expand = _first(text, "expand", "mamba_expand")
    if not fixed and expand is None:
        return None
    kernel = int(_first(text, "conv_kernel", "mamba_d_conv") or 4)
    state = int(_first(text, "state_size", "mamba_d_state", "ssm_state_size") or 16)
    inner = int(text["intermediate_size"] if fixed else expand * text["hidden_size"])
    groups = _first(text, "n_groups", "mamba_n_groups")
    channels = inner + 2 * int(groups) * state if groups else inner
    return channels * kernel * itemsize + inner * state * STATE_BYTES


def _matrix_state(text: Config) -> int:
    """Linear attention of an unknown kind: a matrix of head by head dimension for each head."""
    return key_value_heads(text) * head_dim(text) ** 2 * STATE_BYTES


def _encoder_decoder(text: Config, batch_size: int, length: int, itemsize: int, output_length: int) -> Cache:
    layers = int(_first(text, "num_decoder_layers", "decoder_layers", "num_hidden_layers") or 0)
    heads = int(_first(text, "decoder_attention_heads", "num_attention_heads", "num_heads") or 1)
    size = int(_first(text, "d_kv", "head_dim") or int(_first(text, "d_model", "hidden_size") or 0) // heads)
    groups = int(_first(text, "num_key_value_heads") or heads)
    crossed = int(_first(text, "cross_num_key_value_heads") or groups) * int(_first(text, "cross_head_dim") or size)
    seen = int(text.get("max_source_positions") or length) if text.get("num_mel_bins") else length
    answer = min(output_length, position_limit(text) or output_length)
    kinds = text.get("layer_types") or ["full_attention"] * layers
    kept = [min(answer, _window(text, kind, answer)) for kind in kinds]
    width = 2 * itemsize * batch_size
    return Cache(
        bytes=width * (sum(kept) * groups * size + layers * seen * crossed),
        prefill_extra=0,
        exact=layers > 0,
        kind=f"{layers} × self and cross attention",
    )
