from __future__ import annotations

import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path

import pytest
from support.models import POINTER

from bigpipe.bigmodel.inference.working import answer_batch
from bigpipe.bigmodel.tasks import Answer, Row, read_prompts
from bigpipe.bigmodel.tasks.promptfiles import READERS
from bigpipe.errors import UsageError

BOM = b"\xef\xbb\xbf"


def texts(*arguments: object) -> list[object]:
    return [row.prompt for row in read_prompts(*arguments)]  # type: ignore[arg-type]


def test_a_list_of_texts_chats_and_objects(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    assert texts(["a", chat, {"prompt": "b", "topic": 3}], "prompt", tmp_path) == ["a", chat, "b"]


@pytest.mark.parametrize("odd", [{5: 1}, {"a": {5: 1}}, {"a": [{"b": 1}, {None: 1}]}], ids=str)
def test_a_key_that_is_no_text_would_become_one(odd: dict[object, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts\[1\]: (5|None) is a key, and no text"):
        read_prompts(["a", {"prompt": "b", **odd}], "prompt", tmp_path)  # type: ignore[dict-item]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": {"5": 1}}')
    assert read_prompts("a.jsonl", "prompt", tmp_path)[0].data["x"] == {"5": 1}


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


TWO = {
    "a.jsonl": b'{"prompt": "one, \xc3\xa9", "n": 1}\n{"prompt": "two\\nlines", "n": 2}\n',
    "a.ndjson": b'{"prompt": "one, \xc3\xa9", "n": 1}\r\n\r\n{"prompt": "two\\nlines", "n": 2}',
    "lines.json": b'{"prompt": "one, \xc3\xa9", "n": 1}\n{"prompt": "two\\nlines", "n": 2}\n',
    "list.json": b'[{"prompt": "one, \xc3\xa9", "n": 1},\n {"prompt": "two\\nlines", "n": 2}]',
    "texts.json": b'["one, \xc3\xa9", "two\\nlines"]',
    "a.csv": b'n,prompt\r\n1,"one, \xc3\xa9"\r\n2,"two\nlines"\r\n',
    "unnamed.csv": b'n,prompt,,\r\n1,"one, \xc3\xa9",,\r\n2,"two\nlines",,\r\n',
    "a.tsv": b'n\tprompt\n1\tone, \xc3\xa9\n2\t"two\nlines"\n',
}


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("name", TWO)
def test_each_ending_in_any_case_with_and_without_a_mark(tmp_path: Path, name: str, mark: bytes) -> None:
    for written in (name, name.upper()):
        (tmp_path / written).write_bytes(mark + TWO[name])
        assert texts(written, "prompt", tmp_path) == ["one, é", "two\nlines"]


def test_a_mark_is_no_part_of_a_line_of_text(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_bytes(BOM + b"one\r\ntwo\rthree\n")
    assert texts("A.TXT", "prompt", tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_chat_is_a_row_with_or_without_an_object_around_it(tmp_path: Path, name: str) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / name).write_text(json.dumps([chat] if name == "a.json" else chat) + "\n")
    assert read_prompts(name, "prompt", tmp_path)[0].data == read_prompts([chat], "prompt", tmp_path)[0].data


def test_one_object_over_many_lines(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"prompt": "alone", "n": [1, 2]}, indent=2))
    assert texts("one.json", "prompt", tmp_path) == ["alone"]


@pytest.mark.parametrize(
    ("name", "head", "cell"),
    [("p.tsv", "text, in words", "one, two, three"), ("p.csv", "text; German", "ja"), ("p.csv", '"a;b"', '"c;d"')],
)
def test_another_sign_in_the_name_of_a_single_column_is_a_part_of_it(
    tmp_path: Path, name: str, head: str, cell: str
) -> None:
    (tmp_path / name).write_text(f"{head}\n{cell}\n")
    (row,) = read_prompts(name, head.strip('"'), tmp_path)
    assert row.prompt == cell.strip('"')


def test_a_cell_longer_than_csv_allows_by_itself(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "long.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    assert texts("long.csv", "prompt", tmp_path) == ["x" * 200_000]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(("limit", "taken"), [(1, 1), (2, 2), (3, 2), (2**63, 2), (10**30, 2)])
def test_as_many_rows_as_the_limit_says_or_there_are(tmp_path: Path, limit: int, taken: int) -> None:
    assert len(read_prompts(["one", "two"], "prompt", tmp_path, limit=limit)) == taken


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["one", "two"], "n": [1, None]})
    parquet.write_table(table, tmp_path / "a.Parquet")
    rows = read_prompts("a.Parquet", "prompt", tmp_path)
    assert [row.data for row in rows] == [{"prompt": "one", "n": 1}, {"prompt": "two", "n": None}]


def test_parquet_whose_other_columns_are_no_json(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    moment, price = datetime.datetime(2024, 1, 1), Decimal("1.50")
    cells = {
        "raw": b"\x00",
        "at": moment,
        "day": moment.date(),
        "price": price,
        "image": {"bytes": b"\x00", "path": None},
    }
    table = pyarrow.Table.from_pylist([{"prompt": "one", **cells, "more": [{"day": moment.date()}]}])
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = read_prompts("a.parquet", "prompt", tmp_path)
    assert row.data == {
        "prompt": "one", "at": "2024-01-01T00:00:00", "day": "2024-01-01", "price": "1.50", "image": {"path": None},
        "more": [{"day": "2024-01-01"}],
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"a\.parquet\[0\]: 'raw' is neither a text nor a list of messages"):
        read_prompts("a.parquet", "raw", tmp_path)


def test_what_other_messages_of_a_parquet_column_have_a_message_does_not(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    called = {
        "role": "assistant",
        "content": [{"type": "text", "text": "x"}, {"type": "image", "path": "a"}],
        "call": "f",
    }
    chats = [[{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [called]]
    parquet.write_table(pyarrow.table({"prompt": chats}), tmp_path / "a.parquet")
    assert [row.prompt for row in read_prompts("a.parquet", "prompt", tmp_path)] == chats


def test_what_is_no_parquet_is_refused_with_or_without_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UsageError, match=r"a\.parquet (needs pyarrow|cannot be read)"):
        read_prompts("a.parquet", "prompt", tmp_path)


@pytest.mark.parametrize(
    ("name", "cure"), [("a b.m4a", "ffmpeg -i 'a b.m4a' 'a b.wav'"), ("a.HEIC", "convert it to a.png")]
)
def test_a_sound_or_picture_that_is_not_read_is_to_be_converted(tmp_path: Path, name: str, cure: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError) as raised:
        read_prompts(name, "prompt", tmp_path)
    assert cure in raised.value.cure


@pytest.mark.parametrize("name", ["prompts", "a.jsonlines", "a.md", "a.jsonl.gz", "a.xlsx", "a.yaml", ".jsonl"])
def test_an_ending_that_says_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(UsageError, match="no file of prompts does") as raised:
        read_prompts(name, "prompt", tmp_path)
    assert name in raised.value.cause
    assert all(ending in raised.value.cure for ending in READERS)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", '{"text": "a"}', r"p\.jsonl:1: there is no 'prompt', only 'text'"),
        ("p.jsonl", '["a"]', r"p\.jsonl:1: 'prompt' is neither a text nor a list of messages"),
        ("p.jsonl", "5", r"p\.jsonl:1: a prompt is an object with 'prompt', a text, or a chat"),
        ("p.jsonl", '{"prompt": 5}', r"p\.jsonl:1: 'prompt' is neither a text nor a list"),
        ("p.jsonl", '{"prompt": 5}', "put it in quotes"),
        ("p.jsonl", '{"prompt": null}', "write a text, or leave the row out"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}', r"p\.jsonl:2: not JSON: 'prompt' stands twice"),
        ("p.jsonl", '{"prompt": "a", "x": [{"y": 1, "y": 1}]}', r"p\.jsonl:1: not JSON: 'y' stands twice"),
        ("p.json", '[{"prompt": "b", "prompt": "c"}]', r"p\.json: not JSON: 'prompt' stands twice"),
        ("p.jsonl", '{"prompt": []}', r"p\.jsonl:1: 'prompt' is neither a text nor a list of messages"),
        ("p.jsonl", '{"prompt": ["a"]}', r"p\.jsonl:1: 'prompt' is neither a text nor a list of messages"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}', r"p\.jsonl:1: 'prompt' is neither a text nor a list"),
        ("p.jsonl", "\n\n", "there is no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b \\ud83d c"}', r"p\.jsonl:2: 'prompt' holds half .* '\\ud83d'"),
        ("p.jsonl", '{"prompt": "a", "x": {"\\udc00": 1}}', r"p\.jsonl:1: 'x' holds half"),
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: not JSON"),
        ("p.json", '[{"prompt": "a"}, 5]', r"p\.json\[1\]: a prompt is an object"),
        ("p.json", '[{"prompt": "a"}', r"p\.json: not JSON"),
        ("p.json", '{"prompt": "a"}\n{"prompt"', r"p\.json:2: not JSON"),
        ("p.csv", "id;prompt\n1;a, b\n", r"p\.csv:1: its columns seem to be separated by ';'"),
        ("p.csv", '"id";"prompt"\n"1";"a"\n', r"p\.csv:1: its columns seem to be separated by ';'"),
        ("p.csv", "id\tprompt\n1\ta\n", r"p\.csv:1: its columns seem to be separated by '\\t'"),
        ("p.csv", ",id,prompt,\n1,2,a,b\n", r"p\.csv:2: '1' stands in one of several columns without a name"),
        ("p.csv", "id,prompt\n1,a, b\n", r"p\.csv:2: 3 cells under 2 names"),
        ("p.csv", "prompt,prompt\na,b\n", r"p\.csv:1: two columns are named 'prompt'"),
        ("p.csv", 'prompt\n"a" b\n', r"p\.csv:2: no row of a table"),
        ("p.csv", 'prompt\n"a\n', r"p\.csv:2: no row of a table"),
        ("p.csv", "prompt\n", "there is no prompt"),
        ("p.csv", "", "there is no prompt"),
        ("p.tsv", "id,prompt\n1,a\n", r"p\.tsv:1: its columns seem to be separated by ','"),
        *(
            (f"p.{ending}", POINTER, r"prompts: .*p\.\w+: is a pointer of git-lfs")
            for ending in ("txt", "jsonl", "png")
        ),
        ("p.txt", "/annex/objects/SHA256E-s3--aa.txt\n", "is a pointer of git-annex"),
    ],
)
def test_says_which_line_is_wrong(tmp_path: Path, name: str, content: str, cause: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=cause):
        read_prompts(name, "prompt", tmp_path)


def test_half_a_pair_in_a_list_of_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts\[1\]: 'prompt' holds half"):
        read_prompts(["a", "b\ud83d"], "prompt", tmp_path)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "json"])
