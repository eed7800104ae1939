"""Counts of a running node as people read them: `71 % 18.3/25.7 GB 310 MB/s eta 0:24`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from bigpipe.orchestrator.contract import Progress
from bigpipe.sizes import format_transfer

WINDOW_SECONDS = 10.0
"""The rate is taken over this long: a shorter one jumps, a longer one lags."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How one rank gets on that counts tokens."""

    rank: int
    done: int
    total: int | None
    unit: str
    tokens_per_second: float | None
    """None while it is too early to tell."""
    idle: float | None
    """Share of the time since its first batch in which it did not compute."""
    eta: float | None
    """Seconds that it will take at its own rate; None while unknown, and at its end."""

    def text(self) -> str:
        parts = [f"rank {self.rank}:", amount(self.done, self.total, self.unit)]
        if self.tokens_per_second is not None:
            parts.append(f"{quantity(self.tokens_per_second, 'tokens')}/s")
        if self.idle is not None:
            parts.append(f"idle {self.idle:.0%}")
        if self.eta is not None:
            parts.append(f"eta {duration(self.eta)}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a node's progress."""

    task: str
    done: int
    total: int | None
    unit: str
    rate: float | None
    """Units a second; None while it is too early to tell."""
    note: str = ""
    paces: tuple[Pace, ...] = ()
    """Of all ranks, where they count tokens."""

    @property
    def share(self) -> float | None:
        """0 to 1; None where the total is unknown or zero."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def eta(self) -> float | None:
        """Seconds left; None while unknown."""
        if self.total is None or not self.rate or self.done >= self.total:
            return None
        return (self.total - self.done) / self.rate

    def text(self) -> str:
        parts = [self.task] if self.task else []
        if self.share is not None:
            parts.append(f"{int(100 * self.share)} %")
        parts.append(amount(self.done, self.total, self.unit))
        if self.rate:
            parts.append(f"{quantity(self.rate, self.unit)}/s")
        if self.eta is not None:
            parts.append(f"eta {duration(self.eta)}")
        rates = [pace.tokens_per_second for pace in self.paces if pace.tokens_per_second is not None]
        idle = [pace.idle for pace in self.paces if pace.idle is not None]
        if rates:
            parts.append(f"{quantity(sum(rates), 'tokens')}/s")
        if len(idle) > 1:
            parts.append(f"idle {sum(idle) / len(idle):.0%}")
        if self.note:
            parts.append(self.note)
        return " ".join(parts)


@dataclass(slots=True)
class _RankMeter:
    """The samples of one rank: when, what was done, tokens, seconds at work. The first is that of its first batch."""

    event: Progress
    samples: deque[tuple[float, int, int, float]] = field(default_factory=deque)
    first: tuple[float, float] | None = None

    def add(self, now: float, event: Progress) -> None:
        self.event = event
        if event.tokens is None or not event.busy:  # before the model is there
            return
        if self.samples and event.done < self.samples[-1][1]:  # another process has its place
            self.samples.clear()
            self.first = None
        self.first = self.first or (now, event.busy)
        self.samples.append((now, event.done, event.tokens, event.busy))
        while len(self.samples) > 2 and now - self.samples[1][0] >= WINDOW_SECONDS:
            self.samples.popleft()

    def pace(self, now: float) -> Pace:
        """now: counts for one that has done its share, which waits for the others."""
        event, rate, idle, eta = self.event, None, None, None
        if self.first is not None:
            (since, before), (then, done, tokens, busy) = self.samples[0][0:2], self.samples[-1]
            if then - since >= 0.5:
                rate = (tokens - self.samples[0][2]) / (then - since)
                speed, left = (done - before) / (then - since), (event.total or 0) - done
                eta = left / speed if speed and left > 0 else None
            until = now if done == event.total else then
            if until - self.first[0] >= 0.5:
                idle = min(1.0, max(0.0, 1 - (busy - self.first[1]) / (until - self.first[0])))
        return Pace(event.rank, event.done, event.total, event.unit, rate, idle, eta)


@dataclass(slots=True)
class ProgressMeter:
    """Adds up the ranks of one node's current task and measures its rate."""

    clock: Callable[[], float] = time.monotonic
    _task: tuple[str, int | None] | None = None
    """What is done, and how much of it by all ranks: after a rank's death they begin again, with what is left."""
    _ranks: dict[int, _RankMeter] = field(default_factory=dict)
    _samples: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, event: Progress) -> Reading:
        if (event.task, event.whole) != self._task:
            self._task = event.task, event.whole
            self._ranks.clear()
            self._samples.clear()
        now = self.clock()
        self._ranks.setdefault(event.rank, _RankMeter(event)).add(now, event)
        done = sum(rank.event.done for rank in self._ranks.values())
        totals = [rank.event.total for rank in self._ranks.values()]
        total = None if None in totals else sum(number for number in totals if number is not None)
        total = event.whole if event.whole is not None else total
        counted = any(rank.event.tokens is not None for rank in self._ranks.values())
        paces = tuple(self._ranks[rank].pace(now) for rank in sorted(self._ranks)) if counted else ()
        return Reading(event.task, done, total, event.unit, self._rate(now, done), event.note, paces)

    def _rate(self, now: float, done: int) -> float | None:
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # it started over
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        return (done - before) / (now - since) if now - since >= 0.5 else None


def amount(done: int, total: int | None, unit: str) -> str:
    """Return `18.3/25.7 GB`, `3/5 prompts`: both in the unit of the larger."""
    if total is None:
        return quantity(done, unit)
    if unit != "B":
        return f"{done}/{total} {unit}".rstrip()
    whole, scale = format_transfer(total).split()
    factor = {"B": 0, "kB": 3, "MB": 6, "GB": 9, "TB": 12}[scale]
    part = f"{done / 10**factor:.1f}" if factor else str(done)
    return f"{part}/{whole} {scale}"


def quantity(number: float, unit: str) -> str:
    if unit == "B":
        return format_transfer(number)
    return f"{number:.0f} {unit}".rstrip() if number >= 10 else f"{number:.1f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Return `0:24`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
