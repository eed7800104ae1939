"""Which texts a model may read together: those of one length always, others where padding changes nothing for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bigpipe.bigmodel.architecture import together_limit

HEEDLESS = frozenset({
    "xlnet", "xlm", "flaubert", "rwkv", "fnet", "nystromformer", "yoso", "mra", "convbert", "funnel", "canine",
    "reformer", "recurrent_gemma", "prophetnet", "xlstm", "deepseek_v4", "minimax", "minimax_m3_vl",
    "minimax_m3_vl_text", "big_bird", "bigbird_pegasus", "blt", "qwen4_exp", "qwen4_exp_text", "mobilebert", "git",
    "roformer", "cpmant",
})  # fmt: skip
"""Model types that drop the attention mask as they generate, mix what lies beside a text into it (convolutions, states,
Fourier transforms, landmarks, hashes of neighbours), number positions from the padding on, cut what they read into
blocks or patches from where the padding begins, or attend otherwise to long rows than to short ones."""
HALVES = frozenset({
    "bart", "mbart", "blenderbot", "blenderbot-small", "pegasus", "marian", "mvp", "plbart", "trocr",
})  # fmt: skip
"""Types of encoder-decoders whose decoder, as a model of its own, numbers positions from the padding on."""
WHOLE = ("last", "mean")
"""What `summary_type` says where a head takes the last place of a row, or the mean of all, padding included."""

MATCHING = ("no_repeat_ngram_size", "bad_words_ids", "sequence_bias")
"""Arguments that look for several tokens in a row, which may begin in the padding."""


def most_together(model: Any) -> float:
    """Return up to how many tokens, read and made, of the longest text a loaded model of transformers gives every text
    of a batch the numbers of that text alone, however long the others are: 0 where padding changes them, infinity where
    it never does."""
    config = model.config
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "encoder", "decoder"))]
    kinds = {getattr(part, "model_type", None) for part in parts}
    half = config.model_type in HALVES and not config.is_encoder_decoder
    if HEEDLESS & kinds or half or getattr(config, "summary_type", None) in WHOLE:
        return 0
    limit = together_limit(config.to_dict())
    return math.inf if limit is None else limit


def pads_ordinarily(tokenizer: Any) -> bool:
    """Return whether a tokenizer pads with a token that stands for a part of texts, for want of a special one."""
    added = tokenizer.added_tokens_decoder.get(tokenizer.pad_token_id)
    return added is None or not added.special


def afresh(model: Any) -> Callable[[], None]:
    """Return what makes a loaded model as it is now, to be called before each forward of texts: some models keep
    something of those that they have read."""
    from bigpipe.bigmodel.execution import loaded

    return loaded(model).stream.afresh(model)


def counts_padding(settings: Mapping[str, Any], goes_on: bool, ordinary: bool) -> bool:
    """Return whether arguments of `generate` make something of the padding of a batch. goes_on: does the model go on
    with its prompt, which then is padded on the left? ordinary: with a token that texts are made of?"""
    counted = settings.get("min_length") and not settings.get("min_new_tokens")
    forced = settings.get("forced_bos_token_id") is not None  # where there is one token so far
    repeated = settings.get("no_repeat_ngram_size") == 1
    matched = ordinary and any(settings.get(name) for name in MATCHING)
    mark = settings.get("watermarking_config")
    width = mark.get("context_width") if isinstance(mark, Mapping) else getattr(mark, "context_width", 1)
    seen = settings.get("encoder_repetition_penalty") not in (None, 1) or settings.get("encoder_no_repeat_ngram_size")
    return bool(seen or (goes_on and (counted or forced or repeated or matched or (width or 1) > 1)))
