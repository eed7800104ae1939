"""Architectures of the commonest families, written down: no child process, no torch, no second of waiting.

Each builder gives exactly what instantiating the class gives (a test compares the two, module by module), or None
where a config says anything it does not know; the class itself is asked then. What is written here is what
transformers 5.23 builds; under another version nothing here is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from bigpipe.versions import package_version

from .inquiry import ATTENTION, Head
from .structure import Architecture, ModuleSpec, TensorSpec

VERIFIED = "5.23."
"""The transformers versions that the builders were compared with."""

Config = Mapping[str, Any]


def known_architecture(config: Config, head: Head = "auto") -> Architecture | None:
    """The architecture of a plain config of a known family, else None."""
    if str(config.get("model_type")) not in BUILDERS or not _verified():
        return None
    return _build(json.dumps(config), head)


@lru_cache(maxsize=4)
def _build(config: str, head: Head) -> Architecture | None:
    """An index and the estimate after it ask the same."""
    data = json.loads(config)
    try:
        return BUILDERS[data["model_type"]](data, head)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # a field is missing or odd: the class knows its defaults and its errors


@cache
def _verified() -> bool:
    return (package_version("transformers") or "").startswith(VERIFIED)


@dataclass(frozen=True, slots=True)
class Node:
    """A module before it has its full name: local names and shapes, children in order."""

    class_name: str
    children: Mapping[str, Node] = field(default_factory=dict)
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()
    buffers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Float32 whatever the model's dtype, and not saved: rotary frequencies."""

    def modules(self, name: str = "") -> Iterator[ModuleSpec]:
        prefix = f"{name}." if name else ""
        yield ModuleSpec(
            name=name,
            class_name=self.class_name,
            children=tuple(prefix + child for child in self.children),
            tensors=tuple(TensorSpec(prefix + local, shape, "float32") for local, shape in self.tensors)
            + tuple(TensorSpec(prefix + local, shape, "float32", True, False, True) for local, shape in self.buffers),
            linear=self.class_name in ("Linear", "Conv1D"),
        )
        for child, node in self.children.items():
            yield from node.modules(prefix + child)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> Node:
    return _matrix("Linear", (outputs, inputs), outputs if bias else None)


def conv1d(inputs: int, outputs: int) -> Node:
    return _matrix("Conv1D", (inputs, outputs), outputs)


def embedding(rows: int, columns: int, class_name: str = "Embedding") -> Node:
    return _matrix(class_name, (rows, columns), None)


def layer_norm(size: int) -> Node:
    return _matrix("LayerNorm", (size,), size)


def _matrix(class_name: str, shape: tuple[int, ...], bias: int | None) -> Node:
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", shape),)
    return Node(class_name, tensors=tensors if bias is None else (*tensors, ("bias", (bias,))))


DROPOUT = Node("Dropout")


MOST_LAYERS = 4096


def repeat(count: int, node: Node) -> Node:
    if count > MOST_LAYERS:
        raise ValueError(f"{count} layers would fill this process's memory")
    return Node("ModuleList", {str(index): node for index in range(count)})


