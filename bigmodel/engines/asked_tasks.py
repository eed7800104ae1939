"""The tasks that an endpoint does, through OpenAI's API as its reference and vLLM's server have it. Payloads are those
of the tasks of the same name.

    text-generation      POST /completions, of chats /chat/completions
    scoring              POST /completions with `echo` and `logprobs`, which give the log-probabilities of a prompt
    feature-extraction   POST /embeddings

What a server says is looked at before it counts: NoAnswer is raised for what is no answer to the question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import ANSWERED, Answer, Answerer, Arguments, Row, Task, TaskOptions, ending, find_task

from .endpoint import LEAST, Endpoint, NoAnswer

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

OF_A_TOKEN, OF_A_VECTOR = 2**10, 2**20
"""Bytes of an answer at most for each: a token with its log-probabilities, a vector of numbers as text."""
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
"""What vLLM's server is asked beside a chat that it is to go on with."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


class AskedGeneration(Arguments):
    """The names are those of transformers' `generate`, so that a recipe changes its engine in one line."""

    do_sample: bool = False
    """Draw tokens, with seed + index of the record; else the likeliest one is taken: a temperature of 0."""
    temperature: float | None = Field(None, gt=0)
    """With `do_sample`; null: as the server has it."""
    top_p: float | None = Field(None, gt=0, le=1)
    """With `do_sample`."""
    top_k: int | None = Field(None, ge=1)
    """With `do_sample`; vLLM and others know it, OpenAI does not."""
    min_p: float | None = Field(None, ge=0, le=1)
    """With `do_sample`; vLLM and others know it, OpenAI does not."""
    repetition_penalty: float | None = Field(None, gt=0)
    """vLLM and others know it, OpenAI does not."""
    num_return_sequences: int = Field(1, ge=1, le=128)
    """Texts for each prompt, with `do_sample`: more than one are under `texts` too."""
    stop_strings: str | list[str] | None = None
    """A text ends before the first of these; with transformers after it."""

    @model_validator(mode="after")
    def _drawn(self) -> Self:
        given = [name for name in SAMPLING if getattr(self, name) is not None]
        given += ["num_return_sequences"] if self.num_return_sequences > 1 else []
        if given and not self.do_sample:
            raise ValueError(f"{given[0]} has no effect where nothing is drawn; set do_sample: true, or leave it out")
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """What is sent of them."""
        names = {**{name: name for name in (*SAMPLING, "repetition_penalty")}, "stop_strings": "stop"}
        given = {names[name]: value for name in names if (value := getattr(self, name)) is not None}
        return given if self.do_sample else {**given, "temperature": 0}


class AskedFeatures(Arguments):
    """None: how vectors are made of a text's tokens is the server's affair."""


def _bind_generation(endpoint: Endpoint, path: Path | None, options: TaskOptions, sources: Sources) -> Answerer:
    arguments = AskedGeneration.model_validate(options.arguments)
    texts, most = arguments.num_return_sequences, options.max_new_tokens
    common = {endpoint.length_field: most, "n": texts, "stream": False, **arguments.asked}
    limit = LEAST + texts * most * OF_A_TOKEN

    def answer(row: Row) -> Answer:
        drawn = {"seed": (options.seed + row.index) % 2**63} if arguments.do_sample else {}
        if chat := _chat(row, endpoint):
            begun = CONTINUED if endpoint.goes_on and ending(row) is not ANSWERED else {}
            found = endpoint.ask("/chat/completions", {"messages": chat, **common, **drawn, **begun}, limit)
        else:
            found = endpoint.ask("/completions", {"prompt": row.prompt, **common, **drawn}, limit)
        made = [_text(choice, chat=bool(chat)) for choice in _listed(found, "choices", texts)]
        several = {"texts": made} if texts > 1 else {}
        return Answer({"text": made[0], **several}, _used(found, "completion_tokens"), _used(found, "prompt_tokens"))

    return lambda rows: [answer(row) for row in rows]


def _chat(row: Row, endpoint: Endpoint) -> list[Any]:
    if isinstance(row.prompt, list):
        return row.prompt
    return [{"role": "user", "content": row.prompt}] if endpoint.chat else []


def _text(choice: Mapping[str, Any], *, chat: bool) -> str:
    message = choice.get("message")
    text = (message.get("content") if isinstance(message, dict) else None) if chat else choice.get("text")
    ended = choice.get("finish_reason")
    if ended == "content_filter":
        raise NoAnswer("the server withholds the text: its filter ended it")
    if not isinstance(text, str):
        raise NoAnswer(f"the server answers without a text (it ended by {ended!r:.40})")
    return text


def _bind_scoring(endpoint: Endpoint, path: Path | None, options: TaskOptions, sources: Sources) -> Answerer:
    assert SCORING.arguments is not None  # noqa: S101  it names the field
    column = str(getattr(SCORING.arguments.model_validate(options.arguments), "continuation"))  # noqa: B009

    def read(text: str) -> tuple[list[float], list[bool], list[Any]]:
        """Of each token of a text: its log-probability, whether it is the likeliest, and what the server calls it."""
        question = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        limit = LEAST + (1 + len(text.encode())) * OF_A_TOKEN
        choice = _listed(endpoint.ask("/completions", question, limit), "choices", 1)[0]
        return *_logprobs(choice), _tokens(choice)

    def answer(row: Row) -> Answer:
        scored, _, alone = read(row.prompt)
        start = len(scored)
        if not start:
            raise ValueError("the prompt is empty: nothing stands before the first token that would be scored")
        given = row.data[column]
        wholes = [read(row.prompt + more) for more in ([given] if isinstance(given, str) else given)]
        if any(len(each) <= start for each, *_ in wholes):
            raise ValueError(f"a continuation adds no token to the {start} of its prompt")
        for _, _, tokens in wholes:
            _refuse_ends(row.prompt, alone, tokens)
        scores = [_score(each[start:], likeliest[start:]) for each, likeliest, _ in wholes]
        made = sum(len(each) - start for each, *_ in wholes)
        return Answer({"scores": scores}, made, sum(len(each) for each, *_ in wholes))

    return lambda rows: [answer(row) for row in rows]


