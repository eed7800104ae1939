"""The run as it is foreseen: each node that starts gives at once what was forecast of it.

One node after the other, but for those that take a running producer's files as they are made: these run beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bigpipe.errors import BigpipeError, Offline
from bigpipe.orchestrator.contract import Forecast, ForecastContext, Status
from bigpipe.orchestrator.recipe import Node

from . import schedule
from .decision import Action, Decision, decide
from .schedule import GOOD, SETTLED, Do, Facts, NodeState, States, step
from .session import Session

COMPARABLE_WITHIN = 3
"""The factor within which a recorded run counts as comparable: seconds then go in proportion to what is written. Beyond
it the start of a process weighs otherwise."""


class Rehearsal:
    """decisions, forecasts, followed: by node. peak: the most bytes that the run adds to the disk of the store at any
    time; where: the node that takes it there."""

    def __init__(self, session: Session, forecasts: Mapping[str, Forecast] | None = None) -> None:
        self.session = session
        self.states = States({node.name: NodeState(node) for node in session.nodes})
        self.facts = facts_of(session, jobs=1, foreseen=True)
        self.forecasts = dict(forecasts or {})
        self.followed: dict[str, str] = {}
        self.peak, self.where = 0, ""
        for node in session.nodes:
            self._bring(node.name)
        self.decisions = self._decisions()

    def _bring(self, name: str) -> None:
        """Let the node take its steps, and before them those of producers that it demands, until it has ended."""
        waiting = [name]
        while waiting:
            name = waiting[-1]
            state = self.states[name]
            if state.status in SETTLED:
                waiting.pop()
                continue
            next_step = step(self.states, self.facts, name)
            if next_step.do is Do.LOOK:
                self._look(state)
            elif next_step.do is Do.DEMAND:
                schedule.demand(self.states, name, next_step.producers)
                waiting += next_step.producers
            elif next_step.do is Do.START:
                self._work(name)
            elif next_step.do is Do.SKIP:
                schedule.end(self.states, name, Status.SKIPPED, next_step.why)
            elif next_step.do is Do.CACHED:
                schedule.end(self.states, name, Status.CACHED, "")
            else:
                waiting.pop()

    def _look(self, state: NodeState) -> None:
        node, inputs = state.node, schedule.input_digests(self.states, state.node)
        try:
            decision = decide(self.session, node, inputs, schedule.awaited(self.states, node))
        except Offline as error:
            decision = Decision(action=Action.RUN, reason=f"not known offline: {error.cause}", inputs=inputs)
        doubtful = node.when is not None and node.when.evaluate(schedule.lookup(self.states, node)) is None
        if doubtful and node.when is not None and decision.action is Action.RUN:
            decision = replace(decision, action=Action.MAYBE, reason=f"when {node.when.text} holds; {decision.reason}")
        schedule.decided(state, decision)
        if not state.hit:
            self._foresee(state)

    def _work(self, name: str) -> None:
        """It starts, and with it all that can take its files, and theirs; then they are done."""
        schedule.start(self.states, self.facts, name)
        together = [name]
        for producer in together:
            self.states[producer].passing = True
            for consumer in self.facts.consumers.get(producer, ()):
                while (next_step := step(self.states, self.facts, consumer.name)).do is Do.LOOK:
                    self._look(self.states[consumer.name])
                if next_step.do is Do.START:
                    schedule.start(self.states, self.facts, consumer.name, producer)
                    self.followed[consumer.name] = producer
                    together.append(consumer.name)
        if self.states.held["disk"] > self.peak:
            self.peak, self.where = self.states.held["disk"], together[-1]
        for each in together:
            self._give(self.states[each])

    def _give(self, state: NodeState) -> None:
        state.bytes_here = True
        schedule.end(self.states, state.name, Status.SUCCEEDED, "")
        for name in state.node.producers:
            if not self.states[name].node.cache and step(self.states, self.facts, name).do is Do.DROP:
                schedule.drop(self.states, name)

    def _foresee(self, state: NodeState) -> None:
        """Forecasts of what runs, and of the cached nodes it stands on."""
        waiting = [state.node]
        if state.demanded_by:
            self.forecasts.pop(state.name, None)  # of what is cached
        while waiting:
            node = waiting.pop()
            producers = [self.states[name] for name in node.producers]
            missing = [p.node for p in producers if p.name not in self.forecasts and p.status is not Status.SKIPPED]
            if missing:
                waiting += [node, *missing]
            elif node.name not in self.forecasts:
                self.forecasts[node.name] = self._forecast(self.states[node.name])
        state.forecast = self.forecasts[state.name]
        state.metrics = state.forecast.metrics
        state.processes = self.session.surroundings(state.node).launch.num_processes

    def inputs(self, node: Node) -> dict[str, tuple[Forecast, ...]]:
        """Per port, the forecasts of what is wired there."""
        known = self.forecasts
        found = {port: tuple(known[name] for name in names if name in known) for port, names in node.inputs.items()}
        return {port: values for port, values in found.items() if values}

    def _forecast(self, state: NodeState) -> Forecast:
        session, node, record = self.session, state.node, state.record
        artifact = session.store.artifact_path(record.digest) if record and record.digest and state.bytes_here else None
        context = ForecastContext(
            surroundings=session.surroundings(node),
            inputs=self.inputs(node),
            artifact=artifact,
            pins=session.known_pins(node).values,
        )
        try:
            forecast = node.kind.forecast(node.params, context)
        except Offline as error:
            forecast = Forecast(unknown=(error.cause,))
        except BigpipeError as error:
            error.place = error.place or node.places.get("")
            raise
        if state.status is Status.CACHED:
            metrics = record.metrics if record else forecast.metrics
            return replace(
                forecast, download_bytes=0, write_bytes=0, ram=0, vram={}, seconds=0, metrics=metrics, misfits=()
            )
        if forecast.fetches_to is not None and not session.store.on_disk_of(forecast.fetches_to):
            forecast = replace(forecast, fetches_to=None)
        seconds = self._seconds(node, forecast)
        return forecast if seconds == forecast.seconds else replace(forecast, seconds=seconds)

    def _seconds(self, node: Node, forecast: Forecast) -> float | None:
        """What the same params took the last time for about as much, in proportion; else what the kind reckons; else
        what the node took the last time, whatever that was."""
        last = self.session.last(node.name)
        if last is None:
            return forecast.seconds
        written = sum(int(file["size"]) for file in last.files.values())
        ratio = forecast.write_bytes / written if written and forecast.write_bytes else 1.0
        comparable = 1 / COMPARABLE_WITHIN <= ratio <= COMPARABLE_WITHIN
        if comparable and last.partial == self.session.identity(node).partial:
            return last.seconds * ratio
        return last.seconds if forecast.seconds is None else forecast.seconds

    def _decisions(self) -> dict[str, Decision]:
        """What the nodes came to. Of dropped bytes that are demanded: as sure as the surest of those that need them."""
        found: dict[str, Decision] = {}
        for node in reversed(self.session.nodes):
            state = self.states[node.name]
            decision = state.decision
            if decision is None or state.status not in GOOD:
                decision = Decision(action=Action.SKIPPED, reason=state.reason)
            found[node.name] = decision
            if state.status is Status.SUCCEEDED and decision.action is Action.CACHED:
                needing = [each.name for each in self.session.consumers(node.name) if found[each.name].action.works]
                sure = any(found[name].action is Action.RUN for name in needing)
                found[node.name] = replace(
                    decision,
                    action=Action.RUN if sure else Action.MAYBE,
                    reason=schedule.demanded(" and ".join(needing)),
                )
        return dict(reversed(found.items()))


def facts_of(session: Session, *, jobs: int, keep_going: bool = False, foreseen: bool = False) -> Facts:
    machine = session.machine
    room = {
        "jobs": jobs,
        "CPUs": max(machine.cpus, 1),
        "RAM": machine.memory_available,
        "GPUs": 1,
        "disk": machine.disk_free,
    }
    return Facts(
        consumers={node.name: session.consumers(node.name) for node in session.nodes},
        room=room,
        side_by_side=session.side_by_side,
        keep_going=keep_going,
        foreseen=foreseen,
    )
