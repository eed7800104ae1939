"""The schedule, a row per rule: nodes, what is known of them, and what happens to the last of them next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.kinds import NoMetrics, nothing_to_run

from bigpipe.orchestrator.contract.types import Status
from bigpipe.orchestrator.planning import schedule
from bigpipe.orchestrator.planning.decision import Action, Decision
from bigpipe.orchestrator.planning.schedule import Do, NodeState, States, Step, step
from bigpipe.orchestrator.planning.sharing import Fetch
from bigpipe.orchestrator.planning.states import judge_gates
from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Passing, Port, Stage
from bigpipe.orchestrator.store.artifacts import KeyRecord


class Score(Metrics):
    score: float


def forecast(params: Params, context: object) -> Forecast:
    return Forecast()


def kind(name: str, metrics: type[Metrics] = Score, **more: Any) -> Stage[Any]:
    return Stage(
        kind=name, version=1, params=Params, metrics=metrics, output="text", run=nothing_to_run, forecast=forecast,
        **more,
    )  # fmt: skip


PORTS = {"first": Port("text"), "second": Port("text", optional=True), "rest": Port("text", optional=True, many=True)}
KINDS = {
    "make": kind("make", inputs={}, passing=Passing(streams=True)),
    "use": kind("use", inputs=PORTS),
    "sip": kind("sip", inputs=PORTS, passing=Passing(follows="first", streams=True)),
    "sip-inline": kind("sip-inline", inputs=PORTS, passing=Passing(follows="first"), runs_in="inline"),
    "ranks": kind("ranks", inputs={}, runs_in="ranks"),
    "gather": kind("gather", metrics=NoMetrics, inputs={"rest": Port("text", many=True)}),
}
ROOM = {"jobs": 4, "CPUs": 4, "RAM": 100, "GPUs": 1, "disk": 100}


@dataclass(frozen=True)
class Row:
    rule: str
    stages: str
    given: Mapping[str, str]
    expected: Step
    room: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    vram: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Of nodes of which it is known."""
    same_key: Mapping[str, str] = field(default_factory=dict)
    """Node → the one whose key it has."""
    alike: Sequence[str] = ()
    """Nodes that do the same work."""
    interrupted: bool = False
    of: str = ""
    """Whose step it is; by default that of the last node."""


def record(name: str, score: float = 1.0, digest: str = "") -> KeyRecord:
    return KeyRecord(
        key=f"key of {name}", partial="", identity={}, kind="", node=name, manifest="", metrics={"score": score},
        digest=digest or f"sha256:{name}",
    )  # fmt: skip


class Scene:
    """A moment of a run. Each node's state in words, in topological order:

    new · must (looked up: to run) · refused (the same, though there is a record) · hit · dropped hit · cached · dropped
    · succeeded · again (succeeded with other bytes than before) · skipped · failed · running · done (its gates are not
    judged) · passing (it runs, and its files can be taken) · repassing (the same, and there is a record of its key)
    · there (in the remote store) · bare (only its record is) · came (from there; its gates are not judged)
    · follows (the node before it) · left (its gates do not hold, which is forgiven) · open (foreseen, its gates are not
    decided)
    """

    def __init__(self, row: Row, folder: Path) -> None:
        manifest = folder / "recipe.yaml"
        manifest.write_text("version: 1\nname: scene\nstages:\n" + row.stages)
        self.nodes = load_recipe(manifest, {}, environment={}, stages=KINDS).nodes
        states = {
            name: NodeState(node, Forecast(write_bytes=row.writes.get(name), vram=row.vram.get(name)))
            for name, node in self.nodes.items()
        }
        self.states = States(nodes=states, room={**ROOM, **row.room}, stopped=row.interrupted, **row.facts)
        self.alike = row.alike
        before = ""
        for name in self.nodes:
            self._tell(name, row.given.get(name, "new"), before, record(row.same_key.get(name, name)))
            before = name

    def _tell(self, name: str, words: str, before: str, known: KeyRecord) -> None:
        state = self.states[name]
        if words in ("skipped", "failed"):
            schedule.end(self.states, state, Status(words), "")
        elif words in ("hit", "dropped hit", "cached", "dropped"):
            self._look(state, Action.CACHED, known, bytes_here="dropped" not in words)
            if "hit" not in words:
                schedule.end(self.states, state, Status.CACHED, "")
        elif words in ("there", "bare", "came"):
            self._look(state, Action.REMOTE, known, fetch=Fetch(10, None, words != "bare"))
            if words == "came":
                schedule.start(self.states, state)
                schedule.done(self.states, state, known)
        elif words != "new":
            self._look(state, Action.RUN, known if words in ("refused", "repassing") else None, key=known.key)
            if words not in ("must", "refused"):
                schedule.start(self.states, state, before if words == "follows" else "")
                state.passing = words in ("passing", "repassing")
            if words in ("done", "succeeded", "again", "left", "open"):
                inputs = {port: list(digests) for port, digests in (state.decision.inputs or {}).items()}
                other = {"digest": "other"} if words == "again" else {}
                gave = known.model_copy(update={"inputs": inputs, **other})
                schedule.done(self.states, state, gave)
            if words in ("succeeded", "again", "left", "open"):
                schedule.end(self.states, state, Status.SUCCEEDED, "", left="a gate" if words == "left" else "")
            if words == "open":
                state.metrics, state.record = {}, None

    def _look(self, state: NodeState, action: Action, known: KeyRecord | None, **more: Any) -> None:
        inputs = schedule.input_digests(state)
        partial = "the same" if state.name in self.alike else ""
        decision = Decision(action=action, reason="", inputs=inputs, record=known, partial=partial, **more)
        schedule.decided(self.states, state, decision)