def rotary(prefix: str, config: Config, size: int) -> Node:
    """Frequencies for `size` rotated elements of a head, as computed and as first computed."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise ValueError(f"rope type {kind!r} may bring other buffers")
    shape = (-(-size // 2),)
    return Node(f"{prefix}RotaryEmbedding", buffers=(("inv_freq", shape), ("original_inv_freq", shape)))


def _assemble(
    config: Config,
    head: Head,
    *,
    classes: tuple[str, str],
    body: tuple[str, Node],
    embedding_name: str,
    head_shape: tuple[int, int],
    no_split: Sequence[str],
    tied: bool,
) -> Architecture:
    """Body and head as transformers puts them together. classes: (with its head, the bare model)."""
    prefix, node = body
    named = config.get("architectures") or [classes[0]]
    if len(named) != 1 or named[0] not in classes:
        raise ValueError(f"class {named} is not one of {classes}")
    bare = head == "none" or named[0] == classes[1]
    root = node if bare else Node(classes[0], {prefix: node, "lm_head": linear(*head_shape)})
    source = embedding_name if bare else f"{prefix}.{embedding_name}"
    return Architecture(
        class_name=root.class_name,
        modules=tuple(root.modules()),
        no_split=tuple(sorted(no_split)),
        tied=() if bare or not tied else ((f"{source}.weight", "lm_head.weight"),),
        output_embedding=None if bare else "lm_head",
        input_embedding=source,
        config=dict(config),
        generates=True,
    )


LLAMA_LIKE = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _llama_like(config: Config, head: Head) -> Architecture:
    kind, prefix = config["model_type"], LLAMA_LIKE[config["model_type"]]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    # Qwen3's default is 128 whatever the width; it must say so itself
    size = config["head_dim"] if kind == "qwen3" else config.get("head_dim") or hidden // heads
    if config.get("hidden_act") != "silu" or config.get("use_sliding_window") or config.get("layer_types"):
        raise ValueError("not the plain form")
    if kind == "qwen2" and config.get("head_dim"):
        raise ValueError("Qwen2 has no head_dim of its own")
    bias = bool(config.get("attention_bias")) if kind in ("llama", "qwen3") else False
    read_bias = bias or kind == "qwen2"
    norm = _matrix(f"{prefix}RMSNorm", (hidden,), None)
    attention = {
        "q_proj": linear(hidden, heads * size, bias=read_bias),
        "k_proj": linear(hidden, groups * size, bias=read_bias),
        "v_proj": linear(hidden, groups * size, bias=read_bias),
        "o_proj": linear(heads * size, hidden, bias=bias),
    }
    if kind == "qwen3":
        attention |= {name: _matrix("Qwen3RMSNorm", (size,), None) for name in ("q_norm", "k_norm")}
    layer = {
        "self_attn": Node(f"{prefix}Attention", attention),
        "mlp": _gated(prefix, hidden, config["intermediate_size"], kind == "llama" and bool(config.get("mlp_bias"))),
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
    }
    body = {
        "embed_tokens": embedding(config["vocab_size"], hidden),
        "layers": repeat(config["num_hidden_layers"], Node(f"{prefix}DecoderLayer", layer)),
        "norm": norm,
        "rotary_emb": rotary(prefix, config, int(size * (config.get("partial_rotary_factor") or 1))),
    }
    window = None if kind.startswith("qwen") else config.get("sliding_window")
    complete = {**config, "head_dim": size, "num_key_value_heads": groups, "sliding_window": window}
    return _assemble(
        complete, head, classes=(f"{prefix}ForCausalLM", f"{prefix}Model"),
        body=("model", Node(f"{prefix}Model", body)), embedding_name="embed_tokens",
        head_shape=(hidden, config["vocab_size"]),
        no_split=(f"{prefix}DecoderLayer",), tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip


def _gated(prefix: str, hidden: int, inner: int, bias: bool) -> Node:
    return Node(
        f"{prefix}MLP",
        {
            "gate_proj": linear(hidden, inner, bias=bias),
            "up_proj": linear(hidden, inner, bias=bias),
            "down_proj": linear(inner, hidden, bias=bias),
            "act_fn": Node("SiLUActivation"),
        },
    )


def _opt(config: Config, head: Head) -> Architecture:
    hidden = config["hidden_size"]
    if config.get("word_embed_proj_dim", hidden) != hidden or config.get("activation_function") != "relu":
        raise ValueError("not the plain form")
    plain = {"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True}
    if any(config.get(name, value) is not value for name, value in plain.items()):
        raise ValueError("not the plain form")
    square = linear(hidden, hidden, bias=True)
    layer = {
        "self_attn": Node("OPTAttention", {f"{name}_proj": square for name in ("k", "v", "q", "out")}),
        "activation_fn": Node("ReLU"),
        "self_attn_layer_norm": layer_norm(hidden),
        "fc1": linear(hidden, config["ffn_dim"], bias=True),
        "fc2": linear(config["ffn_dim"], hidden, bias=True),
        "final_layer_norm": layer_norm(hidden),
    }
    positions = config["max_position_embeddings"] + 2
    body = {"embed_tokens": embedding(config["vocab_size"], hidden)}
    body["embed_positions"] = embedding(positions, hidden, "OPTLearnedPositionalEmbedding")
    if not config.get("_remove_final_layer_norm"):
        body["final_layer_norm"] = layer_norm(hidden)
    body["layers"] = repeat(config["num_hidden_layers"], Node("OPTDecoderLayer", layer))
    return _assemble(
        config, head, classes=("OPTForCausalLM", "OPTModel"),
        body=("model", Node("OPTModel", {"decoder": Node("OPTDecoder", body)})),
        embedding_name="decoder.embed_tokens", head_shape=(hidden, config["vocab_size"]),
        no_split=("OPTDecoderLayer",), tied=bool(config.get("tie_word_embeddings", True)),
    )  # fmt: skip


def _gpt2(config: Config, head: Head) -> Architecture:
    hidden, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    if config.get("activation_function") != "gelu_new" or config.get("add_cross_attention"):
        raise ValueError("not the plain form")
    attention = {"c_attn": conv1d(hidden, 3 * hidden), "c_proj": conv1d(hidden, hidden)}
    mlp = {"c_fc": conv1d(hidden, inner), "c_proj": conv1d(inner, hidden), "act": Node("NewGELUActivation")}
    layer = {
        "ln_1": layer_norm(hidden),
        "attn": Node("GPT2Attention", {**attention, "attn_dropout": DROPOUT, "resid_dropout": DROPOUT}),
        "ln_2": layer_norm(hidden),
        "mlp": Node("GPT2MLP", {**mlp, "dropout": DROPOUT}),
    }
    body = {
        "wte": embedding(config["vocab_size"], hidden),
        "wpe": embedding(config["n_positions"], hidden),
        "drop": DROPOUT,
        "h": repeat(config["n_layer"], Node("GPT2Block", layer)),
        "ln_f": layer_norm(hidden),
    }
    common = {"hidden_size": hidden, "max_position_embeddings": config["n_positions"]}
    common |= {"num_attention_heads": config["n_head"], "num_hidden_layers": config["n_layer"]}
    return _assemble(
        {**config, **common}, head, classes=("GPT2LMHeadModel", "GPT2Model"),
        body=("transformer", Node("GPT2Model", body)), embedding_name="wte",
        head_shape=(hidden, config["vocab_size"]), no_split=("GPT2Block",),
        tied=bool(config.get("tie_word_embeddings", True)),
    )  # fmt: skip


def _bloom(config: Config, head: Head) -> Architecture:
    hidden = config.get("hidden_size") or config["n_embed"]
    count = config.get("n_layer") or config["num_hidden_layers"]
    heads = config.get("n_head") or config["num_attention_heads"]
    attention = {"query_key_value": linear(hidden, 3 * hidden, bias=True), "dense": linear(hidden, hidden, bias=True)}
    layer = {
        "input_layernorm": layer_norm(hidden),
        "self_attention": Node("BloomAttention", {**attention, "attention_dropout": DROPOUT}),
        "post_attention_layernorm": layer_norm(hidden),
        "mlp": Node(
            "BloomMLP",
            {
                "dense_h_to_4h": linear(hidden, 4 * hidden, bias=True),
                "gelu_impl": Node("BloomGelu"),
                "dense_4h_to_h": linear(4 * hidden, hidden, bias=True),
            },
        ),
    }
    body = {
        "word_embeddings": embedding(config["vocab_size"], hidden),
        "word_embeddings_layernorm": layer_norm(hidden),
        "h": repeat(count, Node("BloomBlock", layer)),
        "ln_f": layer_norm(hidden),
    }
    common = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": count, ATTENTION: "eager"}
    return _assemble(
        {**config, **common}, head, classes=("BloomForCausalLM", "BloomModel"),
        body=("transformer", Node("BloomModel", body)), embedding_name="word_embeddings",
        head_shape=(hidden, config["vocab_size"]), no_split=("BloomBlock",),
        tied=bool(config.get("tie_word_embeddings", True)),
    )  # fmt: skip


def _gpt_neox(config: Config, head: Head) -> Architecture:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if config.get("hidden_act") != "gelu":
        raise ValueError("not the plain form")
    bias = bool(config.get("attention_bias", True))
    layer = {
        "input_layernorm": layer_norm(hidden),
        "post_attention_layernorm": layer_norm(hidden),
        "post_attention_dropout": DROPOUT,
        "post_mlp_dropout": DROPOUT,
        "attention": Node(
            "GPTNeoXAttention",
            {"query_key_value": linear(hidden, 3 * hidden, bias=bias), "dense": linear(hidden, hidden, bias=bias)},
        ),
        "mlp": Node(
            "GPTNeoXMLP",
            {
                "dense_h_to_4h": linear(hidden, inner, bias=True),
                "dense_4h_to_h": linear(inner, hidden, bias=True),
                "act": Node("GELUActivation"),
            },
        ),
    }
    size = int(hidden // config["num_attention_heads"] * config["rotary_pct"])
    body = {
        "embed_in": embedding(config["vocab_size"], hidden),
        "emb_dropout": DROPOUT,
        "layers": repeat(config["num_hidden_layers"], Node("GPTNeoXLayer", layer)),
        "final_layer_norm": layer_norm(hidden),
        "rotary_emb": rotary("GPTNeoX", config, size),
    }
    return _assemble(
        config, head, classes=("GPTNeoXForCausalLM", "GPTNeoXModel"), body=("gpt_neox", Node("GPTNeoXModel", body)),
        embedding_name="embed_in", head_shape=(hidden, config["vocab_size"]), no_split=("GPTNeoXLayer",),
        tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip


BUILDERS: Mapping[str, Callable[[Config, Head], Architecture]] = {
    **dict.fromkeys(LLAMA_LIKE, _llama_like),
    "opt": _opt,
    "gpt2": _gpt2,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
}
