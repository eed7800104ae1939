from __future__ import annotations

from pathlib import Path

import pytest

from bigpipe.bigmodel.tasks import read_prompts
from bigpipe.errors import UsageError


def texts(*arguments: object) -> list[object]:
    return [row.prompt for row in read_prompts(*arguments)]  # type: ignore[arg-type]


def test_a_list_of_texts_chats_and_objects(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert texts(["a", chat, {"prompt": "b", "topic": 3}], "prompt", tmp_path) == ["a", chat, "b"]


def test_files_by_name_and_by_glob_in_order(tmp_path: Path) -> None:
    (tmp_path / "2.jsonl").write_text('{"question": "c"}\n\n{"question": "d"}\n')
    (tmp_path / "1.jsonl").write_text('{"question": "a", "extra": 1}\n{"question": "b"}')
    (tmp_path / "plain.txt").write_text("first line\r\n\n  second\u2028line\n")
    assert texts("*.jsonl", "question", tmp_path) == ["a", "b", "c", "d"]
    assert texts("2.jsonl", "question", tmp_path) == ["c", "d"]
    assert texts("plain.txt", "prompt", tmp_path) == ["first line", "  second\u2028line"]


def test_rows_know_their_input(tmp_path: Path) -> None:
    one, two, again = read_prompts([{"prompt": "a", "n": 1}, "a", {"n": 1, "prompt": "a"}], "prompt", tmp_path)
    assert [one.index, two.index, again.index] == [0, 1, 2]
    assert one.digest == again.digest != two.digest


@pytest.mark.parametrize(
    ("content", "column", "cause"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "prompt", r"p\.jsonl:2: not JSON"),
        ('{"text": "a"}', "prompt", r"p\.jsonl:1: there is no 'prompt', only 'text'"),
        ('["a"]', "prompt", r"p\.jsonl:1: a prompt is an object with 'prompt'"),
        ('{"prompt": 5}', "prompt", r"p\.jsonl:1: 'prompt' is neither a text nor a list"),
        ("\n\n", "prompt", "there is no prompt"),
    ],
)
def test_says_which_line_is_wrong(tmp_path: Path, content: str, column: str, cause: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UsageError, match=cause):
        read_prompts("p.jsonl", column, tmp_path)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file nowhere\.jsonl"):
        read_prompts("nowhere.jsonl", "prompt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"latin\.txt cannot be read"):
        read_prompts("latin.txt", "prompt", tmp_path)