A, A_DROPS = "  a: {uses: make}\n", "  a: {uses: make, cache: false}\n"
AB = A + "  b: {uses: use, inputs: {first: a}}\n"
ABC = A + "  b: {uses: make}\n  c: {uses: use, inputs: {first: a, second: b}}\n"
PAIR = A + "  b: {uses: make}\n"
RANKS = "  a: {uses: ranks}\n  b: {uses: ranks}\n"
NEEDS = A + "  b: {uses: make, needs: [a]}\n"
GATHER = PAIR + "  c: {uses: gather, inputs: {rest: [a, b]}}\n"
SIP_OF_TWO = A + "  o: {uses: make}\n  b: {uses: sip, inputs: {first: a, second: o}}\n"
SIP = A + "  b: {uses: sip, inputs: {first: a}}\n"


SAME: dict[str, Any] = {"alike": ["a", "b"], "same_key": {"b": "a"}}
SAME_SIPS: dict[str, Any] = {"alike": ["b", "c"], "same_key": {"c": "b"}}
SIPPING = SIP + "  c: {uses: sip, inputs: {first: a}}\n"
TWO_PAIRS = AB.replace("b:", "c: {uses: make}\n  b:") + "  d: {uses: use, inputs: {first: c}}\n"


def two(resources: str) -> str:
    return f"  a: {{uses: make, resources: {resources}}}\n  b: {{uses: make, resources: {resources}}}\n"


def sip(more: str, uses: str = "sip") -> str:
    return A + f"  b: {{uses: {uses}, inputs: {{first: a}}, {more}}}\n"


def gated(gate: str) -> str:
    return f"  a: {{uses: make, gates: ['{gate}']}}\n"


def when(condition: str) -> str:
    return A + f'  b: {{uses: make, when: "${{stages.a.metrics.score}} {condition}"}}\n'


TRY = """\
  a: {uses: make, matrix: {s: [x, y, z]}, env: {S: "${matrix.s}"}}
  j: {uses: use, inputs: {first: a}, gates: ["score > 0"]}
  c: {uses: use, inputs: {first: a}, first: {axis: s, of: j}}
"""
TRY_AFTER = (
    TRY.replace("inputs: {first: a}, first", "inputs: {first: w}, first") + "  w: {uses: use, inputs: {first: a}}\n"
)
X_LEFT, X_PASSES = {"a@s=x": "cached", "j@s=x": "left"}, {"a@s=x": "cached", "j@s=x": "cached"}
WAIT, LOOK, START, STOP = Step(Do.WAIT), Step(Do.LOOK), Step(Do.START), Step(Do.STOP)
FOLLOW = Step(Do.START, "a")
DEMAND = Step(Do.DEMAND, producers=("a",))


def skip(why: str) -> Step:
    return Step(Do.SKIP, why)


def wait(why: str) -> Step:
    return Step(Do.WAIT, why)


