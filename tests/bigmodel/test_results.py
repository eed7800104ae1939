"""Results as Parquet and in several files, files beside them, and the memory that many rows take."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigpipe.bigmodel.inference import Bound, Output, compute_share, merge_results, merging, plan_work, read_log
from bigpipe.bigmodel.inference.columns import Columns
from bigpipe.bigmodel.inference.sharing import WINDOW, Batching, chunked, chunks_of
from bigpipe.bigmodel.tasks import Answer, ResultFile, Row, read_prompts
from bigpipe.errors import StageFailed
from bigpipe.orchestrator.report.firstrows import first_results

PAYLOADS: list[dict[str, Any]] = [
    {"text": "eins", "score": 1, "labels": []},
    {"text": "zwei", "score": 0.5, "labels": [{"label": "A", "score": 1}]},
    {"error": "ValueError: it is empty"},
    {"text": None, "score": 2, "labels": [{"label": "B", "score": 0.25, "more": {"deep": [True, None]}}]},
    {"text": "fünf", "score": -(2**53), "labels": None, "vectors": [[0.5, 1.5], []]},
]
ROWS = [Row(number, f"prompt {number}", {"prompt": f"prompt {number}"}) for number in range(len(PAYLOADS))]


LINES = Output()


def merged(
    folder: Path, payloads: Sequence[dict[str, Any]], ranks: int = 1, output: Output = LINES, **options: Any
) -> dict[str, bytes]:
    """Compute rows with these payloads on so many ranks; return the files of results."""
    rows = [Row(number, f"prompt {number}", {"prompt": f"prompt {number}"}) for number in range(len(payloads))]
    folder.mkdir(exist_ok=True)
    plan_work(folder, rows, lambda row: 1 + row.index % 3, ranks=ranks, batch_size=2, **options)

    def answer(batch: Sequence[Row]) -> list[Answer]:
        return [Answer(payloads[row.index], 2, 1) for row in batch]

    for rank in range(ranks):
        compute_share(folder, rank, ranks, lambda: Bound(answer), max_errors=len(rows))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    summary, files = merge_results(folder, out, max_errors=len(rows), output=output)
    right = len(rows) - sum(isinstance(payload.get("deep"), dict) for payload in payloads)
    assert (summary["prompts"], summary["tokens"], summary["prompt_tokens"]) == (len(rows), 2 * right, right)
    written = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files == {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in written.items()}
    return written


def table(*files: bytes) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return [row for file in files for row in parquet.read_table(io.BytesIO(file)).to_pylist()]


def schema(file: bytes) -> Any:
    from pyarrow import parquet

    return parquet.read_schema(io.BytesIO(file))


def test_rows_of_several_shapes_come_back_from_parquet(tmp_path: Path) -> None:
    (data,) = merged(tmp_path, PAYLOADS, output=Output("parquet")).values()
    found = table(data)
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4]
    assert [row["prompt"] for row in found] == [row.prompt for row in ROWS]
    for row, payload in zip(found, PAYLOADS, strict=True):
        assert {name: row[name] for name in payload if name != "labels"} == {
            name: value for name, value in payload.items() if name != "labels"
        }
        assert all(value is None for name, value in row.items() if name not in {"index", "prompt", *payload})
    assert found[3]["labels"] == [{"label": "B", "score": 0.25, "more": {"deep": [True, None]}}]
    assert found[1]["labels"] == [{"label": "A", "score": 1.0, "more": None}]
    assert (found[0]["labels"], found[4]["labels"]) == ([], None)


@pytest.mark.parametrize("output_format", ["jsonl", "parquet"])
def test_the_files_are_the_same_whoever_computed_what(tmp_path: Path, output_format: Any) -> None:
    output = Output(output_format, 2)
    found = [
        merged(tmp_path / f"{ranks}-{split}", PAYLOADS, ranks, output, split=split)
        for ranks in (1, 2, 4)
        for split in ("queue", "static")
    ]
    assert all(files == found[0] for files in found)
    assert sorted(found[0]) == [f"results-0000{number}-of-00003.{output_format}" for number in (1, 2, 3)]
    parts = [found[0][name] for name in sorted(found[0])]
    whole = merged(tmp_path / "whole", PAYLOADS, output=Output(output_format))
    if output_format == "jsonl":
        assert b"".join(parts) == whole["results.jsonl"]
    else:
        assert [len(table(part)) for part in parts] == [2, 2, 1]
        assert table(*parts) == table(whole["results.parquet"])


@pytest.mark.parametrize(
    ("payloads", "cause"),
    [
        ([{"a": 1}, {"a": None}, {"a": "x"}], r"prompt 2: .* 'a' is a text, and a whole number in a row before"),
        ([{"a": True}, {"a": 1}], r"prompt 1: .* 'a' is a whole number, and a truth value"),
        ([{"a": [1]}, {"a": {"b": 1}}], r"prompt 1: .* 'a' is an object, and a list"),
        ([{"a": [{"b": 1}]}, {"a": [{"b": ["x"]}]}], r"prompt 1: .* 'a\[\]\.b' is a list"),
        ([{"a": 0.5}, {"a": 2**53 + 1}], r"prompt 1: .* 'a' is a whole number"),
        ([{"a": 1}, {"a": 2**63}], r"prompt 1: .* 'a' is 9223372036854775808, more than 64 bits hold"),
        ([{"a": {}}], r"prompt 0: .* 'a' is an object without fields"),
        ([{"a": [1, "x"]}], r"prompt 0: .* 'a\[\]' is a text, and a whole number"),
    ],
)
def test_what_no_column_holds_is_refused_with_its_row(
    tmp_path: Path, payloads: list[dict[str, Any]], cause: str
) -> None:
    with pytest.raises(StageFailed, match=cause) as refused:
        merged(tmp_path, payloads, output=Output("parquet"))
    assert "jsonl" in str(refused.value.cure)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("rows_per_file", [None, 2])
def test_columns_that_only_a_late_row_needs_are_there_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_file: int | None
) -> None:
    output = Output("parquet", rows_per_file)
    files = {"picture": ResultFile(b"0", ".png")}
    payloads = [{"a": 1}, {"a": None} | files, {"a": 2, "b": None}, {"a": 0.5, "c": [{"d": 1}]}, {"c": [{"d": 0.5}]}]
    whole = merged(tmp_path / "whole", payloads, output=output)
    monkeypatch.setattr(merging, "GROUP_ROWS", 1)
    by_one = merged(tmp_path / "by one", payloads, output=output)
    assert sorted(whole) == sorted(by_one)
    assert "files/000001.png" in by_one
    names = [name for name in sorted(whole) if name.endswith(".parquet")]
    assert [schema(whole[name]) for name in names] == [schema(by_one[name]) for name in names]
    found = table(*(by_one[name] for name in names))
    assert found == table(*(whole[name] for name in names))
    assert [row["a"] for row in found] == [1.0, None, 2.0, 0.5, None]
    assert [row["c"] for row in found] == [None, None, None, [{"d": 1.0}], [{"d": 0.5}]]


@pytest.mark.parametrize("rows_per_file", [None, 1])
def test_a_late_row_that_no_column_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_file: int | None
) -> None:
    monkeypatch.setattr(merging, "GROUP_ROWS", 1)
    with pytest.raises(StageFailed, match=r"prompt 2: .* 'a' is a text, and a whole number in a row before"):
        merged(tmp_path, [{"a": 1}, {"a": None}, {"a": "x"}], output=Output("parquet", rows_per_file))
    assert not list((tmp_path / "out").iterdir())


@dataclass(init=False)
class Seen(OrderedDict[str, Any]):
    """As transformers' outputs are: a mapping whose class has fields, too."""

    extra: None = None


