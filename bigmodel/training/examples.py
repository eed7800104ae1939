"""Rows as what a model learns from: tokens to predict and, by the task, what it is given to predict them from."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.sources import Sources
from bigpipe.bigmodel.tasks import (
    OTHER_TOKENIZER,
    Asking,
    Bounded,
    Row,
    Wording,
    beyond,
    known_architecture,
    load_processor,
    load_tokenizer,
    read_prompts,
    read_sound,
    refuse_looking_ahead,
    require_fetched,
    require_library,
    require_processor,
    require_template,
    require_tokenizer,
    sound_seconds,
    textless,
    vocabulary,
)
from bigpipe.errors import UsageError
from bigpipe.files import missing
from bigpipe.modules import foreign
from bigpipe.sizes import counted

from .settings import TaskName

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.architecture import Architecture

FINETUNE = Asking("fine-tuning", "take a model of transformers that makes texts, such as OPT, Llama, T5 or Whisper")
IGNORED = -100
"""A label that no loss counts, in transformers."""
AT_ONCE = 512
"""Rows between two looks at what the tokenizer takes."""
SLACK = 0.1
"""Seconds of a sound that hold no word: by so much it may be longer than what is heard of it."""
SPEECH_CLASSES = ("WhisperForConditionalGeneration",)


@dataclass(frozen=True, slots=True)
class LearningTask:
    """One way of learning."""

    peft_type: str | None
    """peft's `task_type`; None: its plain wrapper, as a model that reads no `input_ids` needs it."""
    fits: Callable[[Architecture], bool]
    takes: str
    """The models that it is for, in words."""
    input_column: str = ""
    """What a row's input is called, where nobody says it."""


def _decodes(architecture: Architecture) -> bool:
    return architecture.generates and not architecture.config.get("is_encoder_decoder")


def _translates(architecture: Architecture) -> bool:
    encodes = bool(architecture.config.get("is_encoder_decoder")) and architecture.generates
    return encodes and architecture.class_name not in SPEECH_CLASSES


def _hears(architecture: Architecture) -> bool:
    return architecture.class_name in SPEECH_CLASSES


TASKS: Mapping[TaskName, LearningTask] = {
    "causal-lm": LearningTask("CAUSAL_LM", _decodes, "models that continue a text, such as OPT or Llama"),
    "seq2seq-lm": LearningTask("SEQ_2_SEQ_LM", _translates, "encoder-decoders of text, such as T5", "input"),
    "speech-seq2seq": LearningTask(None, _hears, "Whisper", "audio"),
}


def input_column_of(task: TaskName, asked: str | None) -> str:
    """Return the field of a row that holds what the model is given; "" where the task knows none. Raise UsageError
    where one is asked for all the same: tokens of one text would be learnt as those of another."""
    if asked and not TASKS[task].input_column:
        cause = f"input_column has no meaning for {task}, which learns texts alone"
        raise UsageError(cause, "leave it out, or use task: seq2seq-lm", field="input_column")
    return asked or TASKS[task].input_column


def read_data(
    data: str | Sequence[Any], column: str, input_column: str, base: Path, field: str = "data",
    limit: int | None = None,
) -> list[Row]:  # fmt: skip
    """Return the rows of a list, or of the files that a path or glob names, `limit` of them at most; `prompt` is what
    is learnt. Raise UsageError naming file and line, also for a row without its input, and for one with nothing to
    learn."""
    try:
        rows = read_prompts(data, column, base, wording=Wording(field, "row"), limit=limit)
    except UsageError as error:
        error.field = error.field or field
        raise
    for row in rows:
        if row.reads != "text":
            raise UsageError(f"{field}: a {row.reads} says no text to learn", NEEDS_TEXT, field=field)
        if input_column and input_column not in row.data:
            there = ", ".join(map(repr, row.data))
            cure = "set `input_column` to the one that the model is given"
            raise row.wrong(f"there is no text {input_column!r}, only {there}", cure)
        if input_column and not isinstance(row.data[input_column], str):
            raise row.wrong(*textless(input_column, row.data[input_column]))
    _refuse_empty([row for row in rows if not _says(row.prompt)], column)
    return rows


def _says(prompt: Any) -> bool:
    return not isinstance(prompt, str) or bool(prompt.strip())


def _refuse_empty(rows: Sequence[Row], column: str) -> None:
    if rows:
        more = f", nor in {len(rows) - 1} other rows" if len(rows) > 1 else ""
        raise rows[0].wrong(f"there is nothing to learn in {column!r}{more}", EMPTY)


EMPTY = "leave out the rows that are empty"
NEEDS_TEXT = "write rows that name the sound and its text: {audio: sounds/1.wav, text: …}"


