from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings, strategies as st

from bigpipe.bigmodel.inference import Record, read_log
from bigpipe.bigmodel.inference.records import append, open_log

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
