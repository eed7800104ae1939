"""scoring: `{"scores": […]}`, how likely a model finds the continuations of each prompt that its row gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.sources import Sources

from .rows import Row
from .task import Answer, Answerer, Arguments, Task, TaskOptions
from .together import afresh, most_together
from .tokenizing import (
    Asking,
    Bounded,
    added_behind,
    check_length,
    check_text_model,
    embedded,
    load_tokenizer,
    longest,
    pad,
    require_going_on,
    require_template,
    text_of,
)

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import ModelDescription


Case = tuple[list[int], int]
"""The tokens of a prompt and what follows, and how many of them are the prompt's."""


class Scoring(Arguments):
    continuation: str = "continuation"
    """The field of a row with what is scored after its prompt: a text, or a list of texts."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    column = Scoring.model_validate(options.arguments).continuation
    with options.bounded("the tokenizer of the model"):
        behind = added_behind(tokenizer)
    score = _scorer(model, tokenizer)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        each = [_cases(tokenizer, row, column, behind, options.bounded) for row in rows]
        cases = [case for found in each for case in found]
        # As many at a time as there are rows, so that several continuations of a row take no more memory
        parts = [cases[start : start + len(rows)] for start in range(0, len(cases), len(rows))]
        scores = iter([found for part in parts for found in score(part)])
        return [_answer(found, [next(scores) for _ in found]) for found in each]

    return answer


def _continuations(row: Row, column: str) -> list[str]:
    given = row.data[column]
    return [given] if isinstance(given, str) else given


def _cases(tokenizer: Any, row: Row, column: str, behind: int, bounded: Bounded) -> list[Case]:
    """The prompt with each of its continuations. Both are read as one text, whose tokens need not end where the prompt
    does: those beyond the prompt's own number are scored, as by EleutherAI's lm-evaluation-harness. behind: tokens that
    the tokenizer puts after a text, which are no part of either."""

    def read(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
        return tokens[: len(tokens) - behind] if special else tokens

    with bounded("the tokenizer, or the chat template, of the model"):
        text, special = text_of(tokenizer, row, going_on=True)
        start = len(read(text))
        wholes = [read(text + more) for more in _continuations(row, column)]
    if not start:
        raise ValueError("the prompt is empty: nothing stands before the first token that would be scored")
    if short := next((whole for whole in wholes if len(whole) <= start), None):
        raise ValueError(
            f"a continuation adds no token to the {start} of its prompt: {tokenizer.decode(short)[-80:]!r}"
        )
    return [(whole, start) for whole in wholes]


def _scorer(model: Any, tokenizer: Any) -> Callable[[Sequence[Case]], list[dict[str, Any]]]:
    import torch

    most, begin = most_together(model), afresh(model)

    def score(cases: Sequence[Case]) -> list[dict[str, Any]]:
        encoded = [{"input_ids": whole} for whole, _ in cases]
        check_length(model, longest(encoded))
        if len({len(whole) for whole, _ in cases}) > 1 and longest(encoded) > most:
            return [found for case in cases for found in score([case])]
        begin()
        with torch.inference_mode():
            logits = model(**pad(model, tokenizer, encoded, "right")).logits
        return [_of_one(row, whole, start) for row, (whole, start) in zip(logits, cases, strict=True)]

    return score


def _of_one(logits: torch.Tensor, whole: Sequence[int], start: int) -> dict[str, Any]:
    """logits: [tokens, vocabulary]. The one at a place is of the token that follows."""
    import torch

    likely = logits[start - 1 : len(whole) - 1].float().log_softmax(-1).cpu()
    wanted = torch.tensor(whole[start:])
    each = likely.gather(-1, wanted[:, None])[:, 0].double()
    return {
        "logprob": each.sum().item(),
        "token_logprobs": each.tolist(),
        "tokens": len(wanted),
        "greedy": bool((likely.argmax(-1) == wanted).all()),
    }


def _answer(cases: Sequence[Case], scores: list[dict[str, Any]]) -> Answer:
    read = sum(len(whole) for whole, _ in cases)
    return Answer({"scores": scores}, sum(score["tokens"] for score in scores), read)


def _length_of(row: Row, arguments: Mapping[str, Any]) -> int:
    column = Scoring.model_validate(arguments).continuation
    return row.nbytes + max(len(text.encode()) for text in _continuations(row, column))


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    require_going_on(model, sources, Asking("scoring"), field="task")
    check_text_model(model, arguments, sources)


TASK = Task(
    name="scoring", bind=_bind, arguments=Scoring, check_model=_check_model, row_check=require_template,
    named_columns={"continuation": "texts"}, length_of=_length_of, side_by_side=True,
)  # fmt: skip
