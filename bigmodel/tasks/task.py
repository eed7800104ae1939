"""The task as a value, and a plain function as one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.names import did_you_mean, listed
from bigpipe.sizes import counted

from .tokenizing import OWN_FUNCTION, known_architecture

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from bigpipe.bigmodel.checkpoint import ModelDescription

    from .rows import Reads, Row


WRITTEN: Mapping[Reads, str] = {
    "text": "name files of texts, or write a list of them",
    "picture": "name the files, each of which is a row: pictures/*.png",
    "sound": "name the files, each of which is a row: sounds/*.wav",
}
"""What a task reads → how its prompts are written."""
OVERFLOWS = "where the model overflows, as it may in float16, set dtype: float32"
"""The cure of numbers that are none."""
SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of what is made of a row: far from the seeds of other rows."""


def seeds_of(seed: int, count: int) -> list[int]:
    """Return seeds for so many texts or pictures of the row that `seed` belongs to."""
    return [(seed + number * SEED_STEP) % 2**63 for number in range(count)]


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file that a task makes of a row: a picture, a sound, any bytes. It comes to lie beside the results, named by
    the row's index; the row says where. Raise ValueError for an ending that is none."""

    content: bytes
    ending: str
    """Of its name: `.png`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\.[A-Za-z0-9_]{1,16}){1,2}", self.ending):
            raise ValueError(f"{self.ending!r} is no ending of a file's name, such as '.png'")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a task gives for one row."""

    payload: dict[str, Any]
    """A JSON object. It becomes the row's line of results, after its index and prompt. A value of it may be a
    `ResultFile`, or a list with such."""
    tokens: int = 0
    """Tokens made; of scoring those scored; read, where a task does neither. Speeds are told in these."""
    read: int = 0
    """Tokens of the prompt, as far as the task tells."""


Answerer = Callable[[Sequence["Row"]], list[Answer]]
"""A task bound to a model: the rows of a batch → one answer per row, in their order. Equal batches give equal answers,
and what is drawn at random depends on `seed` + index of the row alone."""


