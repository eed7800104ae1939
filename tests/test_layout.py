"""The shape of the repository: links, the wheel, file sizes, what importing costs, the export list."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bigpipe

ROOT = Path(__file__).parents[1]
ROOMS = ("commandline", "orchestrator", "bigmodel", "plugins", "webpage")
HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes")
EXPORTS = [
    "Attested", "BigpipeError", "Checked", "Checkpoint", "Estimate", "Evaluation", "ManifestError", "Placement",
    "Plan", "Recipe", "Reproduction", "RunRecord", "RunResult", "Stage", "TrainedAdapter", "__version__", "attest",
    "check_directory", "estimate", "evaluate", "finetune", "load", "load_manifest", "merge_adapter",
    "open_checkpoint", "place", "plan", "quantize_checkpoint", "reproduce", "run", "runs", "save_checkpoint",
    "split_between_processes",
]  # fmt: skip


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "cli.py"]


@pytest.mark.parametrize("name", [*ROOMS, "cli.py"])
def test_links_are_relative_and_lead_to_the_rooms(name):
    link = ROOT / "src" / "bigpipe" / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == (ROOT / name).resolve()


def test_no_file_is_longer_than_450_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_the_export_list():
    assert sorted(bigpipe.__all__) == EXPORTS
    for name in EXPORTS:
        assert getattr(bigpipe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bigpipe.nonsense  # noqa: B018


def test_no_module_of_the_command_imports_a_heavy_library():
    """In a fresh interpreter: every module of every room, but for those that run only in children."""
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    names = [".".join(("bigpipe", *path.relative_to(ROOT).with_suffix("").parts)) for path in modules()]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_start_of_the_command_imports_nothing_of_the_library():
    code = "import sys, bigpipe.cli; print([name for name in sys.modules if name.startswith('bigpipe.bigmodel')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow
def test_a_wheel_holds_every_module(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("bigpipe_ml-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"bigpipe/{path.relative_to(ROOT)}" for path in modules()}
    leaves = (
        "__init__.py",
        "__main__.py",
        "environment.py",
        "errors.py",
        "faces.py",
        "files.py",
        "filesystems.py",
        "fit.py",
        "git.py",
        "modules.py",
        "machine.py",
        "redaction.py",
        "names.py",
        "passing.py",
        "plainyaml.py",
        "sizes.py",
        "testing.py",
        "trust.py",
        "versions.py",
        "py.typed",
    )
    wanted |= {f"bigpipe/{name}" for name in leaves}
    snapshots = (ROOT / "bigmodel" / "architecture" / "snapshots").glob("*.json")
    wanted |= {f"bigpipe/{path.relative_to(ROOT)}" for path in snapshots}
    shown = [path for folder in ("static", "templates") for path in (ROOT / "webpage" / folder).iterdir()]
    wanted |= {f"bigpipe/{path.relative_to(ROOT)}" for path in shown}
    assert wanted - held == set()
    assert {name.split("/")[0] for name in held} <= {"bigpipe"} | {n.split("/")[0] for n in held if ".dist-info" in n}


def imported(path: Path) -> set[str]:
    """The modules that a file imports from, late and for types too."""
    inside = path.relative_to(ROOT).parent.parts
    package = ("bigpipe", *inside) if inside != ("src", "bigpipe") else ("bigpipe",)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


ENGINE = sorted(path.name for path in (ROOT / "orchestrator").iterdir() if (path / "__init__.py").exists())


@pytest.mark.parametrize("room", ENGINE)
def test_a_room_of_the_engine_is_used_by_its_face(room):
    """From outside a room, `from bigpipe.orchestrator.ROOM import NAME`: its `__init__` offers the name."""
    folder = ROOT / "orchestrator" / room
    offered = ", ".join(re.findall(r"from \. import (.+)", (folder / "__init__.py").read_text())).split(", ")
    inner = {f"bigpipe.orchestrator.{room}.{p.stem}" for p in folder.glob("[!_]*.py") if p.stem not in offered}
    outside = [path for path in modules() if not path.is_relative_to(ROOT / "orchestrator" / room)]
    outside += (ROOT / "src/bigpipe").glob("*.py")
    passed = {str(path.relative_to(ROOT)): sorted(imported(path) & inner) for path in outside}
    assert {path: found for path, found in passed.items() if found} == {}


def test_what_is_imported_from_a_face_is_there():
    """Type checkers cannot tell: a face that imports late takes any name."""
    rooms = [f"bigpipe.{path.parent.parent.name}.{path.parent.name}" for path in ROOT.glob("[bo]*/*/__init__.py")]
    faces = {room: importlib.import_module(room) for room in rooms}
    names = set().union(*(imported(path) for path in [*modules(), *(ROOT / "src/bigpipe").glob("*.py")]))
    asked = [name.rpartition(".") for name in names if name.rpartition(".")[0] in faces]
    missing = [f"{room}.{name}" for room, _, name in asked if not hasattr(faces[room], name)]
    assert [name for name in missing if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("room", ENGINE)
def test_a_face_gives_what_it_says(room):
    """What is imported for types is what is given at run time."""
    face = importlib.import_module(f"bigpipe.orchestrator.{room}")
    for node in ast.walk(ast.parse(Path(face.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            for name in node.names if node.module else ():
                module = importlib.import_module(f"{face.__name__}.{node.module}")
                assert getattr(face, name.name) is getattr(module, name.name)


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "bigmodel").glob("*/__init__.py")))
def test_a_face_has_every_name_that_it_lists(room):
    face = importlib.import_module(f"bigpipe.bigmodel.{room}")
    assert face.__all__
    assert [name for name in face.__all__ if not hasattr(face, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        face.nonsense  # noqa: B018


DOORS = frozenset({"bigpipe.bigmodel.formats.encoders", "bigpipe.bigmodel.formats.encoders.floats"})
"""Modules beside their room's face, because few need them, or the face is too much for who does."""


def test_rooms_of_the_library_are_entered_by_their_faces():
    """What lies inside a room is imported by that room alone; all others import from its `__init__`."""
    import grimp

    graph = grimp.build_graph("bigpipe", exclude_type_checking_imports=False, cache_dir=None)
    inner = [name for name in graph.modules if name.startswith("bigpipe.bigmodel.") and name.count(".") > 2]
    entered = [
        f"{importer} imports {name}"
        for name in sorted(set(inner) - DOORS)
        for importer in sorted(graph.find_modules_that_directly_import(name))
        if f"{importer}.".partition(room := f"{'.'.join(name.split('.')[:3])}.")[1] != room
    ]
    assert entered == []


def test_no_import_circles():
    """Not even through imports inside functions, or for types alone."""
    import grimp
    import networkx

    graph = grimp.build_graph("bigpipe", cache_dir=None)
    edges = [(one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)]
    circles = [sorted(c) for c in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(c) > 1]
    assert circles == []


def test_every_test_that_needs_a_gpu_is_named_where_they_are_run():
    """By its path: what imports other tests, too, needs more packages than a machine with a GPU may have."""
    mark = "mark." + "gpu"
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if mark in path.read_text()]
    names = [str(path.relative_to(ROOT)) for path in files]
    assert len(names) > 3
    for place in ("Makefile", "CONTRIBUTING.md"):
        text = (ROOT / place).read_text()
        assert [name for name in names if name not in text] == [], place
