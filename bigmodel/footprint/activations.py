"""What a forward pass needs besides weights and cache: its largest set of tensors alive at one time.

The coefficients were read off the tensors that transformers 5.23's own forward keeps alive, counted allocation by
allocation on shape-only tensors (`tests/support/allocations.py` counts them again), for a prompt without padding and
logits of the last token only, as `generate` asks for. A phase (feed-forward, attention, logits) is a sum of such
tensors; the peak is the largest phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigpipe.bigmodel.architecture import ATTENTION, Architecture, experts_per_token, text_config
from bigpipe.bigmodel.memo import kept

WRITTEN_OUT: Mapping[str, Mapping[int, tuple[int, int]]] = {
    "": {2: (10, 4), 4: (8, 4), 8: (20, 5)},
    "bloom": {2: (14, 6), 4: (16, 10), 8: (36, 6)},
}
"""Model type → bytes per element → (bytes per attention score, residual widths), where scores are written out.

Other scores than float32 have a copy in it for their softmax, which is widened again in float64; Bloom adds position
biases to another one."""

COUNTED = frozenset({
    "bert", "bloom", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "opt", "phi3", "qwen2",
    "qwen3", "qwen3_moe",
})  # fmt: skip
"""Model types whose forwards were counted; others are taken to be like them, with a wide margin."""

MODERN_GATED = frozenset({"gate_proj", "up_proj", "w1", "w3", "gate_up_proj", "dense_h_to_4h_gate"})


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a transformer that activations depend on; one element per unit."""

    hidden: int
    inner: int
    """Width of the feed-forward part."""
    gated: bool
    fused: bool
    """Gate and up projection in one matrix, so that both lie there twice."""
    heads: int
    layers: int
    vocabulary: int
    """0: there is no head."""
    experts: int
    """Experts that each token visits; 0: not a mixture."""
    scores: Mapping[int, tuple[int, int]]
    """An entry of `WRITTEN_OUT` where attention scores are written out, s² of them per head; else empty."""
    grouped: bool
    """Fewer heads of keys than of queries."""
    residuals: int
    """Tensors as wide as the residual stream that live through the feed-forward part."""
    activation: str
    head_dim: int
    last_logits: bool
    """Logits are computed for the last token only, as decoders do while generating."""
    logit_copies: int
    """2 where logits are squashed by a tanh or have a bias added; else 1."""
    state: int
    """Width of a state-space model's state; 0: an attention model."""
    known: bool
    """Of a kind that the coefficients were counted on."""