ROWS = [
    # The remote store
    Row("what the remote store has comes from there", A, {"a": "there"}, Step(Do.FETCH)),
    Row("its record alone comes too", A, {"a": "bare"}, Step(Do.FETCH)),
    Row("what comes needs no dropped bytes", A_DROPS + AB.removeprefix(A), {"a": "dropped", "b": "there"},
        Step(Do.FETCH)),
    Row("what came is cached", A, {"a": "came"}, Step(Do.CACHED)),
    Row("what comes follows nobody", SIP, {"a": "passing", "b": "there"}, wait("a")),
    Row("nothing comes in a run that ends", A, {"a": "there"}, STOP, interrupted=True),
    Row("what comes needs a turn", PAIR, {"a": "running", "b": "there"}, wait("jobs"), room={"jobs": 1}),
    Row("what comes needs room on the disk", PAIR, {"a": "running", "b": "there"}, wait("disk"), room={"disk": 9}),
    Row("what comes needs no CPU", PAIR, {"a": "running", "b": "there"}, Step(Do.FETCH), room={"CPUs": 1}),
    # The cache
    Row("what nobody has asked the store about is looked up", A, {}, LOOK),
    Row("what the store has is taken", A, {"a": "hit"}, Step(Do.CACHED)),
    Row("what it has not runs", A, {"a": "must"}, START),
    Row("a record that was refused is none: outside effect gone, bytes damaged, forced", A, {"a": "refused"}, START),
    Row("a running producer is waited for", AB, {"a": "running"}, wait("a")),
    Row("a pending producer is waited for", AB, {"a": "must"}, wait("a")),
    Row("`needs` is waited for", NEEDS, {"a": "running"}, wait("a")),
    Row("what `when` asks is waited for", when("> 0"), {"a": "running"}, wait("a")),
    Row("a work that ended succeeds", A, {"a": "done"}, Step(Do.SUCCEED)),
    Row("a work that did not goes on", A, {"a": "running"}, WAIT),
    # Skipping
    Row("after a failed producer", AB, {"a": "failed"}, skip("a failed")),
    Row("after one that failed and lets others go on", AB.replace("make", "make, on_fail: continue"), {"a": "failed"},
        skip("a failed")),
    Row("after a failed one in `needs`", NEEDS, {"a": "failed"}, skip("a failed")),
    Row("after a skipped producer on a required port", AB, {"a": "skipped"}, skip("a is skipped")),
    Row("not after one on an optional port", ABC, {"a": "cached", "b": "skipped"}, LOOK),
    Row("after a skipped one in `needs`", NEEDS, {"a": "skipped"}, skip("a is skipped")),
    Row("after all of a `many` port", GATHER,
        {"a": "skipped", "b": "skipped"}, skip("a is skipped")),
    Row("not after some of a `many` port",
        GATHER,
        {"a": "skipped", "b": "cached"}, LOOK),
    Row("a `when` that does not hold", when("> 5"), {"a": "cached"}, skip("when ${stages.a.metrics.score} > 5: 1")),
    Row("a `when` that holds", when("> 0"), {"a": "cached"}, LOOK),
    Row("a `when` of what was skipped", when("> 0"), {"a": "skipped"},
        skip("when ${stages.a.metrics.score} > 0: no value")),
    Row("also in a plan", when("> 0"), {"a": "skipped"}, skip("when ${stages.a.metrics.score} > 0: no value"),
        facts={"foreseen": True}),
    Row("one that is not known skips in a run", when("> 0"), {"a": "open"},
        skip("when ${stages.a.metrics.score} > 0: not known")),
    Row("one of what is only foreseen is left open", when("> 0"), {"a": "open"}, LOOK, facts={"foreseen": True}),
    # Dropped bytes
    Row("dropped bytes are no reason to run", A_DROPS, {"a": "dropped hit"}, Step(Do.CACHED)),
    Row("who must run demands them", AB, {"a": "dropped", "b": "must"}, DEMAND),
    Row("who is cached does not", AB, {"a": "dropped", "b": "hit"}, Step(Do.CACHED)),
    Row("who waits for them starts once they are made again", AB, {"a": "succeeded", "b": "must"}, START),
    # Gates
    Row("a gate that holds", gated("score > 0"), {"a": "done"}, Step(Do.SUCCEED)),
    Row("gates are judged on cached nodes too", gated("score > 0"), {"a": "hit"}, Step(Do.CACHED)),
    Row("after a producer that was left", AB, {"a": "left"}, skip("a is left: a gate")),
    Row("also on an optional port", ABC, {"a": "cached", "b": "left"}, skip("b is left: a gate")),
    Row("after a left one in `needs`", NEEDS, {"a": "left"}, skip("a is left: a gate")),
    Row("not where it is gathered with others", GATHER, {"a": "left", "b": "cached"}, LOOK),
    # The first variant that passes
    Row("the first variant has its turn", TRY, {}, LOOK, of="a@s=x"),
    Row("the second waits while the first may pass", TRY, {"a@s=x": "running"}, wait("j@s=x"), of="a@s=y"),
    Row("also while that is judged", TRY, {"a@s=x": "cached", "j@s=x": "done"}, wait("j@s=x"), of="a@s=y"),
    Row("it has its turn once the first is left", TRY, X_LEFT, LOOK, of="a@s=y"),
    Row("the third waits for the second", TRY, X_LEFT, wait("j@s=y"), of="a@s=z"),
    Row("what comes after one that is taken is not run", TRY, X_PASSES, skip("s x is taken"), of="a@s=y"),
    Row("nor what would judge it", TRY, X_PASSES, skip("s x is taken"), of="j@s=z"),
    Row("a judge that broke is no verdict", TRY, {"a@s=x": "cached", "j@s=x": "failed"}, skip("j@s=x failed"),
        of="a@s=y"),
    Row("nor is one that could not run for it", TRY, {"a@s=x": "failed", "j@s=x": "skipped"}, skip("a@s=x failed"),
        of="a@s=y"),
    Row("one that was skipped is left", TRY, {"a@s=x": "skipped", "j@s=x": "skipped"}, LOOK, of="a@s=y"),
    Row("in a plan the next may run where nothing is decided", TRY, {"a@s=x": "cached", "j@s=x": "open"}, LOOK,
        facts={"foreseen": True}, of="a@s=y"),
    Row("what no judge stands on waits until its variant is taken", TRY_AFTER, {"a@s=x": "cached", "j@s=x": "running"},
        wait("j@s=x"), of="w@s=x"),
    Row("then it runs", TRY_AFTER, X_PASSES, LOOK, of="w@s=x"),
    Row("and not if the variant is left", TRY_AFTER, X_LEFT, skip("s x is left: a gate"), of="w@s=x"),
    Row("in a plan it may", TRY_AFTER, {"a@s=x": "cached", "j@s=x": "open"}, LOOK, facts={"foreseen": True},
        of="w@s=x"),
    Row("who takes the first waits for the first judge", TRY, {"a@s=x": "cached"}, wait("j@s=x")),
    Row("then for the next", TRY, X_LEFT, wait("j@s=y")),
    Row("it takes the one that passes", TRY, {**X_LEFT, "a@s=y": "cached", "j@s=y": "cached"}, Step(Do.TAKE, "y")),
    Row("not the next after one that broke", TRY, {"a@s=x": "cached", "j@s=x": "failed"}, skip("j@s=x failed")),
    Row("it fails where none passes", TRY, {f"{node}@s={value}": "left" for node in "aj" for value in "xyz"},
        Step(Do.FAIL)),
    Row("with on_fail: skip it is skipped", TRY.replace("c: {uses", "c: {on_fail: skip, uses"),
        {f"{node}@s={value}": "left" for node in "aj" for value in "xyz"},
        skip("c: no s passes: x: a gate; y: a gate; z: a gate")),
    Row("it is skipped where none could be judged", TRY,
        {f"{node}@s={value}": "skipped" for node in "aj" for value in "xyz"}, skip("j@s=z is skipped")),
    # The same work
    Row("what another is doing is waited for", PAIR, {"a": "running", "b": "must"}, wait("a"), **SAME),
    Row("not where it is done for other inputs", TWO_PAIRS, {"a": "cached", "c": "cached", "b": "running", "d": "must"},
        START, alike=["b", "d"]),
    Row("what another has done is taken", PAIR, {"a": "succeeded", "b": "must"}, Step(Do.SAME, "a"), **SAME),
    Row("not its failure", PAIR.replace("make", "make, on_fail: continue"), {"a": "failed", "b": "must"}, START,
        **SAME),
    Row("who does what a follower does waits for it", SIPPING, {"a": "passing", "b": "follows", "c": "must"},
        wait("b"), **SAME_SIPS),
    Row("and sends for no bytes meanwhile", SIPPING.replace("make", "make, cache: false"),
        {"a": "dropped", "b": "running", "c": "must"}, wait("b"), **SAME_SIPS),
    # Room
    Row("jobs", PAIR, {"a": "running", "b": "must"}, wait("jobs"), room={"jobs": 1}),
    Row("room for both", two("{ram: 50B, cpus: 2}"), {"a": "running", "b": "must"}, START),
    Row("RAM", two("{ram: 51B}"), {"a": "running", "b": "must"}, wait("RAM")),
    Row("CPUs", two("{cpus: 3}"), {"a": "running", "b": "must"}, wait("CPUs")),
    Row("one process is one CPU", PAIR, {"a": "running", "b": "must"}, wait("CPUs"),
        room={"CPUs": 1}),
    Row("one node at a time holds GPUs", two("{gpus: 1}"), {"a": "running", "b": "must"}, wait("GPUs")),
    Row("who needs none runs beside it", PAIR.replace("make", "make, resources: {gpus: 1}", 1),
        {"a": "running", "b": "must"}, START),
    Row("ranks of which nobody knows what they use hold GPUs", RANKS, {"a": "running", "b": "must"}, wait("GPUs")),
    Row("ranks that use none do not", RANKS, {"a": "running", "b": "must"}, START, vram={"a": {}}),
    Row("nor do those that are to have none", RANKS.replace("ranks", "ranks, resources: {gpus: 0}", 1),
        {"a": "running", "b": "must"}, START),
    Row("nor other processes", PAIR, {"a": "running", "b": "must"}, START, room={"GPUs": 0}),
    Row("disk", PAIR, {"a": "running", "b": "must"}, wait("disk"),
        writes={"a": 60, "b": 41}),
    Row("disk that the recipe asks for", two("{disk: 51B}"), {"a": "running", "b": "must"}, wait("disk")),
    Row("disk that finished nodes keep", "  a: {uses: make}\n  c: {uses: make}\n  b: {uses: make}\n",
        {"a": "succeeded", "c": "running", "b": "must"}, wait("disk"), writes={"a": 60, "b": 41}),
    Row("what does not fit beside others runs alone", two("{ram: 500B, cpus: 50}"), {"b": "must"}, START),
    Row("also on the disk", A, {"a": "must"}, START, writes={"a": 500}),
    # Ending
    Row("a failure stops what has not started", PAIR, {"a": "failed", "b": "must"}, STOP),
    Row("on_fail: continue does not", "  a: {uses: make, on_fail: continue}\n  b: {uses: make}\n",
        {"a": "failed", "b": "must"}, START),
    Row("nor does --keep-going", PAIR, {"a": "failed", "b": "must"}, START,
        facts={"keep_going": True}),
    Row("what is cached is taken all the same", PAIR, {"a": "failed", "b": "hit"},
        Step(Do.CACHED)),
    Row("an interruption stops what has not started", A, {"a": "must"}, STOP, interrupted=True),
    Row("whatever goes on after failures", A, {"a": "must"}, STOP, interrupted=True, facts={"keep_going": True}),
    # Following
    Row("a follower is looked up on what is known", SIP, {"a": "passing"}, LOOK),
    Row("a follower starts beside its producer", SIP, {"a": "passing", "b": "must"}, FOLLOW),
    Row("not before files were announced", SIP, {"a": "running", "b": "must"}, wait("a")),
    Row("not a kind that takes no files one by one", AB, {"a": "passing", "b": "must"}, wait("a")),
    Row("not one that cannot wait", sip("", uses="sip-inline"), {"a": "passing", "b": "must"}, wait("a")),
    Row("not one with a timeout", sip("timeout: 1h"), {"a": "passing", "b": "must"}, wait("a")),
    Row("not one with `when`", sip('when: "${stages.a.metrics.score} > 0"'), {"a": "passing", "b": "must"}, wait("a")),
    Row("not on another port", SIP_OF_TWO, {"a": "cached", "o": "passing", "b": "must"}, wait("o")),
    Row("not where nodes run one after the other", SIP, {"a": "passing", "b": "must"}, wait("a"),
        facts={"side_by_side": False}),
    Row("not while something else runs", SIP_OF_TWO, {"a": "passing", "o": "running", "b": "must"}, wait("a")),
    Row("not where other bytes were dropped", SIP_OF_TWO, {"a": "passing", "o": "dropped", "b": "must"}, wait("a")),
    Row("not one that is a hit if the same comes again", SIP, {"a": "repassing", "b": "hit"}, wait("a")),
    Row("a follower needs memory", sip("resources: {ram: 51B}").replace("make", "make, resources: {ram: 50B}"),
        {"a": "passing", "b": "must"}, wait("RAM")),
    Row("but shares its producer's job and CPU", SIP, {"a": "passing", "b": "must"}, FOLLOW,
        room={"jobs": 1, "CPUs": 1}),
    Row("and its disk: waiting would need as much", SIP, {"a": "passing", "b": "must"}, FOLLOW,
        writes={"a": 100, "b": 100}),
    Row("no follower starts in a run that ends", SIP, {"a": "passing", "b": "must"}, STOP, interrupted=True),
    Row("a follower of a follower waits for files too", SIP + "  c: {uses: sip, inputs: {first: b}}\n",
        {"a": "passing", "b": "follows"}, wait("b")),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.rule)
