"""The numbers of one window, from its logits: a few rows of them at a time, none of which is kept.

In nats. What a token's probabilities are is worked out in float32, as transformers' loss does; sums are in float64.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bigpipe.errors import StageFailed

if TYPE_CHECKING:
    import torch

AT_A_TIME = 2**22
"""Logits that are worked on at once."""


def measure(
    logits: torch.Tensor, ids: torch.Tensor, first: int, baseline: torch.Tensor | None = None
) -> dict[str, Any]:
    """Return the numbers of the scored tokens of a window, as JSON.

    logits: [scored, vocabulary] of the places before them; baseline: the same of the other model. ids: [scored] int64.
    first: the place of the first one in the text.

    `tokens`, and of the tokens' negative log-likelihoods the sum `nll` and the sum of squares `nll_squares`. With a
    baseline also `baseline_nll` and `baseline_squares`; `differences_squares`, of the token by token differences;
    `agree`, how many tokens have the same likeliest one; and `kl`, Σ p·(log p − log q) of each token, p the baseline's:
    float32 in base64, since a percentile needs all of them. Raise StageFailed for what is no number, with the token's
    place.
    """
    import torch

    kept: dict[str, list[torch.Tensor]] = {}
    for part, own, other in _parts(logits, baseline):
        for name, values in _of_tokens(own, ids[part].to(own.device), other).items():
            kept.setdefault(name, []).append(values.double().cpu())
    found = {name: torch.cat(values) for name, values in kept.items()}
    for name in ("baseline", "nll", "kl"):
        _require_finite(found.get(name), "the baseline" if name == "baseline" else "the model", first)
    numbers = {"tokens": len(ids), "nll": _sum(found["nll"]), "nll_squares": _sum(found["nll"] ** 2)}
    if baseline is None:
        return numbers
    return {
        **numbers,
        "baseline_nll": _sum(found["baseline"]),
        "baseline_squares": _sum(found["baseline"] ** 2),
        "differences_squares": _sum((found["nll"] - found["baseline"]) ** 2),
        "agree": int(_sum(found["agree"])),
        "kl": base64.b64encode(found["kl"].float().numpy().tobytes()).decode(),
    }


def _parts(
    logits: torch.Tensor, baseline: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """A few tokens at a time: which they are, and the logits of each model, float32 [tokens, vocabulary]."""
    rows = max(1, AT_A_TIME // logits.shape[-1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        own = logits[part].float()
        yield part, own, None if baseline is None else baseline[part].to(own.device).float()


def _of_tokens(own: torch.Tensor, ids: torch.Tensor, other: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Per token."""
    import torch

    likely = own.log_softmax(-1)
    found = {"nll": -likely.gather(-1, ids[:, None])[:, 0]}
    if other is not None:
        base = other.log_softmax(-1)
        each = base.exp()
        terms = torch.where(each > 0, each * (base - likely), 0.0)
        found["baseline"] = -base.gather(-1, ids[:, None])[:, 0]
        found["kl"] = terms.sum(-1, dtype=torch.float64).clamp(min=0)  # NaN stays
        found["agree"] = own.argmax(-1) == other.argmax(-1)
    return found


def _sum(values: torch.Tensor) -> float:
    return float(values.sum())


def _require_finite(values: torch.Tensor | None, whose: str, first: int) -> None:
    if values is None or bool(values.isfinite().all()):
        return
    at = int((~values.isfinite()).nonzero()[0, 0])
    what = "logits that are no numbers (NaN)" if bool(values[at].isnan()) else "no probability"
    cause = f"{whose} gives token {first + at} of the text {what}"
    raise StageFailed(cause, "compute in another dtype (`dtype: float32`), or look for NaN among the weights")


def unpack(text: str) -> list[float]:
    """Return the numbers under `kl`."""
    from array import array

    return array("f", base64.b64decode(text)).tolist()
