"""image-classification: `{"label": …, "score": …}` of each picture; `labels` where more are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bigpipe.bigmodel.sources import Sources

from .classifying import Activation, labelled
from .pictures import read_picture
from .processing import file_of, load_processor, on_device, require_library, require_processor
from .rows import Row
from .task import Answer, Answerer, Arguments, Task, TaskOptions

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import ModelDescription


class ImageClassification(Arguments):
    top_k: int | None = Field(1, ge=1)
    """How many labels, the likeliest first; null: all. More than one stand under `labels`."""
    function_to_apply: Activation | None = None
    """What makes scores of the model's numbers. null: as the config says, like transformers' pipeline."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    require_library("PIL", "image-classification")
    processor = load_processor("AutoImageProcessor", path, sources, options.bounded)
    asked = ImageClassification.model_validate(options.arguments)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        import torch

        pictures = [read_picture(file_of(row, sources), row.prompt) for row in rows]
        inputs = processor(images=pictures, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**on_device(model, inputs)).logits.float().cpu()
        return list(map(Answer, labelled(model.config, logits, asked.function_to_apply, asked.top_k)))

    return answer


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    require_library("PIL", "image-classification")
    require_processor(model)


TASK = Task(
    name="image-classification", bind=_bind, arguments=ImageClassification, check_model=_check_model,
    reads=("picture",), classes=("ForImageClassification",), length_of=lambda row, arguments: 1, side_by_side=True,
)  # fmt: skip
