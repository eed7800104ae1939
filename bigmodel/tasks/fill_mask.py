"""fill-mask: `{"fills": […]}`, for each mask of a text the likeliest tokens in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .classifying import Truncating, reader
from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions
from .tokenizing import OWN_FUNCTION, check_text_model, embedded, known_architecture, load_tokenizer, refuse_chats

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import ModelDescription


class FillMask(Truncating):
    top_k: int = Field(5, ge=1)
    """How many tokens for each mask, the likeliest first."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    tokenizer = load_tokenizer(path, sources, options.bounded, embedded(model))
    asked = FillMask.model_validate(options.arguments)
    if tokenizer.mask_token_id is None:
        raise UsageError(f"{type(tokenizer).__name__} has no mask token", OWN_FUNCTION)
    read = reader(model, tokenizer, options.bounded, truncate=asked.truncate)

    def answer(rows: Sequence[Row]) -> list[Answer]:
        return [
            Answer(
                {"fills": _fills(tokenizer, list(tokens["input_ids"]), logits, asked.top_k)},
                *[len(tokens["input_ids"])] * 2,
            )
            for tokens, logits in zip(*read([row.prompt for row in rows]), strict=True)
        ]

    return answer


def _fills(tokenizer: Any, tokens: list[int], logits: torch.Tensor, top_k: int) -> list[list[dict[str, Any]]]:
    """logits: [tokens, vocabulary]. A mask's entries are those of transformers' pipeline."""
    masks = [place for place, token in enumerate(tokens) if token == tokenizer.mask_token_id]
    if not masks:
        read = f"the {len(tokens)} tokens that are read of the text"
        raise ValueError(f"there is no mask in {read}: write {tokenizer.mask_token} where a token is to be found")
    single, fills = len(masks) == 1, []
    for place in masks:
        scores, likeliest = logits[place].softmax(-1).topk(min(top_k, logits.shape[-1]))
        entries = []
        for score, token in zip(scores.tolist(), likeliest.tolist(), strict=True):
            filled = [*tokens[:place], token, *tokens[place + 1 :]]
            # With other masks left, special tokens stay, lest these go too
            sequence = tokenizer.decode(filled, skip_special_tokens=single)
            entries.append(
                {"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence}
            )
        fills.append(entries)
    return fills


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    check_text_model(model, arguments, sources)
    architecture = known_architecture(model, sources)
    pretraining = architecture is not None and architecture.class_name.endswith("ForPreTraining")
    if architecture is not None and pretraining and architecture.output_embedding is None:
        cause = f"{architecture.class_name} does no fill-mask: it predicts no tokens"
        raise UsageError(cause, f"take a model of a class …ForMaskedLM; or {OWN_FUNCTION}", field="task")


TASK = Task(
    name="fill-mask", bind=_bind, arguments=FillMask, check_model=_check_model, row_check=refuse_chats,
    classes=("ForMaskedLM", "ForPreTraining", "WithLMHeadModel"), side_by_side=True, needs_text=True,
)  # fmt: skip
