"""The run as it is foreseen: each node that starts gives at once what was forecast of it.

One node after the other, but for those that take a running producer's files as they are made: these run beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bigpipe.errors import Offline
from bigpipe.orchestrator.contract import Forecast, ForecastContext, Status
from bigpipe.orchestrator.recipe import Choice

from . import fallback, schedule
from .decision import Action, Decision, decide
from .schedule import Do, Step, step
from .session import Session
from .states import GOOD, NOTHING_FORESEEN, SETTLED, NodeState, States

COMPARABLE_WITHIN = 3
"""The factor within which a recorded run counts as comparable: seconds then go in proportion to what is written. Beyond
it the start of a process weighs otherwise."""


def most(forecasts: Sequence[Forecast]) -> Forecast:
    """Return the forecast of which each cost is the largest of them, and each metric known where all agree. The rest is
    the first's."""
    costs = ("download_bytes", "write_bytes", "file_bytes", "works_on", "ram", "seconds")
    known = {name: [value for each in forecasts if (value := getattr(each, name)) is not None] for name in costs}
    on_gpus = [each.vram for each in forecasts if each.vram is not None]
    gpus = sorted({index for vram in on_gpus for index in vram})
    first = forecasts[0]
    same = {
        name: value
        for name, value in first.metrics.items()
        if all(each.metrics.get(name) == value for each in forecasts)
    }
    return replace(
        first,
        **{name: max(values) for name, values in known.items() if values},
        vram={index: max(vram.get(index, 0) for vram in on_gpus) for index in gpus} if on_gpus else None,
        metrics=same,
        unknown=tuple(dict.fromkeys(text for each in forecasts for text in each.unknown)),
        misfits=tuple(dict.fromkeys(misfit for each in forecasts for misfit in each.misfits)),
    )


