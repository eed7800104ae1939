"""Names that somebody wrote, against those that there are: what is probably meant, and an error where nothing is. And
what public functions are given under the names of their arguments."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from .errors import BigpipeError, GatedRepository, Offline, UsageError, first_few

P = ParamSpec("P")
R = TypeVar("R")


class Given(NamedTuple):
    """What an argument may be."""

    kinds: tuple[type, ...]
    words: str
    """The same for people: `a path`."""


PATH = Given((str, os.PathLike), "a path, as text or pathlib.Path")
FLAG = Given((bool,), "True or False")
TEXT = Given((str,), "a text")
TEXTS = Given((str, list, tuple, set, frozenset), "names, as a list of texts")
TABLE = Given((Mapping,), "a dict")
CALLED = Given((Callable,), "a function")  # type: ignore[arg-type]  # as isinstance takes it
ARGUMENTS: Mapping[str, Given] = {
    **dict.fromkeys(("manifest", "path", "out", "store", "remote", "base", "memo", "parts"), PATH),
    **dict.fromkeys(
        ("locked", "offline", "keep_going", "check", "preflight", "trust_remote_code", "double_quant",
         "gradient_checkpointing"),
        FLAG,
    ),
    **dict.fromkeys(("revision", "subfolder", "variant", "library_name", "head", "train", "scheme", "format"), TEXT),
    **dict.fromkeys(("nodes", "force", "lora_targets", "no_split_module_classes", "skip_modules",
                     "keep_in_fp32_modules", "llm_int8_skip_modules"), TEXTS),
    **dict.fromkeys(("params", "architecture", "max_memory", "special_dtypes", "environment"), TABLE),
    "progress": CALLED,
    "jobs": Given((int,), "how many stages run side by side"),
    "first_gpu": Given((int,), "the number of a GPU"),
}  # fmt: skip
"""By the name of an argument, which means the same in all public functions."""
SPELLINGS = {
    "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32", "fp64": "float64",
    "fp8": "float8", "8bit": "int8", "4bit": "nf4", "int4": "nf4",
}  # fmt: skip
"""What others call dtypes and formats."""
FOLDERS = ("base", "memo", "parts")
"""Arguments that are handed on as paths."""


def is_text(text: str) -> bool:
    """Return whether it can be written down: bytes that are no UTF-8 reach Python as halves of characters, and no file
    name holds NUL."""
    return "\0" not in text and not any("\ud800" <= sign <= "\udfff" for sign in text)


def begins_address(part: str) -> bool:
    """Return whether the first part of a path is what an address begins with, such as `s3:` or `hf:`."""
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", part) is not None


LONGEST_PLAIN = 50
"""Characters of a plain name: with what tells it from others, fewer than a label of Kubernetes may have."""


def plain_names(names: Iterable[str], joint: str = "-") -> dict[str, str]:
    """Return of each name one that other systems take for a name too: letters and digits of ASCII, at its inner places
    `joint`, at most 63 characters. No two are the same, whatever their case: those that would be end in a digest."""
    from hashlib import sha256  # of what is written for other systems

    names = dict.fromkeys(names)
    plain = {name: re.sub(r"[^A-Za-z0-9]+", joint, name).strip(joint) for name in names}
    often = Counter(each.lower() for each in plain.values())
    found: dict[str, str] = {}
    taken = {each.lower() for each in plain.values() if often[each.lower()] == 1}
    for name, text in sorted(plain.items()):
        if often[text.lower()] == 1 and 0 < len(text) <= LONGEST_PLAIN and not text[0].isdigit():
            found[name] = text
            continue
        digest, head = sha256(name.encode()).hexdigest(), text[:LONGEST_PLAIN].strip(joint) or "x"
        head = f"x{joint}{head}" if head[0].isdigit() else head
        one = next(each for size in range(6, 10) if (each := f"{head}{joint}{digest[:size]}").lower() not in taken)
        taken.add(one.lower())
        found[name] = one
    return {name: found[name] for name in names}


def listed(words: Iterable[str], joint: str = "and") -> str:
    """Return `a, b and c`."""
    *most, last = list(words) or [""]
    return f"{', '.join(most)} {joint} {last}" if most else last


def closest(word: str, known: Sequence[str], most: int = 500) -> str | None:
    """Return the known word that `word` is probably a slip for. most: of the known ones that are compared."""
    folded = {name.lower().replace("_", "-"): name for name in known}
    same = folded.get(word.lower().replace("_", "-"))
    if same is not None:
        return same
    from difflib import get_close_matches

    # Comparing is quadratic in the length of words and linear in their number; both are the writer's to choose.
    return next(iter(get_close_matches(word[:100], known[:most], n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return `did you mean 'x'?` where something known is close to `word`; else the known words, if they are few.
    `otherwise` introduces that list: `it takes` gives `it takes a, b and c`."""
    known = list(known)
    close = closest(word, known)
    if close is not None:
        return f"did you mean {close!r}?"
    return f"{otherwise} {listed(known)}" if otherwise and 0 < len(known) <= 20 else ""