def sounds_of(rows: Sequence[Row], input_column: str, base: Path) -> list[Path]:
    """Return the files of sound that rows name. Raise UsageError for one that is not there."""
    paths = [base / row.data[input_column] for row in rows]
    for row, path in zip(rows, paths, strict=True):
        if not path.is_file():
            raise row.wrong(*missing(row.data[input_column], base))
        require_fetched(path, row.wrong)
    return paths


def check_rows(rows: Sequence[Row], batch_size: int, accumulation: int, ranks: int) -> None:
    """Raise UsageError where one change of the adapter takes more rows than there are."""
    needed = batch_size * accumulation * ranks
    if len(rows) < needed:
        parts = f"batch_size {batch_size} × gradient_accumulation_steps {accumulation} × {counted(ranks, 'rank')}"
        raise UsageError(
            f"{counted(len(rows), 'row')}, which is too few: a step takes {needed}, {parts}",
            "lower one of them, or give more rows",
            field="data",
        )


def check_model(task: TaskName, model: ModelDescription, rows: Sequence[Row], sources: Sources) -> Architecture | None:
    """Return what the model consists of, as far as that is known. Raise UsageError for a model that the task is not
    for, and for one without a tokenizer or what else the rows need."""
    require_tokenizer(model, FINETUNE)
    if task == "speech-seq2seq":
        require_processor(model, FINETUNE)
    architecture = known_architecture(model, sources, FINETUNE)
    if architecture is not None and not TASKS[task].fits(architecture):
        fitting = [name for name, other in TASKS.items() if other.fits(architecture)]
        cure = f"use task: {fitting[0]}" if fitting else FINETUNE.otherwise
        raise UsageError(f"{task} is for {TASKS[task].takes}; this is {architecture.class_name}", cure, field="task")
    if task == "causal-lm" and architecture is not None:
        refuse_looking_ahead(architecture, FINETUNE, field="task")
    check = require_template(model)
    for row in rows:
        check(row)
    return architecture


@dataclass(frozen=True, slots=True)
class Example:
    labels: Sequence[int]
    """Tokens to predict."""
    given: Any = None
    """Tokens that an encoder reads, or the row of a sound. None: what is predicted is read too."""

    def learnt(self, task: TaskName) -> int:
        """Return how many tokens of it are predicted: of a continued text all but the first."""
        return len(self.labels) - (task == "causal-lm")


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows, ready to be put together to batches."""

    task: TaskName
    all: Sequence[Example]
    cut: int
    """Rows that were longer than allowed."""
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]]

    def learnt(self, indices: Sequence[int]) -> int:
        """Return the tokens that these rows teach."""
        return sum(self.all[index].learnt(self.task) for index in indices)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return what the model's forward takes, on the CPU; `labels` [rows, longest] int64, padded with `IGNORED`."""
        return self.collate([self.all[index] for index in indices])


