"""Params enter the key by what they point to."""

import json
import os
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

import pytest
from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from typing_extensions import TypedDict

from bigpipe.errors import UsageError
from bigpipe.orchestrator.planning.content import content_params
from bigpipe.orchestrator.stage import Code, ContentField, File, FileOrLiteral, Folder, Params, Size, Tree
from bigpipe.orchestrator.store.hashing import StatMemo, canonical, hash_file


class Scheme(Enum):
    INT8 = "int8"


class Inner(BaseModel):
    config: File | None = None
    weight: float = 0.5


@dataclass
class Shard:
    file: File
    weight: float = 1.0


@checked_dataclass
class CheckedShard:
    file: File


class Typed(TypedDict):
    file: NotRequired[File]


class Named(NamedTuple):
    name: str
    file: File


class Everything(Params):
    prompts: Annotated[str | list[str], FileOrLiteral] = "prompts.txt"
    model: Inner = Inner()
    models: dict[str, Inner] = Field(default_factory=dict)
    config: Annotated[dict[str, Any] | str, ContentField("file")] = Field(default_factory=dict)
    files: list[File] = Field(default_factory=list)
    by_name: dict[str, list[File]] = Field(default_factory=dict)
    mode: Literal["auto"] | File = "auto"
    maybe: File | None = None
    tree: Tree | None = None
    folder: Folder | None = None
    task: Code = "text-generation"
    max_memory: dict[int | str, Size] = Field(default_factory=dict)
    scheme: Scheme = Scheme.INT8
    skip: frozenset[str] = frozenset()
    plain: str = "prompts.txt"
    pictures: Annotated[str | None, ContentField("file", names=True)] = None
    class_: Code = Field(default="builtin", alias="class")
    shards: list[Shard] = Field(default_factory=list)
    checked: CheckedShard | None = None
    typed: Typed = Field(default_factory=Typed)
    named: tuple[Named, ...] = ()
    pairs: list[tuple[str, File]] = Field(default_factory=list)
    path: Annotated[Path | None, ContentField("file")] = None


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "prompts.txt").write_text("hello\n")
    return folder


@pytest.fixture
def memo(tmp_path):
    return StatMemo(tmp_path / "memo")


def content(base, memo, **fields):
    return content_params(Everything(**fields), base, memo)


def test_values_that_are_no_paths_enter_as_they_are(base, memo):
    found = content(base, memo, max_memory={0: "10GiB", "cpu": "1GB"}, skip={"b", "a"})
    assert found["max_memory"] == {"0": 10 * 2**30, "cpu": 10**9}
    assert found["scheme"] == "int8"
    assert found["skip"] == ["a", "b"]
    assert found["plain"] == "prompts.txt"
    assert found["maybe"] is None
    assert set(found) == {*Everything.model_fields, "class"} - {"class_"}  # as people write it
    canonical(found)


def test_names_of_a_globs_files_enter_where_results_tell_them(base, memo):
    (base / "a.png").write_bytes(b"a")
    before = content(base, memo, pictures="*.png", prompts="*.png")
    (base / "a.png").rename(base / "b.png")
    after = content(base, memo, pictures="*.png", prompts="*.png")
    assert after["prompts"] == before["prompts"]
    assert after["pictures"] != before["pictures"]
    assert content(base, memo, pictures="b.png")["pictures"] == f"sha256:{hash_file(base / 'b.png')}.png"


def test_a_directory_stands_for_its_files_where_a_glob_would(base, memo):
    (base / "all").mkdir()
    (base / "all" / "a.png").write_bytes(b"a")
    assert content(base, memo, pictures="all")["pictures"] == content(base, memo, pictures="all/*")["pictures"]
    (base / "none").mkdir()
    with pytest.raises(UsageError, match="pictures: there is no file in none"):
        content(base, memo, pictures="none")


def test_a_file_enters_by_its_bytes_and_its_suffix(base, memo):
    before = content(base, memo)["prompts"]
    assert before == f"sha256:{hash_file(base / 'prompts.txt')}.txt"
    (base / "sub").mkdir()
    (base / "prompts.txt").rename(base / "sub" / "moved.txt")
    assert content(base, memo, prompts="sub/moved.txt")["prompts"] == before
    assert content(base, memo, prompts=str(base / "sub" / "moved.txt"))["prompts"] == before
    (base / "sub" / "moved.txt").write_text("hullo\n")
    assert content(base, memo, prompts="sub/moved.txt")["prompts"] != before


def test_a_glob_enters_by_all_its_files_in_path_order(base, memo):
    for name, text in {"a.txt": "1", "b.txt": "2"}.items():
        (base / name).write_text(text)
    both = content(base, memo, prompts="[ab].txt")["prompts"]
    (base / "a.txt").write_text("2")
    (base / "b.txt").write_text("1")
    assert content(base, memo, prompts="[ab].txt")["prompts"] != both
    (base / "c[1].txt").write_text("a name, not a pattern")
    assert content(base, memo, prompts="c[1].txt")["prompts"] == f"sha256:{hash_file(base / 'c[1].txt')}.txt"


