"""The run as it is foreseen: each node that starts gives at once what was forecast of it.

One node after the other, but for those that take a running producer's files as they are made: these run beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bigpipe.errors import Offline
from bigpipe.orchestrator.contract import Forecast, ForecastContext, Status

from . import schedule
from .decision import Action, Decision, decide
from .schedule import GOOD, NOTHING_FORESEEN, SETTLED, Do, NodeState, States, step
from .session import Session

COMPARABLE_WITHIN = 3
"""The factor within which a recorded run counts as comparable: seconds then go in proportion to what is written. Beyond
it the start of a process weighs otherwise."""


class Rehearsal:
    """decisions, contexts of the forecasts, followed: by node. peak: the most bytes that the run adds to the disk of
    the store at any time; where: the node that takes it there."""

    def __init__(self, session: Session, nodes: Iterable[NodeState] | None = None) -> None:
        """nodes: the selected ones in topological order, with forecasts that are known."""
        self.session = session
        nodes = (NodeState(node) for node in session.nodes) if nodes is None else nodes
        self.states = States(
            nodes={state.name: state for state in nodes},
            room=session.room(jobs=1),
            side_by_side=session.side_by_side,
            foreseen=True,
        )
        self.contexts: dict[str, ForecastContext] = {}
        self.followed: dict[str, str] = {}
        self.peak, self.where = 0, ""
        for state in self.states.nodes.values():
            self._bring(state)
        self.decisions: dict[str, Decision] = {}
        for state in reversed([*self.states.nodes.values()]):
            self.decisions[state.name] = self._came_to(state)

    def _bring(self, state: NodeState) -> None:
        """Let the node take its steps, and before them those of producers that it demands, until it has ended."""
        waiting = [state]
        while waiting:
            state = waiting[-1]
            if state.status in SETTLED:
                waiting.pop()
                continue
            next_step = step(self.states, state)
            match next_step.do:
                case Do.LOOK:
                    self._look(state)
                case Do.START:
                    self._work(state)
                case Do.CACHED:
                    schedule.end(self.states, state, Status.CACHED, "")
                case Do.SKIP:
                    schedule.end(self.states, state, Status.SKIPPED, next_step.why)
                case Do.DEMAND:
                    schedule.demand(self.states, state, next_step.producers)
                    waiting += [self.states[name] for name in next_step.producers]
                case _:
                    waiting.pop()

    def _look(self, state: NodeState) -> None:
        node, inputs = state.node, schedule.input_digests(state)
        try:
            decision = decide(self.session, node, inputs, schedule.awaited(state) if inputs is None else ())
        except Offline as error:
            decision = Decision(action=Action.RUN, reason=f"not known offline: {error.cause}", inputs=inputs)
        when = node.when if decision.action is Action.RUN else None
        if when is not None and when.evaluate(schedule.lookup(self.states, state)) is None:
            decision = replace(decision, action=Action.MAYBE, reason=f"when {when.text} holds; {decision.reason}")
        schedule.decided(self.states, state, decision)
        if not state.hit:
            self._foresee(state)

    def _work(self, state: NodeState) -> None:
        """It starts, and with it all that can take its files, and theirs; then they are done."""
        schedule.start(self.states, state)
        together = [state]
        for producer in together:
            producer.passing = True
            for consumer in producer.consumers:
                while (next_step := step(self.states, consumer)).do is Do.LOOK:
                    self._look(consumer)
                if next_step.do is Do.START:
                    schedule.start(self.states, consumer, producer.name)
                    self.followed[consumer.name] = producer.name
                    together.append(consumer)
        if self.states.held["disk"] > self.peak:
            self.peak, self.where = self.states.held["disk"], together[-1].name
        for each in together:
            each.bytes_here = True
            schedule.end(self.states, each, Status.SUCCEEDED, "")
            for producer in each.producers:
                if not producer.node.cache and step(self.states, producer).do is Do.DROP:
                    schedule.drop(self.states, producer)

    def _foresee(self, state: NodeState) -> None:
        """Forecasts of what runs, and of the cached nodes it stands on."""
        if state.demanded_by:
            state.forecast = NOTHING_FORESEEN  # of what is cached
        waiting = [state]
        while waiting:
            each = waiting.pop()
            if each.forecast is NOTHING_FORESEEN:
                missing = [
                    one
                    for one in each.producers
                    if one.forecast is NOTHING_FORESEEN and one.status is not Status.SKIPPED
                ]
                if missing:
                    waiting += [each, *missing]
                else:
                    each.forecast = self._forecast(each)
        state.metrics = state.forecast.metrics

    def _forecast(self, state: NodeState) -> Forecast:
        session, node, record = self.session, state.node, state.record
        inputs: dict[str, tuple[Forecast, ...]] = {}
        for port, wired in state.inputs.items():
            if forecasts := [one.forecast for one in wired if one.forecast is not NOTHING_FORESEEN]:
                inputs[port] = tuple(forecasts)
        digest = record.digest if record and state.bytes_here else None
        self.contexts[node.name] = context = ForecastContext(
            surroundings=session.surroundings(node),
            inputs=inputs,
            artifact=session.store.artifact_path(digest) if digest else None,
            pins=session.known_pins(node).values,
            known=session.locked_answers.get(node.name, {}),
        )
        state.processes = context.launch.num_processes
        try:
            forecast = session.ask(node, node.kind.forecast, context)
        except Offline as error:
            forecast = Forecast(unknown=(error.cause,))
        if state.status is Status.CACHED:
            metrics = record.metrics if record else forecast.metrics
            return replace(
                forecast, download_bytes=0, write_bytes=0, ram=0, vram={}, seconds=0, metrics=metrics, misfits=()
            )
        if forecast.fetches_to is not None and not session.store.on_disk_of(forecast.fetches_to):
            forecast = replace(forecast, fetches_to=None)
        seconds = self._seconds(state, forecast)
        return forecast if seconds == forecast.seconds else replace(forecast, seconds=seconds)

    def _seconds(self, state: NodeState, forecast: Forecast) -> float | None:
        """What the same params took the last time for about as much, in proportion; else what the kind reckons; else
        what the node took the last time, whatever that was."""
        last = self.session.last(state.name)
        if last is None:
            return forecast.seconds
        written = sum(int(file["size"]) for file in last.files.values())
        ratio = forecast.write_bytes / written if written and forecast.write_bytes else 1.0
        comparable = 1 / COMPARABLE_WITHIN <= ratio <= COMPARABLE_WITHIN
        if comparable and last.partial == self.session.identity(state.node).partial:
            return last.seconds * ratio
        return last.seconds if forecast.seconds is None else forecast.seconds

    def _came_to(self, state: NodeState) -> Decision:
        """What is decided in the end. Of dropped bytes that are demanded: as surely as the surest of those that need
        them."""
        decision = state.decision
        if decision is None or state.status not in GOOD:
            return Decision(action=Action.SKIPPED, reason=state.reason)
        if state.status is Status.CACHED or decision.action is not Action.CACHED:
            return decision
        needing = {each.name: self.decisions[each.name].action for each in state.consumers}
        needing = {name: action for name, action in needing.items() if action.works}
        return replace(
            decision,
            action=Action.RUN if Action.RUN in needing.values() else Action.MAYBE,
            reason=schedule.demanded(" and ".join(needing)),
        )