def test_rule(row: Row, tmp_path: Path) -> None:
    scene = Scene(row, tmp_path)
    assert step(scene.states, scene.states[row.of or list(scene.nodes)[-1]]) == row.expected


def test_bytes_that_do_not_come_are_made_where_they_are_demanded(tmp_path: Path) -> None:
    now = scene(tmp_path, AB, {"a": "bare", "b": "must"})
    producer, consumer = now.states["a"], now.states["b"]
    schedule.start(now.states, producer)
    schedule.done(now.states, producer, record("a"))
    schedule.end(now.states, producer, Status.CACHED, "")
    assert not producer.bytes_here
    now._look(consumer, Action.RUN, None)
    assert step(now.states, consumer) == DEMAND
    schedule.demand(now.states, consumer, ["a"])
    now._look(producer, Action.REMOTE, record("a"), fetch=Fetch(10, None, False))
    assert step(now.states, producer) == START


def test_in_a_plan_what_may_run_says_nothing_of_what_surely_does(tmp_path: Path) -> None:
    now = scene(tmp_path, PAIR, {"a": "succeeded", "b": "must"}, facts={"foreseen": True}, **SAME)
    first = now.states["a"]
    assert first.decision is not None
    assert next_of(now, "b") is Do.SAME
    first.decision = replace(first.decision, action=Action.MAYBE)
    assert next_of(now, "b") is Do.START


