"""Arguments of transformers' `generate`: which can be written in a recipe, and whether their values are good.

    python -m bigpipe.bigmodel.tasks.arguments QUESTION.json ANSWER.json

Names are read from the source of the installed `GenerationConfig`. Values are given to it in a child process, which
imports transformers; its answers are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import text_config
from bigpipe.bigmodel.memo import answered
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.files import write_file
from bigpipe.names import did_you_mean
from bigpipe.trust import Limits
from bigpipe.versions import missing, package_version

from .tokenizing import OWN_FUNCTION

GENERATION_CONFIG = "generation_config.json"
FIELDS = {
    "max_tokens": "max_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "seed": "seed",
}
"""Argument → the stage's own field that is meant."""
REFUSED: Mapping[str, tuple[str, ...]] = {
    "it needs an assistant model, which a recipe cannot hand over; prompt_lookup_num_tokens needs none": (
        "assistant_model", "assistant_tokenizer", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp",
    ),
    "results hold texts alone": (
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    ),
    "transformers does not generate so by itself any more": (
        "low_memory", "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints",
        "force_words_ids",
    ),
    "it is an object of Python, which a recipe cannot hold": (
        "compile_config", "continuous_batching_config", "generation_config", "logits_processor", "stopping_criteria",
        "prefix_allowed_tokens_fn", "streamer", "custom_generate", "synced_gpus",
    ),
    "it changes the prompt": ("token_healing",),
    "it ends texts by the clock, and results would depend on the machine; max_new_tokens ends them by their length": (
        "max_time",
    ),
}  # fmt: skip
"""Why → the arguments that are not taken."""
OFFLOADED = "offloaded"
"""What values of `cache_implementation` begin with that need a GPU, beside which keys and values lie."""
ANSWERING = ("transformers", "torch", "optimum-quanto", "hqq")
"""Distributions on which it depends whether values are good: caches are quantized by the last two."""
SEQUENCES = ("num_beams", "num_return_sequences")
PROCESSORS = {
    "temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper", "top_h": "TopHLogitsWarper", "typical_p": "TypicalLogitsWarper",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor", "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
    "epsilon_cutoff": "EpsilonLogitsWarper", "eta_cutoff": "EtaLogitsWarper",
    "sequence_bias": "SequenceBiasLogitsProcessor",
}  # fmt: skip
"""Argument → what transformers makes of its value, and what refuses bad ones."""
TOKENS = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
})  # fmt: skip
"""Arguments that are tokens."""
COUNTS = frozenset({"num_beams", "num_return_sequences"})
"""Arguments that multiply the work."""
SAY_LITTLE = frozenset({
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict_in_generate",
})  # fmt: skip
"""Arguments that stand in configs of models that say nothing of how they generate."""
TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
"""As transformers documents an argument → what may be given."""
FRACTIONS = frozenset({
    "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "guidance_scale",
})  # fmt: skip
"""Arguments that transformers takes as floats alone: a recipe's 2 is its 2.0."""


@cache
def known_arguments() -> frozenset[str]:
    """Return what the installed `GenerationConfig` takes, by its source: importing it takes a second. Empty where the
    source is written in another way than now."""
    spec = find_spec("transformers")
    file = Path(spec.origin or "").parent / "generation/configuration_utils.py" if spec else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    names = re.findall(r"self\.(\w+) = kwargs\.pop\(\"\1\"", text)
    return frozenset(name for name in names if not name.startswith("_")) - {"transformers_version"}


