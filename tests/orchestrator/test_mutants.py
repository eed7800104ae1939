"""Each rule of the schedule, broken on purpose: a test of it fails. What can be broken unseen is no rule."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCHEDULE, REHEARSAL = "orchestrator/planning/schedule.py", "orchestrator/planning/rehearsal.py"
STATES, FALLBACK = "orchestrator/planning/states.py", "orchestrator/planning/fallback.py"
EXECUTION = "orchestrator/running/execution.py"
RULES, FORESEEN, REFUSED = (f"tests/orchestrator/test_{name}.py" for name in ("schedule", "rehearsal", "execution"))
VERDICTS = "tests/orchestrator/test_fallback.py"
SCHEDULE_MUTANTS = [
    # What there is room for
    ("RAM is not counted", '"RAM": ram', '"RAM": 0'),
    ("CPUs are not counted", '"CPUs": cpus', '"CPUs": 0'),
    ("GPUs are not counted", '"GPUs": int(gpus)', '"GPUs": 0'),
    ("ranks of which nothing is known hold no GPU", " or takes_any_gpus(state.node, forecast)", ""),
    ("jobs are not counted", '"jobs": 0 if follows else 1', '"jobs": 0'),
    ("the disk is not counted", 'share["disk"] = state.writes + state.fetches', 'share["disk"] = 0'),
    ("finished nodes free the disk", "        states.hold_disk(state, state.writes)\n", "        pass\n"),
    ("a process is no CPU", "(0 if follows else state.processes)", "0"),
    ("nothing runs alone", '    if not states.running:\n        return ""\n', ""),
    ("a follower counts as a job", '"jobs": 0 if follows else 1', '"jobs": 1'),
    ("what ended still holds its share", "states.held[what] -= size", "pass"),
    # Dropped bytes
    ("bytes go after the first consumer", "taken = all(", "taken = any("),
    ("kept bytes go", "return state.node.cache or not state.consumers", "return not state.consumers"),
    ("bytes go though a consumer failed",
     "        each.status is Status.SKIPPED\n        or (each",
     "        each.status in (Status.SKIPPED, Status.FAILED)\n        or (each"),
    ("bytes that nobody takes go", "return state.node.cache or not state.consumers", "return state.node.cache"),
    ("dropped bytes are not demanded", "if each.status in GOOD and not each.bytes_here)", "if False)"),
    ("what stands on other bytes stays", "    if not _up_to_date(states, state):\n        return Step(Do.LOOK)\n", ""),
    ("bytes that another node keeps go",
     "if taken and not any(map(keeps, sharing))", "if taken"),
    ("bytes go after the consumers of one of those that share them",
     "for one in sharing for", "for one in [state] for"),
    ("shared bytes are counted twice",
     "    if not any(each.disk for each in _sharing(states, state)[1:]):\n", "    if True:\n"),
    # Gates, `when` and what is skipped
    ("a gate that cannot be decided passes",
     "if gate.failed or (gate.verdict is None and not states.foreseen)", "if gate.failed"),
    ("a gate that does not hold passes", "if gate.failed or (gate.verdict is None and", "if (gate.verdict is None and"),
    ("gates are not judged on cached nodes", "_judged(states, state, Do.CACHED)", "Step(Do.CACHED)"),
    ("a plan stops at its gates", "Step(otherwise) if states.foreseen else Step(Do.FAIL", "Step(Do.FAIL"),
    ("`when` that is not known holds", 'return "" if states.foreseen else', 'return "" if True else'),
    ("`when` that is not known skips in a plan", 'return "" if states.foreseen else', 'return "" if False else'),
    ("`when` is not asked", 'if when is None:\n        return ""', 'if True:\n        return ""'),
    ("what failed upstream is overlooked", "if each.status is Status.FAILED:", "if False:"),
    ("an optional port is required", "gone and not spec.optional and", "gone and"),
    ("a `many` port needs all", "(not spec.many or len(gone) == len(wired))", "True"),
    ("`needs` of what is skipped is overlooked",
     "for each in needed if each.status is Status.SKIPPED)", "for each in needed if False)"),
    ("a left producer is taken", "        if not spec.many and (left :=", "        if False and (left :="),
    ("a left producer is not gathered", "        if not spec.many and (left :=", "        if (left :="),
    ("`needs` of what is left is overlooked", "for each in needed if each.left)", "for each in needed if False)"),
    ("a gate that is forgiven fails the run", "    if not fallback.forgiven(state):\n", "    if True:\n"),
    ("a warning leaves the node", "gate=None if _minds_nothing(state) else bad[0]", "gate=bad[0]"),
    # The first variant that passes
    ("variants are not held back", "_held_back(states, state) or _chooses", "_chooses"),
    ("what none passes for is skipped", "if forgiven else Step(Do.FAIL)", "if True else Step(Do.FAIL)"),
    ("what none passes for fails where it is to be skipped",
     "if forgiven else Step(Do.FAIL)", "if False else Step(Do.FAIL)"),
    ("what nothing was judged for fails",
     "        if not any(states[each.judge].left for each in first.choices):\n", "        if False:\n"),
    ("a broken variant is overlooked by who takes one", "    if last is Verdict.FAILED:\n", "    if False:\n"),
    ("who takes one waits for no judge", "    if last is Verdict.AWAITED:\n", "    if False:\n"),
    ("a choice stays whatever its judge says",
     "    if found and found[0][0] is not state.choice:\n        return False\n", ""),
    ("a variant that cannot pass runs",
     "        if foregone := _foregone(states, state):\n            return foregone\n", ""),
    # The remote store
    ("what comes demands dropped bytes", "    if not state.remote:\n", "    if True:\n"),
    ("what comes follows", "    elif follows:\n        return Step(Do.WAIT, follows)\n", ""),
    ("what came counts as made", "Do.CACHED if state.remote else Do.SUCCEED", "Do.SUCCEED"),
    ("what comes holds CPUs", '    if state.remote:\n        return {"jobs": 1}\n', ""),
    ("bytes of what is left stay",
     "        or not any(fallback.still_takes(states, each, one) for one in sharing if each in one.consumers)\n", ""),
    ("a plan knows inputs that are not decided", "    if state.awaits:\n        return None\n", ""),
    # Ending
    ("a failure stops nothing", 'state.node.on_fail != "continue"', "False"),
    ("on_fail: continue stops",
     ' and state.node.on_fail != "continue"', ""),
    ("--keep-going does not", " and not states.keep_going:", ":"),
    ("an interruption stops nothing", "    if states.stopped:\n        return Step(Do.STOP)\n", ""),
    # Following
    ("files are taken before they are announced", "unsettled.passing and", ""),
    ("one after the other, and followed", "        states.side_by_side\n        and producer", "        producer"),
    ("what cannot wait follows", "        and executor(kind.runs_in).waits\n", ""),
    ("a node with a `when` follows", "        and node.when is None\n", ""),
    ("a node with a timeout follows", "        and node.timeout is None\n", ""),
    ("any port is followed", "        and node.inputs.get(kind.passing.follows) == (producer.name,)\n", ""),
    ("a follower starts without what else it needs",
     "other.status in GOOD and other.bytes_here for other", "True for other"),
    ("a follower starts on dropped bytes",
     "other.status in GOOD and other.bytes_here for", "other.status in GOOD for"),
    ("a hit follows", "return Step(Do.WAIT, follows) if follows else _judged", "return _judged"),
    ("what a producer gave before is not asked",
     "if state.decision and state.status is Status.RUNNING else None", "if False else None"),
    ("files are let go though one waits for all",
     "all(\n        each.status in excused", "any(\n        each.status in excused"),
    ("who takes what a follower gives is waited for", "in (each, *alike.others(each))", "in (each,)"),
    # The same work
    ("what does the same work does it too",
     "        if (same := _same_work(states, state)) is not None:\n            return same\n", ""),
    ("what cannot pass is run", "None if states.foreseen else Step(Do.FAIL, gate=bad[0])", "None"),
    ("a plan stops at what cannot pass",
     "return None if states.foreseen else Step(Do.FAIL, gate=bad[0])", "return Step(Do.FAIL, gate=bad[0])"),
    ("files that are kept are let go",
     "if keeps(state) or state.node.timeout is not None or len", "if state.node.timeout is not None or len"),
    ("who has a timeout waits for its followers", "state.node.timeout is not None or len(", "len("),
    ("files are kept for who was skipped", "else {Status.SKIPPED}", "else set()"),
    ("all of what passes lies there",
     "min(producer.disk, _between(producer))", "producer.disk"),
]  # fmt: skip
STATES_MUTANTS = [
    ("a hit needs its bytes",
     "return self.decision.bytes_here or not self.demanded_by", "return self.decision.bytes_here"),
    ("demanded bytes are a hit without being there",
     "return self.decision.bytes_here or not self.demanded_by", "return True"),
    ("the disk that is asked for is not read", "asked = self.node.resources.disk", "asked = None"),
    ("what no judge stands on runs at once", "name not in below", "False"),
    ("what a judge stands on waits for it", "name not in below", "True"),
    ("nobody judges", "judges = True", "judges = False"),
]  # fmt: skip
FALLBACK_MUTANTS = [
    ("nothing is left", "(judge.status in GOOD or again) and not judge.left", "(judge.status in GOOD or again)"),
    ("a plan takes what is not decided for passed", "return Verdict.OPEN if undecided else", "return"),
    ("a crash of a judge is a verdict", "    if judge.status is Status.FAILED or (", "    if ("),
    ("a crash below a judge is a verdict", "and broken_above(judge))", "and False)"),
    ("a skipped judge is waited for", "if judge.left or judge.status is Status.SKIPPED else", "if judge.left else"),
    ("all variants go on", "        if found is Verdict.PASSED:\n            return Status.SKIPPED, f",
     "        if found is Verdict.PASSED:\n            return None\n            return Status.SKIPPED, f"),
    ("what is left goes on", "            return Status.SKIPPED, f\"{first.axis} {choice.value} is left",
     "            return None\n            return Status.SKIPPED, f\"{first.axis} {choice.value} is left"),
    ("a judge's gates fail the run", "return state.judges or state", "return state"),
]  # fmt: skip
MUTANTS = [
    *((name, SCHEDULE, rule, broken, RULES) for name, rule, broken in SCHEDULE_MUTANTS),
    *((name, STATES, rule, broken, RULES) for name, rule, broken in STATES_MUTANTS),
    *((name, FALLBACK, rule, broken, RULES) for name, rule, broken in FALLBACK_MUTANTS),
    (
        "a maybe demands for certain",
        REHEARSAL,
        "Action.RUN if Action.RUN in needing.values() else Action.MAYBE",
        "Action.RUN",
        FORESEEN,
    ),
    (
        "a verdict falls with the dropped bytes of its judge",
        FALLBACK,
        "(judge.status in GOOD or again)",
        "judge.status in GOOD",
        VERDICTS,
    ),
    # Whose record counts
    ("a refused record is taken", EXECUTION, "_unasked(made) == _unasked(refused)", "False", REFUSED),
    ("nobody else's record is taken", EXECUTION, "if made is None or (refused", "if True or (refused", REFUSED),
]


@pytest.mark.parametrize(("file", "rule"), [pytest.param(file, rule, id=name) for name, file, rule, *_ in MUTANTS])
def test_a_rule_stands_where_it_is_broken(file: str, rule: str) -> None:
    assert rule in (ROOT / file).read_text()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose engine may be damaged."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("orchestrator", "src", "tests"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("bigmodel", "plugins", "commandline", "cli.py", "pyproject.toml"):
        (folder / part).symlink_to(ROOT / part)
    return folder


def passes(checkout: Path, tests: str) -> bool:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("tests", [RULES, FORESEEN, REFUSED, VERDICTS])
def test_what_is_whole_passes(checkout: Path, tests: str) -> None:
    assert passes(checkout, tests)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "rule", "broken", "tests"), [pytest.param(*each, id=name) for name, *each in MUTANTS])
def test_a_broken_rule_is_seen(checkout: Path, file: str, rule: str, broken: str, tests: str) -> None:
    whole = (ROOT / file).read_text()
    (checkout / file).write_text(whole.replace(rule, broken))
    try:
        assert not passes(checkout, tests)
    finally:
        (checkout / file).write_text(whole)
