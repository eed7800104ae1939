"""Which nodes of a plan will take the files of a running producer one by one, and what is on the disk at a time.

The run decides again with what is true then (`streaming`); here is what can be known before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from bigpipe.orchestrator.contract.forecast import Forecast
from bigpipe.orchestrator.contract.passing import AHEAD
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.recipe.graph import Node

from .decision import Action, Decision
from .session import Session

Decisions = Mapping[str, Decision]
Forecasts = Mapping[str, Forecast]
RUNNING = (Action.RUN, Action.MAYBE)


def needs_ram(node: Node, forecast: Forecast | None) -> int:
    """Bytes of RAM a node holds: what the recipe says, else what was forecast."""
    if node.resources.ram is not None:
        return node.resources.ram
    return (forecast.ram or 0) if forecast else 0


def followed(session: Session, decisions: Decisions, node: Node) -> str:
    """The producer whose files the node can take while they are made; "" where there is none."""
    names = tuple(node.inputs.get(node.kind.passing.follows, ()))
    if not session.side_by_side or decisions[node.name].action not in RUNNING or len(names) != 1:
        return ""
    if node.when is not None or node.timeout is not None or not executor(node.kind.runs_in).waits:
        return ""
    producer = session.recipe.nodes[names[0]]
    return producer.name if decisions[producer.name].action in RUNNING and producer.kind.passing.streams else ""


class Disk:
    """What the run adds to the disk of the store at any time.

    Nodes are taken one after the other, but for those that follow each other file by file: these are all there at once.
    The bytes of a `cache: false` node go once its last consumer has published. Where all its consumers follow, never
    more lies there than the files they are working on.
    """

    def __init__(self, session: Session, decisions: Decisions, forecasts: Forecasts) -> None:
        self._session, self._decisions, self._forecasts = session, decisions, forecasts
        self.peak, self.where = 0, ""
        self._walk()

    def _walk(self) -> None:
        nodes = self._session.nodes
        if not any(self._decisions[node.name].action in RUNNING for node in nodes):
            return
        held = {node.name: self._held(node) for node in nodes}
        waiting = {node.name: len(self._session.consumers(node.name)) for node in nodes if not node.cache}
        alive = 0
        with_it: dict[str, list[str]] = {}  # freed only when what follows the node is there too
        for node in nodes:
            alive += held[node.name] + self._kept_elsewhere(node)
            if alive > self.peak:
                self.peak, self.where = alive, node.name
            free = with_it.setdefault(node.name, [])
            for name in {name for names in node.inputs.values() for name in names} & waiting.keys():
                waiting[name] -= 1
                if not waiting[name]:
                    free += [name, *with_it.get(name, ())]
            if not self._followers(node):
                alive -= sum(held.pop(name, 0) for name in free)

    def _held(self, node: Node) -> int:
        forecast = self._forecasts.get(node.name)
        if forecast is None or self._decisions[node.name].action not in RUNNING:
            return 0
        whole = forecast.write_bytes or 0
        return min(whole, self._passing(node, forecast)) if self.passes_on(node) else whole

    def passes_on(self, node: Node) -> bool:
        """Are its files let go while it runs, as they are taken? Where memory lets all who take them run beside it."""
        forecast, consumers = self._forecasts.get(node.name), self._session.consumers(node.name)
        if node.cache or not consumers or len(self._followers(node)) != len(consumers):
            return False
        if any(self._waits_for_others(consumer, node.name) for consumer in consumers):
            return False
        ram = sum(needs_ram(each, self._forecasts.get(each.name)) for each in (node, *consumers))
        sure = all(self._decisions[each.name].action is Action.RUN for each in consumers)
        return (
            sure and forecast is not None and forecast.file_bytes > 0 and ram <= self._session.machine.memory_available
        )

    def _waits_for_others(self, node: Node, producer: str) -> bool:
        others = [self._decisions[name] for name in node.predecessors if name != producer]
        return not all(other.action is Action.CACHED and other.bytes_here for other in others)

    def _followers(self, node: Node) -> list[Node]:
        consumers = self._session.consumers(node.name)
        return [each for each in consumers if followed(self._session, self._decisions, each) == node.name]

    def _passing(self, node: Node, forecast: Forecast) -> int:
        """Files between it and its consumers: two, or as many as one of them works on at a time."""
        window = max(self._forecasts[each.name].works_on for each in self._session.consumers(node.name))
        files = math.ceil(window / forecast.file_bytes) + 1
        return max(AHEAD, files) * forecast.file_bytes

    def _kept_elsewhere(self, node: Node) -> int:
        """What it fetches into a cache of somebody else's, where that lies on the same disk."""
        forecast = self._forecasts.get(node.name)
        if forecast is None or self._decisions[node.name].action not in RUNNING or forecast.fetches_to is None:
            return 0
        return (forecast.download_bytes or 0) if self._session.store.on_disk_of(forecast.fetches_to) else 0
