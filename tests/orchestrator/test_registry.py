"""Stage kinds: the built-in ones, and those of real distributions on the path."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from support.workshop import Workshop, statuses

import bigpipe
from bigpipe.errors import ManifestError, UsageError
from bigpipe.machine import Machine
from bigpipe.modules import code_files
from bigpipe.orchestrator.planning.content import source_digest
from bigpipe.orchestrator.planning.keys import identity
from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.recipe.registry import BUILT_IN, load_stage, stage_kinds
from bigpipe.orchestrator.store.hashing import StatMemo
from bigpipe.trust import Trust

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
def memo(tmp_path: Path) -> StatMemo:
    return StatMemo(tmp_path / "memo")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return folder


def test_the_built_in_kinds_come_first() -> None:
    assert list(stage_kinds())[:11] == [
        "download", "estimate", "shard", "quantize", "dispatch", "distributed-infer", "finetune", "evaluate",
        "merge", "command", "save",
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
        ("bad = json:dumps", "json:dumps is a function, not a Stage"),
        ("bad = bigpipe.plugins.shard:STAGE", "is the Stage of kind 'shard', not of 'bad'"),
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


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ValueError('no key')", r"ValueError: no key \(.*broken_kind_0\.py:1\)"),
        ("import sys\nsys.exit(0)", "it ends the program"),
        ("import os\nos.environ['NO_SUCH_KEY']", "KeyError: 'NO_SUCH_KEY'"),
    ],
)
def test_a_kind_whose_module_fails_is_no_bug_of_ours(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "broken_kind_0.py").write_text(source)
    (tmp_path / "m.yaml").write_text(
        "version: 1\ntrust: {modules: [broken_kind_0]}\nstages:\n  s: {uses: 'broken_kind_0:STAGE'}\n"
    )
    with pytest.raises(ManifestError, match=said) as placed:
        load_recipe(tmp_path / "m.yaml", environment={})
    (problem,) = placed.value.problems
    assert (problem.code, problem.place.line, problem.place.column) == ("BP109", 4, 13)


NOTE = """
from pathlib import Path
from bigpipe.orchestrator.stage import Forecast, Metrics, Params, Stage, StageResult
from {helper} import TEXT


class NoteParams(Params):
    width: int = 1
    \"\"\"How wide the note is.\"\"\"


class NoteMetrics(Metrics):
    length: int
    \"\"\"Of the note.\"\"\"


def run(params, context):
    (context.out / "note.txt").write_text(TEXT)
    return StageResult(NoteMetrics(length=len(TEXT)))


STAGE = Stage(kind="note", version=1, params=NoteParams, metrics=NoteMetrics, inputs={{}}, output="report",
              run=run, forecast=lambda params, context: Forecast(), runs_in="{runs_in}")
"""
RECIPE = "version: 1\ntrust: {modules: [%s]}\nstages:\n  note: {uses: '%s:STAGE'}\n"


def write_package(folder: Path, name: str, text: str, runs_in: str = "process") -> None:
    """A package whose kind writes a text that another module of it holds."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").write_text(NOTE.format(helper=".texts", runs_in=runs_in))
    (folder / name / "texts.py").write_text(f"TEXT = {text!r}\n")


def note(result: Any) -> str:
    return str((result.path("note") / "note.txt").read_text())


@pytest.mark.parametrize("runs_in", ["process", "inline"])
def test_a_kind_in_a_trusted_module_beside_the_manifest_and_its_edits(workshop: Workshop, runs_in: str) -> None:
    """Workers find it too; a change in any module of its package is another computation, and is said to be one."""
    name = f"notes_{runs_in}"
    write_package(workshop.folder, name, "first", runs_in)
    one = workshop.run(RECIPE % (name, name))
    assert (note(one), statuses(one)) == ("first", {"note": "succeeded"})
    assert statuses(workshop.run()) == {"note": "cached"}
    write_package(workshop.folder, name, "the second", runs_in)
    reason = workshop.json("why", "recipe.yaml", "note")["nodes"]["note"]["reason"]
    assert reason.startswith("code ")
    assert " → " in reason
    two = workshop.run()
    assert (note(two), statuses(two)) == ("the second", {"note": "succeeded"})


