"""Tokens of a text, and the windows that a model reads them through."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture, position_limit
from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import (
    OTHER_TOKENIZER,
    Asking,
    Bounded,
    Row,
    beyond,
    load_tokenizer,
    require_going_on,
    require_tokenizer,
    vocabulary,
)
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.modules import foreign

from .pieces import Encoded, encode

EVALUATE = Asking("evaluation", "take a model of transformers that goes on with a text, such as OPT, GPT-2 or Llama")
MOST = 64
"""Tokens of one character that are looked for on each side: it has four bytes, but a tokenizer may spell it out."""
UNLIMITED = 2048
"""Tokens of a window, where a model's positions have no end and nobody says how many."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `begin` to `end` of a text, of which those from `scored` on are scored, each given all before it here."""

    begin: int
    end: int
    scored: int

    @property
    def tokens(self) -> int:
        """Return how many are scored."""
        return self.end - self.scored


def windows_of(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Yield the windows over so many tokens, as in transformers' guide "Perplexity of fixed-length models": each begins
    `stride` after the one before and has at most `length` tokens; every token is scored once, in the first window that
    holds it. The first token of a window has nothing before it, and is not scored there."""
    done = 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        window = Window(begin, end, max(done, begin + 1))
        if window.tokens > 0:
            yield window
        if end == tokens:
            return
        done = end


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as a model reads it."""

    ids: array[int]
    text_bytes: int
    """UTF-8 bytes of the tokens that are scored, whatever the number of windows that each stands in."""


def tokenize(
    path: Path,
    text: str,
    sources: Sources,
    bounded: Bounded,
    windows: Callable[[int], Iterable[Window]],
    most: int | None = None,
    *,
    limit: int | None = None,
    where: Callable[[int], str] = "character {}".format,
) -> Tokens:
    """Return the first `most` tokens (None: all) of a text, by the tokenizer in a checkpoint's directory, with the
    special tokens that it puts around a text. windows: those over so many tokens, as `windows_of` gives them. limit:
    tokens of the model's vocabulary; None: nobody knows. where: how errors call the place of a character. Raise
    UsageError for fewer than two tokens, as nothing stands before the first, and for one that the model does not
    have."""
    tokenizer = load_tokenizer(path, sources, bounded)
    broken = foreign(f"{path} has a tokenizer that cannot be used", "mend it, or take another model")
    around = partial(bounded, f"the tokenizer of {path}")
    with broken:
        encoded = encode(tokenizer, text, around, most) if tokenizer.is_fast else _whole(tokenizer, text, around)
        with around():
            ids = encoded.ids[:most]
            cause = beyond(tokenizer, ids, limit)
            scored = _together((window.scored, window.end) for window in windows(len(ids)))
            size = _bytes_of(text, encoded, scored) if encoded.ends else _decoded(tokenizer, ids, scored)
    if len(ids) < 2:
        cause = f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}, and the first is never scored"
        raise UsageError(cause, "give a longer text", field="data")
    if cause is not None:
        first = next(place for place, token in enumerate(ids) if token == max(ids))
        place = where(encoded.begins[first]) if encoded.begins else f"token {first} of the text"
        raise UsageError(f"{place}: {cause}", OTHER_TOKENIZER, field="data")
    return Tokens(ids, size)


def _whole(tokenizer: Any, text: str, bounded: Callable[[], AbstractContextManager[None]]) -> Encoded:
    """The same of a tokenizer that does not say where tokens stand, so that nothing can be put together."""
    with bounded():
        return Encoded(array("i", tokenizer(text, verbose=False)["input_ids"]), array("q"), array("q"))