def scene(folder: Path, stages: str, given: Mapping[str, str], **more: Any) -> Scene:
    return Scene(Row("", stages, given, WAIT, **more), folder)


def next_of(scene: Scene, name: str) -> Do:
    return step(scene.states, scene.states[name]).do


@pytest.mark.parametrize("gate", ["score > 5", "no.such.metric > 0"], ids=["that does not hold", "that is not known"])
@pytest.mark.parametrize(("words", "good"), [("done", Do.SUCCEED), ("hit", Do.CACHED), ("came", Do.CACHED)])
def test_a_gate_fails_the_run_and_is_left_to_it_by_a_plan(gate: str, words: str, good: Do, tmp_path: Path) -> None:
    stages = gated("score > 5")
    run, plan = scene(tmp_path, stages, {"a": words}), scene(tmp_path, stages, {"a": words}, facts={"foreseen": True})
    if "no.such" in gate:
        run.states["a"].metrics = plan.states["a"].metrics = {}
    failed = step(run.states, run.states["a"])
    assert failed.do is Do.FAIL
    assert "a: gate score > 5" in str(failed.gate.error(run.nodes["a"]))
    assert next_of(plan, "a") is good
    assert [verdict.failed for verdict in judge_gates(plan.states, plan.states["a"])] == [True]  # it is over


def test_a_gate_on_a_metric_that_was_not_measured_says_which_was(tmp_path: Path) -> None:
    for foreseen in (False, True):
        now = scene(tmp_path, gated("score > 0"), {"a": "hit"}, facts={"foreseen": foreseen})
        now.states["a"].metrics = {"scores": 2}
        verdict = judge_gates(now.states, now.states["a"])[0]
        assert str(verdict.error(now.nodes["a"])).endswith(
            "a: gate score > 0: no value\n  a measured no score; did you mean 'scores'?"
        )
    now.states["a"].record = None  # only foreseen
    assert judge_gates(now.states, now.states["a"])[0].verdict is None