@pytest.mark.parametrize(("content", "place"), [(b"ab\ncaf\xe9\n", "2:4"), ("caf\u00e9".encode("utf-16"), "1:1")])
def test_missing_and_unreadable_files(tmp_path: Path, ending: str, content: bytes, place: str) -> None:
    with pytest.raises(UsageError, match=r"there is no file nowhere\.jsonl"):
        read_prompts("nowhere.jsonl", "prompt", tmp_path)
    name = f"latin.{ending}"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=rf"latin\.{ending}:({place}: this is no UTF-8|1: not JSON)"):
        read_prompts(name, "prompt", tmp_path)


def test_a_directory_stands_for_the_files_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "all [of] them"
    (folder / "deeper").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deeper/c.txt", ".hidden.txt"):
        (folder / name).write_text(name)
    assert [row.prompt for row in read_prompts(folder.name, "prompt", tmp_path)] == ["a.txt", "b.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there is no file in empty"):
        read_prompts("empty", "prompt", tmp_path)


@pytest.mark.parametrize("given", ["prompts/*.jsonl", "prompts", "prompts/a.jsonl", "**/a.jsonl"])
def test_globs_and_directories_start_at_a_recipe_whose_own_path_looks_like_a_pattern(
    tmp_path: Path, given: str
) -> None:
    for name, text in (("exp[1]", "mine"), ("exp1", "somebody else's")):
        (tmp_path / name / "prompts").mkdir(parents=True)
        (tmp_path / name / "prompts" / "a.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    assert [row.prompt for row in read_prompts(given, "prompt", tmp_path / "exp[1]")] == ["mine"]
    alone = tmp_path / "wh?t" / "*"
    (alone / "prompts").mkdir(parents=True)
    (alone / "prompts" / "a.jsonl").write_text('{"prompt": "starred"}\n')
    assert [row.prompt for row in read_prompts(given, "prompt", alone)] == ["starred"]


@pytest.mark.parametrize("payload", [{"text": "half \ud83d"}, {"text": float("nan")}, {"text": b"bytes"}])
def test_an_answer_that_cannot_be_written_fails_its_row_alone(payload: dict[str, object]) -> None:
    def answer(rows: object) -> list[Answer]:
        return [Answer(payload if row.index == 1 else {"text": "good"}) for row in rows]  # type: ignore[attr-defined]

    rows = [Row(index, "p", {"prompt": "p"}) for index in range(3)]
    said = answer_batch(answer, rows, lambda text: None)  # type: ignore[arg-type]
    assert [list(each.payload) for each in said] == [["text"], ["error"], ["text"]]
    json.dumps(said[1].payload, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("payload", "cause"),
    [
        ({"features": [0.5, float("nan")]}, "features[1] is nan"),
        ({"text": "a", "scores": [{"logprob": -1.0}, {"logprob": float("-inf")}]}, "scores[1].logprob is -inf"),
    ],
)
def test_a_number_that_is_none_is_named_with_what_to_do(payload: dict[str, object], cause: str) -> None:
    rows = [Row(index, "p", {"prompt": "p"}) for index in range(2)]
    said = answer_batch(lambda given: [Answer(payload if row.index else {}) for row in given], rows, str)
    cure = "where the model overflows, as it may in float16, set dtype: float32"
    assert [each.payload for each in said] == [
        {}, {"error": f"ValueError: {cause}, which no result can hold: {cure}"}
    ]  # fmt: skip


def test_a_template_makes_prompts_of_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"a, b",3\nc,4\n')
    rows = read_prompts("a.csv", "prompt", tmp_path, "Say {{it}} {n} times: {text}")
    assert [row.prompt for row in rows] == ["Say {it} 3 times: a, b", "Say {it} 4 times: c"]
    assert rows[0].data == {"text": "a, b", "n": "3"}
    rows = read_prompts(["x", {"prompt": 1.5}], "prompt", tmp_path, "<{prompt}>")
    assert [row.prompt for row in rows] == ["<x>", "<1.5>"]


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("no field", "names no field"),
        ("{}", "more than the name of a field"),
        ("{text!r}", "more than the name"),
        ("{text:>10}", "more than the name"),
        ("{text", "expected '}'"),
        ("text}", "Single '}'"),
    ],
)
def test_a_template_that_is_none(tmp_path: Path, template: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        read_prompts([{"text": "a"}], "prompt", tmp_path, template)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"other": 1}', "there is no 'text', only 'other'"),
        ('{"text": ["a"]}', "'text' is neither a text nor a number"),
        ('{"text": null}', "'text' is neither a text nor a number"),
        ("3", "a template needs an object with fields"),
        ('{"text": "a", "more": "\\ud83d"}', "'more' holds half of a surrogate pair"),
    ],
)
def test_a_row_that_a_template_cannot_use_is_placed(tmp_path: Path, line: str, cause: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 730 + line + "\n")
    with pytest.raises(UsageError, match=cause) as error:
        read_prompts("a.jsonl", "prompt", tmp_path, "Classify: {text}")
    assert f"{tmp_path}/a.jsonl:731: " in error.value.cause


def test_a_template_reaches_no_attribute(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no 'text.__class__', only 'text'"):
        read_prompts([{"text": "a"}], "prompt", tmp_path, "{text.__class__}")