class Rehearsal:
    """decisions, contexts of the forecasts, followed: by node. peak: the most bytes that the run adds to the disk of
    the store at any time; where: the node that takes it there; sized: what every node that works adds is known."""

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
        self.unanswered: dict[str, Offline] = {}
        """Node → why its source cannot say what it has."""
        self.peak, self.where = 0, ""
        for state in self.states.nodes.values():
            self._bring(state)
        self.sized = all(state.sized for state in self.states.nodes.values() if state.status is Status.SUCCEEDED)
        self.decisions: dict[str, Decision] = {}
        for state in reversed([*self.states.nodes.values()]):
            self.decisions[state.name] = self._came_to(state)

    def _bring(self, state: NodeState) -> None:
        """Let the node take its steps, and before them those of producers that it demands and of nodes that decide
        whether it has its turn, until it has ended."""
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
                case Do.FETCH:
                    self._fetch(state)
                case Do.SAME:
                    schedule.same(self.states, state, self.states[next_step.why])
                case Do.CACHED:
                    self._end(state, Status.CACHED, next_step)
                case Do.SKIP:
                    self._end(state, Status.SKIPPED, next_step)
                case Do.TAKE:
                    schedule.take(self.states, state, next_step.why)
                case Do.FAIL:
                    state.error = fallback.none_passes(self.states, state)
                    schedule.end(self.states, state, Status.SKIPPED, state.error.cause)
                case Do.DEMAND:
                    schedule.demand(self.states, state, next_step.producers)
                    waiting += [self.states[name] for name in next_step.producers]
                case Do.WAIT if (awaited := self.states.nodes.get(next_step.why)) and awaited not in waiting:
                    waiting.append(awaited)
                case _:
                    waiting.pop()

    def _end(self, state: NodeState, status: Status, told: Step) -> None:
        schedule.end(self.states, state, status, told.why, left=told.why if told.gate else "")

    def _look(self, state: NodeState) -> None:
        node, inputs = state.node, schedule.input_digests(state)
        try:
            decision = decide(self.session, node, inputs, schedule.awaited(state) if inputs is None else ())
        except Offline as error:
            self.unanswered[node.name] = error
            decision = Decision(action=Action.RUN, reason=f"not known offline: {error.cause}", inputs=inputs)
        when = node.when if decision.action is Action.RUN else None
        if when is not None and when.evaluate(schedule.lookup(self.states, state)) is None:
            decision = replace(decision, action=Action.MAYBE, reason=f"when {when.text} holds; {decision.reason}")
        if decision.action.works and (condition := self._condition(state)):
            decision = replace(decision, action=Action.MAYBE, reason=f"{condition}; {decision.reason}")
        schedule.decided(self.states, state, decision)
        if not (state.hit or state.remote):
            self._foresee(state)

    def _condition(self, state: NodeState) -> str:
        """Under which condition the node runs: its own, or that of what it takes, unless it takes another then."""
        above = () if state.node.first else state.predecessors
        found = (fallback.conditional(self.states, each) for each in (state, *above))
        return next(filter(None, found), "")

    def _fetch(self, state: NodeState) -> None:
        """It comes from the remote store, which says what it gave."""
        assert state.decision is not None  # noqa: S101  no other node is told to
        assert state.decision.record is not None  # noqa: S101
        schedule.start(self.states, state)
        self._note_peak(state)
        schedule.done(self.states, state, state.decision.record)
        self._end(state, Status.CACHED, step(self.states, state))

    def _note_peak(self, state: NodeState) -> None:
        if self.states.held["disk"] > self.peak:
            self.peak, self.where = self.states.held["disk"], state.name

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
        self._note_peak(together[-1])
        for each in together:
            each.bytes_here = each.done = True
            self._end(each, Status.SUCCEEDED, step(self.states, each))
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
        state.metrics = state.record.metrics if state.record else state.forecast.metrics

    def _forecast(self, state: NodeState) -> Forecast:
        """What it costs; where it may take one of several variants, the most that one of them does."""
        if len(choices := self._may_take(state)) < 2:
            return self._forecast_of(state, state.inputs)
        nodes = self.states.nodes
        each = [{port: [nodes[name] for name in names] for port, names in one.inputs.items()} for one in choices]
        return most([self._forecast_of(state, inputs) for inputs in reversed(each)][::-1])

    def _may_take(self, state: NodeState) -> list[Choice]:
        first = state.node.first
        return [choice for choice, _ in fallback.candidates(self.states, first)] if first and state.awaits else []

    def _forecast_of(self, state: NodeState, wires: Mapping[str, Sequence[NodeState]]) -> Forecast:
        session, node, record = self.session, state.node, state.record
        inputs: dict[str, tuple[Forecast, ...]] = {}
        for port, wired in wires.items():
            if forecasts := [one.forecast for one in wired if one.forecast is not NOTHING_FORESEEN]:
                inputs[port] = tuple(forecasts)
        digest = record.digest if record and state.bytes_here and not state.remote else None
        self.contexts[node.name] = context = ForecastContext(
            surroundings=session.surroundings(node),
            inputs=inputs,
            artifact=session.store.artifact_path(digest) if digest else None,
            pins=session.known_pins(node).values,
            known=session.locked_answers.get(node.name, {}),
            recipe_name=session.recipe.name,
            node=node.name,
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
        comparable = 1 / COMPARABLE_WITHIN <= ratio <= COMPARABLE_WITHIN and state.name not in self.unanswered
        if comparable and last.partial == self.session.identity(state.node).partial:
            return last.seconds * ratio
        return last.seconds if forecast.seconds is None else forecast.seconds

    def _came_to(self, state: NodeState) -> Decision:
        """What is decided in the end. Of dropped bytes that are demanded: as surely as the surest of those that need
        them."""
        decision = state.decision
        if decision is None or state.status not in GOOD:
            return Decision(action=Action.SKIPPED, reason=f"left: {state.left}" if state.left else state.reason)
        if told := fallback.told(self.states, state):
            decision = replace(decision, reason="; ".join(filter(None, [decision.reason, told])))
        if state.status is Status.CACHED or decision.action not in (Action.CACHED, Action.REMOTE):
            return decision
        needing = {each.name: self.decisions[each.name].action for each in state.consumers}
        needing = {name: action for name, action in needing.items() if action.works}
        return replace(
            decision,
            fetch=None,
            action=Action.RUN if Action.RUN in needing.values() else Action.MAYBE,
            reason=schedule.demanded(" and ".join(needing)),
        )
