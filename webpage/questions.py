"""What is asked of the estimator, read from a form or an address; in words of `bigpipe estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.names import did_you_mean, is_text

from .gpus import GPUS, MOST_AT_ONCE

DTYPES = ("float32", "float16", "int8", "int4")
"""What `bigpipe estimate` shows where nothing is said."""
RUN_IN = ("float32", "float16", "bfloat16", "int8", "nf4", "fp4")
"""What a model can be loaded as: int4 is only a word for any 4-bit format."""
TRAIN = ("adamw", "adamw_8bit", "sgd", "lora")
LONGEST = 500
"""Characters of a model's name, or of any other short field."""
LARGEST_NUMBER = 2**31
FLAGS = ("double_quant", "gradient_checkpointing")
NUMBERS = ("batch_size", "sequence_length", "lora_rank")
TEXTS = ("model", "revision", "library_name", "subfolder", "variant", "memory", "kv_dtype", "train", "head")
LISTS = ("dtypes", "lora_targets")
OPTIONS = (*TEXTS, *NUMBERS, *FLAGS, *LISTS)
"""Of `bigpipe estimate`, but for those that would run what a repository brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the page was asked."""

    model: str = ""
    """A repository, its address, or a path in the directory of the page."""
    config: str = ""
    """The text of a `config.json`, in place of a model."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `bigpipe.estimate`, those that were given."""
    run_in: str = "float16"
    """The dtype or format that the cache, the placement and the recipe are for."""
    gpu: str = ""
    """A name of GPUS; "" is what this machine has."""
    gpus: int = 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_question(pairs: Sequence[tuple[str, str]]) -> Question:
    """Return a question from the fields of a form. Empty ones are as good as none; unknown ones are refused, as the
    command refuses unknown options. Raise UsageError."""
    given: dict[str, list[str]] = {}
    for name, text in pairs:
        if name not in (*OPTIONS, "config", "run_in", "gpu", "gpus"):
            raise UsageError(f"there is no field {name!r:.80}", did_you_mean(name[:80], OPTIONS, otherwise="there are"))
        if name != "config" and (len(text) > LONGEST or not is_text(text)):
            raise UsageError(f"{name} is too long, or no text", "write less")
        if text.strip():
            given.setdefault(name, []).append(text.strip())
    last = {name: texts[-1] for name, texts in given.items()}
    options: dict[str, Any] = {name: last[name] for name in TEXTS[1:] if name in last}
    options |= {name: number(name, last[name]) for name in NUMBERS if name in last}
    options |= {name: _flag(name, last[name]) for name in FLAGS if name in last}
    options |= {name: " ".join(given[name]).replace(",", " ").split() for name in LISTS if name in given}
    run_in = _one_of("run_in", last.get("run_in", "float16"), RUN_IN)
    if options.get("double_quant") and "dtypes" in options:  # it may be meant for what is run alone
        options["dtypes"] = [*dict.fromkeys([*options["dtypes"], run_in])]
    return Question(
        model=last.get("model", ""),
        config=last.get("config", ""),
        options=options,
        run_in=run_in,
        gpu=_one_of("gpu", last.get("gpu", ""), ("", *GPUS)),
        gpus=number("gpus", last.get("gpus", "1"), MOST_AT_ONCE),
    )


def number(name: str, text: str, most: int = LARGEST_NUMBER) -> int:
    """Return a whole number from 1. Raise UsageError."""
    digits = text if text.isascii() and text.isdigit() and len(text) <= len(str(most)) else "0"
    if not 1 <= int(digits) <= most:
        raise UsageError(f"{name} is {text!r:.40}", f"write a whole number from 1 to {most}", field=name)
    return int(digits)


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "on", "1", "false", "off", "0"):
        raise UsageError(f"{name} is {text!r:.40}", "use true or false", field=name)
    return text in ("true", "on", "1")


def _one_of(name: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise UsageError(f"{name} is {text!r:.40}", did_you_mean(text[:40], known, otherwise="use one of"), field=name)
    return text
