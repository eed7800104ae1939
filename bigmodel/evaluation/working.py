"""What a rank does with its windows: the forwards of one or two models, and the numbers that come of their logits."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.execution import loaded
from bigpipe.bigmodel.inference import Bound, Work, WorkPlan
from bigpipe.bigmodel.tasks import Answer, Row
from bigpipe.errors import BigpipeError, DoesNotFit, StageFailed
from bigpipe.modules import foreign
from bigpipe.sizes import counted

from .layers import Layers, Losses
from .measures import measure
from .windows import Window, window_of

if TYPE_CHECKING:
    import torch

CURE = "lower batch_size or sequence_length, or place more of the model on cpu or disk"


@dataclass(slots=True)
class Pair:
    """The model that is looked at and, where there is one, the model that it is compared with. Both made by `load`."""

    model: Any
    baseline: Any = None
    layers: Layers | None = None
    """Compares their modules one by one."""
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)
    """Window → the baseline's logits [scored, vocabulary], from the baseline's forward to the model's."""
    losses: dict[int, Losses] = field(default_factory=dict)
    """First window of a batch → what `layers` found in its forward, as long."""
    afresh: dict[int, Callable[[], None]] = field(default_factory=dict)
    """Model, by its `id` → what makes it as it was before it read any window, from `bind_windows` on."""


def bind_windows(pair: Pair, plan: WorkPlan, ids: array[int], seed: int = 0) -> Bound:
    """Return what answers windows, batch by batch: each is read by the baseline, then by the model, and their logits
    are let go. Each finds nothing of those before it. Where layers are streamed, as many batches as the plan says go
    through them together."""
    models = [model for model in (pair.model, pair.baseline) if model is not None]
    pair.afresh = {id(model): loaded(model).stream.afresh(model) for model in models}

    def answer(rows: Sequence[Row]) -> list[Answer]:
        with _failing(rows):
            return [found for alike in _alike(rows) for found in _answer(pair, alike, ids, seed)]

    def each(work: Work, chunks: Iterable[int], together: int) -> None:
        queue = iter(chunks)
        while group := list(islice(queue, max(1, together))):
            if pair.baseline is not None:
                _through(pair.baseline, lambda chunk: _look_ahead(pair, plan.batch(chunk), ids, seed), group, together)
            _through(pair.model, work, group, together)

    return Bound(answer, each)


def _through(model: Any, work: Work, chunks: Sequence[int], together: int) -> None:
    loaded(model).stream.together(model, work, chunks, together)


def _look_ahead(pair: Pair, rows: Sequence[Row], ids: array[int], seed: int) -> None:
    import torch

    with torch.no_grad(), _failing(rows):
        for alike in _alike(rows):
            found = _logits(pair, pair.baseline, alike, ids, seed)
            pair.waiting.update(zip((row.index for row in alike), found, strict=True))
            if pair.layers is not None:
                pair.losses[alike[0].index] = pair.layers.take()


def _alike(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Windows of one length, so that none is padded: only the last one is shorter."""
    for _, group in groupby(rows, lambda row: window_of(row).end - window_of(row).begin):
        yield list(group)


def _answer(pair: Pair, rows: Sequence[Row], ids: array[int], seed: int) -> Iterator[Answer]:
    import torch

    logits = _logits(pair, pair.model, rows, ids, seed)
    for row, own in zip(rows, logits, strict=True):
        window, held = window_of(row), None if pair.baseline is None else pair.waiting.pop(row.index)
        wanted = torch.tensor(ids[window.scored : window.end])
        layers = {"layers": pair.losses.pop(row.index)} if row.index in pair.losses else {}
        yield Answer({**measure(own, wanted, window.scored, held), **layers}, window.tokens, window.end - window.begin)


def _logits(pair: Pair, model: Any, rows: Sequence[Row], ids: array[int], seed: int) -> list[torch.Tensor]:
    """Of the scored tokens of each window, [scored, vocabulary], as the model computes them."""
    import torch

    windows = [window_of(row) for row in rows]
    torch.manual_seed(seed + rows[0].index)
    tokens = torch.tensor([list(ids[window.begin : window.end]) for window in windows])
    given = tokens.to(loaded(model).homes.main)
    pair.afresh[id(model)]()
    found = model(input_ids=given, **_without_cache(model)).logits
    return [logits[_places(window)] for logits, window in zip(found, windows, strict=True)]


def _without_cache(model: Any) -> dict[str, bool]:
    """Keys and values of a window are of no use after it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _places(window: Window) -> slice:
    """The logits at a place are of the token that follows."""
    return slice(window.scored - window.begin - 1, window.end - window.begin - 1)


@contextmanager
def _failing(rows: Sequence[Row]) -> Iterator[None]:
    """Around windows: what goes wrong is said of them, and ends the evaluation."""
    try:
        with foreign(f"the model fails at {rows[0].prompt}", "see the log", StageFailed):
            yield
    except BigpipeError:
        raise
    except Exception as error:  # memory that ran out
        first = str(error).partition("\n")[0]
        raise DoesNotFit(f"{counted(len(rows), 'window')} at once do not fit: {first}", CURE) from error
