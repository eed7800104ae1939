"""Files of prompts made to hurt: rows, or an error that names the file; within seconds and bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from bigpipe.bigmodel.tasks import promptfiles
from bigpipe.bigmodel.tasks.rows import read_prompts
from bigpipe.errors import UsageError

SECONDS = 60
MEMORY = 3 * 2**30
DEEP = "[" * 50_000 + "]" * 50_000
WRONG: dict[str, list[bytes]] = {
    ".jsonl": [
        b"\xff",
        b"\xff\xfe{\x00}\x00",
        b"{",
        b"[",
        b"nul",
        b"{} {}",
        b'{"prompt": NaN, "x": Infinity}',
        b"1",
        b'"a',
        b"{}",
        b'{"prompt": 1}',
        b'{"prompt": null}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": {"a": 1}}',
        b'{"Prompt": "a"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "x": "\\udfff"}',
        f'{{"prompt": "a", "x": {DEEP}}}'.encode(),
        f'{{"prompt": {DEEP}}}'.encode(),
        f'{{"prompt": "a", "x": {"1" * 5000}}}'.encode(),
        b'{"prompt": "a"}\n\xc3\x28',
        b"\0",
        b"",
        b"\n\n\n",
        b"\xed\xa0\x80",
        b'{"prompt": "a"}\x00',
        b"\x1f\x8b\x08\x00",
        b'{"prompt": [' + b"1," * 10 + b"}",
    ],
    ".json": [
        b"[",
        b"[1",
        b"{",
        b"[{}]",
        b"[1]",
        b"[null]",
        DEEP.encode(),
        b"\xff\xfe[\x00]\x00",
        b"",
        b"null",
        b"[[[]]]x",
    ],
    ".csv": [
        b"",
        b"prompt\n",
        b"text\na\n",
        b"prompt,prompt\na,b\n",
        b"prompt\na,b\n",
        b'prompt\n"a\n',
        b'prompt\n"a"b\n',
        b"\xff\n",
        b"a,b\n1\n",
        b'"' + b"a" * 10,
        b",\n,\n",
    ],
    ".tsv": [b"prompt\ta\nx\n", b"\xfe\xff", b'prompt\n"'],
    ".txt": [b"\xff\xfe", b"", b"\n \n", b"\xf0\x28\x8c\x28"],
    ".parquet": [
        b"",
        b"PAR1",
        b"PAR1" + b"\xff" * 100 + b"PAR1",
        b"PAR1\x00\x00\x00\x00PAR1",
        b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1",
    ],
    ".md": [b"a"],
    ".py": [b"a"],
    ".jsonl.gz": [b"a"],
    "": [b"a"],
}
RIGHT: dict[str, list[bytes]] = {
    ".jsonl": [
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": ""}',
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "\\ud83d\\ude00"}',
        b'"a"',
        b'{"prompt": "\x7f\\u001b[2J"}',
        b'{"prompt": "a"}\r{"prompt": "b"}',
    ],
    ".json": [b'["a"]', b'{"prompt": "a"}', b'[{"prompt": "a"}]'],
    ".csv": [
        b"prompt\na\n",
        b"prompt\na\0b\n",
        b'prompt\n"' + b"a" * 1_000_000 + b'"\n',
        b"\xef\xbb\xbfprompt\r\na\r\n",
    ],
    ".txt": [b"a", b"\xe2\x80\xa8a", b"a\0b", b"a" * 1_000_000],
}


def listed(files: dict[str, list[bytes]]) -> list[tuple[str, bytes]]:
    return [(ending, content) for ending, contents in files.items() for content in contents]


def test_there_are_many():
    assert len(listed(WRONG)) + len(listed(RIGHT)) >= 75


@pytest.mark.parametrize(("ending", "content"), listed(WRONG))
def test_a_broken_file_is_a_mistake_with_its_name(tmp_path, ending, content):
    path = tmp_path / f"p{ending}"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(path.name, "prompt", tmp_path)
    assert path.name in caught.value.cause
    assert caught.value.cure
    assert len(caught.value.cause) < 2000


@pytest.mark.parametrize(("ending", "content"), listed(RIGHT))
def test_an_odd_file_is_read(tmp_path, ending, content):
    path = tmp_path / f"p{ending}"
    path.write_bytes(content)
    rows = read_prompts(path.name, "prompt", tmp_path)
    assert all(isinstance(row.prompt, str) and row.digest for row in rows)


@pytest.mark.parametrize(
    "name", ["fifo.jsonl", "folder.jsonl", "loop.jsonl", "null.jsonl", "nowhere.jsonl", "x" * 5000, "[", "**"]
)
def test_what_is_no_file_is_a_mistake(tmp_path, name):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UsageError):
        read_prompts(name, "prompt", tmp_path)


def repeated(path: Path, value: str, rows: int) -> Path:
    """A table of one value, stored once: a few kilobytes, whatever it stands for."""
    column = arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), arrow.array([value]))
    parquet.write_table(arrow.table({"prompt": column}), path, compression="zstd", row_group_size=rows)
    return path


def zeros(path: Path) -> None:
    """1.25 GiB in five pages."""
    table = arrow.table({"prompt": arrow.array(["\0" * 2**28])})
    with parquet.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        for _ in range(5):
            writer.write_table(table)


BOMBS = {
    "long.parquet": lambda path: repeated(path, "a" * 10**5, 50_000),
    "wide.parquet": lambda path: repeated(path, "a" * 10**8, 100),
    "zeros.parquet": zeros,
    "sparse.jsonl": lambda path: os.truncate(path, 1 << 40),
    "sparse.csv": lambda path: os.truncate(path, 1 << 40),
}
READ = """
import resource, sys
from pathlib import Path
from bigpipe.bigmodel.tasks.rows import read_prompts
from bigpipe.errors import UsageError
import pyarrow.parquet
size = int(sys.argv[2]); resource.setrlimit(resource.RLIMIT_DATA, (size, size))
try: read_prompts(sys.argv[1], "prompt", Path("."))
except UsageError as error: print(error.cause)
"""


@pytest.mark.attack
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, name):
    """In a process that may have three times as much as the largest file."""
    (tmp_path / name).touch()
    BOMBS[name](tmp_path / name)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", READ, name, str(MEMORY)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "more than" in done.stdout
    assert time.monotonic() - started < SECONDS


def test_a_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path):
    path = repeated(tmp_path / "p.parquet", "a" * 1000, 5_000)
    assert path.stat().st_size < 20_000
    assert len(read_prompts("p.parquet", "prompt", tmp_path)) == 5_000
    with pytest.raises(UsageError, match=r"unpacks to more than 1\.0 MiB"):
        list(promptfiles._rows_of_parquet(path, parquet.ParquetFile(path), 2**20))