@pytest.mark.parametrize("runs_in", ["process", "inline"])
def test_a_module_beside_it_that_a_kind_imports_counts_through_others_too(workshop: Workshop, runs_in: str) -> None:
    kind, helper, far = (f"{name}_{runs_in}" for name in ("writer", "words", "letters"))
    (workshop.folder / f"{kind}.py").write_text(NOTE.format(helper=helper, runs_in=runs_in))
    (workshop.folder / f"{helper}.py").write_text(f"import json, {far} as letters\nTEXT = letters.TEXT\n")
    (workshop.folder / far).mkdir()
    (workshop.folder / far / "__init__.py").write_text("TEXT = 'first'\n")
    (workshop.folder / "unrelated.py").write_text("TEXT = 'first'\n")
    assert note(workshop.run(RECIPE % (kind, kind))) == "first"
    (workshop.folder / "unrelated.py").write_text("TEXT = 'the second'\n")
    assert statuses(workshop.run()) == {"note": "cached"}
    (workshop.folder / far / "__init__.py").write_text("TEXT = 'the second'\n")
    two = workshop.run()
    assert (note(two), statuses(two)) == ("the second", {"note": "succeeded"})


def test_two_kinds_of_one_module_with_one_name_have_results_of_their_own(workshop: Workshop) -> None:
    (workshop.folder / "two_texts.py").write_text("TEXT = 'first'\n")
    second = "from dataclasses import replace\ndef other(params, context):\n    global TEXT\n    TEXT = 'second'\n"
    second += "    return run(params, context)\nOTHER = replace(STAGE, run=other)\n"
    (workshop.folder / "two_kinds.py").write_text(NOTE.format(helper="two_texts", runs_in="inline") + second)
    assert note(workshop.run(RECIPE % ("two_kinds", "two_kinds"))) == "first"
    again = workshop.run((RECIPE % ("two_kinds", "two_kinds")).replace("STAGE", "OTHER"))
    assert (note(again), statuses(again)) == ("second", {"note": "succeeded"})
    assert "two_kinds:STAGE@" in again["note"].reason
    assert "two_kinds:OTHER@" in again["note"].reason


def test_the_module_beside_the_manifest_counts_not_an_installed_namesake(workshop: Workshop, site: Path) -> None:
    write_package(site, "notes_twice", "installed", "inline")
    write_package(workshop.folder, "notes_twice", "beside", "inline")
    text = RECIPE % ("notes_twice", "notes_twice")
    assert note(workshop.run(text)) == "beside"
    other = workshop.folder / "other"
    other.mkdir()
    write_package(other, "notes_twice", "of the other recipe", "inline")
    (other / "recipe.yaml").write_text(text)
    assert note(bigpipe.run(other / "recipe.yaml")) == "of the other recipe"


def test_an_edited_kind_of_a_distribution_runs_again(workshop: Workshop, site: Path) -> None:
    install(
        site, "noter", "note = noter_plugin:STAGE", noter_plugin=NOTE.format(helper="noter_texts", runs_in="inline")
    )
    (site / "noter_texts.py").write_text("TEXT = 'a'\n")
    text = "version: 1\nstages:\n  note: {uses: note}\n"
    assert statuses(workshop.run(text)) == {"note": "succeeded"}
    assert statuses(workshop.run()) == {"note": "cached"}
    with (site / "noter_plugin.py").open("a") as source:
        source.write("# edited\n")
    assert statuses(workshop.run()) == {"note": "succeeded"}
    (site / "noter_texts.py").write_text("TEXT = 'bb'\n")
    assert note(workshop.run()) == "bb"


