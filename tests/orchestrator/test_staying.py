"""Files that a key was made of and that are edited while somebody works: when that counts, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from bigpipe.errors import StageFailed, Transient
from bigpipe.orchestrator.contract import RankHello
from bigpipe.orchestrator.planning import open_session
from bigpipe.orchestrator.running import staying

RECIPE = """\
version: 1
name: staying
stages:
  model: {uses: download, with: {repo: org/model}}
  reads: {uses: write, with: {source: data}}
  walks: {uses: command, with: {argv: ['true'], files: [folder], produces: report}}
  looks:
    uses: distributed-infer
    inputs: model
    with: {task: image-text-to-text, prompts: rows.jsonl, generation: {image: seen}}
  sees: {uses: distributed-infer, inputs: model, with: {task: image-classification, prompts: folder/*}}
"""
HELLO = RankHello("reads", 0, 1, 1)


class AtOnce:
    """A timer whose time comes as soon as it is started, or never."""

    daemon, comes = False, True

    def __init__(self, seconds, function, arguments=()) -> None:
        self._call = lambda: function(*arguments)

    def start(self) -> None:
        if self.comes:
            self._call()

    def cancel(self) -> None:
        pass

    def is_alive(self) -> bool:
        return False


@pytest.fixture
def base(workshop, monkeypatch) -> Path:
    monkeypatch.setattr(staying.threading, "Timer", AtOnce)
    workshop.manifest.write_text(RECIPE)
    for name in ("data", "folder/data", "one.png", "two.png"):
        (workshop.folder / name).parent.mkdir(exist_ok=True)
        (workshop.folder / name).write_text("as it was")
    (workshop.folder / "rows.jsonl").write_text('{"prompt": "a", "seen": "one.png"}\n')
    return workshop.folder


def work(base: Path, node: str, steps: Sequence[str | BaseException], drop: Callable[[], None]) -> None:
    """What happens one after another while a node works: a worker comes up (hello: and has read what there was), files
    are edited, it fails."""
    session = open_session(base / "recipe.yaml", params={}, store=base / "store")
    with staying.files_stay(session, session.recipe.nodes[node], drop) as hear:
        for step in steps:
            if isinstance(step, BaseException):
                raise step
            if step in ("hello", "began"):
                AtOnce.comes = step == "hello"
                hear(HELLO)
            else:
                (base / step).write_text('{"prompt": "a", "seen": "two.png"}\n' if step == "rows.jsonl" else "edited")


FAILS = StageFailed("a fault")


@pytest.mark.parametrize(
    ("node", "steps", "lost"),
    [
        ("reads", ["hello"], False),
        ("reads", ["data", "hello"], True),
        ("reads", ["data"], True),  # nobody has said that it came up
        ("reads", ["began", "data"], True),
        ("reads", ["hello", "data", "began"], True),
        ("reads", ["hello", "data"], False),  # it has read what was there
        ("reads", ["hello", "data", "hello"], True),  # a rank was replaced, and reads it again
        ("reads", ["data", "hello", FAILS], True),
        ("reads", ["data", FAILS], True),
        ("reads", ["data", KeyboardInterrupt()], True),
        ("reads", ["hello", "data", FAILS], False),
        ("reads", ["hello", FAILS], False),
        ("walks", ["hello", "folder/data"], True),
        ("walks", ["hello", "folder/data", FAILS], True),
        ("looks", ["hello", "one.png"], True),
        ("looks", ["hello", "one.png", FAILS], True),
        ("sees", ["hello", "folder/data"], True),
        ("looks", ["hello", "rows.jsonl"], False),
        ("looks", ["hello", "rows.jsonl", "hello"], True),
        ("looks", ["hello", "two.png"], False),  # no row leads there
    ],
)
def test_what_was_made_of_an_edited_file_is_let_go(base, node, steps, lost):
    dropped: list[bool] = []
    with suppress(Transient, StageFailed, KeyboardInterrupt):
        work(base, node, steps, lambda: dropped.append(True))
    assert bool(dropped) is lost


@pytest.mark.parametrize(
    ("node", "steps", "error", "told"),
    [
        ("reads", ["data"], Transient, r"reads: params\.source .* since the run looked at it"),
        ("looks", ["hello", "one.png"], Transient, r"looks: files\.one\.png .* since the run looked at it"),
        ("reads", ["data", FAILS], StageFailed, "a fault"),
    ],
)
def test_which_file_it_was_is_told_unless_there_is_more_to_say(base, node, steps, error, told):
    with pytest.raises(error, match=told):
        work(base, node, steps, list)


def test_workers_say_when_they_begin(base, workshop):
    """What is edited later is not what they read: here a moment later, and the time for reading is none."""
    workshop.manifest.write_text("version: 1\nname: one\nstages:\n  a: {uses: write, with: {source: data}}\n")

    def edit(event) -> None:
        if isinstance(event, RankHello):
            (base / "data").write_text("edited")

    AtOnce.comes = True
    assert workshop.run(progress=edit).nodes["a"].status == "succeeded"
    assert (base / "data").read_text() == "edited"
