"""A config of the same kind of model, made small: narrow, few layers, few experts.

What makes a model the kind that it is stays: its type and classes, its vocabulary, ties and positions, what a picture
or a sound becomes, the ratio of heads to those of keys and values, every kind of layer that it mixes, whether it has
experts. Nothing is known of single families but the names that their configs give to sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]

STEP = 64
"""Widths are multiples of it, which the blocks of four-bit formats and eight heads of eight divide."""
HEAD = 16
"""Channels of a head, at the most."""
LAYERS = 4
"""Of a stack, at the most, unless it takes more to have every kind of layer."""
MOST_LAYERS = 16
EXPERTS, CHOSEN = 4, 2
RANK = 32
"""Of a factored projection, and of what a state keeps, at the most."""

WIDTH = re.compile(
    r"(?:^|_)(?:hidden_size\w*|(?:intermediate|ffn_hidden|embedding|latent)_size|d_model|d_ff|d_inner|n_embd|n_embed"
    r"|n_inner|ffn_dim|hidden_dim|inner_dim|mlp_dim|embed_dim|model_dim|proj_dim|projection_dim|cross_attention_dim"
    r"|lru_width|intermediate_dim|dim|dim_ff|hidden_channels|d_ssm)$"
)
NOT_WIDTH = re.compile(r"head_dim|rotary|rope|conv|codebook|num_|_per_|kernel|pos|patch|time|mel")
STACK = re.compile(
    r"^(?:num_(?:\w+_)?layers|n_layers?|(?:encoder|decoder)_layers|depth|num_(?:\w+_)?blocks|n_blocks"
    r"|num_(?:encoder|decoder)_blocks)$"
)
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
WIDE = ("hidden_size", "d_model", "n_embd", "n_embed")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads")
HEAD_SIZES = ("head_dim", "d_kv", "d_head", "attention_head_dim", "kv_channels", "qk_nope_head_dim", "qk_rope_head_dim",
              "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim",
              "mamba_headdim", "global_head_dim")  # fmt: skip
RANKS = ("q_lora_rank", "kv_lora_rank", "state_size", "ssm_state_size", "mamba_d_state", "mamba_dt_rank",
         "time_step_rank", "index_n_heads", "index_topk")  # fmt: skip
MANY_EXPERTS = re.compile(r"^(?:num_(?:local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts)$")
TOP = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "moe_top_k",
       "top_k_experts", "num_selected_experts", "router_top_k")  # fmt: skip
PERIODS = ("attn_layer_period", "expert_layer_period", "full_attention_interval", "decoder_sparse_step",
           "encoder_sparse_step", "sliding_window_pattern", "interleave_moe_layer_step", "moe_layer_freq",
           "no_rope_layer_interval", "attention_every_n_layers")  # fmt: skip
"""Every so many layers one is of another kind."""
FROM = ("first_k_dense_replace", "moe_layer_start_index")
"""Up to this layer they are of another kind."""
SOME = ("cross_attention_layers", "mlp_only_layers", "dense_layers", "full_attn_idxs", "attn_layer_indices")
"""Numbers of layers that are of another kind."""
PATTERN = re.compile(r"(?:^|_)pattern$")
"""A letter per layer."""
SPREAD = re.compile(r"(?:_indexes|_indices|_feature_layers|_layer_ids)$")
"""Numbers of layers whose outputs are taken."""


def shrunk(config: Config, complete: Config = MappingProxyType({})) -> dict[str, Any]:
    """Return the config of a small model of the same kind. Numbers that are small already stay; equal widths stay equal
    wherever they stand, and different ones different. complete: the same with what the class itself fills in
    (`Architecture.config`): sizes that a config leaves out are taken from there."""
    config = _filled(config, complete)
    widths = sorted({value for value in _widths(config) if value > 0})
    narrow = {value: min(value, STEP * rank) for rank, value in enumerate(widths, 1)}
    return _part(config, narrow)


def _filled(config: Config, complete: Config) -> dict[str, Any]:
    """With the sizes that are left out, in parts of it too."""
    found = dict(config)
    for name, value in complete.items():
        if _holds_sizes(value) and "model_type" in value:
            part = config.get(name)
            kind = {} if isinstance(part, Mapping) else {"model_type": value["model_type"]}
            found[name] = _filled(part if isinstance(part, Mapping) else kind, value)
        elif name not in config and _count(value) and _says_size(name):
            found[name] = value
    return found


def _says_size(name: str) -> bool:
    known = (*HEADS, *KEY_HEADS, *HEAD_SIZES, *RANKS, *TOP)
    return _is_width(name) or name in known or any(each.match(name) for each in (STACK, MANY_EXPERTS))


def _widths(value: Any) -> Iterator[int]:
    for name, inner in value.items():
        if _holds_sizes(inner):
            yield from _widths(inner)
        elif _is_width(name):
            yield from (each for each in _listed(inner) if _count(each))


def _is_width(name: str) -> bool:
    return WIDTH.search(name) is not None and NOT_WIDTH.search(name) is None


def _holds_sizes(value: Any) -> bool:
    """Is it a config inside another one, and no table such as that of labels?"""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _part(config: Config, narrow: Mapping[int, int]) -> dict[str, Any]:
    """One config, with those inside it."""
    small = {name: _part(value, narrow) if _holds_sizes(value) else value for name, value in config.items()}
    in_stages = any(isinstance(config.get(name), list) for name in HEADS)  # each with widths of its own
    for name, value in config.items():
        if _is_width(name) and not in_stages:
            made = [narrow.get(each, each) if _count(each) else each for each in _listed(value)]
            small[name] = made if isinstance(value, list) else made[0]
    _take_layers(config, small)
    _take_heads(config, small)
    _take_experts(config, small)
    _at_most(small, RANKS, RANK)
    _follow_heads(config, small)
    return small


def _at_most(small: dict[str, Any], names: Iterable[str], most: int) -> None:
    for name in names:
        if _count(small.get(name)):
            small[name] = min(small[name], most)


def _take_layers(config: Config, small: dict[str, Any]) -> None:
    stacks = {name: value for name, value in config.items() if STACK.match(name) and _count(value) and value > 0}
    if not stacks:
        return
    layers = max(stacks.values())
    kept = min(layers, max(LAYERS, *_needed(config, layers)))
    for name, value in stacks.items():
        small[name] = min(value, kept)
    for name, value in config.items():
        if name in SOME and isinstance(value, list):
            small[name] = [each for each in value if not _count(each) or each < kept]
        elif name == "stage_names" and isinstance(value, list):
            small[name] = value[: kept + 1]  # before the first layer, too
        elif name == "out_features" and isinstance(value, list):
            small[name] = list(dict.fromkeys(_spread(str(each), kept, layers) for each in value))
        elif SPREAD.search(name) and isinstance(value, list):
            small[name] = list(dict.fromkeys(each * kept // layers if _count(each) else each for each in value))
        elif _per_layer(name, value, layers) and layers > kept:
            small[name] = value[:kept]  # something of each layer
        elif name in FROM and _count(value):
            small[name] = min(value, 1)
        elif name in ("max_window_layers", "num_kv_shared_layers") and _count(value) and value < layers:
            small[name] = value * kept // layers
        elif name == "max_window_layers" and _count(value):
            small[name] = kept


def _spread(stage: str, kept: int, layers: int) -> str:
    """`stage12` as the name of one of fewer."""
    name, digits, _ = re.split(r"(\d+)$", stage) if stage[-1:].isdecimal() else (stage, "", "")
    return f"{name}{int(digits) * kept // layers}" if digits else stage


def _needed(config: Config, layers: int) -> Iterator[int]:
    """How many of the first layers have all kinds."""
    yield 1
    for name, value in config.items():
        if name in PERIODS and _count(value):
            yield min(value, MOST_LAYERS)
        elif name in SOME and isinstance(value, list) and any(map(_count, value)):
            yield min(min(each for each in value if _count(each)) + 1, MOST_LAYERS)
        elif _per_layer(name, value, layers) and all(isinstance(each, str) for each in value):
            yield min(max(value.index(kind) for kind in set(value)) + 1, MOST_LAYERS)


def _per_layer(name: str, value: Any, layers: int) -> bool:
    """Is it something of each layer?"""
    listed = isinstance(value, list) or (isinstance(value, str) and PATTERN.search(name) is not None)
    return listed and len(value) == layers


def _take_heads(config: Config, small: dict[str, Any]) -> None:
    """Few heads, in the ratio of the many to those of keys and values as far as few can have it."""
    many = next((config[name] for name in HEADS if _count(config.get(name)) and config[name] > 0), None)
    if many is None:
        return
    keys = next((config[name] for name in KEY_HEADS if _count(config.get(name))), many)
    few_keys = 1 if keys == 1 else 2
    few = few_keys * min(max(many // max(keys, 1), 1), 4) if 1 < keys < many else 4
    few_keys = few if keys >= many else few_keys
    if many <= few:
        return
    for name in HEADS:
        if _count(config.get(name)):
            small[name] = few if config[name] == many else min(config[name], 4)
    for name in KEY_HEADS:
        if _count(config.get(name)):
            small[name] = few_keys
    for name, most in (("linear_num_key_heads", 2), ("linear_num_value_heads", 4)):
        _at_most(small, (name,), most)


def _take_experts(config: Config, small: dict[str, Any]) -> None:
    for name, value in config.items():
        if MANY_EXPERTS.match(name) and _count(value):
            small[name] = min(value, EXPERTS)
    _at_most(small, TOP, CHOSEN)
    if _count(config.get("n_group")) and config["n_group"] > 1:
        small |= {"n_group": 2, "topk_group": 1}


def _first(config: Config, names: Iterable[str]) -> int:
    return next((config[name] for name in names if _count(config.get(name))), 0)


def _follow_heads(config: Config, small: dict[str, Any]) -> None:
    """What is made of the width and the heads."""
    width, before = (_first(each, WIDE) for each in (small, config))
    heads, many = (_first(each, HEADS) for each in (small, config))
    for name in HEAD_SIZES:
        if _count(config.get(name)):
            whole = many and config[name] * many == before and heads
            small[name] = width // heads if whole else min(config[name], HEAD)
    if _count(config.get("qk_head_dim")):
        small["qk_head_dim"] = small.get("qk_nope_head_dim", 0) + small.get("qk_rope_head_dim", 0)
    size = small.get("head_dim") or (width // heads if heads else 0)
    if not size:
        return
    _at_most(small, ("rotary_dim",), size)
    was = config.get("head_dim") or (before // many if many else 0)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(small.get(name), dict) and was:
            small[name] = _rope(small[name], lambda length: max(1, length * size // was))
    expanded = _first(config, ("mamba_expand", "expand"))
    for count, of_each in (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"),
                           ("n_mamba_heads", "mamba_headdim"), ("num_heads", "head_dim")):  # fmt: skip
        if all(_count(config.get(name)) for name in (count, of_each)) and (
            config[count] * config[of_each] == expanded * before
        ):
            small[count] = expanded * width // small[of_each]


def _rope(scaling: Mapping[str, Any], shorter: Callable[[int], int]) -> dict[str, Any]:
    """How positions turn, where it is told channel by channel."""
    made: dict[str, Any] = {}
    for name, value in scaling.items():
        if isinstance(value, Mapping):
            made[name] = _rope(value, shorter)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            made[name] = value[: shorter(len(value))]
        elif name == "mrope_section" and isinstance(value, list):
            rest = [shorter(each) for each in value[1:]]
            made[name] = [shorter(sum(value)) - sum(rest), *rest]
        else:
            made[name] = value
    return made
