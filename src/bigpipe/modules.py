"""Python modules that are named as `module:name`: where their source lies, and their import."""

from __future__ import annotations

import ast
import errno
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, reduce
from importlib import import_module, invalidate_caches
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

from bigpipe.errors import BigpipeError, UsageError, gpu_memory_ran_out

RAN_OUT = (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)
Stamps = frozenset[tuple[str, int, int]]

_imported: dict[str, Stamps] = {}
"""Top-level module → (path, mtime in ns, size) of its code when `import_attribute` last met it."""
_appended: list[str] = []
"""Directories that `import_attribute` has put at the end of `sys.path`, the last one first."""
_lock = threading.RLock()
"""Held while something is imported: what another thread has begun to import is not there yet."""
_IMPORTING = {"late": "target", "import_module": "name", "__import__": "name"}
"""Functions that import what their first argument names → what it is called."""
_INSTALLED = {"site-packages", "dist-packages", Path(os.__file__).parent.name}
"""Names of directories in which nobody edits what lies there."""


def top_level(reference: str) -> str:
    """Return `package` of `package.module:name`."""
    return reference.partition(":")[0].partition(".")[0]


def _own_folder() -> str:
    """The directory of the script, else the one it was started in, that Python itself puts before all else in
    `sys.path`; no worker has it there. "": there is none."""
    if sys.flags.safe_path:
        return ""
    main = sys.modules["__main__"]
    script = None if getattr(main, "__spec__", None) else getattr(main, "__file__", None)
    folder = os.path.dirname(os.path.abspath(script)) if script else os.getcwd()
    everywhere = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return "" if folder in map(os.path.abspath, everywhere) else folder


def _searched(base: Path | None, *, first: bool) -> list[str]:
    """Where modules are looked for, in the order of a worker; then where this process alone looks. first: in `base`
    before what is installed, else after it."""
    own, home = _own_folder(), [str(base)] if base else []
    everywhere = [each for each in sys.path if each not in _appended and os.path.abspath(each) != own]
    return [*home, *everywhere, own] if first else [*everywhere, *home, own]


def _locations(top: str, base: Path | None, *, first: bool = True) -> tuple[Path, ...]:
    """Where a top-level module lies. first: `base` is looked at before what is installed, else after it."""
    try:
        spec = PathFinder.find_spec(top, _searched(base, first=first)) or find_spec(top)
    except (ValueError, ImportError):  # `__main__`, or no name
        return ()
    if spec is None:
        return ()
    if spec.submodule_search_locations is not None:
        return tuple(Path(place) for place in spec.submodule_search_locations)
    return (Path(spec.origin),) if spec.origin and spec.has_location else ()


def only_here(reference: str, base: Path | None) -> str:
    """Return the directory in which the module of `module:name` lies, where this process alone looks: that of the
    script. "": workers find it too."""
    own, found = _own_folder(), _locations(top_level(reference), base)
    return own if own and own != str(base) and {os.path.dirname(place) for place in found} == {own} else ""


def installed_in(top: str, base: Path | None) -> Path | None:
    """Return the directory of installed packages in which a top-level module lies; None where it lies elsewhere."""
    return next((place.parent for place in _locations(top, base) if _is_installed(place)), None)


def source_files(top: str, base: Path | None) -> list[tuple[str, Path]]:
    """Return (relative path, path) of all Python files of a top-level module or package, sorted; [] if there are none.
    Links to nothing, which editors leave beside what they edit, are none. base: a directory that is looked at first,
    before what is installed."""
    return _sources(_locations(top, base))


def _sources(places: Iterable[Path]) -> list[tuple[str, Path]]:
    found = []
    for place in places:
        if place.is_dir():
            found += [(str(file.relative_to(place)), file) for file in place.rglob("*.py") if file.is_file()]
        else:
            found.append((place.name, place))
    return sorted(found)