def _together(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same tokens in as few (begin, end) as there can be: those of windows that overlap are one."""
    found: list[tuple[int, int]] = []
    for begin, end in spans:
        first = found.pop()[0] if found and found[-1][1] == begin else begin
        found.append((first, end))
    return found


def _bytes_of(text: str, encoded: Encoded, scored: Iterable[tuple[int, int]]) -> int:
    """UTF-8 bytes of the tokens from each begin to its end, the first never among them. What a tokenizer leaves out
    between two tokens belongs to the second."""
    ends = array("q", accumulate(encoded.ends, max))
    return sum(
        len(text[ends[begin - 1] : ends[end - 1]].encode())
        + _shared(text, encoded, begin)
        - _shared(text, encoded, end)
        for begin, end in scored
    )


def _shared(text: str, encoded: Encoded, token: int) -> int:
    """Where a character is of several tokens, of which this one is not the first: the bytes that fall to it and those
    after it, as all have equal parts."""
    behind, ahead = encoded.spans(max(0, token - MOST), token), encoded.spans(token, token + MOST)
    if not ahead or (alike := ahead[0]) != behind[-1]:
        return 0
    before, after = (sum(1 for _ in takewhile(alike.__eq__, spans)) for spans in (reversed(behind), ahead))
    size = len(text[slice(*alike)].encode())
    return size - size * before // (before + after)


def _decoded(tokenizer: Any, ids: array[int], scored: Iterable[tuple[int, int]]) -> int:
    """The same, where only the tokens' texts are known: what they add to the token before them."""

    def size(begin: int, end: int) -> int:
        text = tokenizer.decode(list(ids[begin:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    return sum(size(begin - 1, end) - size(begin - 1, begin) for begin, end in scored)


def plan_windows(tokens: Tokens, length: int, stride: int, asked: str = "") -> list[Row]:
    """Return the windows over the tokens as rows, which are told apart by what they are, what they read, and `asked`:
    what else their numbers depend on."""
    found = []
    for index, window in enumerate(windows_of(len(tokens.ids), length, stride)):
        read = hashlib.sha256(tokens.ids[window.begin : window.end].tobytes() + asked.encode()).hexdigest()[:16]
        found.append(Row(index, f"tokens {window.begin} to {window.end}", {**asdict(window), "read": read}))
    return found


def window_of(row: Row) -> Window:
    return Window(row.data["begin"], row.data["end"], row.data["scored"])


def positions_of(model: ModelDescription, architecture: Architecture | None) -> int | None:
    """Return how many tokens a model reads at once; None where there is no last one."""
    return position_limit(architecture.config if architecture else model.config or {})


def check_windows(readers: Mapping[str, int | None], length: int | None, stride: int | None) -> tuple[int, int]:
    """Return tokens of a window and between the begins of two. readers: who reads them, the model and its baseline,
    with the positions that each has. length: None is what all have positions for, and where these have no end 2,048.
    stride: None is half of it. Raise UsageError for more than there are positions, and for a stride above the length,
    which would leave tokens out."""
    known = [(limit, who) for who, limit in readers.items() if limit is not None]
    limit, who = min(known, key=lambda found: found[0], default=(None, ""))
    if length is not None and limit is not None and length > limit:
        cause = f"sequence_length is {length}, and the {who} has {limit} positions"
        raise UsageError(cause, f"give at most {limit}, or leave it out", field="sequence_length")
    settled = length or limit or UNLIMITED
    if stride is not None and stride > settled:
        cause = f"stride is {stride} and a window has {settled} tokens, so that tokens between two would be left out"
        raise UsageError(cause, f"give at most {settled}", field="stride")
    return settled, stride or max(1, settled // 2)


def check_model(model: ModelDescription, sources: Sources, who: str = "model") -> Architecture | None:
    """Return what the model consists of; None where that is not known yet. who: `model`, or `baseline`. Raise
    UsageError, with the field `inputs.WHO`, for one that does not go on with a text, or has no tokenizer."""
    try:
        require_tokenizer(model, EVALUATE, f"the {who}")
        return require_going_on(model, sources, EVALUATE)
    except BigpipeError as error:
        error.field = error.field or f"inputs.{who}"
        raise


def tokens_of(architecture: Architecture | None) -> int | None:
    """Return how many tokens a model both has embeddings of and predicts; None where nobody knows."""
    sizes = vocabulary(architecture) if architecture else ()
    return min((size for size in sizes if size is not None), default=None)


def check_pair(model: Architecture | None, baseline: Architecture | None) -> None:
    """Raise UsageError for a baseline of another vocabulary."""
    sizes = [_vocabulary(found) for found in (model, baseline)]
    if None not in sizes and sizes[0] != sizes[1]:
        cause = f"the baseline has a vocabulary of {sizes[1]} tokens, and the model one of {sizes[0]}"
        raise UsageError(cause, "take as baseline the model that this one was made from", field="inputs.baseline")


def _vocabulary(architecture: Architecture | None) -> int | None:
    from bigpipe.bigmodel.architecture import text_config

    size = text_config(architecture.config).get("vocab_size") if architecture else None
    return size if isinstance(size, int) else None


def check_same_tokens(own: Tokens, baseline: Tokens) -> None:
    """Raise UsageError where two tokenizers read the text differently."""
    if own.ids != baseline.ids:
        pairs = zip(own.ids, baseline.ids, strict=False)
        place = next(
            (at for at, (one, other) in enumerate(pairs) if one != other), min(len(own.ids), len(baseline.ids))
        )
        cause = f"the baseline's tokenizer reads the text differently, from token {place} on"
        raise UsageError(cause, "take as baseline a model with the same tokenizer", field="inputs.baseline")