def said_by_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` that stand in a config.json: transformers heeds them where there is no
    generation_config.json (`GenerationConfig.from_model_config`). Tokens that each config names are left out."""
    nested = next((part for name in ("decoder", "generator", "text_config") if (part := config.get(name))), None)
    names = known_arguments() - SAY_LITTLE
    parts = [nested if isinstance(nested, Mapping) else {}, config]
    return {name: value for part in parts for name, value in part.items() if name in names and value is not None}


def check_names(arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for the first argument that is not taken."""
    reasons = {name: why for why, names in REFUSED.items() for name in names}
    for name in arguments:
        key = f"generation.{name}[key]"
        if name in FIELDS:
            raise UsageError(f"{name} is no argument here", f"set {FIELDS[name]} as a field of the stage", field=key)
        if name in reasons:
            raise UsageError(f"{name} is not taken: {reasons[name]}", OWN_FUNCTION, field=key)
        if known_arguments() and name not in known_arguments():
            close = did_you_mean(name, sorted(known_arguments() - reasons.keys()))
            cure = close or "its arguments are those of GenerationConfig"
            raise UsageError(f"`generate` has no argument {name!r}", cure, field=key)


def as_floats(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with floats where whole numbers stand for them."""
    return {name: float(v) if name in FRACTIONS and type(v) is int else v for name, v in arguments.items()}


def check_values(
    arguments: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    sources: Sources,
    config: Mapping[str, Any] | None = None,
    file: str = GENERATION_CONFIG,
) -> None:
    """Raise UsageError where transformers does not take a value, or one has no effect beside the others. own: what the
    model's `file` says, which holds where an argument is left out; None: not known. config: the model's, complete;
    None: not known. The answer is kept; without transformers there is none. Raise InvalidCheckpoint where more
    sequences are made of a prompt than the limits allow."""
    from bigpipe.bigmodel.architecture import ask_child

    if not arguments and not own:
        return
    refuse_sequences({**(own or {}), **arguments}, sources.trust.limits)
    if missing(["transformers"]):
        return  # then nothing generates here
    model = {"vocabulary": _vocabulary(config), "encodes": bool(config.get("is_encoder_decoder"))} if config else None
    question = json.dumps({"arguments": as_floats(arguments), "own": own, "model": model}, sort_keys=True, default=str)
    versions = [package_version(name) for name in ANSWERING]
    key = hashlib.sha256(f"{versions} {question}".encode()).hexdigest()
    answer = answered(
        sources.memo / "generation" / f"{key}.json" if sources.memo else None,
        key,
        lambda: ask_child(__name__, question, "checking the arguments of `generate`", sources.trust.limits),
    )
    if wrong := answer["wrong"]:
        cure = "transformers documents what it takes under GenerationConfig"
        mend = "mend the model's file, or say otherwise under `generation`"
        of_file = wrong.startswith(GENERATION_CONFIG)
        if of_file:
            raise UsageError(file + wrong.removeprefix(GENERATION_CONFIG), mend, field="generation")
        raise UsageError(wrong, cure, field=wrong.partition(" ")[0].rstrip(":"))


def _vocabulary(config: Mapping[str, Any]) -> int:
    """How many tokens a model of this config makes; 0 where it does not say."""
    sizes = [value for name, value in text_config(config).items() if name.endswith("vocab_size")]
    return max([size for size in sizes if type(size) is int], default=0)


def refuse_sequences(settings: Mapping[str, Any], limits: Limits) -> None:
    """Raise InvalidCheckpoint where they ask for more beams or texts of one prompt than the limits allow."""
    for name in SEQUENCES:
        count = settings.get(name)
        if isinstance(count, int | float) and count > limits.sequences:
            raise limits.exceeded("sequences", f"generation: {name} is {str(count)[:80]}")


def sequences_of(arguments: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> int:
    """Return how many sequences a prompt becomes: its beams, or the texts that are asked for. own: what the model's
    file says, which holds where an argument is left out. A value that is no number counts as one: it is refused where
    values are checked."""
    settings = {**(own or {}), **{name: value for name, value in arguments.items() if value is not None}}
    return max([1, *(count for name in SEQUENCES if type(count := settings.get(name)) is int)])


def wrong_value(
    arguments: Mapping[str, Any], own: Mapping[str, Any] | None, model: Mapping[str, Any] | None = None
) -> str | None:
    """Return why transformers would not generate with these, or would not heed one; None where it would.
    model: `vocabulary`, and whether it `encodes` a prompt before it makes tokens; None: not known."""
    from transformers import GenerationConfig

    documented = dict(re.findall(r"^ +(\w+) ?\(`(\w+)`[,)]", GenerationConfig.__doc__ or "", re.MULTILINE))
    for name, value in arguments.items():
        wanted = TYPES.get(documented.get(name, ""))
        if (
            wanted
            and value is not None
            and (not isinstance(value, wanted) or isinstance(value, bool) > (bool in wanted))
        ):
            return f"generation.{name} takes {documented[name]}, and {json.dumps(value)} is given"
    try:
        GenerationConfig(**{**(own or {}), **arguments})
    except Exception as error:  # foreign code may raise anything
        return f"{'generation' if arguments else GENERATION_CONFIG}: {_said(error)}"
    modes = {name: (own or {})[name] for name in ("do_sample", "num_beams") if name in (own or {})}
    try:
        if own is not None:
            GenerationConfig(**{**modes, **arguments}).validate(strict=True, user_set_attributes=set(arguments))
        _try_processors(arguments, GenerationConfig._get_default_generation_params())
    except Exception as error:
        return f"generation: {_said(error)}"
    settled = {**(own or {}), **arguments}
    return _wrong_text(settled) or (_wrong_token(arguments, model) or _tried(arguments, own or {}, model))


def _wrong_text(arguments: Mapping[str, Any]) -> str | None:
    stops = arguments.get("stop_strings")
    texts = [stops] if isinstance(stops, str) else stops
    if stops is None or (isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts)):
        return None
    return (
        f"generation.stop_strings takes a text or a list of them, none of them empty, and {json.dumps(stops)} is given"
    )


def _wrong_token(arguments: Mapping[str, Any], model: Mapping[str, Any] | None) -> str | None:
    """A token that the model never makes ends nothing and suppresses nothing."""
    size = model["vocabulary"] if model else 0
    for name, value in arguments.items():
        tokens = value if isinstance(value, list) else [value]
        if name not in TOKENS or value is None or not size:
            continue
        least = -1 if name == "eos_token_id" else 0  # -1: nothing ends a text but its length
        if odd := [token for token in tokens if type(token) is not int or not least <= token < size]:
            return f"generation.{name}: {odd[0]!r} is none of the model's {size} tokens"
    return None


def _tried(arguments: Mapping[str, Any], own: Mapping[str, Any], model: Mapping[str, Any] | None) -> str | None:
    """Let a tiny model of as many tokens generate with these, and return what transformers says against it."""
    if not model or not model["vocabulary"]:
        return None
    tiny = _tiny_model(**model)

    def said(given: Mapping[str, Any]) -> str | None:
        try:
            _generate(tiny, given, own)
        except Exception as error:  # foreign code may raise anything
            return f"{type(error).__name__}: {_said(error)}"
        return None

    whole = said(arguments)
    if whole is None:
        return None
    if own and said({}) == whole:
        return f"{GENERATION_CONFIG}: {whole}"
    alone = (name for name, value in arguments.items() if said({name: value}) == whole)
    name = next(alone, None)
    return f"generation.{name}: {whole}" if name else f"generation: {whole}"


def _tiny_model(vocabulary: int, encodes: bool) -> Any:
    import transformers

    if encodes:
        sizes = {"d_model": 2, "d_kv": 2, "d_ff": 2, "num_layers": 1, "num_heads": 1, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=vocabulary, **sizes)).eval()
    sizes = {"n_embd": 2, "n_layer": 1, "n_head": 1, "n_positions": 64}
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocabulary, **sizes, **tokens)).eval()


def _generate(model: Any, arguments: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Two tokens. What a tokenizer is needed for, or a device, is left out, and what takes time is cut."""
    import torch
    from transformers import GenerationConfig, WatermarkingConfig

    given = {name: min(v, 4) if name in COUNTS and type(v) is int else v for name, v in arguments.items()}
    if isinstance(watermark := given.get("watermarking_config"), dict):
        given["watermarking_config"] = WatermarkingConfig.from_dict(watermark)
    if str(given.get("cache_implementation", "")).startswith(OFFLOADED):
        del given["cache_implementation"]
    given.pop("stop_strings", None)
    left = ["stop_strings", "max_length", "max_new_tokens"]
    left += ["cache_implementation"] if str(own.get("cache_implementation", "")).startswith(OFFLOADED) else []
    kept = {name: min(v, 4) if name in COUNTS and type(v) is int else v for name, v in own.items() if name not in left}
    model.generation_config = GenerationConfig(**{"decoder_start_token_id": 0, "eos_token_id": 0, **kept})
    ids = torch.zeros((1, 1), dtype=torch.int64)
    with torch.inference_mode(), warnings.catch_warnings(action="ignore"):  # of lengths that two tokens do not reach
        model.generate(**{"input_ids": ids, "attention_mask": ids + 1, "max_new_tokens": 2, "pad_token_id": 0, **given})


def _try_processors(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name in arguments.keys() & PROCESSORS.keys():
        value = arguments[name]
        if value is not None and value != defaults.get(name) and (name, value) != ("top_k", 0):  # neither builds one
            from transformers.generation import logits_process

            getattr(logits_process, PROCESSORS[name])(value)


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def main(question: str, answer: str) -> None:
    asked = json.loads(Path(question).read_bytes())
    write_file(Path(answer), json.dumps({"wrong": wrong_value(**asked)}), durable=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