@pytest.mark.parametrize(("words", "good"), [("done", Do.SUCCEED), ("hit", Do.CACHED)])
@pytest.mark.parametrize(("on_fail", "left"), [("skip", True), ("warn", False)])
def test_a_gate_that_does_not_hold_can_be_no_failure(
    on_fail: str, left: bool, words: str, good: Do, tmp_path: Path
) -> None:
    stages = gated("score > 5").replace("make,", f"make, on_fail: {on_fail},")
    for foreseen in (False, True):
        now = scene(tmp_path, stages, {"a": words}, facts={"foreseen": foreseen})
        told = step(now.states, now.states["a"])
        assert (told.do, told.why, told.gate is not None) == (good, "gate score > 5: 1", left)


def test_a_broken_stage_stops_the_run_whatever_its_gates_may(tmp_path: Path) -> None:
    for on_fail in ("skip", "warn"):
        now = scene(tmp_path, PAIR.replace("make", f"make, on_fail: {on_fail}", 1), {"a": "failed", "b": "must"})
        assert next_of(now, "b") is Do.STOP


@pytest.mark.parametrize(("words", "good"), [("done", Do.SUCCEED), ("hit", Do.CACHED)])
def test_a_judge_whose_gates_do_not_hold_is_left(words: str, good: Do, tmp_path: Path) -> None:
    now = scene(tmp_path, TRY.replace("score > 0", "score > 5"), {"a@s=x": "cached", "j@s=x": words})
    told = step(now.states, now.states["j@s=x"])
    assert (told.do, told.why) == (good, "gate score > 5: 1")
    assert told.gate is not None


def test_a_judge_of_nobody_in_the_run_is_as_any_other(tmp_path: Path) -> None:
    """`run j`: its gates fail the run, and all its variants run."""
    now = scene(tmp_path, TRY.replace("score > 0", "score > 5"), {})
    nodes = {name: state for name, state in now.states.nodes.items() if name != "c"}
    alone = States(nodes={name: NodeState(state.node) for name, state in nodes.items()}, room=ROOM)
    assert step(alone, alone["a@s=y"]) == LOOK
    now.states = alone
    now._tell("a@s=x", "cached", "", record("a@s=x"))
    now._tell("j@s=x", "done", "", record("j@s=x"))
    assert step(alone, alone["j@s=x"]).do is Do.FAIL


@pytest.mark.parametrize("on_fail", ["stop", "continue", "skip", "warn"])
def test_a_variant_that_cannot_pass_by_what_is_forecast_is_not_run(on_fail: str, tmp_path: Path) -> None:
    stages = TRY.replace("gates: [", f"on_fail: {on_fail}, gates: [").replace("score > 0", "score > 5")
    now = scene(tmp_path, stages, {"a@s=x": "cached", "j@s=x": "must"})
    assert next_of(now, "j@s=x") is Do.START
    now.states["j@s=x"].forecast = Forecast(metrics={"score": 5})
    told = step(now.states, now.states["j@s=x"])
    assert (told.do, told.why) == (Do.SKIP, "gate score > 5: 5")
    assert told.gate is not None
    schedule.end(now.states, now.states["j@s=x"], Status.SKIPPED, "", left=told.why)
    assert next_of(now, "a@s=y") is Do.LOOK


@pytest.mark.parametrize(("foreseen", "done"), [(True, Do.START), (False, Do.FAIL)], ids=["plan", "run"])
def test_a_gate_that_fails_by_what_is_forecast_is_not_paid_for(foreseen: bool, done: Do, tmp_path: Path) -> None:
    """`on_fail: continue` and `--keep-going` leave it to the run, which did all the work first."""
    now = scene(tmp_path, gated("score > 5"), {"a": "must"}, facts={"foreseen": foreseen, "keep_going": True})
    now.states["a"].forecast = Forecast(metrics={"score": 5})
    assert next_of(now, "a") is done
    now.states["a"].demanded_by = "b"  # its gates were judged
    assert next_of(now, "a") is Do.START


def test_what_is_taken_is_all_that_counts(tmp_path: Path) -> None:
    given = {**X_LEFT, "a@s=y": "cached", "j@s=y": "cached", "a@s=z": "skipped", "j@s=z": "skipped"}
    now = scene(tmp_path, TRY, given)
    schedule.take(now.states, now.states["c"], "y")
    assert schedule.input_digests(now.states["c"]) == {"first": ["sha256:a@s=y"]}
    assert next_of(now, "c") is Do.LOOK


def test_a_plan_does_not_know_inputs_that_are_not_decided(tmp_path: Path) -> None:
    given = {"a@s=x": "cached", "j@s=x": "open", "a@s=y": "cached", "j@s=y": "cached"}
    now = scene(tmp_path, TRY, given, facts={"foreseen": True})
    assert step(now.states, now.states["c"]) == Step(Do.TAKE, "x")
    schedule.take(now.states, now.states["c"], "x")
    assert schedule.input_digests(now.states["c"]) is None
    assert schedule.awaited(now.states["c"]) == ["j@s=x"]