class Arguments(BaseModel):
    """What a task takes under `generation:`. Every field has a default; the text under it is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """How a task is to be done."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The task's own: the fields of its `arguments`, of `generate`, of a function."""
    max_new_tokens: int = 32
    seed: int = 0
    """Of row i: seed + i."""
    bounded: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext()
    """Around what the model's tokenizer and chat template do, which may be endless. what: the subject of an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One way to answer rows with a model.

    bind: (model that `load` made, its checkpoint's directory, options, sources) → the function that answers batches.
      Raises UsageError where the model cannot do it. Only here may torch be imported.
    arguments: the model of `TaskOptions.arguments`, which are checked by it; None: any, as `check_arguments` says.
    check_arguments: raises UsageError for `TaskOptions.arguments` it does not take; asked of each argument alone too.
    reads: what its rows may be; none: anything.
    files: (row, arguments) → the files that it names besides the one that it may be, from the recipe's directory where
      they lie below that; raises UsageError for a row that does not name what it should.
    classes: how the name of a model's class ends that can do it; none: any class.
    check_model: (model, arguments, sources); raises UsageError for a model it cannot run, and for arguments that do not
      go with it, as far as config and side files tell.
    row_check: (model) → what raises UsageError for a row that the model cannot take, as far as its side files tell.
    makes_tokens: does it make tokens, `TaskOptions.max_new_tokens` of them at the most?
    own_length: does it make as many tokens as it needs, whatever that number is?
    heeds_length: does it heed `TaskOptions.max_new_tokens` though nobody knows whether it makes tokens?
    headless: does it run the body of a model alone, of an encoder-decoder the encoder, and make no logits?
    columns: fields that each row must have besides its prompt.
    named_columns: those of the `arguments` that name such a field, where they are given, and what it holds: one text,
      or one or several of them (`texts`).
    length_of: (row, arguments) → the most tokens that a row may have; what a plan's memory, and its batches,
      are reckoned with.
    chats: may its rows be chats?
    needs_text: is a prompt that is an empty text an error, whatever the model?
    library: whose models it runs. A model of transformers is loaded as its placement says, and handed to `bind`; of
      diffusers that is a pipeline, several models on one device.
    side_by_side: may another batch begin, in another thread, while one waits in a forward of the model? Only one of
      them runs at a time, and torch's generators are its own.
    """

    name: str
    bind: Callable[[Any, Path, TaskOptions, Sources], Answerer]
    arguments: type[Arguments] | None = None
    check_arguments: Callable[[Mapping[str, Any]], None] = lambda arguments: None
    check_model: Callable[[ModelDescription, Mapping[str, Any], Sources], None] = lambda model, arguments, sources: None
    row_check: Callable[[ModelDescription], Callable[[Row], None]] = lambda model: lambda row: None
    reads: tuple[Reads, ...] = ("text",)
    files: Callable[[Row, Mapping[str, Any]], Sequence[str]] | None = None
    classes: tuple[str, ...] = ()
    makes_tokens: bool = False
    own_length: bool = False
    heeds_length: bool = False
    headless: bool = False
    columns: tuple[str, ...] = ()
    named_columns: Mapping[str, Literal["text", "texts"]] = field(default_factory=dict)
    length_of: Callable[[Row, Mapping[str, Any]], int] = lambda row, arguments: row.nbytes
    chats: bool = True
    needs_text: bool = False
    library: Literal["transformers", "diffusers"] = "transformers"
    side_by_side: bool = False

    def checked(
        self,
        arguments: Mapping[str, Any],
        rows: Iterable[Row],
        model: ModelDescription | None,
        sources: Sources = Sources(),
        max_new_tokens: int = 0,
    ) -> Iterator[Row]:
        """Return the rows, each as it is found to be right. Raise UsageError for what is known to be wrong before there
        is a model in memory; for what is no row's, before the first."""
        self.require_arguments(arguments)
        check_row: Callable[[Row], None] = lambda row: None  # noqa: E731
        if model is not None:
            self._require_class(model, sources)
            self.check_model(model, arguments, sources)
            if self.makes_tokens and not self.own_length:
                _check_new_tokens(model, max_new_tokens, sources)
            check_row = self.row_check(model)
        return self._each_checked(arguments, rows, check_row)

    def _each_checked(
        self, arguments: Mapping[str, Any], rows: Iterable[Row], check_row: Callable[[Row], None]
    ) -> Iterator[Row]:
        for row in self.with_columns(arguments, rows):
            check_row(row)
            yield row

    def require_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise UsageError for arguments it does not take."""
        if self.arguments is not None:
            settle(self.name, self.arguments, arguments)
        self.check_arguments(arguments)

    def settled(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments, and what the task takes where they leave one out. Raise ValidationError for those that
        it does not take."""
        return self.arguments.model_validate(arguments).model_dump() if self.arguments else arguments

    def length(self, arguments: Mapping[str, Any], row: Row) -> int:
        """Return the most tokens that a row may have, one at least."""
        return max(1, self.length_of(row, arguments))

    def with_columns(self, arguments: Mapping[str, Any], rows: Iterable[Row]) -> Iterator[Row]:
        """Yield each row. Raise UsageError for one that is not what the task reads, or is without the fields that it
        needs."""
        settled = self.arguments.model_validate(arguments) if self.arguments else None
        named = {getattr(settled, name): (name, holds) for name, holds in self.named_columns.items()}
        needed = (*self.columns, *filter(None, named))
        for row in rows:
            if self.reads and row.reads not in self.reads:
                what = listed((f"{each}s" for each in self.reads), "or")
                cause = f"task {self.name} reads {what}, and prompt {row.index} is a {row.reads}"
                raise UsageError(cause, WRITTEN[self.reads[0]], field="prompts")
            if not self.chats and isinstance(row.prompt, list):
                cause = f"task {self.name} takes no chats here"
                raise row.wrong(cause, "write a text, as the model is to read it")
            for column in needed:
                if column not in row.data:
                    cause = f"task {self.name} needs {column!r}, which prompt {row.index} does not have"
                    raise UsageError(cause, f"give every prompt the field {column}", field="prompts")
            for column, (name, holds) in named.items():
                if column is not None and not _holds_text(row.data[column], several=holds == "texts"):
                    cause = f"prompt {row.index}: {column!r} holds no text, as {name} of {self.name} needs it"
                    cure = "write a text" + (", or a list of them" if holds == "texts" else "")
                    raise UsageError(cause, cure, field="prompts")
            if self.files is not None:
                self.files(row, arguments)
            yield row

    def answerable(self, rows: Iterable[Row], max_errors: int) -> Iterator[Row]:
        """Yield each row. Raise UsageError at the end where of more than `max_errors` it is known without a model that
        they fail."""
        first, count = None, 0
        for row in rows:
            if self.needs_text and not row.prompt:
                first, count = first or row, count + 1
            yield row
        if first is not None and count > max_errors:
            others = f", and so is that of {counted(count - 1, 'other row')}" if count > 1 else ""
            raise first.wrong(f"the text is empty{others}", "leave it out, or let max_errors allow as many")

    def _require_class(self, model: ModelDescription, sources: Sources) -> None:
        architecture = known_architecture(model, sources) if self.classes else None
        if architecture is not None and not architecture.class_name.endswith(self.classes):
            cause = f"{architecture.class_name} does no {self.name}"
            wanted = listed((f"…{ending}" for ending in self.classes), "or")
            raise UsageError(cause, f"take a model of a class {wanted}; or {OWN_FUNCTION}", field="task")


