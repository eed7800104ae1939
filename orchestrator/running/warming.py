"""Which node's worker starts before its turn, while what the node needs is still being made.

    begin()     starts the next one, where there is memory for it
    take()      hands it to its node, or ends it for another one that needs the memory now

One at a time. None for a node that may turn out cached or skipped: with a `when`, behind gates that are not decided,
or where a producer may give again what it gave before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator.contract import Status
from bigpipe.orchestrator.launch import MEMORY, AttemptFolder, WarmWorker, worker_environment
from bigpipe.orchestrator.planning import GOOD, Action, NodeState, Plan, Session, States
from bigpipe.orchestrator.recipe import Node


class Warming:
    """Of one run. Used by the thread of the run's loop, which outlives every worker, alone."""

    def __init__(self, session: Session, plan: Plan, states: States, folder: Callable[[Node], Path]) -> None:
        self._session, self._plan, self._states, self._folder = session, plan, states, folder
        self._waiting: tuple[str, WarmWorker] | None = None
        self._tried: set[str] = set()

    def begin(self) -> None:
        """Start a worker for the node whose turn comes next."""
        session = self._session
        for name, state in self._states.nodes.items():
            if self._waiting is not None or self._full():
                return
            if name not in self._tried and self._certain(state):
                self._tried.add(name)
                node, job_file = state.node, AttemptFolder(self._folder(state.node) / "1").job
                # Of a BigpipeError or OSError the node itself will speak.
                with suppress(BigpipeError, OSError):
                    if modules := node.kind.warms(node.params) if node.kind.warms else ():
                        around = session.surroundings(node)
                        environment = worker_environment(node.kind, around, session.environment)
                        worker = WarmWorker(modules, job_file, environment=environment, directory=around.base)
                        self._waiting = name, worker

    def take(self, node: Node) -> WarmWorker | None:
        """The worker that waits for this node; another one ends where the node needs its memory."""
        if self._waiting is not None and self._waiting[0] == node.name:
            worker, self._waiting = self._waiting[1], None
            return worker
        if self._full():
            self.close()
        return None

    def close(self) -> None:
        """End the one that waits."""
        if self._waiting is not None:
            self._waiting[1].end()
            self._waiting = None

    def _certain(self, state: NodeState) -> bool:
        """Is it waiting for nothing but nodes that run, and will it run after them if they end well?"""
        node = state.node
        if state.status is not Status.PENDING or state.demanded_by or node.when is not None:
            return False
        if node.kind.warms is None or not self._session.executor(node.kind).waits:
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