@kept
def shape_of(architecture: Architecture) -> Shape:
    config = text_config(architecture.config)
    names = {module.name.rpartition(".")[2] for module in architecture.modules}
    hidden = _number(config, "hidden_size", "d_model", "n_embd", "dim", "embed_dim")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")
    experts = experts_per_token(config) if _is_mixture(config) else 0
    inner = _number(config, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "hidden_dim")
    if experts:
        inner = _number(config, "moe_intermediate_size", "expert_ffn_hidden_size") or inner
    encoder_decoder = bool(config.get("is_encoder_decoder"))
    eager = config.get(ATTENTION, architecture.config.get(ATTENTION)) == "eager"
    kind = str(config.get("model_type"))
    # BART and its kin add a bias that is not part of the head
    biased = any(tensor.name == "final_logits_bias" for tensor in architecture.modules[0].tensors)
    called = str(config.get("activation_function") or config.get("hidden_act") or "")
    return Shape(
        hidden=hidden,
        inner=inner or 4 * hidden,
        gated=bool(names & MODERN_GATED) or experts > 0,
        fused="gate_up_proj" in names,
        heads=heads,
        layers=_number(config, "num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "n_layers"),
        vocabulary=_number(config, "vocab_size") if architecture.output_embedding else 0,
        experts=experts,
        scores=WRITTEN_OUT.get(kind, WRITTEN_OUT[""]) if eager else {},
        grouped=0 < _number(config, "num_key_value_heads") < heads,
        residuals=3 if "post_feedforward_layernorm" in names and "input_layernorm" not in names else 4,
        activation="bloom_gelu" if kind == "bloom" else called,
        head_dim=_number(config, "head_dim", "d_kv") or (hidden // heads if heads else 0),
        last_logits=architecture.generates and not encoder_decoder,
        logit_copies=2 if config.get("final_logit_softcapping") or biased else 1,
        state=_number(config, "state_size", "mamba_d_state", "ssm_state_size"),
        known=kind in COUNTED and architecture.library == "transformers",
    )


def _is_mixture(config: Mapping[str, Any]) -> bool:
    return any(config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def _number(config: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), 0)


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one forward over a whole prompt."""

    bytes: int
    formula: str
    """After the part of the model that they belong to at the peak."""
    known: bool


def prefill(
    shape: Shape,
    batch_size: int,
    length: int,
    itemsize: int,
    *,
    image: tuple[int, int] | None = None,
    all_logits: bool = False,
    headless: bool = False,
) -> Activations:
    """The peak while a prompt of `length` tokens is read.

    image: (pixels per side, patch size or 0). all_logits: a decoder's plain forward gives those of every token, where
    `generate` asks for the last one's. headless: no logits at all, as in an encoder.
    """
    if image is not None:
        side, patch = image
        if not patch or not shape.heads:  # a convolutional net: its first, largest feature maps
            return Activations(batch_size * side * side * 64 * itemsize, "first convolution: 64·b·side²·bytes", False)
        length = (side // patch) ** 2 + 1
    phases: dict[str, tuple[int, str]] = {
        "feed-forward": _feed_forward(shape, batch_size, length, itemsize),
        "attention": _scores(shape, batch_size, length, itemsize),
        "logits": (0, "") if headless else _logits(shape, batch_size, length, itemsize, all_logits),
        "state": _state(shape, batch_size * length, itemsize),
    }
    phase = max(phases, key=lambda name: phases[name][0])
    size, formula = phases[phase]
    return Activations(size, f"{phase}: {formula}", shape.known and not shape.state)


UNGATED = {"gelu_new": (5, 2), "bloom_gelu": (5, 8)}
"""(widths of the feed-forward part, widths of the residual stream) alive at once; (2, 4) for activations of one call.
GELU in its tanh form is written out in Python: four intermediates of the full width."""


def _feed_forward(shape: Shape, batch_size: int, length: int, itemsize: int) -> tuple[int, str]:
    """(bytes, formula) in the middle of the feed-forward part, the residual stream included."""
    inner, hidden = shape.inner, shape.hidden
    # Rotary cosines and sines are there once for the whole batch, learned positions too
    positions = 2 * shape.head_dim // batch_size
    if shape.experts:
        routed = max(4 * shape.experts * hidden + 4 * hidden, shape.experts * (3 * inner + 2 * hidden) + 9 * hidden)
        elements, formula = routed + positions, "max(4kh+4h, k(3f+2h)+9h)"
    elif shape.gated:
        inners = 4 if shape.fused else 3
        elements = inners * inner + shape.residuals * hidden + positions
        formula = f"{inners}f+{shape.residuals}h+2·head_dim/b"
    else:
        inners, hiddens = UNGATED.get(shape.activation, (2, 4))
        elements, formula = inners * inner + hiddens * hidden, f"{inners}f+{hiddens}h"
    if shape.scores:  # attention that was written out is still referred to by the layer
        elements, formula = elements + (shape.heads + 1) * length, f"{formula} + heads·s"
    words = ", k experts per token" if shape.experts else ""
    return elements * batch_size * length * itemsize, f"b·s·({formula})·bytes{words}"


def _scores(shape: Shape, batch_size: int, length: int, itemsize: int) -> tuple[int, str]:
    if not shape.scores:
        return 0, ""
    per_score, widths = shape.scores[itemsize]
    width = widths * shape.hidden + (2 * shape.heads * shape.head_dim if shape.grouped else 0)
    size = batch_size * length * (length * (shape.heads * per_score + itemsize) + width * itemsize)
    expanded = " + expanded keys and values" if shape.grouped else ""
    return size, f"b·heads·s²·{per_score} + b·s·({widths}h{expanded})·bytes + mask"


def _logits(shape: Shape, batch_size: int, length: int, itemsize: int, all_logits: bool) -> tuple[int, str]:
    if not shape.vocabulary:
        return 0, ""
    if shape.last_logits and not all_logits:
        return batch_size * shape.vocabulary * (itemsize + 4), "b·vocab·(bytes+4)"
    widths = 1 if shape.last_logits else 2
    size = batch_size * length * (shape.logit_copies * shape.vocabulary + widths * shape.hidden) * itemsize
    copies = "2·" if shape.logit_copies == 2 else ""
    return size, f"b·s·({copies}vocab+{'h' if widths == 1 else '2h'})·bytes"


def _state(shape: Shape, tokens: int, itemsize: int) -> tuple[int, str]:
    """Without their own kernels, state-space layers write out the float32 state of every token, three times."""
    inner = shape.inner if shape.inner > shape.hidden else 2 * shape.hidden
    size = tokens * inner * (12 * shape.state + 13 * itemsize) if shape.state and not shape.heads else 0
    return size, "b·s·inner·(12·state+26)"


def activations_kept(
    shape: Shape, batch_size: int, length: int, *, mixed: bool, checkpointing: bool, headless: bool = False
) -> int:
    """Bytes kept for the backward pass: s·b·h·(34 + 5·a·s/h) per layer (arXiv 2205.05198, eq. 2), 16-bit.

    Attention that is not written out drops the second term. Gradient checkpointing keeps one input per layer, and one
    layer whole. In float32 everything is twice as large. A head's logits and their float32 copy come on top.
    headless: of an encoder, which has none.
    """
    layer = length * batch_size * shape.hidden * 34
    if shape.scores:
        layer += 5 * shape.heads * length * length * batch_size
    whole = layer + 2 * length * batch_size * shape.hidden * shape.layers if checkpointing else layer * shape.layers
    logits = 0 if headless else batch_size * length * shape.vocabulary * (2 + 4)
    return (whole + logits) * (1 if mixed else 2)