def settle(task: str, model: type[Arguments], arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for the first of the `arguments` of a task that its `model` does not take."""
    for error in faults(task, model, arguments, "generation"):
        raise error


def faults(taker: str, model: type[Arguments], arguments: Mapping[str, Any], field: str) -> Iterator[UsageError]:
    """Yield an error for each of the `arguments` that the `model` of their taker does not take, or lacks. field: of the
    stage, that holds them."""
    try:
        model.model_validate(arguments)
    except ValidationError as error:
        for each in error.errors():
            yield _fault(taker, model, each, field)


def _fault(taker: str, model: type[Arguments], told: ErrorDetails, field: str) -> UsageError:
    name = str(told["loc"][0]) if told["loc"] else ""
    cure = "`bigpipe kinds distributed-infer` lists what it takes"
    if told["type"] == "missing":
        return UsageError(f"{taker} needs {name!r}", f"write it under `{field}`; {cure}", field=field)
    if told["type"] == "extra_forbidden":
        cure = did_you_mean(name, model.model_fields, otherwise="it takes") or "it takes none"
        return UsageError(f"{taker} takes no argument {name!r}", cure, field=f"{field}.{name}[key]")
    said = told["msg"].removeprefix("Value error, ")
    cause = f"{name} of {taker}: {said[:1].lower()}{said[1:]}, and {told['input']!r:.60} is given"
    return UsageError(cause, cure, field=f"{field}.{name}")


def _holds_text(value: Any, *, several: bool) -> bool:
    if isinstance(value, list):
        return several and bool(value) and all(isinstance(each, str) and each for each in value)
    return isinstance(value, str) and bool(value)


def _check_new_tokens(model: ModelDescription, new: int, sources: Sources) -> None:
    """Raise UsageError for more new tokens than positions, one of which the shortest text, or the token that a decoder
    begins with, has taken."""
    from bigpipe.bigmodel.architecture import position_limit

    architecture = known_architecture(model, sources)
    limit = position_limit(architecture.config) if architecture else None
    if limit is not None and new >= limit:
        what, less = "a prompt and what follows", ", less the tokens of the prompt"
        if architecture is not None and architecture.config.get("is_encoder_decoder"):
            what, less = "what it makes", ""
        cause = f"max_new_tokens is {new}, and the model has {limit} positions for {what}"
        raise UsageError(cause, f"give at most {limit - 1}{less}", field="max_new_tokens")


def function_task(name: str, function: Callable[..., Any]) -> Task:
    """Return the task that calls (model, rows, **arguments). Each row is a dict of its own fields as they are, of
    `index` and `seed` where it has none of that name, and of `prompt`, the row's prompt in any case. A row of which it
    gives an `error` that is a text failed; `tokens` and `prompt_tokens` are how many it made and read."""

    taken, called = _keywords(function), name.rpartition(":")[2]
    heeds = taken is None or "max_new_tokens" in taken

    def bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
        length = {"max_new_tokens": options.max_new_tokens} if heeds else {}
        return partial(_call, called, partial(function, **{**length, **options.arguments}), model, options.seed)

    checked = partial(refuse_arguments, name, taken)
    return Task(name=name, bind=bind, check_arguments=checked, heeds_length=heeds, reads=())


def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """What may be handed to it by keyword; None where it takes any, or nobody can tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None
    return frozenset(each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY))


def refuse_arguments(name: str, taken: Collection[str] | None, arguments: Iterable[str]) -> None:
    """Raise UsageError for the first argument that the function of a task does not take. taken: the names of those that
    it does; None: any."""
    for argument in arguments if taken is not None else ():
        if argument not in (taken or ()):
            field = argument if argument == "max_new_tokens" else f"generation.{argument}"
            cure = did_you_mean(argument, taken or ()) or "leave it out, or let the function take it"
            raise UsageError(f"task {name}: the function takes no {argument!r}", cure, field=field)


def _refuse_changed(name: str, made: Mapping[str, Any], own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError for what a function calls as a result's own fields are called, but for what it was given."""
    for key, value in own.items():
        if key in made and made[key] not in (value, given[key]):
            raise TypeError(f"{name} gives another {key!r} than the row's, which a result holds too: name it otherwise")


def _call(name: str, function: partial[Any], model: Any, seed: int, rows: Sequence[Row]) -> list[Answer]:
    import torch

    torch.manual_seed(seed + rows[0].index)
    given = [{"index": row.index, "seed": seed + row.index, **row.data, "prompt": row.prompt} for row in rows]
    made = function(model, given)
    if not isinstance(made, list) or len(made) != len(rows) or not all(isinstance(entry, dict) for entry in made):
        raise TypeError(f"{name} must give a list of {len(rows)} dicts, one per row")
    for entry, row, fields in zip(made, rows, given, strict=True):
        _refuse_changed(name, entry, {"index": row.index, "prompt": row.prompt}, fields)
    return [Answer(dict(entry), _count(entry, "tokens"), _count(entry, "prompt_tokens")) for entry in made]


def _count(entry: Mapping[str, Any], name: str) -> int:
    """What a function's answer tells of itself; 0 where it does not."""
    told = entry.get(name)
    return told if isinstance(told, int) and not isinstance(told, bool) and told > 0 else 0
