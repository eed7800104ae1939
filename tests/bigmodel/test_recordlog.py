from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bigpipe.bigmodel.inference import Record, plain_result, read_log
from bigpipe.bigmodel.inference.lines import from_line, to_line
from bigpipe.bigmodel.inference.records import _line_at, append, encoded, open_log
from bigpipe.bigmodel.tasks import Row
from bigpipe.redaction import conceal

RECORDS = [Record(index, f"{index:016x}", {"text": f"é{index}\n"}, index, 0.25) for index in range(6)]


def write(path: Path, records: list[Record]) -> None:
    with open_log(path) as log:
        append(log, records)


def test_gives_back_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "rank-0" / "records.jsonl"
    assert list(read_log(path)) == []
    write(path, RECORDS[:4])
    write(path, RECORDS[4:])
    assert list(read_log(path)) == RECORDS


@pytest.mark.parametrize("length", [0, 1, 1023, 1024, 1025, 2047, 2048, 5000, 70_000])
def test_a_line_is_read_from_where_it_begins_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    lines = [b"x" * 10 + b"\n", b"y" * length + b"\n", b"z" * length]
    (tmp_path / "log").write_bytes(b"".join(lines))
    whole = os.pread
    with (tmp_path / "log").open("rb") as file:
        for read in (whole, lambda *asked: whole(asked[0], max(1, asked[1] // 3), asked[2])):  # as far as it gets
            monkeypatch.setattr(os, "pread", read)
            assert [_line_at(file.fileno(), at) for at in (0, 11, 12 + length)] == lines


def test_a_secret_is_masked_in_the_record_that_holds_it_alone(tmp_path: Path) -> None:
    token, short = "t0kenless", "EMPTY"
    conceal([token, short])
    payloads = [
        {"text": "plain"}, {"text": f"with {token}"}, {"text": 'a "quote"\n', token: [token]}, {"text": "a\\b"},
        {"text": f"{token}ness is {short}"},
    ]  # fmt: skip
    told: list[int] = []
    lines = encoded([Record(number, "0", payload) for number, payload in enumerate(payloads)], told.append)
    (tmp_path / "records.jsonl").write_bytes(lines)
    assert [record.payload for record in read_log(tmp_path / "records.jsonl")] == [
        payloads[0], {"text": "with ***"}, {"text": 'a "quote"\n', "***": ["***"]}, payloads[3], payloads[4],
    ]  # fmt: skip
    assert told == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        'engine = create_engine("postgresql://postgres:postgres@localhost:5432/app")',
        'headers = {"Authorization": "Bearer YOUR_API_KEY"}',
        "git clone https://oauth2@github.com/x/y",
        "GET https://api.example.com/items?token=abc&page=2\n",
        "token = hf_" + "a1B2" * 9,
    ],
)
def test_what_has_but_the_form_of_a_secret_is_data_and_stays(tmp_path: Path, text: str) -> None:
    write(tmp_path / "records.jsonl", [Record(0, "0", {"text": text})])
    (record,) = read_log(tmp_path / "records.jsonl")
    assert plain_result(Row(0, text, {"prompt": text}), record) == {"index": 0, "prompt": text, "text": text}


@pytest.mark.parametrize(
    ("payload", "failed"),
    [({"error": None}, False), ({"error": 0.0}, False), ({"error": ""}, False), ({"error": "why"}, True), ({}, False)],
)
def test_a_record_failed_where_its_error_says_why(payload: dict[str, Any], failed: bool) -> None:
    assert Record(0, "0", payload).failed == failed


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=VALUES)
def test_a_line_gives_back_the_value_to_its_last_bit(value: Any) -> None:
    line = to_line(value)
    assert b"\n" not in line
    found = from_line(line)
    assert found == value
    assert repr(found) == repr(value)
    assert json.loads(line) == value


def test_what_is_too_deep_for_one_encoder_goes_through_the_other() -> None:
    value: Any = "é"
    for _ in range(600):
        value = [value]
    assert from_line(to_line(value)) == value


def test_every_way_of_tearing_the_tail(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, RECORDS[:3])
    whole = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = RECORDS[: sum(end - 1 <= length for end in ends)]  # the checksum tells, not the line's end
        assert list(read_log(path)) == kept
        write(path, RECORDS[3:])
        assert list(read_log(path)) == [*kept, *RECORDS[3:]]
        path.unlink()


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_record(tmp_path_factory: Any, position: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("log") / "records.jsonl"
    write(path, RECORDS)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    found = list(read_log(path))
    assert len(found) >= len(RECORDS) - 2
    assert all(record in RECORDS for record in found)
