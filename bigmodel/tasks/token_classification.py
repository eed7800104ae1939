"""token-classification: `{"entities": […]}`, the labelled tokens of each text, or the spans that they make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .classifying import Truncating, reader
from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions
from .tokenizing import Encoded, check_text_model, embedded, load_tokenizer, refuse_chats

if TYPE_CHECKING:
    import torch


class TokenClassification(Truncating):
    aggregation_strategy: Literal["none", "simple", "first", "average", "max"] = "none"
    """How tokens become spans, as in transformers: `none` leaves them alone, `simple` joins neighbours of one label,
    the others let the tokens of a word agree before."""
    ignore_labels: list[str] = Field(default_factory=lambda: ["O"])
    """Labels that are left out."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    asked = TokenClassification.model_validate(options.arguments)
    if asked.aggregation_strategy in ("first", "average", "max") and not tokenizer.is_fast:
        cause = f"{type(tokenizer).__name__} does not tell which tokens make up a word"
        raise UsageError(cause, "use aggregation_strategy: simple")
    spans = _spans(model, tokenizer, asked)
    more = {"return_special_tokens_mask": True, "return_offsets_mapping": tokenizer.is_fast}
    read = reader(model, tokenizer, options.bounded, truncate=asked.truncate, **more)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        texts = [row.prompt for row in rows]
        return [
            Answer({"entities": spans(text, tokens, logits)}, len(tokens["input_ids"]), len(tokens["input_ids"]))
            for text, tokens, logits in zip(texts, *read(texts), strict=True)
        ]

    return answer


def _spans(model: Any, tokenizer: Any, asked: TokenClassification) -> Any:
    """Return what makes of (text, its tokens, their logits [tokens, labels]) the entities that transformers' pipeline
    makes of them: `word`, `score`, `start` and `end` in characters, `entity` and `index`, or `entity_group`."""
    import numpy
    import torch
    from transformers import TokenClassificationPipeline
    from transformers.pipelines.token_classification import AggregationStrategy

    # Only what it does with logits is needed: its __init__ would move the model, and knows no layers on disk
    pipeline = TokenClassificationPipeline.__new__(TokenClassificationPipeline)
    pipeline.model, pipeline.tokenizer = model, tokenizer
    strategy = AggregationStrategy(asked.aggregation_strategy)

    def spans(text: str, tokens: Encoded, logits: torch.Tensor) -> list[Mapping[str, Any]]:
        length = len(tokens["input_ids"])
        output = {
            "logits": logits[None, :length],
            "input_ids": torch.tensor([tokens["input_ids"]]),
            "special_tokens_mask": torch.tensor([tokens["special_tokens_mask"]]),
            "offset_mapping": [tokens["offset_mapping"]] if "offset_mapping" in tokens else None,
            "sentence": text,
        }
        found = pipeline.postprocess([output], aggregation_strategy=strategy, ignore_labels=asked.ignore_labels)
        numbers = (numpy.generic,)
        return [{k: v.item() if isinstance(v, numbers) else v for k, v in entity.items()} for entity in found]

    return spans


TASK = Task(
    name="token-classification", bind=_bind, arguments=TokenClassification, check_model=check_text_model,
    row_check=refuse_chats, classes=("ForTokenClassification",), side_by_side=True, needs_text=True,
)  # fmt: skip
