"""Perplexity and divergence as a plain script with transformers works them out, all logits kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def load_plainly(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options).eval()


def ids_of(path: Path, text: str) -> torch.Tensor:
    """[1, tokens]"""
    from transformers import AutoTokenizer

    ids: torch.Tensor = AutoTokenizer.from_pretrained(path, local_files_only=True)(text, return_tensors="pt").input_ids
    return ids


def windows(tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The loop of transformers' guide: begin, end, and how many at its end are targets."""
    before = 0
    for begin in range(0, tokens, stride):
        end = min(begin + length, tokens)
        yield begin, end, end - before
        before = end
        if end == tokens:
            break


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, length: int, stride: int) -> tuple[float, int]:
    """By the model's own loss, which is the mean over the targets that something stands before."""
    total, count = 0.0, 0
    for begin, end, targets in windows(ids.shape[1], length, stride):
        labels = ids[:, begin:end].clone()
        labels[:, :-targets] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            total += float(model(ids[:, begin:end], labels=labels).loss) * scored
            count += scored
    return float(torch.tensor(total / count, dtype=torch.float64).exp()), count


@torch.no_grad()
def all_logits(model: Any, ids: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """[scored tokens, vocabulary] float64"""
    kept = []
    for begin, end, targets in windows(ids.shape[1], length, stride):
        logits = model(ids[:, begin:end]).logits[0, :-1].double()
        kept.append(logits[-targets:] if targets < end - begin else logits)
    return torch.cat(kept)


def divergences(baseline: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL of each token."""
    p, q = baseline.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
