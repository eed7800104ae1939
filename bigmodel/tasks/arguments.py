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
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.errors import UsageError
from bigpipe.files import write_file
from bigpipe.versions import package_version

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
}  # fmt: skip
"""Why → the arguments that are not taken."""
PROCESSORS = {
    "temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper", "top_h": "TopHLogitsWarper", "typical_p": "TypicalLogitsWarper",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor", "no_repeat_ngram_size": "NoRepeatNGramLogitsProcessor",
    "epsilon_cutoff": "EpsilonLogitsWarper", "eta_cutoff": "EtaLogitsWarper",
    "sequence_bias": "SequenceBiasLogitsProcessor",
}  # fmt: skip
"""Argument → what transformers makes of its value, and what refuses bad ones."""
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


def check_names(arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for the first argument that is not taken."""
    reasons = {name: why for why, names in REFUSED.items() for name in names}
    for name in arguments:
        if name in FIELDS:
            raise UsageError(f"{name} is no argument here", f"set {FIELDS[name]} as a field of the stage")
        if name in reasons:
            raise UsageError(f"{name} is not taken: {reasons[name]}", OWN_FUNCTION)
        if known_arguments() and name not in known_arguments():
            close = get_close_matches(name, known_arguments() - reasons.keys() - FIELDS.keys(), n=1)
            cure = f"did you mean {close[0]!r}?" if close else "its arguments are those of GenerationConfig"
            raise UsageError(f"`generate` has no argument {name!r}", cure)


def as_floats(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with floats where whole numbers stand for them."""
    return {name: float(v) if name in FRACTIONS and type(v) is int else v for name, v in arguments.items()}


def check_values(arguments: Mapping[str, Any], own: Mapping[str, Any] | None, memo: Path | None) -> None:
    """Raise UsageError where transformers does not take a value, or one has no effect beside the others. own: what the
    model's generation_config.json says, which holds where an argument is left out; None: not known. The answer is kept
    in `memo`."""
    from bigpipe.bigmodel.architecture import ask_child

    if not arguments and not own:
        return
    question = json.dumps({"arguments": as_floats(arguments), "own": own}, sort_keys=True, default=str)
    key = hashlib.sha256(f"{package_version('transformers')} {question}".encode()).hexdigest()
    file = memo / "generation" / f"{key}.json" if memo else None
    answer = file and recall(file)
    if not answer:
        answer = ask_child(__name__, question)
        if file:
            remember(file, answer)
    if answer["wrong"]:
        cure = "transformers documents what it takes under GenerationConfig"
        raise UsageError(answer["wrong"], cure, field="generation")


def wrong_value(arguments: Mapping[str, Any], own: Mapping[str, Any] | None) -> str | None:
    """Return why transformers would not generate with these, or would not heed one; None where it would."""
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
    return None


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
