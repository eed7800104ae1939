"""feature-extraction: `{"features": […]}`, one vector per prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.architecture import text_config
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .rows import Row
from .task import Answer, Answerer, Task, TaskOptions
from .tokenizing import (
    OWN_FUNCTION,
    check_length,
    encode,
    known_architecture,
    load_tokenizer,
    pad,
    require_template,
    require_tokenizer,
)

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.checkpoint import ModelDescription

POOLINGS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0),
    "last": lambda states: states[-1],  # as for decoders
    "first": lambda states: states[0],  # as for BERT's [CLS]
}
"""Of a prompt's token vectors, [tokens, width] → [width]."""


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if unknown := arguments.keys() - {"pooling"}:
        raise UsageError(f"feature-extraction has no option {sorted(unknown)[0]!r}", "it takes `pooling` alone")
    if arguments.get("pooling", "mean") not in POOLINGS:
        raise UsageError(f"pooling {arguments['pooling']!r} is not known", f"use one of {', '.join(POOLINGS)}")


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    if not hasattr(model, "base_model"):
        raise UsageError(f"{type(model).__name__} is no model of transformers'", "use the task `module:function`")
    tokenizer = load_tokenizer(path, sources, options.bounded, model)
    pool = POOLINGS[options.arguments.get("pooling", "mean")]
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    def answer(rows: Sequence[Row]) -> list[Answer]:
        import torch

        encoded = encode(tokenizer, rows, options.bounded)
        check_length(model, max(map(len, encoded)))
        inputs = pad(model, tokenizer, encoded, "right")
        with torch.inference_mode():
            hidden = body(**inputs).last_hidden_state.float().cpu()
        return [
            Answer({"features": pool(states[: len(tokens)]).tolist()}, len(tokens), len(tokens))
            for states, tokens in zip(hidden, encoded, strict=True)
        ]

    return answer


def _check_model(model: ModelDescription, arguments: Mapping[str, Any], sources: Sources) -> None:
    require_tokenizer(model)
    architecture = known_architecture(model, sources)
    if architecture is not None and not text_config(architecture.config).get("vocab_size"):
        raise UsageError(f"{architecture.class_name} reads no text", OWN_FUNCTION)


TASK = Task(
    name="feature-extraction", bind=_bind, check_arguments=_check_arguments, check_model=_check_model,
    check_rows=require_template, side_by_side=True,
)  # fmt: skip
