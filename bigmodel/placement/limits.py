"""The least time that work with a placed model takes on this machine, and what bounds it.

    t ≥ max(bytes moved / bandwidth, 2 · active weights · tokens / FLOP/s, bytes of weights read / memory bandwidth)

since reading ahead, multiplying and fetching from memory go on beside each other. A pass over the streamed weights
serves all batches that are together; every batch fetches each weight from memory, but where a CPU multiplies the rows
of all at once. What reads alone, an encoder or a tower, runs once for a prompt. Attention is left out, and beams count
once: what is given is a bound, and nothing is faster but a disk whose files are still in the page cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bigpipe.bigmodel.architecture import Architecture, encodes, reads_alone, text_config
from bigpipe.bigmodel.checkpoint import ModelDescription, itemsize
from bigpipe.bigmodel.formats import PLAIN, format_of
from bigpipe.machine import Machine

from .devices import is_computing
from .models import stored_bytes, stored_dtype
from .placement import Placement
from .products import ROWS, Products, gathers, products_of
from .speeds import Speeds, speeds_of
from .streaming import streamed


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Texts that are read and made."""

    rows: int
    read: int = 0
    """Tokens of all rows; 0: their prompts were read before."""
    made: int = 0
    """Tokens of all rows; 0: they are only read."""
    told: int = 0
    """Tokens that its speed is told in, such as those scored; 0: those made, or read where none are made."""
    headless: bool = False
    """Only the body of the model runs, of an encoder-decoder the encoder."""
    batch_size: int = 1
    sequences: int = 1
    """That each text becomes: beams. They count once, but where rows are multiplied."""
    together: int = 1
    """Batches that one pass over the streamed weights serves."""

    @property
    def batches(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    @property
    def steps(self) -> float:
        """Forwards of a batch: one reads the prompts and makes a token, the others make one each."""
        return max(1.0, self.made / self.rows)


@dataclass(frozen=True, slots=True)
class Limit:
    """What bounds a piece of work: the largest of three times, in seconds."""

    work: Work
    bandwidth: float
    """Moving streamed weights to where they compute."""
    compute: float
    """Multiplying."""
    memory: float
    """Reading weights from the memory they compute in."""

    @property
    def seconds(self) -> float:
        return max(self.bandwidth, self.compute, self.memory)

    @property
    def bound_by(self) -> str:
        """Return which of the three it is, by name."""
        times = {"bandwidth": self.bandwidth, "compute": self.compute, "memory": self.memory}
        return max(times, key=lambda name: times[name])

    @property
    def tokens_per_second(self) -> float:
        """Return how many tokens are made, or read where none are made, or scored, at the most."""
        return (self.work.told or self.work.made or self.work.read) / self.seconds

    def describe(self) -> str:
        times = {"moving": self.bandwidth, "multiplying": self.compute, "memory": self.memory}
        said = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in times.items())
        return f"at most {self.tokens_per_second:.3g} tokens/s, bound by {self.bound_by} ({said})"


def limit_here(
    placement: Placement, architecture: Architecture, model: ModelDescription, dtype: str, work: Work,
    machine: Machine, memo: Path,
) -> Limit | None:  # fmt: skip
    """Return the limit at the speeds of this machine, measured once and kept in `memo`; None for another machine.

    dtype: what is computed in. Where a GPU computes, how fast it multiplies is not known, and does not bound."""
    speeds = speeds_of(machine, memo)
    if speeds is None:
        return None
    products = products_of(machine, memo) if placement.main == "cpu" else None
    stored = stored_bytes(model, architecture, memo).of()
    return limit_of(
        placement, architecture, stored, stored_dtype(model), dtype, work, speeds, products, machine.cpus,
        plain=format_of(model) is PLAIN,
    )  # fmt: skip


