"""What tasks share that read texts in one forward: encoded, padded, and what the model says of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bigpipe.bigmodel.architecture import position_limit

from .task import Arguments
from .together import afresh, most_together
from .tokenizing import UNLIMITED, Bounded, Encoded, check_length, encode_texts, longest, pad

if TYPE_CHECKING:
    import torch

Activation = Literal["sigmoid", "softmax", "none"]
Reader = Callable[[Sequence[str | tuple[str, str]]], "tuple[list[Encoded], torch.Tensor]"]
"""Gives each text, or pair of texts, as tokens, and their logits, float32 on the CPU, [texts, …], those of padding too.
Raises ValueError for an empty text, and one that is longer than the model's positions."""


class Truncating(Arguments):
    """What is asked of texts that may be too long."""

    truncate: bool = False
    """Cut texts that are longer than the model takes, of a pair the longer one; else they are errors."""


def reader(model: Any, tokenizer: Any, bounded: Bounded, *, truncate: bool, **asked: Any) -> Reader:
    """Return what a loaded model says of texts. truncate: cut those that are too long. asked: what the tokenizer is to
    give besides."""
    import torch

    most, begin = most_together(model), afresh(model)
    known = (position_limit(model.config.to_dict()), tokenizer.model_max_length)
    limit = min((each for each in known if each is not None and each < UNLIMITED), default=None)
    if truncate and limit is not None:
        asked |= {"truncation": True, "max_length": limit}

    def logits_of(encoded: Sequence[Encoded]) -> torch.Tensor:
        if len({len(each["input_ids"]) for each in encoded}) > 1 and longest(encoded) > most:
            return torch.nn.utils.rnn.pad_sequence([logits_of([each])[0] for each in encoded], batch_first=True)
        begin()
        with torch.inference_mode():
            found = model(**pad(model, tokenizer, encoded, "right"))
        logits: torch.Tensor = found.logits if "logits" in found else found.prediction_logits
        return logits.float().cpu()

    def read(texts: Sequence[str | tuple[str, str]]) -> tuple[list[Encoded], torch.Tensor]:
        encoded = encode_texts(tokenizer, texts, bounded, **asked)
        check_length(model, longest(encoded), otherwise=", or set truncate")
        return encoded, logits_of(encoded)

    return read


def scores_of(config: Any, logits: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    """[…, labels] → the same. activation: None: what the config's `problem_type` and number of labels mean, as in
    transformers' pipelines."""
    import torch

    if activation is None:
        problem = getattr(config, "problem_type", None)
        several = problem == "multi_label_classification" or config.num_labels == 1
        activation = "none" if problem == "regression" else "sigmoid" if several else "softmax"
    if activation == "none":
        return logits
    return torch.sigmoid(logits) if activation == "sigmoid" else logits.softmax(-1)


def labelled(
    config: Any, logits: torch.Tensor, activation: Activation | None, top_k: int | None
) -> list[dict[str, Any]]:
    """[rows, labels] → of each row `label` and `score` of the likeliest label and, unless `top_k` is 1, `labels`: so
    many of them, all where it is None, the likeliest first."""
    names = dict(config.id2label)  # once: a config takes its time for each answer
    return [_likeliest(names, scores, top_k) for scores in scores_of(config, logits, activation).tolist()]


def _likeliest(names: Mapping[int, str], scores: Sequence[float], top_k: int | None) -> dict[str, Any]:
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    found = [{"label": names[index], "score": scores[index]} for index in order[:top_k]]
    return found[0] if top_k == 1 else {**found[0], "labels": found}
