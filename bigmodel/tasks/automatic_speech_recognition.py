"""automatic-speech-recognition: `{"text": …}`, what is said in each sound; `chunks` where times are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError, first_few

from .arguments import GENERATION_CONFIG
from .processing import load_processor, on_device, require_library, require_processor
from .rows import Row
from .sounds import read_sound
from .task import Answer, Answerer, Arguments, Task, TaskOptions
from .text_generation import computing_numbers, draw_alone
from .tokenizing import embedded, load_tokenizer, require_tokenizer

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

WINDOW = 30.0
"""Seconds that Whisper hears at once."""


class SpeechRecognition(Arguments):
    language: str | None = None
    """What is spoken, `english` or `en`. null: the model finds out, from each chunk."""
    task: Literal["transcribe", "translate"] | None = None
    """Write what is said, or translate it into English. null: as the model's files say."""
    return_timestamps: bool = False
    """Give `chunks` too: texts with the seconds at which they begin and end."""
    chunk_length_s: float = Field(WINDOW, gt=0, le=WINDOW)
    """Longer sounds are heard in chunks of so many seconds, which overlap."""
    stride_length_s: float | None = Field(None, ge=0)
    """Seconds by which a chunk overlaps its neighbours on each side. null: a sixth of it."""
    num_beams: int = Field(1, ge=1)
    """Beams of `generate`."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    extractor = load_processor("AutoFeatureExtractor", path, sources, options.bounded)
    asked = SpeechRecognition.model_validate(options.arguments)
    given = {name: value for name in ("language", "task") if (value := getattr(asked, name)) is not None}
    given |= {"return_timestamps": asked.return_timestamps, "num_beams": asked.num_beams}
    draw_alone(model)

    def hear(chunks: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return [1, tokens] for each chunk, as many as the model makes."""
        import torch

        inputs = {name: torch.cat([chunk[name] for chunk in chunks]) for name in ("input_features", "attention_mask")}
        with torch.inference_mode(), computing_numbers():
            made = model.generate(**on_device(model, inputs), **given).cpu()
        return [tokens[tokens != model.generation_config.pad_token_id][None] for tokens in made]

    def answer(rows: Sequence[Row]) -> list[Answer]:
        each = [_chunks(read_sound(row, sources, extractor.sampling_rate), extractor, asked) for row in rows]
        chunks = [chunk for found in each for chunk in found]
        # As many at a time as there are rows, so that a long sound takes no more memory
        parts = [hear(chunks[start : start + len(rows)]) for start in range(0, len(chunks), len(rows))]
        tokens = iter([row for part in parts for row in part])
        return [_answer(found, [next(tokens) for _ in found]) for found in each]

    def _answer(chunks: Sequence[Mapping[str, Any]], tokens: Sequence[Any]) -> Answer:
        rate = extractor.sampling_rate
        heard = [
            {"tokens": made, "stride": tuple(samples / rate for samples in chunk["stride"])}
            for chunk, made in zip(chunks, tokens, strict=True)
        ]
        with options.bounded("the tokenizer of the model"):
            text, more = tokenizer._decode_asr(
                heard, return_timestamps=asked.return_timestamps, return_language=None,
                time_precision=extractor.chunk_length / model.config.max_source_positions,
            )  # fmt: skip
        return Answer({"text": text, **_spans(more)}, sum(made.shape[1] for made in tokens))

    return answer


def _chunks(samples: Any, extractor: Any, asked: SpeechRecognition) -> list[dict[str, Any]]:
    """What the model hears at once: `input_features` [1, bands, frames], `attention_mask` [1, frames], and `stride`,
    the samples of the chunk and of its overlaps on the left and right."""
    from transformers.pipelines.automatic_speech_recognition import chunk_iter

    length = round(asked.chunk_length_s * extractor.sampling_rate)
    beside = asked.chunk_length_s / 6 if asked.stride_length_s is None else asked.stride_length_s
    stride = round(beside * extractor.sampling_rate)
    if length <= 2 * stride:
        raise ValueError(f"stride_length_s {beside:g} on both sides leaves nothing of {asked.chunk_length_s:g} seconds")
    return list(chunk_iter(samples, extractor, length, stride, stride))


def _spans(more: Mapping[str, Any]) -> dict[str, Any]:
    spans = [{**chunk, "timestamp": list(chunk["timestamp"])} for chunk in more.get("chunks", ())]
    return {"chunks": spans} if "chunks" in more else {}


def _row_check(model: ModelDescription) -> Callable[[Row], None]:
    def check(row: Row) -> None:
        if not row.prompt.lower().endswith(".wav"):
            require_library("soundfile", "sound in other files than .wav")

    return check


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    asked = SpeechRecognition.model_validate(arguments)
    if asked.stride_length_s is not None and 2 * asked.stride_length_s >= asked.chunk_length_s:
        cause = f"stride_length_s {asked.stride_length_s:g} on both sides leaves nothing of {asked.chunk_length_s:g} s"
        raise UsageError(cause, "give less than half of chunk_length_s", field="generation.stride_length_s")


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    from bigpipe.bigmodel.checkpoint import MAX_CONFIG, read_json

    require_processor(model)
    require_tokenizer(model)
    if model.path is not None and (model.path / GENERATION_CONFIG).is_file():
        asked = SpeechRecognition.model_validate(arguments)
        _check_spoken(read_json(model.path / GENERATION_CONFIG, model.path, MAX_CONFIG), asked)


def _check_spoken(own: Mapping[str, Any], asked: SpeechRecognition) -> None:
    """Raise UsageError where a model does not know the language, or is of one alone, as its generation_config.json
    says. own: its contents."""
    named = next((name for name in ("language", "task") if getattr(asked, name) is not None), None)
    if named is not None and own.get("is_multilingual") is False:
        cause = f"the model knows English alone, and takes no {named}"
        raise UsageError(cause, "leave it out, or take a model of many languages", field=f"generation.{named}")
    known = own.get("lang_to_id")
    if asked.language is None or not isinstance(known, Mapping):
        return
    told = asked.language.lower()
    codes = [told, *(other for pair in _language_names() if told in pair for other in pair)]
    if told not in known and not any(f"<|{code}|>" in known for code in codes):
        there = first_few(sorted(str(token).strip("<|>") for token in known))
        cure = f"name it in English, or by its code: {there}"
        raise UsageError(f"the model knows no language {asked.language!r}", cure, field="generation.language")


@cache
def _language_names() -> frozenset[tuple[str, str]]:
    """Pairs of a language's name and its code, in either order, by the source of transformers: importing it takes a
    second. None where it is written in another way than now."""
    found = find_spec("transformers")
    file = Path(found.origin or "").parent / "models/whisper/tokenization_whisper.py" if found else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return frozenset(re.findall(r'^    "([\w ]+)": "([\w ]+)",$', text, re.MULTILINE))


TASK = Task(
    name="automatic-speech-recognition", bind=_bind, arguments=SpeechRecognition, check_model=_check_model,
    row_check=_row_check, reads=("sound",), classes=("WhisperForConditionalGeneration",), makes_tokens=True,
    own_length=True, check_arguments=_check_arguments, length_of=lambda row, arguments: 1, side_by_side=True,
)  # fmt: skip
