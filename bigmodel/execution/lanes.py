"""Several pieces of work that share what is brought for them, so that each thing is brought once for all.

Each piece runs in a lane, a thread of its own, and one lane runs at a time. A lane that needs what is not here waits,
and another one goes on. Once all wait, what comes first in order is brought, and those that wait for it go on:

    lane 1   layer 0 ·                      layer 1 ·
    lane 2             layer 0 ·                      layer 1 ·
    lane 3                       layer 0 ·                      layer 1 ·
             └ brought           dropped ┘  └ brought           dropped ┘

Lanes can also meet: each waits at the same place, and something is done once for all that do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import Semaphore, Thread, local
from typing import Generic, TypeVar

Need = TypeVar("Need")
Item = TypeVar("Item")
Suspend = Callable[[], Callable[[], None]]


def _nothing_to_suspend() -> Callable[[], None]:
    return lambda: None


@dataclass(slots=True, eq=False)
class Lane(Generic[Need]):
    turn: Semaphore = field(default_factory=lambda: Semaphore(0))
    within: list[Need] = field(default_factory=list)
    """What it entered and has not left."""
    runs: bool = False
    """Is it one of `run`'s?"""
    failure: Exception | None = None
    """Why what it waits for could not be brought."""


@dataclass(slots=True)
class Waiting(Generic[Need]):
    """For one need."""

    arrive: Callable[[int], None]
    """What is done before they go on, by one of them or of others; called with how many they are."""
    lanes: list[Lane[Need]] = field(default_factory=list)


class _Ended(BaseException):
    """Another lane failed. No handler of errors catches it."""


class Lanes(Generic[Need]):
    """A thread that is none of `run`'s has a lane to itself; there may be one such thread, and only outside `run`."""

    def __init__(
        self, bring: Callable[[Need], None], drop: Callable[[Need], None], order: Callable[[Need], int]
    ) -> None:
        """bring, drop: called by whichever lane has the turn, drop after the last one left. order: the lower is brought
        before the higher; where work goes through needs in this order, lanes that are apart meet again."""
        self._bring = bring
        self._drop = drop
        self._order = order
        self._own = local()
        self._here: Counter[Need] = Counter()
        """What was brought, and how many lanes are within it or let in."""
        self._waiting: dict[Need, Waiting[Need]] = {}
        self._ready: deque[Lane[Need]] = deque()
        self._over = Semaphore(0)
        """Released when no lane is left that could go on."""
        self._errors: list[BaseException] = []
        """One ends all lanes."""
        self._suspend: Suspend = _nothing_to_suspend

    def run(self, work: Callable[[Item], None], items: Iterable[Item], count: int, suspend: Suspend) -> None:
        """Do the work of each item, in at most `count` lanes, each of which takes the next item when it has done one.
        After the first error, which is raised, no lane goes on.

        suspend: called where a lane waits or an item is done; what it gives is called when that lane goes on.
        """
        if count < 2:
            for item in items:
                work(item)
                suspend()
            return
        self._suspend, self._over, left = suspend, Semaphore(0), iter(items)
        self._ready.extend(Lane(runs=True) for _ in range(count))
        for lane in self._ready:
            Thread(target=self._live, args=(lane, work, left), name="bigpipe-lane", daemon=True).start()
        try:
            self._pass_on()
            self._over.acquire()
        except BaseException as error:  # a signal's: the lanes end at their next need
            self._errors.append(error)
            raise
        errors, self._errors, self._suspend = self._errors, [], _nothing_to_suspend
        if errors:
            for need in list(self._here):
                self._let_go(need)
            raise errors[0]

    @property
    def among_others(self) -> bool:
        """Is the thread that asks one of those of `run`, where there are several?"""
        lane: Lane[Need] | None = getattr(self._own, "lane", None)
        return lane is not None and lane.runs

    def enter(self, need: Need) -> None:
        """Wait until `need` is here. Raise what bringing it raised."""
        lane = self._lane()
        if need in self._here:
            self._here[need] += 1
        else:
            self._wait(lane, need, partial(self._let_in, need))
        lane.within.append(need)

    def meet(self, need: Need, together: Callable[[], None]) -> None:
        """Wait until no other lane can go on to what comes before; then do this once for all that wait here. Raise what
        it raised. It is never brought nor dropped."""
        self._wait(self._lane(), need, lambda count: together())

    def leave(self, need: Need) -> None:
        """Nothing where the lane did not enter."""
        lane = self._lane()
        if need in lane.within:
            lane.within.remove(need)
            self._here[need] -= 1
            if not self._here[need]:
                self._let_go(need)

    def _let_go(self, need: Need) -> None:
        del self._here[need]
        self._drop(need)

    def _lane(self) -> Lane[Need]:
        lane: Lane[Need] | None = getattr(self._own, "lane", None)
        if lane is None:
            lane = self._own.lane = Lane()
        return lane

    def _wait(self, lane: Lane[Need], need: Need, arrive: Callable[[int], None]) -> None:
        resume = self._suspend()
        self._waiting.setdefault(need, Waiting(arrive)).lanes.append(lane)
        self._pass_on()
        lane.turn.acquire()
        resume()
        failure, lane.failure = lane.failure, None
        if failure is not None:
            raise failure
        if self._errors:
            raise _Ended

    def _live(self, lane: Lane[Need], work: Callable[[Item], None], left: Iterator[Item]) -> None:
        lane.turn.acquire()
        self._own.lane = lane
        try:
            while not self._errors:
                try:
                    item = next(left)
                except StopIteration:
                    break
                work(item)
                self._suspend()
        except _Ended:
            pass
        except BaseException as error:
            self._errors.append(error)
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to a lane that can go on; where all wait, to those that wait for what comes first."""
        if not self._ready and self._waiting:
            need = min(self._waiting, key=self._order)
            waiting = self._waiting.pop(need)
            if not self._errors:
                self._do(waiting)
            self._ready.extend(waiting.lanes)
        (self._ready.popleft().turn if self._ready else self._over).release()

    def _do(self, waiting: Waiting[Need]) -> None:
        try:
            waiting.arrive(len(waiting.lanes))
        except Exception as error:
            for lane in waiting.lanes:
                lane.failure = error

    def _let_in(self, need: Need, count: int) -> None:
        self._bring(need)
        self._here[need] = count
