"""What each module of a model loses against the same module of its baseline.

As the baseline reads a text, each of its modules that holds weights has its input; the model's module of the same name
is given that same input, and the relative error is

    e = √( Σ (own output − baseline's)² / Σ (baseline's output)² )

over all tokens read; of a module that gives several tensors, the first one of floats. So a module is blamed for what
it loses itself, not for what came wrong from the ones before it. Nothing is kept but two sums for each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bigpipe.errors import UsageError, first_few

if TYPE_CHECKING:
    import torch

Losses = dict[str, list[float]]
"""Module → the two sums: of squared errors, and of squares."""


@dataclass(frozen=True, slots=True)
class LayerLoss:
    modules: Mapping[str, float]
    """Module → relative error, the largest first."""
    total: float
    """Square root of the sum of their squares: what they lose together, were their errors independent."""
    bound: float
    """What `total` should not be above."""
    skip_modules: tuple[str, ...] | None
    """What to leave as it is, for `quantize`, so that `total` would not be above `bound`: those that were left before,
    and the fewest others. Squares add up, so that these are the largest ones. None: nothing is quantized."""
    left: float
    """What `total` would be with these left; above `bound` where modules that are not quantized lose more."""


class Layers:
    """Hooks on a baseline's modules, while it reads."""

    def __init__(self, model: Any, baseline: Any) -> None:
        """Raise UsageError where modules are streamed: they hold nothing while another model runs."""
        own, other = _leaves(model), _leaves(baseline)
        if away := [name for name, module in (*own.items(), *other.items()) if _is_away(module)]:
            cause = f"per_layer needs both models in memory, and {first_few(away, 2)} would be streamed"
            raise UsageError(cause, "leave per_layer out, or place both on devices that hold them", field="per_layer")
        self._losses: Losses = {}
        for name in own.keys() & other.keys():
            other[name].register_forward_hook(partial(self._compare, name, own[name]), with_kwargs=True)

    def _compare(self, name: str, own: Any, module: Any, given: Any, named: Any, output: Any) -> None:
        made = own(*map(partial(_as_taken, own), given), **{key: _as_taken(own, value) for key, value in named.items()})
        found, compared = _tensor_of(made), _tensor_of(output)
        if found is None or compared is None:
            return
        wanted = compared.float()
        error = (found.to(wanted.device).float() - wanted).square().sum(dtype=_float64())
        sums = self._losses.setdefault(name, [0.0, 0.0])
        sums[0] += float(error)
        sums[1] += float(wanted.square().sum(dtype=_float64()))

    def take(self) -> Losses:
        """Return what was found since the last time."""
        found, self._losses = self._losses, {}
        return dict(sorted(found.items()))


def _float64() -> torch.dtype:
    import torch

    return torch.float64


def _tensor_of(output: Any) -> torch.Tensor | None:
    """What is compared of a module's output: the tensor that it is, or the first one of floats among several, as of a
    router of experts its logits; None: there is none."""
    import torch

    parts = output if isinstance(output, tuple | list) else (output,)
    return next((each for each in parts if isinstance(each, torch.Tensor) and each.is_floating_point()), None)


def _leaves(model: Any) -> dict[str, Any]:
    """Modules that hold weights and no other modules."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and next(module.children(), None) is None and next(module.parameters(), None) is not None
    }


def _is_away(module: Any) -> bool:
    return any(parameter.is_meta or parameter.numel() == 0 for parameter in module.parameters())


def _as_taken(module: Any, value: Any) -> Any:
    """A tensor where the module is, floats in its dtype: its floating weights', of packed ones as it comes."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    weight = next(module.parameters())
    floats = value.is_floating_point() and weight.is_floating_point()
    return value.to(weight.device, weight.dtype) if floats else value.to(weight.device)


def lose_least(
    found: Iterable[Losses], bound: float | None, kept: Sequence[str], quantized: Collection[str]
) -> LayerLoss:
    """Return what the modules lose, from what `take` gave of each batch. bound: of `total`; None is half of what it is.
    kept: modules that were left as they are. quantized: those that need not be left so; all by the names that
    the class has."""
    errors, squares = Counter[str](), Counter[str]()
    for losses in found:
        for name, (error, square) in losses.items():
            errors[name] += error  # type: ignore[assignment]  # floats
            squares[name] += square  # type: ignore[assignment]
    relative = {name: math.sqrt(errors[name] / squares[name]) if squares[name] else 0.0 for name in errors}
    modules = dict(sorted(relative.items(), key=lambda item: (-item[1], item[0])))
    total = math.sqrt(math.fsum(error * error for error in modules.values()))
    limit = total / 2 if bound is None else bound
    chosen, rest = _largest(modules, limit, quantized)
    return LayerLoss(modules, total, limit, (*kept, *chosen) if quantized else None, math.sqrt(rest))


def _largest(modules: Mapping[str, float], bound: float, quantized: Collection[str]) -> tuple[list[str], float]:
    """The fewest modules without which the rest is not above the bound, and the sum of squares that is left."""
    chosen: list[str] = []
    rest = math.fsum(error * error for error in modules.values())
    for name, error in modules.items():
        if rest <= bound * bound or not error:
            break
        if name in quantized:
            chosen.append(name)
            rest = math.fsum(other * other for left, other in modules.items() if left not in chosen)
    return chosen, rest
