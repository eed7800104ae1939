"""`module:name`: what is imported is what a worker imports, whatever this process imported before."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from bigpipe.errors import UsageError
from bigpipe.modules import code_files, import_attribute, only_here
from bigpipe.orchestrator.contract import Code, Params
from bigpipe.orchestrator.planning.content import content_params
from bigpipe.orchestrator.recipe.registry import load_stage
from bigpipe.orchestrator.store.hashing import StatMemo
from bigpipe.trust import Trust


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path, loaded = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        if name.startswith("own_"):
            del sys.modules[name]


def folder(place: Path, **modules: str) -> Path:
    place.mkdir(exist_ok=True)
    for name, text in modules.items():
        (place / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return place


@pytest.mark.parametrize("names", [("own_kinds", "own_kinds"), ("own_kinds_a", "own_kinds_b")])
def test_each_recipe_has_the_helper_beside_it(tmp_path: Path, names: tuple[str, str]) -> None:
    for place, name in [("a", names[0]), ("b", names[1])] * 2:
        base = folder(tmp_path / place, own_helper=f"WORD = '{place}'", **{name: "from own_helper import WORD"})
        assert import_attribute(f"{name}:WORD", base) == place


def test_what_the_caller_imported_and_edited_since_is_imported_anew(tmp_path: Path) -> None:
    base = folder(
        tmp_path, own_cell_helper="WORD = 'first'", own_cell="import own_cell_helper\nWORD = own_cell_helper.WORD"
    )
    sys.path.insert(0, str(base))
    before = importlib.import_module("own_cell")
    folder(tmp_path, own_cell_helper="WORD = 'second'  # edited")
    assert import_attribute("own_cell:WORD", base) == "second"
    assert before.WORD == "first"
    assert import_attribute("own_cell:__dict__", base) is import_attribute("own_cell:__dict__", base)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the script that this process is then taken for."""
    main = ModuleType("__main__")
    main.__file__ = str(folder(tmp_path / "script") / "main.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    sys.path.insert(0, str(tmp_path / "script"))
    return tmp_path / "script"


def test_a_helper_beside_the_recipe_comes_before_one_beside_the_script(tmp_path: Path, script: Path) -> None:
    folder(script, own_helper="WORD = 'script'")
    importlib.import_module("own_helper")
    base = folder(tmp_path / "recipes", own_helper="WORD = 'recipe'", own_kinds="from own_helper import WORD")
    assert import_attribute("own_kinds:WORD", base) == "recipe"
    assert base / "own_helper.py" in [path for _, path in code_files("own_kinds", base)]
    assert sys.path[0] == str(script)


KIND = """
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult
STAGE = Stage(kind="mine", version=1, params=Params, metrics=Metrics, inputs={}, output=None, runs_in="process",
              run=lambda params, context: StageResult(Metrics()), forecast=lambda params, context: Forecast())
"""


class Asks(Params):
    task: Code


def test_what_only_this_process_would_find_is_refused_before_a_worker_looks_for_it(
    tmp_path: Path, script: Path
) -> None:
    folder(script, own_kinds=KIND, own_inline=KIND.replace("process", "inline"))
    base = folder(tmp_path / "recipes")
    assert only_here("own_kinds:STAGE", base) == str(script)
    with pytest.raises(UsageError, match=f"own_kinds:STAGE lies in {script}, where workers do not look"):
        load_stage("own_kinds:STAGE", Trust(("own_kinds",)), base)
    with pytest.raises(UsageError, match=f"the module own_kinds lies in {script}, where workers do not look"):
        content_params(Asks(task="own_kinds:run"), base, StatMemo(tmp_path / "memo"))
    assert load_stage("own_inline:STAGE", Trust(("own_inline",)), base).kind == "mine"
    assert load_stage("own_kinds:STAGE", Trust(("own_kinds",)), script).kind == "mine"
    assert only_here("json:loads", base) == ""


def test_two_threads_import_one_module_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder(tmp_path, own_kinds="import sys\nsys.meet()\nWORD = 'whole'")
    found: list[str] = []
    other = threading.Thread(target=lambda: found.append(import_attribute("own_kinds:WORD", base)))

    def meet() -> None:
        other.start()
        other.join(0.1)  # it waits for this one

    monkeypatch.setattr(sys, "meet", meet, raising=False)
    assert import_attribute("own_kinds:WORD", base) == "whole"
    other.join()
    assert found == ["whole"]
