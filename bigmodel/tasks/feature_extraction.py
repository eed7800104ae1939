"""feature-extraction: `{"features": […]}`, one vector per prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

from .rows import Row
from .task import Answer, Answerer, Arguments, Task, TaskOptions
from .tokenizing import (
    check_length,
    check_text_model,
    encode,
    load_tokenizer,
    longest,
    pad,
    require_template,
)

if TYPE_CHECKING:
    import torch

POOLINGS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0),
    "last": lambda states: states[-1],
    "first": lambda states: states[0],
}
"""Of a prompt's token vectors, [tokens, width] → [width]."""


class FeatureExtraction(Arguments):
    pooling: Literal["mean", "last", "first"] = "mean"
    """Of a prompt's token vectors: their mean, the last one as for decoders, or the first one as for BERT's [CLS]."""


def _bind(model: Any, path: Path, options: TaskOptions, sources: Sources) -> Answerer:
    if not hasattr(model, "base_model"):
        raise UsageError(f"{type(model).__name__} is no model of transformers'", "use the task `module:function`")
    tokenizer = load_tokenizer(path, sources, options.bounded, model)
    pool = POOLINGS[FeatureExtraction.model_validate(options.arguments).pooling]
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model

    def answer(rows: Sequence[Row]) -> list[Answer]:
        import torch

        encoded = encode(tokenizer, rows, options.bounded)
        check_length(model, longest(encoded))
        inputs = pad(model, tokenizer, encoded, "right")
        with torch.inference_mode():
            hidden = body(**inputs).last_hidden_state.float().cpu()
        lengths = [len(each["input_ids"]) for each in encoded]
        return [
            Answer({"features": pool(states[:length]).tolist()}, length, length)
            for states, length in zip(hidden, lengths, strict=True)
        ]

    return answer


TASK = Task(
    name="feature-extraction", bind=_bind, arguments=FeatureExtraction, check_model=check_text_model,
    check_rows=require_template, side_by_side=True,
)  # fmt: skip
