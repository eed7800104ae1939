"""Stage kinds: the built-in ones, and those of real distributions on the path."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bigpipe.errors import ManifestError, UsageError
from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.recipe.registry import BUILT_IN, load_stage, stage_kinds

PLUGIN = """
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult
STAGE = Stage(kind="polish", version=1, params=Params, metrics=Metrics, inputs={}, output=None,
              run=lambda params, context: StageResult(Metrics()), forecast=lambda params, context: Forecast())
"""


def install(folder: Path, distribution: str, *entries: str, **modules: str) -> None:
    """What pip leaves behind for a distribution with entry points."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bigpipe.stages]\n" + "\n".join(entries) + "\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return folder


def test_the_built_in_kinds_come_first() -> None:
    assert list(stage_kinds())[:7] == [
        "download", "estimate", "shard", "quantize", "dispatch", "distributed-infer", "save",
    ]  # fmt: skip
    assert all(target.startswith("bigpipe.plugins.") for target in BUILT_IN.values())


def test_a_built_in_kind_is_loaded() -> None:
    assert load_stage("shard").kind == "shard"


def test_a_kind_from_another_distribution(site: Path) -> None:
    install(site, "polisher", "polish = polish_plugin:STAGE", polish_plugin=PLUGIN)
    assert stage_kinds()["polish"] == "polish_plugin:STAGE"
    assert "polish_plugin" not in sys.modules
    assert load_stage("polish").kind == "polish"
    sys.modules.pop("polish_plugin")


def test_the_same_name_twice_is_an_error(site: Path) -> None:
    install(site, "one", "polish = a:STAGE")
    install(site, "two", "polish = b:STAGE")
    with pytest.raises(UsageError, match="'polish' is offered by one and by two"):
        stage_kinds()
    with pytest.raises(UsageError, match="uninstall one"):
        load_stage("polish")


def test_the_name_of_a_built_in_kind_is_taken(site: Path) -> None:
    install(site, "mine", "shard = a:STAGE")
    with pytest.raises(UsageError, match="'shard' is offered by bigpipe and by mine"):
        stage_kinds()


def test_a_distribution_seen_twice_on_the_path_is_one(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "polisher", "polish = polish_plugin:STAGE")
    install(tmp_path / "other", "polisher", "polish = polish_plugin:STAGE")
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    assert "polish" in stage_kinds()


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ("bad = no_such_module:STAGE", "cannot be loaded from no_such_module:STAGE: No module named 'no_such_module'"),
        ("bad = json:STAGE", "cannot be loaded from json:STAGE"),
        ("bad = json:dumps", "json:dumps is a function, not the Stage of kind 'bad'"),
        ("bad = bigpipe.plugins.shard:STAGE", "is a Stage of kind 'shard', not the Stage of kind 'bad'"),
    ],
)
def test_a_kind_that_cannot_be_loaded_is_a_placed_error(site: Path, tmp_path: Path, entry: str, cause: str) -> None:
    install(site, "broken", entry)
    with pytest.raises(UsageError) as caught:
        load_stage("bad")
    assert cause in str(caught.value)
    (tmp_path / "m.yaml").write_text("version: 1\nstages:\n  s: {uses: bad}\n")
    with pytest.raises(ManifestError) as placed:
        load_recipe(tmp_path / "m.yaml", environment={})
    (problem,) = placed.value.problems
    assert (problem.code, problem.place.line, problem.place.column) == ("BP109", 3, 13)


def test_an_unknown_kind() -> None:
    with pytest.raises(UsageError, match="unknown stage kind 'qantize'") as caught:
        load_stage("qantize")
    assert caught.value.cure == "did you mean 'quantize'?"


def test_built_in_kinds_are_loaded_one_by_one_and_without_reading_distributions() -> None:
    code = """
import sys
from importlib import metadata
metadata.entry_points = metadata.distributions = None  # would fail
from bigpipe.orchestrator.recipe.registry import load_stage
load_stage("shard")
print(sorted(name for name in sys.modules if name.startswith("bigpipe.plugins.")), "torch" in sys.modules)
"""
    # pydantic asks for its own plugins once, at the first model, unless told that there are none.
    environment = {"PYTHONPATH": ":".join(sys.path), "PYDANTIC_DISABLE_PLUGINS": "__all__"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "['bigpipe.plugins.shard'] False\n", done.stderr