def test_literals_are_not_taken_for_paths(base, memo):
    found = content(base, memo, prompts=["prompts.txt"], config={"file": "prompts.txt"}, mode="auto")
    assert found["prompts"] == ["prompts.txt"]
    assert found["config"] == {"file": "prompts.txt"}
    assert found["mode"] == "auto"


def test_markers_are_found_wherever_they_stand(base, memo):
    digest = f"sha256:{hash_file(base / 'prompts.txt')}.txt"
    found = content(
        base, memo, model=Inner(config="prompts.txt"), models={"x": Inner(config="prompts.txt")}, config="prompts.txt",
        files=["prompts.txt"], by_name={"a": ["prompts.txt"]}, mode="prompts.txt", maybe="prompts.txt",
    )  # fmt: skip
    assert found["model"] == {"config": digest, "weight": 0.5}
    assert found["models"] == {"x": {"config": digest, "weight": 0.5}}
    assert [found["config"], found["mode"], found["maybe"]] == [digest] * 3
    assert (found["files"], found["by_name"]) == ([digest], {"a": [digest]})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("shards", [{"file": "prompts.txt"}], [{"file": "DIGEST", "weight": 1.0}]),
        ("checked", {"file": "prompts.txt"}, {"file": "DIGEST"}),
        ("typed", {"file": "prompts.txt"}, {"file": "DIGEST"}),
        ("named", [["prompts.txt", "prompts.txt"]], [["prompts.txt", "DIGEST"]]),
        ("pairs", [["prompts.txt", "prompts.txt"]], [["prompts.txt", "DIGEST"]]),
        ("path", "prompts.txt", "DIGEST"),
    ],
)
def test_markers_are_found_in_whatever_holds_fields(base, memo, field, value, expected):
    found = content(base, memo, **{field: value})[field]
    digest = f"sha256:{hash_file(base / 'prompts.txt')}.txt"
    assert str(found).replace(digest, "DIGEST") == str(expected)
    with pytest.raises(UsageError, match=f"^{field}.*: there is no file none.txt"):
        content(base, memo, **json.loads(json.dumps({field: value}).replace("prompts.txt", "none.txt")))


def test_a_tree_enters_by_the_names_and_bytes_of_its_files(base, memo, tmp_path):
    (base / "model" / "sub").mkdir(parents=True)
    (base / "model" / "config.json").write_text("{}")
    (base / "model" / "sub" / "w").write_text("1")
    before = content(base, memo, tree="model")["tree"]
    (base / "model" / ".git").mkdir()
    (base / "model" / ".git" / "index").write_text("noise")
    (base / "model").rename(base / "renamed")
    assert content(base, memo, tree="renamed")["tree"] == before
    (base / "renamed" / "sub").rename(tmp_path / "sub")
    (base / "renamed" / "sub").symlink_to(tmp_path / "sub")
    (tmp_path / "sub" / "around").symlink_to(base / "renamed")
    assert content(base, memo, tree="renamed")["tree"] == before
    (tmp_path / "sub" / "w").rename(tmp_path / "sub" / "v")
    assert content(base, memo, tree="renamed")["tree"] != before


def test_a_folder_enters_without_the_folders_that_links_lead_to(base, memo, tmp_path):
    (base / "model").mkdir()
    (base / "model" / "config.json").write_text("{}")
    before = content(base, memo, folder="model", tree="model")
    assert before["folder"] == before["tree"]
    (tmp_path / "runs").mkdir()
    with (tmp_path / "runs" / "data.bin").open("wb") as file:
        file.truncate(2**40)
    (base / "model" / "runs").symlink_to(tmp_path / "runs")
    assert content(base, memo, folder="model")["folder"] == before["folder"]
    (tmp_path / "notes").write_text("1")
    (base / "model" / "notes").symlink_to(tmp_path / "notes")
    assert content(base, memo, folder="model")["folder"] != before["folder"]


def test_code_enters_by_its_name_and_all_python_files_of_its_package(base, memo):
    (base / "mymodel").mkdir()
    for name in ("__init__.py", "model.py", "notes.txt"):
        (base / "mymodel" / name).write_text("raise RuntimeError('imported')\n")
    before = content(base, memo, task="mymodel.model:Net")["task"]
    assert before.startswith("mymodel.model:Net@sha256:")
    assert content(base, memo, task="mymodel.model:Net2")["task"].partition("@")[2] == before.partition("@")[2]
    (base / "mymodel" / "notes.txt").write_text("other")
    assert content(base, memo, task="mymodel.model:Net")["task"] == before
    (base / "mymodel" / "layers.py").write_text("x = 1\n")
    assert content(base, memo, task="mymodel.model:Net")["task"] != before
    (base / "single.py").write_text("y = 2\n")
    assert content(base, memo, task="single:f")["task"].startswith("single:f@sha256:")