def _logprobs(choice: Mapping[str, Any]) -> tuple[list[float], list[bool]]:
    """The first token follows nothing: it has no log-probability, and is likeliest by no measure."""
    told = choice.get("logprobs")
    each = told.get("token_logprobs") if isinstance(told, dict) else None
    likeliest = told.get("top_logprobs") if isinstance(told, dict) else None
    if not isinstance(each, list) or not isinstance(likeliest, list) or len(each) != len(likeliest):
        raise NoAnswer("the server gives no log-probabilities of a prompt (`echo` with `logprobs`)")
    rest = [_number(value) for value in each[1:]]
    if any(value > 1e-3 for value in rest):
        raise NoAnswer("the server gives log-probabilities above 0")
    best = [max(map(_number, top.values()), default=0.0) if isinstance(top, dict) else 0.0 for top in likeliest[1:]]
    return [0.0, *rest][: len(each)], [False, *(one >= top for one, top in zip(rest, best, strict=True))][: len(each)]


def _tokens(choice: Mapping[str, Any]) -> list[Any]:
    """Those of a text, in words; none where the server does not tell."""
    told = choice["logprobs"].get("tokens")
    return told if isinstance(told, list) else []


def _refuse_ends(prompt: str, alone: Sequence[Any], whole: Sequence[Any]) -> None:
    """Raise NoAnswer where the tokens of a prompt end with one that is none of its text, and that gives way to what
    follows: nothing says which tokens are the continuation's then. alone: of the prompt; whole: with what follows."""
    if not alone or len(whole) < len(alone) or alone[-1] != whole[-1] or alone[-1] == whole[len(alone) - 1]:
        return
    if not prompt.endswith(str(alone[-1])):
        raise NoAnswer(
            f"the server puts {str(alone[-1])!r:.40} behind every text, which a continuation is not scored by"
        )


def _score(each: Sequence[float], likeliest: Sequence[bool]) -> dict[str, Any]:
    return {
        "logprob": math.fsum(each), "token_logprobs": list(each), "tokens": len(each), "greedy": all(likeliest)
    }  # fmt: skip


def _bind_features(endpoint: Endpoint, path: Path | None, options: TaskOptions, sources: Sources) -> Answerer:
    def answer(rows: Sequence[Row]) -> list[Answer]:
        question = {"input": [row.prompt for row in rows], "encoding_format": "float"}
        found = endpoint.ask("/embeddings", question, LEAST + len(rows) * OF_A_VECTOR)
        vectors = [_vector(each.get("embedding")) for each in _listed(found, "data", len(rows))]
        each, more = divmod(_used(found, "prompt_tokens"), len(rows))  # the API tells their sum alone
        read = [each + (number < more) for number in range(len(rows))]
        return [Answer({"features": vector}, tokens, tokens) for vector, tokens in zip(vectors, read, strict=True)]

    return answer


def _vector(found: Any) -> list[float]:
    if not isinstance(found, list) or not found:
        raise NoAnswer("the server answers without a vector")
    return [_number(value) for value in found]


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise NoAnswer(f"the server gives {value!r:.40} where a number is due")
    return float(value)


def _listed(found: Mapping[str, Any], name: str, count: int) -> list[dict[str, Any]]:
    """The objects of a list, in the order of their `index`."""
    given = found.get(name)
    if not isinstance(given, list) or len(given) != count or not all(isinstance(each, dict) for each in given):
        amount = len(given) if isinstance(given, list) else "no"
        raise NoAnswer(f"the server answers with {amount} {name}, where {count} are due")
    places = [each.get("index", number) for number, each in enumerate(given)]
    if sorted(places, key=str) != sorted(range(count), key=str):
        raise NoAnswer(f"the server numbers its {name} {places!r:.60}, where 0 to {count - 1} are due")
    return [given[places.index(number)] for number in range(count)]


def _used(found: Mapping[str, Any], name: str) -> int:
    """Tokens, as far as the server counts them."""
    usage = found.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 2**40 else 0


def _of_a_server(name: str, **changes: Any) -> Task:
    """The task of this name, as far as it needs no model here."""
    return replace(find_task(name, Sources()), check_model=_nothing, row_check=_any_row, **changes)


def _nothing(*given: Any) -> None:
    """The server knows its model."""


def _any_row(model: ModelDescription) -> Callable[[Row], None]:
    return _nothing


GENERATION = _of_a_server(
    "text-generation", bind=_bind_generation, arguments=AskedGeneration, check_arguments=_nothing
)  # fmt: skip
SCORING = _of_a_server("scoring", bind=_bind_scoring, chats=False)
FEATURES = _of_a_server("feature-extraction", bind=_bind_features, arguments=AskedFeatures, chats=False)


def asked_tasks() -> Mapping[str, Task]:
    """Return the tasks that an endpoint does, by name."""
    return {task.name: task for task in (GENERATION, SCORING, FEATURES)}


def held_tasks() -> Mapping[str, Task]:
    """Return the same, of a server that is given a model from here: what that model cannot do is known before."""
    own = {name: find_task(name, Sources()) for name in asked_tasks()}
    return {name: replace(task, row_check=own[name].row_check) for name, task in asked_tasks().items()}
