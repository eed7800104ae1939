"""Chat templates made to hurt, rendered as a rank does it: none opens, starts or shows anything, none lasts."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from support.launching import Launched, make_job

from attack.templates import BOMBS, ESCAPES, STAGE
from bigpipe.errors import InvalidCheckpoint
from bigpipe.trust import Limits, Trust

QUICKSTART = Path(__file__).parents[2] / "models/quickstart"
SECRET = "canary-6b1f"
LIMITS = Limits(seconds=6, memory=400 * 2**20)


def rendered(folder: Path, *templates: str, limits: Limits = LIMITS):
    """What the stage says of these, in a worker of its own."""
    model = shutil.copytree(QUICKSTART, folder / "model", dirs_exist_ok=True)
    job = make_job(
        folder, stage=STAGE, module="attack.templates:STAGE", params={"templates": templates},
        inputs={"model": (model,)}, trust=Trust(limits=limits),
    )  # fmt: skip
    return Launched(job).run(timeout=300, environment={"CANARY": SECRET})


def test_there_are_many():
    assert len(ESCAPES) + len(BOMBS) >= 60


def test_no_template_leaves_the_sandbox(tmp_path):
    usual = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    told = rendered(tmp_path, usual, *ESCAPES, limits=Limits()).metrics
    assert (told["ended"][0], told["shown"][0]) == ("tokens", "<|user|>hi")
    assert len(told["ended"]) == 1 + len(ESCAPES)
    assert not list(tmp_path.rglob("canary"))
    shown = "\n".join(told["shown"])
    for word in (SECRET, "root:x:", "<class 'os", "<module", "subprocess"):
        assert word not in shown


def check_bomb(folder: Path, template: str) -> None:
    started, error = time.monotonic(), None
    try:
        ended = rendered(folder, template).metrics["ended"]
    except InvalidCheckpoint as stopped:
        error = stopped
    if error is None:
        assert ended != ["tokens"]
    else:
        assert "the chat template, of the model takes more than" in error.cause
        assert "trust: {limits: {" in error.cure
    assert time.monotonic() - started < LIMITS.seconds + 60  # starting Python and its libraries included


def test_a_template_that_would_not_end_is_stopped(tmp_path):
    check_bomb(tmp_path, BOMBS[0])


@pytest.mark.attack
@pytest.mark.parametrize("template", BOMBS)
def test_every_template_that_would_not_end_is_stopped(tmp_path, template):
    check_bomb(tmp_path, template)


@pytest.mark.attack
def test_a_limit_that_is_raised_lets_it_pass(tmp_path):
    text = "{% for one in range(9000) %}{% for other in range(900) %}{% endfor %}{% endfor %}a"
    with pytest.raises(InvalidCheckpoint, match=r"takes more than 0\.001 s"):
        rendered(tmp_path, text, limits=Limits(seconds=0.001))
    assert rendered(tmp_path, text).metrics["ended"] == ["tokens"]