def test_what_a_task_made_its_values_of_is_written_as_json_has_it(tmp_path: Path) -> None:
    seen = Seen(score=1.5)
    made = [{"seen": seen, "keys": {None: 0.5, 1: True}}, {"text": 'a "quote"', "seen": seen}]
    (data,) = merged(tmp_path, made).values()
    assert [json.loads(line) for line in data.splitlines()] == [
        {"index": 0, "prompt": "prompt 0", "seen": {"score": 1.5}, "keys": {"null": 0.5, "1": True}},
        {"index": 1, "prompt": "prompt 1", "text": 'a "quote"', "seen": {"score": 1.5}},
    ]


def test_results_of_any_length_and_depth_come_back(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    payloads = [{"text": "é" * length, "nested": deep} for length in (0, 1, 700, 1024, 30_000, 300_000)]
    (data,) = merged(tmp_path, payloads).values()
    found = [json.loads(line) for line in data.splitlines()]
    assert [{name: row[name] for name in ("text", "nested")} for row in found] == payloads


def test_so_many_rows_to_a_file_as_no_machine_counts_are_one_file(tmp_path: Path) -> None:
    assert list(merged(tmp_path, PAYLOADS, output=Output(rows_per_file=2**70))) == ["results-00001-of-00001.jsonl"]


def test_whole_numbers_beyond_doubles_stay_whole(tmp_path: Path) -> None:
    payloads = [{"a": 1}, {"a": 2**63 - 1}, {"a": -(2**63)}]
    (data,) = merged(tmp_path, payloads, output=Output("parquet")).values()
    assert [row["a"] for row in table(data)] == [1, 2**63 - 1, -(2**63)]


def test_a_column_of_nulls_is_one(tmp_path: Path) -> None:
    (data,) = merged(tmp_path, [{"a": None, "b": [None]}], output=Output("parquet")).values()
    assert table(data) == [{"index": 0, "prompt": "prompt 0", "a": None, "b": [None]}]


@pytest.mark.parametrize("output", [Output("jsonl", 2), Output("parquet"), Output("parquet", 2)])
def test_results_are_prompts_again(tmp_path: Path, output: Output) -> None:
    merged(tmp_path, PAYLOADS[:2] * 2, output=output)
    rows = read_prompts(f"out/results*.{output.format}", "text", tmp_path)
    assert [row.prompt for row in rows] == ["eins", "zwei"] * 2
    assert list(first_results(tmp_path / "out", 3)) == [
        ("prompt 0", "eins"),
        ("prompt 1", "zwei"),
        ("prompt 2", "eins"),
    ]


def test_groups_of_a_table_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    monkeypatch.setattr("bigpipe.bigmodel.inference.merging.GROUP_ROWS", 3)
    monkeypatch.setattr("bigpipe.bigmodel.inference.merging.GROUP_BYTES", 1000)
    merged(tmp_path, [{"text": "x"}] * 7 + [{"text": "y" * 2000}] * 2, output=Output("parquet"))
    metadata = parquet.read_metadata(tmp_path / "out/results.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [3, 3, 2, 1]


def picture(number: int) -> ResultFile:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "png")
    return ResultFile(file.getvalue(), ".png")


def test_files_lie_beside_the_results_named_by_index(tmp_path: Path) -> None:
    from PIL import Image

    payloads = [
        {"image": picture(7)},
        {"images": [picture(1), picture(2)], "audio": ResultFile(b"RIFF", ".wav")},
        {"image": picture(7), "text": "the same again"},
    ]
    files = merged(tmp_path, payloads, ranks=2, output=Output("parquet"))
    rows = table(files["results.parquet"])
    assert rows[0]["image"] == "files/000000.png"
    assert rows[1]["images"] == ["files/000001-1.png", "files/000001-2.png"]
    assert rows[1]["audio"] == "files/000001-3.wav"
    assert sorted(files) == [
        "files/000000.png", "files/000001-1.png", "files/000001-2.png", "files/000001-3.wav", "files/000002.png",
        "results.parquet",
    ]  # fmt: skip
    assert Image.open(io.BytesIO(files["files/000001-2.png"])).getpixel((0, 0)) == (2, 0, 0)
    assert files["files/000000.png"] == files["files/000002.png"] == payloads[0]["image"].content


def test_a_file_that_changed_after_it_was_written_is_not_taken(tmp_path: Path) -> None:
    payloads = [{"image": picture(7)}]
    merged(tmp_path, payloads)
    (kept,) = (tmp_path / "rank-0/files").iterdir()
    kept.unlink()
    kept.write_bytes(b"another")
    with pytest.raises(StageFailed, match=r"prompt 0: .* is not what was written"):
        merge_results(tmp_path, tmp_path / "out")
    kept.unlink()
    with pytest.raises(StageFailed, match=r"prompt 0: .* is not what was written"):
        merge_results(tmp_path, tmp_path / "out")


def test_a_file_is_on_the_disk_before_the_record_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended between both, as by a kill, the row is computed again, and another content takes its place."""
    import bigpipe.bigmodel.inference.working as working

    def ended(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(working, "encoded", ended)
        with pytest.raises(KeyboardInterrupt):
            merged(tmp_path, [{"image": picture(1)}])
    assert list(read_log(tmp_path / "rank-0/records.jsonl")) == []
    assert len(list((tmp_path / "rank-0/files").iterdir())) == 1
    files = merged(tmp_path, [{"image": picture(2)}])
    assert files["files/000000.png"] == picture(2).content


def test_a_file_where_none_can_be_is_an_error_of_its_row(tmp_path: Path) -> None:
    (data,) = merged(tmp_path, [{"deep": {"image": picture(1)}}, {"text": "x"}]).values()
    first, second = map(json.loads, data.splitlines())
    assert "ResultFile is not JSON serializable" in first["error"]
    assert second["text"] == "x"


@pytest.mark.parametrize("ending", ["png", "", ".", "./x", ".a/../b", ".png\n", ".a.b.c"])
def test_an_ending_that_is_none_is_refused(ending: str) -> None:
    with pytest.raises(ValueError, match="is no ending"):
        ResultFile(b"", ending)


def test_chunks_of_many_rows_are_cut_window_by_window() -> None:
    lengths = [1 + number % 7 for number in range(WINDOW + 100)]
    found = list(chunks_of(lengths, 8))
    assert [chunk for chunk, _ in found if chunk[0] < WINDOW] == chunked(lengths[:WINDOW], 8)
    assert sorted(row for chunk, _ in found for row in chunk) == list(range(len(lengths)))
    assert all(longest == max(lengths[row] for row in chunk) for chunk, longest in found)
    batching = Batching.of(lengths, 8)
    assert (batching.rows, len(batching.sizes)) == (len(lengths), len(found))


def test_a_column_of_mixed_chats_and_texts_is_refused_before_anything_is_computed() -> None:
    columns = Columns()
    columns.add(0, {"prompt": "a"})
    with pytest.raises(StageFailed, match=r"prompt 1: .* 'prompt' is a list, and a text"):
        columns.add(1, {"prompt": [{"role": "user", "content": "a"}]})


MEMORY = """
import json, resource, sys
from pathlib import Path
from bigpipe.bigmodel.inference import Bound, Output, compute_share, merge_results, plan_work
from bigpipe.bigmodel.tasks import Answer, Prompts

import pyarrow.parquet  # once, for both sizes
import torch, numpy

folder = Path(sys.argv[1])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
taken = [peak()]
plan_work(folder, Prompts("prompts.jsonl", "prompt", folder), lambda row: row.nbytes, ranks=1, batch_size=64)
taken.append(peak())
compute_share(folder, 0, 1, lambda: Bound(lambda rows: [Answer({"text": row.prompt[::-1]}) for row in rows]))
taken.append(peak())
merge_results(folder, folder, output=Output("parquet"))
taken.append(peak())
print(json.dumps(taken))
"""


@pytest.mark.slow
def test_ten_times_as_many_rows_take_no_more_memory(tmp_path: Path) -> None:
    """Peaks in MiB of a process of their own, after each step: what 200,000 rows more take is a few bytes each."""

    def rows(count: int) -> Iterator[str]:
        return (json.dumps({"prompt": f"{number} " + "x" * (200 + number % 100)}) + "\n" for number in range(count))

    peaks = []
    for count in (20_000, 220_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        with (folder / "prompts.jsonl").open("w") as file:
            file.writelines(rows(count))
        done = subprocess.run([sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, check=True)
        taken = json.loads(done.stdout)
        peaks.append(taken[-1] - taken[0])
    assert peaks[1] - peaks[0] < 60, peaks
