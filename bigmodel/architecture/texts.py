"""What a config says of the part that reads and writes text, and of how long a text may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
POSITIONS = (
    "max_position_embeddings", "n_positions", "max_target_positions", "max_decoder_position_embeddings", "max_seq_len",
)  # fmt: skip
OFFSET = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text",
                    "longformer", "mpnet", "ibert", "esm", "luke", "lilt", "markuplm", "xmod"})  # fmt: skip
"""Model types that number positions from behind the padding token's, so that the table has so many less for tokens."""

SENSES = frozenset({"image_size", "num_channels", "num_mel_bins", "conv_dim", "feature_projection_input_dim"})
"""Fields of configs of what sees or hears: positions there are none of a text, whatever other fields are called."""

CAUSAL_AS_DECODER = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
})  # fmt: skip
"""Model types that are encoders unless their config says `is_decoder`, whatever their class is called."""


def text_config(config: Config) -> Config:
    """The part of a nested config that generates text: transformers' `get_text_config(decoder=True)`."""
    for name in (
        "decoder", "decoder_config", "generator", "text_config", "llm_config", "language_config", "thinker_config",
    ):  # fmt: skip
        nested = config.get(name)
        if isinstance(nested, Mapping) and nested:
            return text_config(nested)
    return config


def looks_ahead(config: Config) -> str | None:
    """Return why what a model says of a token depends on those behind it, in words; None where it does not. config:
    complete. Its numbers for the next token are then none: it has seen it."""
    text = text_config(config)
    kind = text.get("model_type")
    if kind == "xlnet":
        return "XLNet"
    if kind in ("xlm", "flaubert") and not text.get("causal"):
        return "causal: false"
    if kind in CAUSAL_AS_DECODER and not text.get("is_decoder"):
        return "is_decoder: false"
    if text.get("use_bidirectional_attention") in (True, "all"):
        return f"use_bidirectional_attention: {str(text['use_bidirectional_attention']).lower()}"
    return "is_causal: false" if text.get("is_causal") is False else None


def position_limit(config: Config) -> int | None:
    """Return the most tokens that a complete config's positions are made for, of an encoder-decoder those of what it
    makes; None where there is no last one.

    Rotary positions that are scaled reach `factor` times as far as they did before: transformers computes them so for
    YaRN, linear, dynamic, longrope and llama3 (modeling_rope_utils.py), whatever max_position_embeddings says. Where
    layers differ, the least far reaching ones count.
    """
    text = text_config(config)
    if text.get("relative_attention_num_buckets") and "d_kv" in text:
        return None  # T5's distances know no last position, whatever its config says
    known: list[int] = [text[name] for name in POSITIONS if type(text.get(name)) is int and text[name] > 0]
    if not known:
        return None
    limit = min(known)
    if text.get("model_type") in OFFSET and type(padding := text.get("pad_token_id")) is int:
        return int(limit - padding - 1)
    scaling = text.get("rope_parameters") or text.get("rope_scaling")
    return _scaled(limit, scaling) if isinstance(scaling, Mapping) else limit


def read_limit(config: Config) -> int | None:
    """Return the most tokens that a complete config's positions are made for, of a text that is read; None where there
    is no last one. An encoder-decoder's encoder may have positions of its own; all others, and one whose encoder sees
    or hears, have those of `position_limit`."""
    encoder, own = config.get("encoder"), config.get("max_encoder_position_embeddings")
    if not config.get("is_encoder_decoder"):
        return position_limit(config)
    if isinstance(encoder, Mapping) and encoder:
        return position_limit(config if SENSES & encoder.keys() else encoder)
    return own if type(own) is int else position_limit(config)


def together_limit(config: Config) -> int | None:
    """Return up to how many tokens texts that are computed together get the numbers of each alone; None where they
    always do. config: complete.

    Beyond, `dynamic` and `longrope` turn all texts of a batch by the frequencies of its longest one
    (`dynamic_rope_update` of transformers' modeling_rope_utils.py), and indexers choose `index_topk` of all places:
    which of several equal ones depends on how many there are (DeepSeek-V3.2).
    """
    parts = list(_parts(config))
    chosen = [count for part in parts if type(count := part.get("index_topk")) is int]
    return min([*chosen, *(limit for part in parts for limit in _turning_points(part))], default=None)


def _parts(config: Config) -> Iterator[Config]:
    """A config and those nested in it."""
    yield config
    for nested in config.values():
        if isinstance(nested, Mapping):
            yield from _parts(nested)


def _turning_points(config: Config) -> Iterator[int]:
    """Of one part of a config: after how many tokens the frequencies of its layers become others."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return
    most = config.get("max_position_embeddings")
    for layer in (scaling, *(each for each in scaling.values() if isinstance(each, Mapping))):
        kind = str(layer.get("rope_type", layer.get("type", "default")))
        if kind == "longrope":
            own, before = (part.get("original_max_position_embeddings") for part in (layer, config))
            limit = own or before or most
        else:
            limit = most if "dynamic" in kind else None
        if type(limit) is int:
            yield limit


def _scaled(limit: int, scaling: Config) -> int:
    layers = [layer for layer in scaling.values() if isinstance(layer, Mapping)]
    if layers:
        return min(_scaled(limit, layer) for layer in layers)
    kind, factor = scaling.get("rope_type", scaling.get("type", "default")), scaling.get("factor")
    if kind == "default" or not isinstance(factor, int | float):
        return limit
    before = scaling.get("original_max_position_embeddings")
    return max(limit, int(factor * (before if isinstance(before, int) else limit)))
