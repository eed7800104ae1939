"""text-classification: `{"label": …, "score": …}` of each text or pair of texts; `labels` where more are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from bigpipe.bigmodel.sources import Sources

from .classifying import Activation, Truncating, labelled, reader
from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions
from .tokenizing import check_text_model, embedded, load_tokenizer, refuse_chats


class TextClassification(Truncating):
    top_k: int | None = Field(1, ge=1)
    """How many labels, the likeliest first; null: all. More than one stand under `labels`."""
    pair: str | None = None
    """The field of a row with the second text of a pair; the prompt is the first."""
    function_to_apply: Activation | None = None
    """What makes scores of the model's numbers. null: as the config says, like transformers' pipeline."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    asked, config = TextClassification.model_validate(options.arguments), model.config
    # A decoder finds the end of a text by the padding token that its config names
    alone = config.get_text_config().pad_token_id != tokenizer.pad_token_id
    read = reader(model, tokenizer, options.bounded, truncate=asked.truncate)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        if alone and len(rows) > 1:
            return [answer([row])[0] for row in rows]
        texts = [(row.prompt, row.data[asked.pair]) if asked.pair else row.prompt for row in rows]
        encoded, logits = read(texts)
        payloads = labelled(config, logits, asked.function_to_apply, asked.top_k)
        lengths = [len(tokens["input_ids"]) for tokens in encoded]
        return [Answer(payload, length, length) for payload, length in zip(payloads, lengths, strict=True)]

    return answer


def _length_of(row: Row, arguments: Mapping[str, Any]) -> int:
    return row.nbytes + len(str(row.data.get(str(arguments.get("pair")), "")).encode())


TASK = Task(
    name="text-classification", bind=_bind, arguments=TextClassification, check_model=check_text_model,
    row_check=refuse_chats, classes=("ForSequenceClassification",), named_columns={"pair": "text"},
    length_of=_length_of, side_by_side=True, needs_text=True,
)  # fmt: skip