def limit_of(
    placement: Placement, architecture: Architecture, stored: Mapping[str, int], stored_as: str, dtype: str,
    work: Work, speeds: Speeds, products: Products | None, cores: int, *, plain: bool = True,
) -> Limit:  # fmt: skip
    """Return the limit at given speeds. stored: bytes by the model's own names; stored_as: dtype of those without;
    dtype: what is computed in. plain: no weight is packed, so that a CPU multiplies rows of all batches at once."""
    everywhere = replace(placement, device_map={"": "disk"})
    (moved, again), (whole, whole_again) = (
        [streamed(architecture, where, stored_as, stored, runs) for runs in _runs(architecture, work)]
        for where in (placement, everywhere)
    )
    main, batch = placement.main, work.batch_size
    away = {home: size for home, size in placement.weights.items() if not is_computing(home, main)}
    pace = sum(size / speeds.path(home, main) for home, size in away.items()) / max(sum(away.values()), 1)
    passes, rows = math.ceil(work.batches / work.together), batch * work.together
    first = max(rows, rows * work.read // work.rows)
    bytes_moved = passes * (moved.by(first) + (work.steps - 1) * again.by(rows))
    shared = main == "cpu" and plain
    reading, making = (passes if shared and _at_once(work, tokens) else work.batches for tokens in (first // rows, 1))
    fetched = reading * whole.beside_tables(batch) + making * (work.steps - 1) * whole_again.beside_tables(batch)
    return Limit(
        work,
        bandwidth=bytes_moved * pace,
        compute=_multiplying(architecture, everywhere, dtype, work, products) / cores if products else 0.0,
        memory=speeds.resident(main, int(fetched)),
    )


def _at_once(work: Work, tokens: int) -> bool:
    """Does a CPU multiply the rows of all batches that are together at once, in a step of so many tokens of a text?"""
    return work.together > 1 and gathers(work.batch_size * work.sequences * tokens)


def _multiplying(
    architecture: Architecture, everywhere: Placement, dtype: str, work: Work, products: Products
) -> float:
    """Seconds of one core: 2·n·k·m for a product with a weight, with the rows of one batch, or of all at once. Of a
    prompt the last token alone meets the head; it meets an encoder where there is one, and its answer the decoder.
    Towers, which pictures meet, are left out."""
    if dtype not in products.rates:
        return 0.0
    of_prompts, head = _of_prompts(architecture, work), _head(architecture)

    def looked_up(name: str) -> bool:
        return architecture.by_name[name.rpartition(".")[0]].class_name.endswith("Embedding")

    def weights(runs: Callable[[str], bool]) -> float:
        found = streamed(architecture, everywhere, dtype, {}, lambda name: runs(name) and not looked_up(name))
        token = found.always + sum(size * (found.chosen or count) / count for count, size in found.experts.items())
        return token / itemsize(dtype)

    encoder = weights(of_prompts) if encodes(architecture.config) else 0
    body = weights(lambda name: not of_prompts(name)) - head
    ends = 0 if work.headless else max(work.made, work.rows)
    alone = ends - (work.rows if ends and work.read and not encoder else 0)
    reading = (encoder or body) * work.read / products.rate(dtype, max(ROWS))
    rows = work.batch_size * (work.together if _at_once(work, 1) else 1)
    return 2 * (reading + (body * alone + head * ends) / products.rate(dtype, rows))


def _of_prompts(architecture: Architecture, work: Work) -> Callable[[str], bool]:
    """What tells of a tensor's name whether tokens that are made do not meet it. Nothing of a model that makes none."""
    return reads_alone(architecture.config) if architecture.generates or work.headless else lambda name: False


def _runs(architecture: Architecture, work: Work) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """What tells of a tensor's name whether the first forward of a batch runs it, and whether each further one does."""
    of_prompts, head = _of_prompts(architecture, work), f"{architecture.output_embedding}."

    def again(name: str) -> bool:
        return not of_prompts(name)

    def body(name: str) -> bool:
        return of_prompts(name) if encodes(architecture.config) else not name.startswith(head)

    if work.headless:
        return body, body
    return (lambda name: True) if work.read else again, again


def _head(architecture: Architecture) -> int:
    """Weights that only the last token of a prompt meets: of the product that makes logits."""
    vocabulary = text_config(architecture.config).get("vocab_size")
    shapes = (
        tensor.shape for module in architecture.modules if module.class_name == "Linear" for tensor in module.tensors
    )
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2 and shape[0] == vocabulary)
