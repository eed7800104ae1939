"""Which texts a model may read together: those of one length always, others where padding changes nothing for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEEDLESS = frozenset({
    "xlnet", "xlm", "flaubert", "rwkv", "fnet", "nystromformer", "yoso", "mra", "convbert", "funnel", "canine",
    "reformer", "recurrent_gemma", "prophetnet",
})  # fmt: skip
"""Model types that drop the attention mask as they generate, or mix what lies beside a text into it: convolutions,
states, Fourier transforms, landmarks."""
HALVES = frozenset({
    "bart", "mbart", "blenderbot", "blenderbot-small", "pegasus", "marian", "mvp", "plbart", "trocr",
})  # fmt: skip
"""Types of encoder-decoders whose decoder, as a model of its own, numbers positions from the padding on."""
WHOLE = ("last", "mean")
"""What `summary_type` says where a head takes the last place of a row, or the mean of all, padding included."""


def needs_equal_lengths(model: Any) -> bool:
    """Return whether a loaded model of transformers gives a text other numbers where it is padded."""
    config = model.config
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "encoder", "decoder"))]
    kinds = {getattr(part, "model_type", None) for part in parts}
    half = config.model_type in HALVES and not config.is_encoder_decoder
    return bool(HEEDLESS & kinds) or half or getattr(config, "summary_type", None) in WHOLE


def counts_padding(settings: Mapping[str, Any], goes_on: bool) -> bool:
    """Return whether arguments of `generate` make something of the padding of a batch. goes_on: does the model go on
    with its prompt, which then is padded on the left?"""
    asked = {name: settings.get(name) for name in ("min_length", "min_new_tokens", "no_repeat_ngram_size")}
    counted = asked["min_length"] and not asked["min_new_tokens"]
    seen = settings.get("encoder_repetition_penalty") not in (None, 1) or settings.get("encoder_no_repeat_ngram_size")
    return bool(seen or (goes_on and (counted or asked["no_repeat_ngram_size"] == 1)))
