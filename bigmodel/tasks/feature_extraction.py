"""feature-extraction: `{"features": […]}`, one vector per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import read_limit
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .pooling import LENGTHS, Mode, Pooling, pooling_of
from .rows import Row
from .task import Answer, Answerer, Arguments, Task, TaskOptions
from .together import afresh, most_together
from .tokenizing import (
    MODEL_INPUTS,
    OWN_FUNCTION,
    UNLIMITED,
    Bounded,
    check_length,
    check_text_model,
    embedded,
    encode,
    known_architecture,
    load_tokenizer,
    longest,
    pad,
    require_template,
)

if TYPE_CHECKING:
    from bigpipe.bigmodel.architecture import Architecture
    from bigpipe.bigmodel.checkpoint import ModelDescription


class FeatureExtraction(Arguments):
    pooling: Mode | None = None
    """How the vectors of a text's tokens become one: `last` as for decoders, `first` as for BERT's [CLS]. null: as a
    model of sentence-transformers says in its own files, else their mean."""
    normalize: bool | None = None
    """Make vectors of length 1. null: as the model's own files say, else not."""
    truncate: bool = False
    """Cut texts that are longer than the model takes, as sentence-transformers does; else they are errors."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    if not hasattr(model, "base_model"):
        raise UsageError(f"{type(model).__name__} is no model of transformers'", "use the task `module:function`")
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    asked = FeatureExtraction.model_validate(options.arguments)
    pooling, limit = _pooling(path, asked), None
    if asked.truncate:
        known = (pooling.max_length, read_limit(model.config.to_dict()), tokenizer.model_max_length)
        limit = min((most for most in known if most is not None and most < UNLIMITED), default=None)
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    names = _inputs(body, tokenizer, options.bounded)
    most, begin = most_together(body if hasattr(body, "config") else model), afresh(model)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        import torch

        told = [replace(row, prompt=pooling.text(row.prompt)) if isinstance(row.prompt, str) else row for row in rows]
        encoded = encode(tokenizer, told, options.bounded, limit, names=names)
        if pooling.max_length is not None and longest(encoded) > pooling.max_length:
            cause = f"{longest(encoded)} tokens are more than the {pooling.max_length} of its {LENGTHS}"
            raise ValueError(f"{cause}: shorten the text, or set truncate")
        check_length(model, longest(encoded), encoded=True, otherwise=", or set truncate")
        lengths = [len(each["input_ids"]) for each in encoded]
        if len({*lengths}) > 1 and max(lengths) > most:
            return [answer([row])[0] for row in rows]
        inputs = pad(model, tokenizer, encoded, "right")
        begin()
        with torch.inference_mode():
            states = body(**inputs).last_hidden_state
            hidden = states.to("cpu", torch.promote_types(states.dtype, torch.float32))
        return [
            Answer({"features": pooling.vector(states[:length]).tolist()}, length, length)
            for states, length in zip(hidden, lengths, strict=True)
        ]

    return answer


def _inputs(body: Any, tokenizer: Any, bounded: Bounded) -> Sequence[str]:
    """What a model reads of a text alone: beside its tokens the kinds of them, where a tokenizer tells several in one
    text, as those of XLNet and Funnel do."""
    with bounded("the tokenizer of the model"):
        kinds = tokenizer("a").get("token_type_ids") or ()
    return MODEL_INPUTS if any(kinds) and MODEL_INPUTS[1] in signature(body.forward).parameters else MODEL_INPUTS[:1]


def _pooling(path: Path, asked: FeatureExtraction) -> Pooling:
    """What is asked for, over what the model's files say."""
    own = pooling_of(path)
    modes = own.modes if asked.pooling is None else (asked.pooling,)
    return replace(own, modes=modes, normalize=own.normalize if asked.normalize is None else asked.normalize)


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    check_text_model(model, arguments, sources)
    architecture = known_architecture(model, sources)
    if architecture is not None and _reads_more(architecture):
        cause = f"{architecture.class_name} makes no features of a text alone"
        raise UsageError(cause, f"take a model of texts; or {OWN_FUNCTION}", field="task")
    if model.path is not None:
        pooling_of(model.path)


def _reads_more(architecture: Architecture) -> bool:
    """Does its forward need a picture or a sound beside a text, as CLIP's does, or in its place?"""
    config = architecture.config
    two = any(name in config for name in ("vision_config", "audio_config"))
    return bool(config.get("num_mel_bins")) or (two and not architecture.generates)


TASK = Task(
    name="feature-extraction", bind=_bind, arguments=FeatureExtraction, check_model=_check_model,
    row_check=require_template, headless=True, side_by_side=True,
)  # fmt: skip
