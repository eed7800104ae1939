"""What a generating model keeps of the tokens it has seen, observed in forwards of its own class on the meta device.

Every class fills its cache in its own way: windows, latent vectors, recurrent states, compressed or indexed keys.
Forwards of a few lengths, in which shapes are computed and nothing else, tell how each cached tensor grows.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .structure import CachedTensor

if TYPE_CHECKING:
    import torch

SHORT = (15, 31)
"""Tokens. Shorter than most windows, longer than any convolution."""
LATE, FARTHEST = 2**10, 2**20
"""Tokens, where a window asks for it. No prompt is longer than the second."""
WINDOWS = ("window", "attention_chunk", "compress")
"""In the names of config fields that end or slow the growth of a cache."""
SECONDS = 20
"""For all forwards of one model; most take a quarter of one."""
CACHES = ("past_key_values", "cache_params", "mems", "state")


def observe(model: torch.nn.Module, seconds: int = SECONDS) -> tuple[CachedTensor, ...] | None:
    """Return the tensors that `model`, built on the meta device in bfloat16, caches for one sequence of tokens. None
    where its forward needs more than tokens, or values that the meta device does not have."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config(decoder=True).to_dict()
    with suppress(TimeoutError), _limited(seconds):
        for part in _that_read_tokens(model.eval()):
            try:
                return _observe(part, text)
            except TimeoutError:
                raise
            except Exception:  # noqa: S112  a foreign forward may raise anything; then formulas answer
                continue
    return None


def _that_read_tokens(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model, and the part of it that reads text: the whole may want to look for images among the tokens."""
    yield model
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is not None and (decoder := get_decoder()) is not model:
        yield decoder


def _observe(model: torch.nn.Module, config: Mapping[str, Any]) -> tuple[CachedTensor, ...] | None:
    lengths = [*SHORT, *late_lengths(config)]
    seen = [_cached_after(model, length) for length in lengths]
    if not seen[0] or len({len(tensors) for tensors in seen}) != 1:
        return None
    found = [_growth(lengths, sizes) for sizes in zip(*seen, strict=True)]
    if None in found:
        return None
    return tuple(CachedTensor(count, *tensor) for tensor, count in Counter(found).items() if tensor is not None)


def late_lengths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return two lengths beyond every window that the config names, as far as it has positions; none if it has none.
    One less than a power of two, for then what waits to be compressed is at its most."""
    named = [value for name, value in config.items() if value and any(word in name for word in WINDOWS)]
    if not named:
        return ()
    windows = [value for value in named if isinstance(value, int) and not isinstance(value, bool)]
    late = 2 ** (max([LATE, *(2 * window for window in windows)]) - 1).bit_length()
    limits = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")]
    last = min([2 * late, FARTHEST, *(limit for limit in limits if isinstance(limit, int) and limit > 4 * SHORT[1])])
    return last // 2 - 1, last - 1


def _cached_after(model: torch.nn.Module, length: int) -> list[tuple[int, int, int]]:
    """(elements, those of its storage, bytes of an element; 0: as the model's dtype) of each cached tensor. A storage
    of several counts for the first."""
    import torch

    with torch.device("meta"), torch.no_grad():
        output = model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=True)
    cache = next((output[name] for name in CACHES if output.get(name) is not None), None)
    sizes, storages = [], set()
    for tensor in _tensors(cache, set()):
        width, storage = tensor.element_size(), tensor.untyped_storage()
        held = 0 if storage._cdata in storages else storage.nbytes() // width
        storages.add(storage._cdata)
        sizes.append((tensor.numel(), held, 0 if tensor.dtype == torch.bfloat16 else width))
    return sizes


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()), seen)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry, seen)
    elif type(value).__module__.startswith("transformers") and id(value) not in seen:
        seen.add(id(value))
        yield from _tensors(getattr(value, "__dict__", {}), seen)


def _growth(
    lengths: Sequence[int], sizes: Sequence[tuple[int, int, int]]
) -> tuple[int, float, int | None, int, float] | None:
    """Fields of a `CachedTensor` but its count. None where these sizes do not lie on a line with at most one knee."""
    elements, storages, (width, *_) = zip(*sizes, strict=True)
    early, late = (_slope(lengths[at:], elements[at:]) for at in (0, len(lengths) - 2))
    # A window may be a view into the keys of the whole prompt; a state may be a view of something that does not grow
    viewed = _slope(lengths[-2:], storages[-2:]) if storages[-1] > elements[-1] else 0.0
    if late > 0:
        return max(round(elements[-1] - late * lengths[-1]), 0), late, None, width, viewed
    if late < 0 or early < 0:
        return None
    if early == 0:
        return (elements[-1], 0.0, None, width, viewed) if elements[0] == elements[-1] else None
    start = round(elements[0] - early * lengths[0])
    return start, early, round((elements[-1] - start) / early), width, viewed


def _slope(lengths: Sequence[int], elements: Sequence[int]) -> float:
    """Elements per token between the first two."""
    return (elements[1] - elements[0]) / (lengths[1] - lengths[0])


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError once they have passed. For the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again: Python drops what is raised in some callbacks
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
