"""Random draws of a batch that depend on each row alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def draw_alone(model: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Inside, `model.generate` draws each row's tokens from a generator of its own.

    After all processors that transformers puts in order, the token is chosen by the Gumbel-max rule (Maddison et al.
    2014, arXiv 1411.0030), which draws exactly from the softmax of the scores. Beams are drawn by transformers.
    """
    ordinary = getattr(model, "_get_logits_processor", None)
    if ordinary is None:  # a transformers that is built otherwise: draws then depend on the batch
        yield
        return

    def processors(*arguments: Any, **named: Any) -> Any:
        found = ordinary(*arguments, **named)
        config = named.get("generation_config") or arguments[0]
        if config.do_sample and (config.num_beams or 1) == 1 and (config.num_return_sequences or 1) == 1:
            found.append(_row_sampler(seeds))
        return found

    model._get_logits_processor = processors
    try:
        yield
    finally:
        del model._get_logits_processor


def _row_sampler(seeds: Sequence[int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] → the same, with all but the token drawn at −∞."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each, dtype=torch.float64) for each in generators])
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        chosen = (scores.double() + noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    return choose