def code_files(top: str, base: Path | None) -> list[tuple[str, Path]]:
    """Return (name, path) of all that `source_files` finds, and of the modules from beside it that it imports, and that
    these import: from `base`, or from where it lies itself, unless that is where packages are installed.
    What is imported under a name that is only made up while it runs is not found."""
    found, own = source_files(top, base), _locations(top, base)
    beside = {os.path.realpath(folder) for folder in (*(place.parent for place in own), *([base] if base else []))}
    beside = {folder for folder in beside if not _is_installed(Path(folder))}
    known, waiting = {top, __package__, *sys.stdlib_module_names}, []
    if beside and not any(map(_is_installed, own)):
        waiting = [path for _, path in found]
    while waiting:
        for name in sorted(_imported_by(waiting.pop()) - known):
            known.add(name)
            places = _locations(name, base, first=False)
            if {os.path.realpath(place.parent) for place in places} & beside:
                more = [(f"{name}:{file}", path) for file, path in _sources(places)]
                found += more
                waiting += [path for _, path in more]
    return found


def _is_installed(path: Path) -> bool:
    return not _INSTALLED.isdisjoint(path.parts)


def _imported_by(file: Path) -> frozenset[str]:
    """The top-level names of the modules that a file imports, as far as its text tells: none, if it is no Python."""
    facts = file.stat()
    return _imported_by_text(file, (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))


@lru_cache(4096)
def _imported_by_text(file: Path, facts: tuple[int, ...]) -> frozenset[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of its escapes: whoever runs it is told
            tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    nodes = list(ast.walk(tree))
    aliases = [each for node in nodes if isinstance(node, ast.ImportFrom) for each in node.names if each.asname]
    importing = _IMPORTING | {str(each.asname): _IMPORTING[each.name] for each in aliases if each.name in _IMPORTING}
    return frozenset(top_level(name) for node in nodes for name in _names_of(node, importing)) - {""}


def _names_of(node: ast.AST, importing: Mapping[str, str]) -> Iterator[str]:
    """The modules that a statement or a call names, where they are no relative ones."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module or ""
    elif isinstance(node, ast.Call):
        called = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
        told = [*node.args[:1], *(each.value for each in node.keywords if each.arg == importing.get(called, ""))]
        if called in importing and told and isinstance(told[0], ast.Constant) and isinstance(told[0].value, str):
            yield told[0].value


@contextmanager
def foreign(what: str, cure: str, kind: type[BigpipeError] = UsageError) -> Iterator[None]:
    """Inside, code runs that is not bigpipe's, over what a user wrote: whatever it raises becomes an error of that
    kind, which says `what`, the exception, and the line that raised it. Memory or disk that ran out stays so."""
    try:
        yield
    except (BigpipeError, MemoryError):
        raise
    except Exception as error:
        ran_out = getattr(error, "errno", None) in RAN_OUT or "allocate memory" in str(error)
        if ran_out or gpu_memory_ran_out(error):
            raise
        raise kind(f"{what}: {said_by(error)} ({raised_at(error)})", cure) from error


def said_by(error: BaseException) -> str:
    """Return what an exception is and says, in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:500]}" if said else type(error).__name__


