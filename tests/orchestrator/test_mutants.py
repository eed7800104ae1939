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
EXECUTION = "orchestrator/running/execution.py"
RULES, FORESEEN, REFUSED = (f"tests/orchestrator/test_{name}.py" for name in ("schedule", "rehearsal", "execution"))
SCHEDULE_MUTANTS = [
    # What there is room for
    ("RAM is not counted", '"RAM": ram', '"RAM": 0'),
    ("CPUs are not counted", '"CPUs": cpus', '"CPUs": 0'),
    ("GPUs are not counted", '"GPUs": int(gpus > 0)', '"GPUs": 0'),
    ("jobs are not counted", '"jobs": 0 if follows else 1', '"jobs": 0'),
    ("the disk is not counted", 'share["disk"] = state.writes + state.fetches', 'share["disk"] = 0'),
    ("finished nodes free the disk", "        states.hold_disk(state, state.writes)\n", "        pass\n"),
    ("a process is no CPU", "(0 if follows else state.processes)", "0"),
    ("nothing runs alone", '    if not states.running:\n        return ""\n', ""),
    ("a follower counts as a job", '"jobs": 0 if follows else 1', '"jobs": 1'),
    ("what ended still holds its share", "states.held[what] -= size", "pass"),
    # Dropped bytes
    ("bytes go after the first consumer", "taken = all(each", "taken = any(each"),
    ("kept bytes go", "return state.node.cache or not state.consumers", "return not state.consumers"),
    ("bytes go though a consumer failed",
     "all(each.status is Status.SKIPPED or", "all(each.status in (Status.SKIPPED, Status.FAILED) or"),
    ("bytes that nobody takes go", "return state.node.cache or not state.consumers", "return state.node.cache"),
    ("dropped bytes are not demanded", "if each.status in GOOD and not each.bytes_here)", "if False)"),
    ("a hit needs its bytes",
     "return self.decision.bytes_here or not self.demanded_by", "return self.decision.bytes_here"),
    ("demanded bytes are a hit without being there",
     "return self.decision.bytes_here or not self.demanded_by", "return True"),
    ("what stands on other bytes stays", "    if not _up_to_date(state):\n        return Step(Do.LOOK)\n", ""),
    ("bytes that another node keeps go",
     "if taken and not any(map(_keeps, sharing))", "if taken"),
    ("bytes go after the consumers of one of those that share them",
     "for one in sharing for", "for one in [state] for"),
    ("shared bytes are counted twice",
     "    if not any(each.disk for each in _sharing(states, state)[1:]):\n", "    if True:\n"),
    ("the disk that is asked for is not read", "asked = self.node.resources.disk", "asked = None"),
    # Gates, `when` and what is skipped
    ("a gate that cannot be decided passes", "if gate.failed or gate.verdict is None", "if gate.failed"),
    ("a gate that does not hold passes", "if gate.failed or gate.verdict is None", "if gate.verdict is None"),
    ("gates are not judged on cached nodes", "_judged(states, state, Do.CACHED)", "Step(Do.CACHED)"),
    ("a plan stops at its gates", "() if states.foreseen else judge_gates", "judge_gates"),
    ("`when` that is not known holds", 'return "" if states.foreseen else', 'return "" if True else'),
    ("`when` that is not known skips in a plan", 'return "" if states.foreseen else', 'return "" if False else'),
    ("`when` is not asked", 'if when is None:\n        return ""', 'if True:\n        return ""'),
    ("what failed upstream is overlooked", "if each.status is Status.FAILED:", "if False:"),
    ("an optional port is required", "gone and not spec.optional and", "gone and"),
    ("a `many` port needs all", "(not spec.many or len(gone) == len(wired))", "True"),
    ("`needs` of what is skipped is overlooked",
     "return next((name for name in state.node.needs if states[name].status is Status.SKIPPED), None)", "return None"),
    # Ending
    ("a failure stops nothing", 'state.node.on_fail == "stop"', 'state.node.on_fail == "?"'),
    ("on_fail: continue stops",
     ' and state.node.on_fail == "stop"', ""),
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
     "return all(each.following", "return any(each.following"),
    ("files that are kept are let go",
     "    if _keeps(state) or len(_sharing(states, state)) > 1:\n        return False\n", ""),
    ("files are kept for who was skipped", "else {Status.SKIPPED}", "else set()"),
    ("all of what passes lies there",
     "min(producer.disk, _between(producer))", "producer.disk"),
]  # fmt: skip
MUTANTS = [
    *((name, SCHEDULE, rule, broken, RULES) for name, rule, broken in SCHEDULE_MUTANTS),
    (
        "a maybe demands for certain",
        REHEARSAL,
        "Action.RUN if Action.RUN in needing.values() else Action.MAYBE",
        "Action.RUN",
        FORESEEN,
    ),
    # Whose record counts
    ("a refused record is taken", EXECUTION, "made != attempt.refused", "True", REFUSED),
    ("nobody else's record is taken", EXECUTION, "made is not None and made != attempt.refused", "False", REFUSED),
]


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
@pytest.mark.parametrize("tests", [RULES, FORESEEN, REFUSED])
def test_what_is_whole_passes(checkout: Path, tests: str) -> None:
    assert passes(checkout, tests)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "rule", "broken", "tests"), [pytest.param(*each, id=name) for name, *each in MUTANTS])
def test_a_broken_rule_is_seen(checkout: Path, file: str, rule: str, broken: str, tests: str) -> None:
    whole = (ROOT / file).read_text()
    assert rule in whole
    (checkout / file).write_text(whole.replace(rule, broken))
    try:
        assert not passes(checkout, tests)
    finally:
        (checkout / file).write_text(whole)
