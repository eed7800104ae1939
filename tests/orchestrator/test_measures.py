"""What can be told of a manifest without any facts: sizes without a unit, sizes against what is none, files and modules
that are not there. Each with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigpipe.errors import UsageError
from bigpipe.orchestrator.commands import validate
from bigpipe.orchestrator.recipe.validation import measure_of
from bigpipe.orchestrator.stage import Bytes, Metrics
from bigpipe.sizes import size_of

RECIPE = """\
version: 1
name: measures
trust: {modules: [mine]}
stages:
  download: {uses: download, with: {repo: owner/name}}
  shard: {uses: shard, inputs: download, with: {max_shard_size: 5GB}}
  quantize: {uses: quantize, inputs: shard, resources: {ram: 16GB}, with: {scheme: int8}, gates: ["ratio > 1.5"]}
  dispatch:
    uses: dispatch
    inputs: quantize
    with: {max_memory: {cpu: 48GiB}, sequence_length: 64}
    gates: ["load_seconds < 30s"]
  generate:
    uses: distributed-infer
    inputs: quantize
    with: {task: "mine:run", prompts: prompts.txt}
"""


def problems(folder: Path, text: str) -> list[str]:
    manifest = folder / "recipe.yaml"
    manifest.write_text(text)
    (folder / "prompts.txt").write_text("one")
    (folder / "mine.py").write_text("def run(model, rows): ...")
    found = validate([manifest])
    return [str(problem).partition("\n")[0] for error in found.values() for problem in error.problems]


@pytest.mark.parametrize(
    ("right", "wrong", "place", "told"),
    [
        ("max_shard_size: 5GB", "max_shard_size: 5", "6:65", "5 has no unit; write 5GB or 5GiB, or 5B if it is bytes"),
        ("max_shard_size: 5GB", 'max_shard_size: "500"', "6:65", "500 has no unit"),
        ("ram: 16GB", "ram: 16", "7:62", "resources.ram: 16 has no unit"),
        ("cpu: 48GiB", "cpu: 48000", "11:30", "max_memory.cpu: 48000 has no unit"),
        ("ratio > 1.5", "ratio > 20GiB", "7:", "ratio and 20GiB cannot be compared: ratio is no size"),
        ("ratio > 1.5", "bytes < 20", "7:", "20 has no unit"),
        ("ratio > 1.5", "quantized < 20GiB", "7:", "quantized and 20GiB cannot be compared: quantized is no size"),
        ("ratio > 1.5", "bytes < 2 * quantized", "7:", "2 * quantized is no size"),
        ("ratio > 1.5", "${stages.download.metrics.files} < bytes", "7:", "is no size"),
        ("ratio > 1.5", "bytes < 30min", "7:", "30min is no size"),
        ("ratio > 1.5", "bytes < 0.5 * ratio", "7:", "0.5 * ratio is no size"),
        ("ratio > 1.5", "bytes / 2GB < 10GB", "7:", "bytes / 2GB is no size"),
        ("ratio > 1.5", "ratio < ${stages.download.metrics.bytes}", "7:", "ratio is no size"),
        ("load_seconds < 30s", "load_seconds < 1GB", "12:", "load_seconds is no size"),
        ("load_seconds < 30s", "predicted.cpu < 12", "12:", "12 has no unit"),
    ],
)
def test_a_measure_that_nobody_means_is_refused(tmp_path: Path, right: str, wrong: str, place: str, told: str) -> None:
    assert problems(tmp_path, RECIPE) == []
    (found,) = problems(tmp_path, RECIPE.replace(right, wrong))
    assert f"recipe.yaml:{place}" in found
    assert told in found


@pytest.mark.parametrize(
    ("right", "other"),
    [
        ("max_shard_size: 5GB", "max_shard_size: 5000000000"), ("max_shard_size: 5GB", "max_shard_size: 500B"),
        ("cpu: 48GiB", "cpu: 0"), ("ratio > 1.5", "bytes <= 0.5 * ${stages.download.metrics.bytes}"),
        ("ratio > 1.5", "${stages.download.metrics.bytes} / bytes > 1.5"), ("ratio > 1.5", "bytes < 20B"),
        ("ratio > 1.5", "bytes > 0"), ("ratio > 1.5", "quantized > 2"), ("ratio > 1.5", "bytes / quantized < 1GB"),
        ("ratio > 1.5", "quantized + skipped > 2"), ("ratio > 1.5", "quantized / skipped > 0.5"),
        ("ratio > 1.5", "bytes > 5000000000"), ("ratio > 1.5", "bytes + 1GB < 20GB"),
        ("load_seconds < 30s", "load_seconds < 30"), ("load_seconds < 30s", "predicted.cpu <= 12GiB"),
        ("load_seconds < 30s", "predicted.cpu < 0.9 * 48GiB"),
    ],
)  # fmt: skip
def test_what_can_be_meant_is_taken(tmp_path: Path, right: str, other: str) -> None:
    assert problems(tmp_path, RECIPE.replace(right, other)) == []


def test_a_number_given_from_python_is_bytes_and_a_text_has_its_unit() -> None:
    assert size_of("memory", 5) == 5
    assert size_of("memory", "5B") == 5
    with pytest.raises(UsageError, match="memory: 16 has no unit"):
        size_of("memory", "16")


@pytest.mark.parametrize(
    ("right", "wrong", "place", "told"),
    [
        ("prompts: prompts.txt", "prompts: prompt.txt", "16:39", "prompts: there is no file prompt.txt"),
        ("prompts: prompts.txt", "prompts: '*.jsonl'", "16:39", "there is no file *.jsonl"),
        ("prompts: prompts.txt", "prompts: nothing", "16:39", "there is no file in nothing"),
        ("mine", "no_such_module", "16:18", "task: there is no Python source of a module 'no_such_module'"),
        ("repo: owner/name", "synthetic: {config: conf.json}", "5:57", "synthetic.config: there is no file conf.json"),
    ],
)
def test_what_is_named_and_not_there_is_found(tmp_path: Path, right: str, wrong: str, place: str, told: str) -> None:
    (tmp_path / "nothing").mkdir(exist_ok=True)
    (found,) = problems(tmp_path, RECIPE.replace(right, wrong))
    assert f"recipe.yaml:{place}" in found
    assert "error[BP111]" in found
    assert told in found


def test_a_checkpoint_may_still_come(tmp_path: Path) -> None:
    assert problems(tmp_path, RECIPE.replace("repo: owner/name", "path: model")) == []


class Unmarked(Metrics):
    size: int
    many: int


class Tree(Metrics):
    """Inside of itself."""

    parts: list[Tree]
    many: int


class Marked(Metrics):
    size: Bytes
    by_device: dict[str, Bytes]
    many: int
    perhaps: int | None


class Outer(Metrics):
    inner: Marked
    many: int


def test_a_kind_that_marks_its_sizes_counts_with_the_rest() -> None:
    """One that marks none may mean bytes by any whole number."""
    assert [measure_of(Unmarked, name) for name in ("size", "many")] == [None, None]
    assert measure_of(Tree, "many") is None
    told = {name: measure_of(Marked, name) for name in ("size", "by_device.cpu", "many", "perhaps")}
    assert told == {"size": "size", "by_device.cpu": "size", "many": "count", "perhaps": "count"}
    assert [measure_of(Outer, name) for name in ("inner.size", "many")] == ["size", "count"]