def raised_at(error: BaseException) -> str:
    """Return `file:line` of the innermost call outside the standard library and what is installed, else of the
    innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = (str(Path(__file__).parent), str(Path(os.__file__).parent), "<")
    own = [each for each in frames if not each.filename.startswith(theirs) and "site-packages" not in each.filename]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def missing_name(reference: str, base: Path | None) -> str | None:
    """Return why importing `module:name` must fail, by the source alone; None where it need not. Where in its directory
    or package a module lies, and what it names, is looked up as `import_attribute` does; nothing is imported."""
    module, _, name = reference.partition(":")
    file = _file_of(reference, base)
    if file is None:
        return f"there is no module {module}" if source_files(top_level(reference), base) else None
    try:
        body = ast.parse(file.read_bytes(), str(file))
    except SyntaxError as error:
        return f"{file}:{error.lineno}: {error.msg}"
    names = set(_bound(body))
    known = names & {"*", "__getattr__", name.partition(".")[0]}
    return None if known else f"{file} has nothing that is named {name.partition('.')[0]}"


def keywords_of(reference: str, base: Path | None) -> frozenset[str] | None:
    """Return the names of what may be handed to the function `module:name` by keyword, by the source alone; None where
    that does not tell: another object than a plain function, or one that takes any. Nothing is imported."""
    file, name = _file_of(reference, base), reference.partition(":")[2]
    if file is None:
        return None
    found = [node for node in ast.parse(file.read_bytes()).body if getattr(node, "name", "") == name]
    if len(found) != 1 or not isinstance(found[0], ast.FunctionDef) or found[0].decorator_list or found[0].args.kwarg:
        return None
    return frozenset(each.arg for each in (*found[0].args.args, *found[0].args.kwonlyargs))


def _file_of(reference: str, base: Path | None) -> Path | None:
    """Where the source of the module of `module:name` lies."""
    top, *below = reference.partition(":")[0].split(".")
    files = {relative.removesuffix(".py").removesuffix("/__init__"): file for relative, file in source_files(top, base)}
    return files.get("/".join(below) or "__init__") or files.get(top if not below else "")


def _bound(tree: ast.AST) -> Iterator[str]:
    """All names that are given a meaning anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def is_reference(text: str) -> bool:
    """Return whether it has the form `module:name`, either of which may have dots."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def import_attribute(reference: str, base: Path | None = None) -> Any:
    """Return what `module:name` names; the module is the one in the directory `base`, if it is there, else installed.

    Source that changed since it was imported here, or lies elsewhere now, is imported anew. Modules beside it in `base`
    can be imported too, after all that is installed. Raise ImportError or AttributeError.
    """
    if not is_reference(reference):
        raise ImportError(f"{reference!r} is not module:name")
    module, _, name = reference.partition(":")
    top = top_level(reference)
    if top == __package__:  # what runs here does not change
        return getattr(import_module(module), name)
    with _lock, _in_order(base):
        stamps = _stamps(top, base)
        if any(_is_old(one, found) for one, found in stamps.items()):
            for one in stamps:
                _forget(one)
        if top not in sys.modules and base is not None:
            _import_from(top, base)
        found = import_module(module)
        _imported.update(stamps)
    return reduce(getattr, name.split("."), found)


def _stamps(top: str, base: Path | None) -> dict[str, Stamps]:
    """Of a top-level module, and of those that it imports from beside it, what tells whether their code changed."""
    facts: dict[str, set[tuple[str, int, int]]] = {top: set()}
    for name, file in code_files(top, base):
        beside, colon, _ = name.partition(":")
        found = file.stat()
        facts.setdefault(beside if colon else top, set()).add((str(file), found.st_mtime_ns, found.st_size))
    return {name: frozenset(found) for name, found in facts.items()}


def _is_old(top: str, stamps: Stamps) -> bool:
    """Is what was imported under this name other code than lies there now? What others imported, and whose file was
    written after this process began, may be."""
    if not stamps or top not in sys.modules:
        return False
    if top in _imported:
        return _imported[top] != stamps
    file = getattr(sys.modules[top], "__file__", None)
    elsewhere = file is not None and os.path.realpath(file) not in {os.path.realpath(path) for path, _, _ in stamps}
    return elsewhere or max(changed for _, changed, _ in stamps) > _began()


@cache
def _began() -> float:
    """When this process began, in nanoseconds since 1970."""
    import psutil

    return float(psutil.Process().create_time() * 1e9)


@contextmanager
def _in_order(base: Path | None) -> Iterator[None]:
    """Inside, modules are found in the order in which workers find them. The directory stays in `sys.path`, before
    those that were put there for others: functions may import, too."""
    own, path = _own_folder(), [each for each in sys.path if each not in _appended]
    everywhere = [each for each in path if os.path.abspath(each) != own]
    home = [] if base is None or str(base) in map(os.path.abspath, path) else [str(base)]
    _appended[:] = [*home, *(each for each in _appended if each not in home)]
    inside = [*everywhere, *home, *(each for each in path if each not in everywhere), *_appended[len(home) :]]
    sys.path[:] = inside
    try:
        yield
    finally:
        added = [each for each in sys.path if each not in inside and each not in _appended]
        sys.path[:] = [*added, *path, *_appended]


def _forget(top: str) -> None:
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]
    invalidate_caches()


def _import_from(top: str, base: Path) -> None:
    spec = PathFinder.find_spec(top, [str(base)])
    if spec is None or spec.loader is None:
        return
    sys.modules[top] = module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[top])
    except BaseException:
        del sys.modules[top]
        raise