def test_what_is_built_in_is_named_only(base, memo):
    assert content(base, memo, task="text-generation")["task"] == "text-generation"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": "none.txt"}, "prompts: there is no file none.txt"),
        ({"prompts": "*.jsonl"}, "prompts: there is no file"),
        ({"prompts": "."}, "prompts: . is a directory"),
        ({"by_name": {"a": ["prompts.txt", "none"]}}, r"by_name.a\[1\]: there is no file none"),
        ({"model": {"config": "none.json"}}, "model.config: there is no file none.json"),
        ({"tree": "none"}, "tree: the directory none is not there"),
        ({"tree": "prompts.txt"}, "tree: the directory prompts.txt is a file"),
        ({"task": "nomodule_here:f"}, "task: there is no Python source of a module 'nomodule_here'"),
        ({"model": {"weight": float("nan")}}, "model.weight is nan"),
    ],
)
def test_what_is_not_there_is_named_with_its_field(base, memo, fields, message):
    with pytest.raises(UsageError, match=message) as error:
        content(base, memo, **fields)
    assert error.value.cure


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"prompts": "link"}, "link"), ({"prompts": "lin*"}, "link"), ({"tree": "deep"}, "deep/link")],
)
def test_a_link_that_leads_nowhere_is_named_with_what_it_leads_to(base, memo, fields, name):
    (base / "deep").mkdir(exist_ok=True)
    for link in (base / "link", base / "deep" / "link"):
        link.symlink_to("gone.txt")
    with pytest.raises(UsageError, match=f": {name} is a link to gone.txt, which is not there") as error:
        content(base, memo, **fields)
    assert error.value.cure == "mend the link, or leave it out"


class TestMemo:
    def settled(self, path, data):
        path.write_bytes(data)
        time.sleep(0.06)  # out of the tick of the clock it was written in
        return path

    def test_a_file_is_read_once_by_all_processes(self, tmp_path, memo):
        path = self.settled(tmp_path / "f", b"abc")
        digest = memo.sha256(path)
        log = (tmp_path / "memo" / "files.jsonl").read_bytes()
        fake = log.replace(digest.encode(), b"f" * 64)
        assert StatMemo(tmp_path / "memo").sha256(path) == digest
        assert (tmp_path / "memo" / "files.jsonl").read_bytes() == log
        (tmp_path / "memo" / "files.jsonl").write_bytes(fake)  # a damaged line is skipped
        assert StatMemo(tmp_path / "memo").sha256(path) == digest

    @pytest.mark.parametrize("change", ["bytes", "same-size-same-mtime", "replaced", "mode"])
    def test_any_difference_in_what_stat_says_reads_again(self, tmp_path, memo, change):
        path = self.settled(tmp_path / "f", b"abc")
        before = memo.sha256(path)
        facts = path.stat()
        if change == "bytes":
            path.write_bytes(b"abd")
        elif change == "same-size-same-mtime":
            path.write_bytes(b"abd")
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        elif change == "replaced":
            (tmp_path / "g").write_bytes(b"abd")
            (tmp_path / "g").rename(path)
        else:
            path.chmod(0o600)
        assert (memo.sha256(path) == before) == (change == "mode")

    def test_a_file_written_this_very_moment_is_not_trusted(self, tmp_path, memo):
        for number in range(50):
            (tmp_path / "f").write_bytes(b"%02d" % number)
            assert memo.sha256(tmp_path / "f") == hash_file(tmp_path / "f")

    def test_a_log_full_of_the_past_is_rewritten(self, tmp_path, memo):
        memo.sha256(self.settled(tmp_path / "f", b"1"))
        log = tmp_path / "memo" / "files.jsonl"
        log.write_bytes(log.read_bytes() * StatMemo.COMPACT_FROM)
        digest = StatMemo(tmp_path / "memo").sha256(tmp_path / "f")
        assert len(log.read_bytes().splitlines()) == 1
        assert StatMemo(tmp_path / "memo").sha256(tmp_path / "f") == digest

    def test_many_small_files_are_announced_once_they_take_long(self, tmp_path):
        class Talkative(StatMemo):
            SILENT = 0.001

        said: list[str] = []
        memo = Talkative(tmp_path / "memo", said.append)
        for number in range(20):
            memo.sha256(self.settled(tmp_path / f"f{number}", bytes(2_000_000)))
        assert 1 <= len(said) < 20
        assert set(said) == {f"the files in {tmp_path}"}

    def test_a_store_that_cannot_be_written_costs_time_only(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        memo = StatMemo(tmp_path / "file" / "memo")
        assert memo.sha256(self.settled(tmp_path / "f", b"abc")) == hash_file(tmp_path / "f")

    def test_only_regular_files_are_hashed(self, tmp_path, memo):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="not a regular file"):
            memo.sha256(tmp_path / "pipe")