@dataclass(frozen=True, slots=True)
class Reading:
    """What makes examples of rows: a model's own files."""

    task: TaskName
    tokenizer: Any
    processor: Any
    """Of sounds; None for text."""
    sources: Sources
    bounded: Bounded
    start: int | None
    """The token that a decoder begins with, which its labels leave out."""
    end: int | None
    """The token that a text is to end with; None: as the tokenizer ends it."""
    limits: tuple[int | None, int | None]
    """How many tokens the model has embeddings of, and how many it predicts; None: nobody knows."""

    def examples(
        self, rows: Sequence[Row], input_column: str, max_length: int, max_given: int | None = None
    ) -> Examples:
        """Return the rows as tokens, at most `max_length` each; what an encoder reads, at most `max_given` (left out:
        as many). Raise UsageError, naming file and line, for one that teaches nothing, for a token that the model does
        not have, and for a sound that cannot be read, or is longer than what the model hears at once."""
        if self.processor is not None:
            self._require_heard(rows, input_column)
        cut = 0
        made = []
        for begin in range(0, len(rows), AT_ONCE):
            with self.bounded("the tokenizer, or the chat template, of the model"):
                for row in rows[begin : begin + AT_ONCE]:
                    labels, shortened = self._labels(row, max_length)
                    given, also = self._given(row, input_column, max_length if max_given is None else max_given)
                    made.append(self._require(Example(labels, given), row, input_column))
                    cut += shortened or also
        return Examples(self.task, made, cut, self._collate)

    def _labels(self, row: Row, most: int) -> tuple[array[int], bool]:
        """The tokens that a row teaches, with the end that a text is to have, and whether they were cut."""
        text = self._text(row)
        labels, cut = self._encode(text, most, target=self.task == "seq2seq-lm")
        if self.start is not None and labels[:1] == array("i", [self.start]):
            labels = labels[1:]
        if self.end is not None and text[1] and not cut and labels[-1:] != array("i", [self.end]):
            cut = len(labels) == most
            labels = labels if cut else labels + array("i", [self.end])
        return labels, cut

    def _require_heard(self, rows: Sequence[Row], column: str) -> None:
        """Of a sound that is cut the text would be learnt whole: what nobody has heard."""
        for row in rows:
            try:
                seconds = sound_seconds(Row(row.index, row.data[column], {}, "sound"), self.sources)
            except ValueError as error:
                raise row.wrong(str(error), "mend the file, or leave the row out") from error
            if seconds > self.processor.chunk_length + SLACK:
                cause = f"the sound has {seconds:.4g} s, and the model hears {self.processor.chunk_length} at a time"
                raise row.wrong(cause, "cut it, and its text with it, or leave the row out")

    def _require(self, example: Example, row: Row, input_column: str) -> Example:
        """The same. Raise UsageError for one that no model, or not this one, can learn from."""
        if example.learnt(self.task) < 1:
            whole = " beside the first, which nothing stands before" if self.task == "causal-lm" else ""
            raise row.wrong(f"there is nothing to learn: its text makes no token{whole}", EMPTY)
        read = example.labels if example.given is None else example.given
        tokens = [] if self.processor is not None else read
        if self.processor is None and not tokens:
            raise row.wrong(f"{input_column!r} makes no token: the model would be given nothing", EMPTY)
        for found, limit in zip((tokens, example.labels), self.limits, strict=True):
            if cause := beyond(self.tokenizer, found, limit):
                raise row.wrong(cause, OTHER_TOKENIZER)
        return example

    def _text(self, row: Row) -> tuple[str, bool]:
        if isinstance(row.prompt, str):
            return row.prompt, True
        with foreign(f"{row.place}: the model's chat template refuses it", "mend the chat, or the template"):
            return str(self.tokenizer.apply_chat_template(row.prompt, tools=row.tools, tokenize=False)), False

    def _given(self, row: Row, column: str, max_length: int) -> tuple[Any, bool]:
        if not column:
            return None, False
        if self.processor is not None:
            return Row(row.index, row.data[column], {}, "sound"), False
        return self._encode((row.data[column], True), max_length)

    def _encode(self, text: tuple[str, bool], most: int, *, target: bool = False) -> tuple[array[int], bool]:
        """The tokens of a text, and whether it was cut."""
        named = {"text_target" if target else "text": text[0], "add_special_tokens": text[1], "verbose": False}
        whole = array("i", self.tokenizer(**named)["input_ids"])
        if len(whole) <= most:
            return whole, False
        return array("i", self.tokenizer(**named, truncation=True, max_length=most)["input_ids"]), True

    def _collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        labels = _padded([example.labels for example in examples], IGNORED)
        if self.processor is not None:
            heard = [read_sound(each.given, self.sources, self.processor.sampling_rate) for each in examples]
            rate = self.processor.sampling_rate
            features = self.processor(heard, sampling_rate=rate, return_tensors="pt")
            return {"input_features": features["input_features"], "labels": labels}
        read = [example.labels if example.given is None else example.given for example in examples]
        padded = _padded(read, self.tokenizer.pad_token_id)
        mask = _padded([[1] * len(tokens) for tokens in read], 0)
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def reading(
    task: TaskName, architecture: Architecture | None, path: Path, sources: Sources, bounded: Bounded,
    *, end: bool = False,
) -> Reading:  # fmt: skip
    """Return what makes examples for a model, from the files beside it: nothing of it need be loaded. end: do texts end
    with the token that the model ends its answers with? Raise UsageError where a file lacks, or that token."""
    limits = vocabulary(architecture) if architecture else (None, None)
    tokenizer = load_tokenizer(path, sources, bounded, limits[0])
    hears = task == "speech-seq2seq"
    processor = load_processor("AutoFeatureExtractor", path, sources, bounded) if hears else None
    start = architecture.config.get("decoder_start_token_id") if hears and architecture else None
    if end and tokenizer.eos_token_id is None:
        cause = f"the tokenizer of {path} has no token that ends a text"
        raise UsageError(cause, "name its eos_token in tokenizer_config.json, or leave `end` out", field="end")
    last = tokenizer.eos_token_id if end else None
    return Reading(task, tokenizer, processor, sources, bounded, start, last, limits)


def require_sound_reader(paths: Sequence[Path]) -> None:
    """Raise UsageError where sounds are in other files than .wav, and nothing reads those."""
    if any(path.suffix.lower() != ".wav" for path in paths):
        require_library("soundfile", "sound in other files than .wav")
