"""What a batch leaves behind between two forwards beside what it passes to them, kept apart from what others leave.

Some models keep states in their own modules (RecurrentGemma its recurrent states, Qwen2-VL its rope deltas, dynamic
rotary embeddings the frequencies of the longest text so far), BigBird puts modules of full attention in the place of
others at the first short text, transformers hooks into modules where a forward first asks for hidden states, and notes
that it did; and torch draws from generators that are everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import is_
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Resume = Callable[[], None]
"""Puts back what was suspended."""
Change = tuple[dict[Any, Any], Any, Any, Any]
"""Place, name, first value, value now."""
ABSENT = object()
KEEP_NOTHING = ("torch.nn.", "transformers.pytorch_utils")
"""What the names of modules begin with whose classes keep no states; the second has Conv1D, of GPT-2."""


class KeptStates:
    """Attributes, buffers and inner modules of a model's own modules, and the hooks of all, as they are now and as
    forwards replace them. What is changed in place is not seen. Modules that only multiply, and others of torch itself,
    keep nothing."""

    def __init__(self, model: torch.nn.Module, streamed: Collection[tuple[torch.nn.Module, str]]) -> None:
        """streamed: module and attribute of buffers that come and go by themselves; those beside them count as such."""
        places: list[dict[Any, Any]] = []
        for module in model.modules():
            places += [module._forward_pre_hooks, module._forward_hooks]
            if not type(module).__module__.startswith(KEEP_NOTHING):
                places += [module.__dict__, module._modules]
                if not any((module, name) in streamed for name in module._buffers):
                    places.append(module._buffers)
        self._first = [(place, dict(place)) for place in places if place]
        self._empty = [place for place in places if not place]
        """Most: nobody hooks in. They are looked at in one go, since lanes change a thousand times a second."""

    def restore(self) -> list[Change]:
        """Make all as it was at first, and return what was otherwise."""
        changed = [change for place, first in self._first for change in _changes(place, first)]
        if any(self._empty):
            changed += [change for place in self._empty for change in _changes(place, {})]
        for place, name, first, _ in changed:
            _put(place, name, first)
        return changed

    def suspend(self) -> Resume:
        """Make all as it was at first, and return what makes it as it is now."""
        changed = self.restore()
        drawn = _random_state()

        def resume() -> None:
            for place, name, _, now in changed:
                _put(place, name, now)
            _draw_from(*drawn)

        return resume


def _changes(place: dict[Any, Any], first: dict[Any, Any]) -> list[Change]:
    if len(place) == len(first) and all(map(is_, place.values(), first.values())):
        return []
    pairs = ((name, first.get(name, ABSENT), place.get(name, ABSENT)) for name in {**first, **place})
    return [(place, name, before, now) for name, before, now in pairs if before is not now]


def _put(place: dict[Any, Any], name: Any, value: Any) -> None:
    if value is ABSENT:
        place.pop(name, None)
    else:
        place[name] = value


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of torch's generators that draw where none is named: the CPU's, those of GPUs."""
    import torch

    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), gpus


def _draw_from(cpu: torch.Tensor, gpus: list[torch.Tensor]) -> None:
    import torch

    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