def or_path(error: BigpipeError, name: str) -> BigpipeError:
    """Return an error about a repository that is not there or not known (its field is `repo`), or a Hub that cannot be
    asked, where a directory may have been meant by the name: it then says that there is none, and what is beside it."""
    unknown = error.field == "repo" and not isinstance(error, GatedRepository)
    if not (unknown or isinstance(error, Offline)) or "://" in name:
        return error
    parent = Path(name).parent
    beside = sorted(str(other) for other in parent.iterdir() if other.is_dir()) if parent.is_dir() else []
    near = did_you_mean(name, beside)
    if unknown or near:
        error.cause += f", and there is no directory {name} here"
    if near:
        error.cure = f"{near} Else {error.cure}"
    return error


def as_names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return names that may have been given as one text."""
    return (given,) if isinstance(given, str) else tuple(given)


def refuse_unknown(
    field: str,
    names: Iterable[str],
    known: Collection[str],
    what: str,
    cure: str,
    *,
    meant: Callable[[str], bool] | None = None,
) -> None:
    """Raise UsageError for names that mean nothing a model has, each with what was probably meant.

    field: the argument they stand in. what: what they should name, in the plural. known: names to suggest.
    meant: whether one means something; None: whether it is known.
    """
    unknown = [name for name in names if not (name in known if meant is None else meant(name))]
    if unknown:
        told = [_with_guess(name, known) for name in unknown]
        cause = f"{field} names {what} that the model does not have: {first_few(told)}"
        raise UsageError(cause, cure, field=f"{field}.{unknown[0]}")


def _with_guess(name: str, known: Collection[str]) -> str:
    close = closest(name, list(known), len(known))
    return f"{name} (did you mean {close}?)" if close else name


def checked(**own: Given) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return what makes a public function refuse arguments of types that mean nothing: a UsageError that names argument
    and cure, for one that there is not too. own: what arguments of its own may be, besides `ARGUMENTS`. The default of
    an argument is always taken."""

    def checking(function: Callable[P, R]) -> Callable[P, R]:
        signature, known = inspect.signature(function), {**ARGUMENTS, **own}
        defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        options = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for odd in (name for name in kwargs if name not in defaults and not options):
                called = function.__name__
                cure = did_you_mean(odd, defaults, otherwise="it takes") or f"see help({called})"
                raise UsageError(f"{called} has no argument {odd!r}", cure)
            bound = signature.bind(*args, **kwargs)
            for name, value in {**bound.arguments, **bound.arguments.get(options, {})}.items():
                if name in known and value is not defaults.get(name):
                    _require(name, value, known[name])
                    if name in FOLDERS:
                        bound.arguments[name] = Path(value)
            return function(*bound.args, **bound.kwargs)

        return call

    return checking


def _require(name: str, value: object, wanted: Given) -> None:
    odd = isinstance(value, bool) and bool not in wanted.kinds
    entries = value if wanted is TEXTS and isinstance(value, Collection) else ()
    if odd or not isinstance(value, wanted.kinds) or not all(isinstance(entry, str) for entry in entries):
        raise UsageError(f"{name} is {value!r:.80}", f"give {wanted.words}", field=name)
