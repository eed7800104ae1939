"""A task for a model without a tokenizer: prompts are token ids, answers too."""

from __future__ import annotations

from typing import Any

import torch


def generate(model: Any, rows: list[dict[str, Any]], *, max_new_tokens: int, **_: Any) -> list[dict[str, Any]]:
    """Greedy continuation of each row's ids, one row at a time."""
    answers = []
    for row in rows:
        ids = torch.tensor([[int(word) for word in row["prompt"].split()]])
        with torch.inference_mode():
            made = model.generate(ids, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False)
        answers.append({"text": " ".join(map(str, made[0, ids.shape[1] :].tolist()))})
    return answers
