"""Answers that took a process to find are asked for once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigpipe.bigmodel import memo
from bigpipe.bigmodel.memo import answered, recall, remember


@pytest.fixture(autouse=True)
def _what_was_said() -> Iterator[None]:
    """What other tests were told is kept for those that follow."""
    before = dict(memo._said)
    yield
    memo._said.clear()
    memo._said.update(before)


class Asked:
    """Answers, and counts how often it had to."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.times = answer, 0

    def __call__(self) -> Any:
        self.times += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_process_asks_once_and_whoever_changes_the_answer_changes_a_copy() -> None:
    ask = Asked({"names": ["a"]})
    answered(None, "once", ask)["names"].append("b")
    assert (answered(None, "once", ask), ask.times) == ({"names": ["a"]}, 1)


def test_a_file_is_believed_before_the_process_and_is_written_where_it_is_missing_or_damaged(tmp_path: Path) -> None:
    file, ask = tmp_path / "answer.json", Asked({"said": 1})
    assert answered(file, "file", ask) == recall(file) == {"said": 1}
    remember(file, {"said": 2})
    assert answered(file, "file", ask) == {"said": 2}
    file.write_text("{")
    assert answered(file, "file", ask) == recall(file) == {"said": 1}
    assert ask.times == 1


def test_an_error_is_no_answer() -> None:
    with pytest.raises(ValueError, match="no"):
        answered(None, "wrong", Asked(ValueError("no")))
    assert answered(None, "wrong", Asked({"said": 1})) == {"said": 1}


def test_the_oldest_answers_make_room_for_new_ones() -> None:
    first, long = Asked({"said": "first"}), Asked({"said": "x" * (memo.LARGEST // 2)})
    answered(None, "first", first)
    for name in ("second", "third"):
        answered(None, name, long)
    assert sum(map(len, memo._said.values())) <= memo.LARGEST
    answered(None, "third", long)
    assert long.times == 2
    answered(None, "first", first)
    assert first.times == 2


def test_an_answer_too_long_to_be_kept_is_given_all_the_same() -> None:
    answer = {"said": "x" * memo.LARGEST}
    assert answered(None, "longest", Asked(answer)) == answer
    assert json.dumps(answer) not in memo._said.values()