def test_another_variant_is_taken_where_the_judge_comes_to_another_verdict(tmp_path: Path) -> None:
    """Dropped bytes that were made again came out different, and what judges them ran again."""
    given = {**X_PASSES, "a@s=y": "cached", "j@s=y": "cached"}
    now = scene(tmp_path, TRY, given)
    consumer = now.states["c"]
    schedule.take(now.states, consumer, "x")
    now._look(consumer, Action.CACHED, record("c"))
    schedule.end(now.states, consumer, Status.CACHED, "")
    assert step(now.states, consumer) == WAIT
    now.states["j@s=x"].left = "a gate"
    assert step(now.states, consumer) == LOOK
    now._look(consumer, Action.CACHED, record("c"))
    assert step(now.states, consumer) == Step(Do.TAKE, "y")


@pytest.mark.parametrize(
    ("x", "dropped"), [("left", True), ("running", False), ("cached", False)], ids=["left", "not judged", "taken"]
)
def test_bytes_of_a_variant_go_once_it_is_left(x: str, dropped: bool, tmp_path: Path) -> None:
    """Who might have taken it takes another now, or waits for that."""
    stages = TRY.replace("matrix:", "cache: false, matrix:")
    assert (next_of(scene(tmp_path, stages, {"a@s=x": "succeeded", "j@s=x": x}), "a@s=x") is Do.DROP) == dropped


def test_who_takes_the_first_follows_nobody(tmp_path: Path) -> None:
    stages = TRY_AFTER.replace("c: {uses: use", "c: {uses: sip").replace("w: {uses: use", "w: {uses: sip")
    given = {**X_PASSES, "a@s=y": "skipped", "j@s=y": "skipped", "a@s=z": "skipped", "j@s=z": "skipped"}
    now = scene(tmp_path, stages, {**given, "w@s=x": "passing", "w@s=y": "skipped", "w@s=z": "skipped"})
    schedule.take(now.states, now.states["c"], "x")
    assert step(now.states, now.states["c"]) == wait("w@s=x")


THREE = A_DROPS + "  b: {uses: use, inputs: {first: a}}\n  c: {uses: use, inputs: {first: a}}\n"


@pytest.mark.parametrize(
    ("b", "c", "dropped"),
    [
        ("succeeded", "succeeded", True), ("cached", "succeeded", True), ("succeeded", "skipped", True),
        ("succeeded", "must", False), ("succeeded", "running", False), ("must", "cached", False),
        ("succeeded", "failed", False), ("succeeded", "new", False),
    ],
)  # fmt: skip
def test_bytes_that_are_not_kept_go_after_the_last_consumer(b: str, c: str, dropped: bool, tmp_path: Path) -> None:
    given = {"a": "succeeded", "b": b, "c": c}
    assert (next_of(scene(tmp_path, THREE, given), "a") is Do.DROP) == dropped
    assert next_of(scene(tmp_path, THREE.replace(", cache: false", ""), given), "a") is Do.WAIT


def test_bytes_go_after_a_consumer_of_which_but_a_gate_failed(tmp_path: Path) -> None:
    """It is recorded; they were kept for ever, for a work that is not done again."""
    now = scene(tmp_path, A_DROPS + AB.removeprefix(A), {"a": "succeeded", "b": "done"})
    schedule.end(now.states, now.states["b"], Status.FAILED, "a gate")
    assert next_of(now, "a") is Do.DROP
    now.states["b"].record = None
    assert next_of(now, "a") is Do.WAIT


TWINS = "".join(
    f"  {name}: {{uses: make{more}}}\n  {name}2: {{uses: use, inputs: {{first: {name}}}}}\n"
    for name, more in (("a", ", cache: false"), ("b", "MORE"))
)


@pytest.mark.parametrize(
    ("more", "b", "b2", "dropped"),
    [
        (", cache: false", "succeeded", "succeeded", True), ("", "succeeded", "succeeded", False),
        ("", "must", "new", False), (", cache: false", "succeeded", "must", False),
    ],
)  # fmt: skip
def test_bytes_of_one_key_stay_as_long_as_one_node_keeps_them(
    more: str, b: str, b2: str, dropped: bool, tmp_path: Path
) -> None:
    given = {"a": "succeeded", "a2": "succeeded", "b": b, "b2": b2}
    now = scene(tmp_path, TWINS.replace("MORE", more), given, same_key={"b": "a"}, writes={"a": 7, "b": 7})
    assert now.states.held["disk"] == 7  # they are there once
    assert (next_of(now, "a") is Do.DROP) == dropped
    if dropped:
        schedule.drop(now.states, now.states["a"])
        assert [now.states[name].bytes_here for name in "ab"] == [False, False]
        assert now.states.held["disk"] == 0


def test_bytes_that_nobody_takes_stay(tmp_path: Path) -> None:
    assert next_of(scene(tmp_path, A_DROPS, {"a": "succeeded"}), "a") is Do.WAIT


def test_a_demanded_producer_runs_whatever_the_store_has_of_it_but_its_bytes(tmp_path: Path) -> None:
    now = scene(tmp_path, AB, {"a": "dropped", "b": "must"})
    schedule.demand(now.states, now.states["b"], ("a",))
    assert [next_of(now, name) for name in "ab"] == [Do.LOOK, Do.WAIT]
    now._look(now.states["a"], Action.CACHED, record("a"), bytes_here=False)
    assert next_of(now, "a") is Do.START
    assert "b needs them" in now.states["a"].reason
    now._look(now.states["a"], Action.CACHED, record("a"))  # another run has made them meanwhile
    assert next_of(now, "a") is Do.CACHED