def test_an_upgrade_of_a_distribution_is_another_kind_whatever_it_changed(tmp_path: Path, memo: StatMemo) -> None:
    packages = tmp_path / "site-packages"
    install(packages, "wordy", "words = wordy_kinds:STAGE", wordy_kinds="STAGE = 1\n")
    sys.path.insert(0, str(packages))
    digests: list[str | None] = []
    try:
        for version, words in [("1.0", "sha256=a"), ("1.0", "sha256=b"), ("2.0", "sha256=b")]:
            record = f"wordy_kinds.py,,\nwordy_words.json,{words},1\nwordy_kinds.pyc,sha256={len(digests)},1\n"
            (packages / "wordy-1.0.dist-info" / "RECORD").write_text(record)
            (packages / "wordy-1.0.dist-info" / "METADATA").write_text(f"Name: wordy\nVersion: {version}\n")
            os.utime(packages, ns=(len(digests), len(digests)))
            digests.append(source_digest("wordy_kinds:STAGE", None, memo))
        assert len(set(digests)) == 3
        (packages / "wordy-1.0.dist-info" / "RECORD").write_text(record.replace("sha256=2", "sha256=9"))
        os.utime(packages, ns=(9, 9))
        assert source_digest("wordy_kinds:STAGE", None, memo) == digests[-1]
    finally:
        sys.path.remove(str(packages))


def test_what_an_editor_leaves_beside_a_module_is_no_source(tmp_path: Path) -> None:
    write_package(tmp_path, "edited_kind", "text")
    (tmp_path / "edited_kind/.#texts.py").symlink_to("ada@laptop.1234:1700000000")
    (tmp_path / "edited_kind/odd.py").mkdir()
    assert [name for name, _ in code_files("edited_kind", tmp_path)] == ["__init__.py", "texts.py"]


@pytest.mark.parametrize(
    "text",
    [
        "import json, \\\n    beside as helper",
        "from beside \\\n    import TEXT",
        "try: import beside\nexcept ImportError: beside = None",
        "def run():\n    if True: from beside.inner import TEXT",
        "STAGE = Stage(run=stage.late('beside:run'))",
        "STAGE = Stage(run=stage.late(target='beside:run'))",
        "import importlib; TEXT = importlib.import_module('beside').TEXT",
        "from importlib import import_module as imp; TEXT = imp(name='beside').TEXT",
    ],
)
def test_a_module_beside_a_kind_counts_however_it_is_imported(tmp_path: Path, text: str) -> None:
    (tmp_path / "beside.py").write_text("import far")
    (tmp_path / "far.py").write_text("no Python: 'import unrelated'")
    (tmp_path / "unrelated.py").write_text("")
    (tmp_path / "some_kind.py").write_text(f'"""\nimport unrelated\n"""\nfrom .unrelated import x\n{text}\n')
    found = [name for name, _ in code_files("some_kind", tmp_path)]
    assert found == ["some_kind.py", "beside:beside.py", "far:far.py"]


def test_what_is_installed_beside_a_kind_is_not_read(site: Path) -> None:
    packages = site / "site-packages"
    packages.mkdir()
    (packages / "one_kind.py").write_text("import one_library\n")
    (packages / "one_library.py").write_text("\n")
    sys.path.append(str(packages))
    try:
        assert [name for name, _ in code_files("one_kind", None)] == ["one_kind.py"]
    finally:
        sys.path.remove(str(packages))


def test_a_built_in_kind_counts_by_its_version_alone(workshop: Workshop) -> None:
    workshop.manifest.write_text("version: 1\nstages:\n  d: {uses: download, with: {repo: a/b}}\n")
    node = bigpipe.load_manifest(workshop.manifest).nodes["d"]
    memo = StatMemo(workshop.folder / "memo")
    found = identity(node, base=workshop.folder, memo=memo, machine=Machine("", 1, 1, 1, 1), trust=Trust())
    assert found.code is None
    assert "code" not in found.as_json


