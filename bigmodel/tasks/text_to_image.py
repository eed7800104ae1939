"""text-to-image: `{"image": FILE}`, a picture of each prompt; `images` where several are asked for. By a pipeline of
diffusers."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError
from bigpipe.names import did_you_mean

from .diffusing import count_tokens, longest_prompt, require_pipeline
from .rows import Row
from .task import OVERFLOWS, Answer, Answerer, Arguments, ResultFile, Task, TaskOptions, seeds_of

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription

SIDE = Field(None, ge=8, le=16_384, multiple_of=8)
OURS = frozenset({"prompt", "generator", "output_type", "return_dict"})
"""Arguments of a pipeline's call that are ours to give."""


class TextToImage(Arguments):
    """And any other that the call of the pipeline's own class takes, as its documentation says."""

    model_config = ConfigDict(extra="allow")

    num_inference_steps: int | None = Field(None, ge=1, le=10_000)
    """Steps from noise to picture. null: as many as the pipeline takes by itself."""
    guidance_scale: float | None = Field(None, ge=0)
    """How closely to follow the prompt. null: as the pipeline does by itself."""
    negative_prompt: str | None = None
    """What no picture should show."""
    height: int | None = SIDE
    """Pixels. null: what the model was made for."""
    width: int | None = SIDE
    """Pixels. null: what the model was made for."""
    num_images_per_prompt: int = Field(1, ge=1, le=256)
    """More than one stand under `images`. Each has a seed of its own."""


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name in OURS.intersection(arguments):
        raise UsageError(f"text-to-image gives {name} itself", "leave it out", field=f"generation.{name}")


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    require_pipeline(model, "text-to-image")


def _bind(pipeline: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    import torch

    asked = TextToImage.model_validate(options.arguments)
    given = {name: value for name, value in asked.model_dump().items() if value is not None}
    _require_taken(pipeline, given)
    unwanted = given.pop("negative_prompt", None)
    each, limit = asked.num_images_per_prompt, longest_prompt(pipeline)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        with options.bounded("the tokenizer of the pipeline"):
            for row in rows:
                _require_short(row.prompt, count_tokens(pipeline, row.prompt), limit)
        # The pictures of a row stand side by side
        seeds = [seed for row in rows for seed in seeds_of(options.seed + row.index, each)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.inference_mode(), _of_numbers():
            made = pipeline(
                [row.prompt for row in rows], generator=generators, output_type="pil", **given,
                **({} if unwanted is None else {"negative_prompt": [unwanted] * len(rows)}),
            )  # fmt: skip
        pictures = [ResultFile(_png(image), ".png") for image in made.images]
        flags = getattr(made, "nsfw_content_detected", None) or [False] * len(pictures)
        return [
            _answer(pictures[first : first + each], flags[first : first + each])
            for first in range(0, len(pictures), each)
        ]

    return answer


@contextmanager
def _of_numbers() -> Iterator[None]:
    """Raise ValueError for a picture of what is no number, which Pillow would make black; numpy warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning as error:
            raise ValueError(f"the picture holds what is no number, and would be black: {OVERFLOWS}") from error


def _answer(pictures: list[ResultFile], flags: Sequence[bool]) -> Answer:
    """A picture that the pipeline's own checker took for indecent is black, and the row says so."""
    payload: dict[str, Any] = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures}
    return Answer({**payload, **({"nsfw_content_detected": True} if any(flags) else {})})


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _require_short(prompt: str, tokens: int, limit: int | None) -> None:
    """A pipeline would cut it without a word that anyone sees."""
    if limit is not None and tokens > limit:
        raise ValueError(f"the prompt has {tokens} tokens, and the pipeline reads {limit}: shorten it")


def _require_taken(pipeline: Any, given: Mapping[str, Any]) -> None:
    taken = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" not in taken or "generator" not in taken:
        cause = f"{type(pipeline).__name__} makes no pictures of texts"
        raise UsageError(cause, "take a pipeline that does, such as StableDiffusionPipeline", field="task")
    for name in given:
        if name not in taken:
            cause = f"{type(pipeline).__name__} takes no argument {name!r}"
            cure = did_you_mean(name, set(taken) - OURS - {"self"}, otherwise="it takes") or "leave it out"
            raise UsageError(cause, cure, field=f"generation.{name}")


TASK = Task(
    name="text-to-image", bind=_bind, arguments=TextToImage, check_arguments=_check_arguments,
    check_model=_check_model, length_of=lambda row, arguments: 1, chats=False, library="diffusers",
)  # fmt: skip