def made_again(now: Scene, name: str, digest: str) -> None:
    """A demanded producer runs and gives this."""
    now._look(now.states[name], Action.CACHED, record(name), bytes_here=False)
    schedule.start(now.states, now.states[name])
    schedule.done(now.states, now.states[name], record(name, digest=digest))
    schedule.end(now.states, now.states[name], Status.SUCCEEDED, "")


def test_what_stands_on_other_bytes_than_before_is_looked_up_again(tmp_path: Path) -> None:
    stages = THREE + "  d: {uses: use, inputs: {first: c}}\n"
    now = scene(tmp_path, stages, {"a": "dropped", "b": "must", "c": "cached", "d": "cached"})
    assert next_of(now, "b") is Do.DEMAND
    schedule.demand(now.states, now.states["b"], ("a",))
    assert [next_of(now, name) for name in "cd"] == [Do.WAIT, Do.WAIT]  # nothing has changed yet
    made_again(now, "a", "sha256:a")
    assert [next_of(now, name) for name in "abcd"] == [Do.WAIT, Do.START, Do.WAIT, Do.WAIT]
    schedule.demand(now.states, now.states["b"], ("a",))
    made_again(now, "a", "other")
    assert [next_of(now, name) for name in "abcd"] == [Do.WAIT, Do.LOOK, Do.LOOK, Do.WAIT]


def test_who_followed_in_vain_takes_its_turn(tmp_path: Path) -> None:
    now = scene(tmp_path, SIP, {"a": "passing", "b": "follows"})
    schedule.end(now.states, now.states["a"], Status.FAILED, "")
    schedule.end(now.states, now.states["b"], Status.PENDING, "")
    assert step(now.states, now.states["b"]) == skip("a failed")
    now = scene(tmp_path, SIP, {"a": "passing", "b": "follows"})
    schedule.done(now.states, now.states["a"], record("a", digest="other"))
    schedule.end(now.states, now.states["a"], Status.SUCCEEDED, "")
    schedule.end(now.states, now.states["b"], Status.PENDING, "")
    assert next_of(now, "b") is Do.LOOK
    assert now.states.running == set()
    assert not any(now.states.held.values())


@pytest.mark.parametrize(("digest", "then"), [("sha256:a", Do.CACHED), ("other", Do.LOOK)])
def test_who_would_be_a_hit_is_one_if_the_same_comes_again(digest: str, then: Do, tmp_path: Path) -> None:
    now = scene(tmp_path, SIP, {"a": "repassing", "b": "hit"})
    schedule.done(now.states, now.states["a"], record("a", digest=digest))
    schedule.end(now.states, now.states["a"], Status.SUCCEEDED, "")
    assert next_of(now, "b") is then


SIPS = A_DROPS + "  b: {uses: sip, inputs: {first: a}}\n  c: {uses: sip, inputs: {first: a}}\n"


def test_files_are_let_go_where_all_who_take_them_follow(tmp_path: Path) -> None:
    def passes_on(given: Mapping[str, str], **more: Any) -> bool:
        now = scene(tmp_path, SIPS, {"a": "passing", "b": "must", **given})
        schedule.start(now.states, now.states["b"], "a")
        if given.get("c") == "must":
            schedule.start(now.states, now.states["c"], "a")
        return schedule.passes_on(now.states, now.states["a"], **more)

    assert passes_on({"c": "must"})
    assert not passes_on({"c": "new"})
    assert not passes_on({"c": "failed"})
    assert passes_on({"c": "failed"}, gone=True)
    assert passes_on({"c": "skipped"})
    twins = scene(tmp_path, SIPS, {"a": "passing", "b": "must", "c": "refused"}, **SAME_SIPS)
    schedule.start(twins.states, twins.states["b"], "a")
    assert schedule.passes_on(twins.states, twins.states["a"])
    for stages in (SIP, SIPS.replace("make", "make, timeout: 1h").partition("  c:")[0]):
        kept = scene(tmp_path, stages, {"a": "passing", "b": "follows"})
        assert not schedule.passes_on(kept.states, kept.states["a"])


@pytest.mark.parametrize("cache", ["true", "false"])
def test_what_passes_from_node_to_node_lies_there_two_files_at_a_time(cache: str, tmp_path: Path) -> None:
    now = scene(tmp_path, SIP.replace("uses: make", f"uses: make, cache: {cache}"), {"b": "must"})
    for name, size in (("a", 90), ("b", 50)):
        now.states[name].forecast = Forecast(write_bytes=size, file_bytes=10, works_on=25)
    schedule.start(now.states, now.states["a"])
    assert now.states.held["disk"] == 90
    schedule.start(now.states, now.states["b"], "a")
    assert now.states.held["disk"] == 50 + (90 if cache == "true" else 40)  # three in work, and one that comes
    schedule.end(now.states, now.states["a"], Status.SUCCEEDED, "")
    schedule.drop(now.states, now.states["a"])
    assert now.states.held["disk"] == 50