def test_a_module_that_is_not_trusted_is_refused_and_not_imported(workshop: Workshop) -> None:
    write_package(workshop.folder, "notes_strange", "strange")
    workshop.manifest.write_text(RECIPE % ("another", "notes_strange"))
    with pytest.raises(ManifestError) as caught:
        bigpipe.load_manifest(workshop.manifest)
    (problem,) = caught.value.problems
    assert (problem.code, problem.place.line, problem.place.column) == ("BP110", 4, 16)
    assert (problem.cause, problem.cure) == (
        "the stage kind notes_strange:STAGE: module notes_strange is not trusted",
        "read its source and, if you trust it, write `trust: {modules: [notes_strange]}`",
    )
    assert "notes_strange" not in sys.modules


def test_what_stands_under_the_fields_of_such_a_kind_reaches_reference_and_schema(workshop: Workshop) -> None:
    write_package(workshop.folder, "notes_shown", "x")
    page = workshop.command("kinds", "notes_shown:STAGE").stdout
    assert "How wide the note is." in page
    assert "Of the note." in page
    shown = workshop.json("kinds", "notes_shown:STAGE")["kinds"]["notes_shown:STAGE"]
    assert shown["params"]["properties"]["width"]["description"] == "How wide the note is."
    assert shown["metrics"]["properties"]["length"]["description"] == "Of the note."
    schema = json.loads(workshop.command("schema", "notes_shown:STAGE").stdout)
    assert schema["definitions"]["notes_shown:STAGE"]["properties"]["width"]["description"] == "How wide the note is."


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


def test_a_recipe_is_read_without_what_its_names_stand_for() -> None:
    """Formats and tasks are names → `module:NAME`: to check one, or to ask what a key depends on, imports no more.
    A task that is given arguments knows which it takes, and is read for that."""
    code = """
import sys
from pathlib import Path
from bigpipe.machine import Machine
from bigpipe.modules import code_files
from bigpipe.orchestrator.recipe import load_recipe
for node in load_recipe(Path("manifests/quickstart.yaml")).nodes.values():
    if node.kind.planning.facts:
        node.kind.planning.facts(node.params, Machine("here", 1, 1, 1, 1))
print(*sorted(name.removeprefix("bigpipe.bigmodel.") for name in sys.modules if name.startswith("bigpipe.bigmodel.")))
"""
    environment = {"PYTHONPATH": ":".join(sys.path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=root
    )
    assert done.stdout.split() == [
        "architecture", "architecture.texts", "engines", "engines.engine", "engines.registry", "engines.transformers",
        "formats", "formats.bitsandbytes", "formats.registry", "formats.widths",
        "memo", "placement", "placement.devices", "sources", "tasks", "tasks.arguments", "tasks.registry", "tasks.task",
        "tasks.text_generation", "tasks.together", "tasks.tokenizing",
    ], done.stderr  # fmt: skip


WITHOUT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dispatch": ({}, {"limit_tokens_per_second"}),  # whether the placement streams layers, nobody knows before
    "distributed-infer": ({"task": "text-generation", "prompts": ["one"]}, set()),
    "evaluate": ({"data": "text.txt"}, set()),
    "finetune": ({"data": ["one"], "max_steps": 1}, set()),
}
"""Kind → the least of its params, and metrics of which these do not tell that they are not measured."""


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_number_that_may_lack_is_said_to_lack_before_anything_runs(name: str) -> None:
    """Else a gate on it is refused only after the work."""
    kind = load_stage(name)
    fields = kind.metrics.model_fields.items()
    optional = {metric for metric, field in fields if {float, NoneType} <= set(get_args(field.annotation))}
    if not optional:
        return
    params, told_later = WITHOUT[name]
    assert kind.unmeasured is not None
    asked = kind.params.model_validate(params)
    assert {metric for metric in optional if kind.unmeasured(asked, ["model"], metric) is None} == told_later
