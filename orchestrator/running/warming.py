"""Which node's worker starts before its turn, while what the node needs is still being made.

    begin()     starts the next one, where there is memory for it
    take()      hands it to its node, or ends it for another one that needs the memory now

One at a time. None for a node that may turn out cached or skipped: with a `when`, behind gates that are not decided,
or where a producer may give again what it gave before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator.contract import Status
from bigpipe.orchestrator.launch import MEMORY, AttemptFolder, WarmWorker, executor
from bigpipe.orchestrator.planning import GOOD, Action, NodeState, Plan, Session, States
from bigpipe.orchestrator.recipe import Node


class Warming:
    """Of one run. Used by the thread of the run's loop, which outlives every worker, alone."""

    def __init__(self, session: Session, plan: Plan, states: States, folder: Callable[[Node], Path]) -> None:
        self._session, self._plan, self._states, self._folder = session, plan, states, folder
        self._waiting: dict[str, WarmWorker] = {}
        self._tried: set[str] = set()

    def begin(self) -> None:
        """Start a worker for the node whose turn comes next."""
        if self._waiting or self._full():
            return
        for name, state in self._states.nodes.items():
            if name not in self._tried and self._certain(state):
                self._tried.add(name)
                if worker := self._start(state.node):
                    self._waiting[name] = worker
                    return

    def take(self, node: Node) -> WarmWorker | None:
        """The worker that waits for this node; another one ends where the node needs its memory."""
        worker = self._waiting.pop(node.name, None)
        if self._waiting and self._full():
            self.close()
        return worker

    def close(self) -> None:
        """End those that wait."""
        while self._waiting:
            self._waiting.popitem()[1].end()

    def _start(self, node: Node) -> WarmWorker | None:
        modules = node.kind.warms(node.params) if node.kind.warms else ()
        if not modules:
            return None
        session, job_file = self._session, AttemptFolder(self._folder(node) / "1").job
        try:
            return WarmWorker(node.kind, modules, session.surroundings(node), job_file, session.environment)
        except (BigpipeError, OSError):
            return None  # the node itself will say so

    def _certain(self, state: NodeState) -> bool:
        """Is it waiting for nothing but nodes that run, and will it run after them if they end well?"""
        node = state.node
        if state.status is not Status.PENDING or state.demanded_by or node.when is not None:
            return False
        if node.kind.warms is None or not executor(node.kind.runs_in).waits:
            return False
        running = [each for each in state.predecessors if each.status is Status.RUNNING]
        if not running or any(each.status not in GOOD and each not in running for each in state.predecessors):
            return False
        if any(other.status is Status.RUNNING and other.node.gates for other in self._states.nodes.values()):
            return False
        return self._is_new(node) or any(self._is_new(producer.node) for producer in running)

    def _is_new(self, node: Node) -> bool:
        """Is there no record that this node could turn out to be? What is forced may give what it gave before."""
        return self._plan.nodes[node.name].decision.action is Action.RUN and node.name not in self._session.forced

    def _full(self) -> bool:
        """Is there no memory for a worker that waits?"""
        return self._states.held["RAM"] + MEMORY > self._session.machine.memory_available
