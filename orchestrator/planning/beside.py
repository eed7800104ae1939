"""What is wrong with a recipe that a look at it alone does not tell, and no work, network or store is needed for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigpipe.errors import ManifestError, Problem, UsageError
from bigpipe.files import without_detours
from bigpipe.orchestrator.recipe import Fault, Recipe, declared_parameters, load_recipe, written
from bigpipe.orchestrator.sinks import SINKS, install
from bigpipe.orchestrator.store import Store, default_root

from .content import content_paths
from .effects import written_twice
from .session import Session


def examined(
    manifests: Sequence[Path], params: Mapping[str, Any] | None, note: Callable[[str], None]
) -> dict[Path, UsageError]:
    """Return what is wrong with each manifest that is not right. params: what is set, each of it in the manifests that
    declare it; in all, where none does. note: told, in a line, of what fails no run, and of parameters without a
    value."""
    errors: dict[Path, UsageError] = {}
    for path, given in _shared_out(manifests, params or {}).items():
        try:
            _examine(load_recipe(path, written(given)), note)
        except ManifestError as error:
            if wrong := [each for each in error.problems if not _is_awaited(each, note)]:
                errors[path] = ManifestError(wrong)
        except UsageError as error:
            errors[path] = error
    return errors


def _shared_out(manifests: Sequence[Path], params: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    declared = {path: _declared(path) if params else frozenset[str]() for path in manifests}
    unknown = params.keys() - frozenset().union(*declared.values())
    return {path: {name: params[name] for name in params if name in own | unknown} for path, own in declared.items()}


def _declared(path: Path) -> frozenset[str]:
    with suppress(UsageError):  # that it is not there is told when it is read
        return declared_parameters(path)
    return frozenset()


def _examine(recipe: Recipe, note: Callable[[str], None]) -> None:
    for line in untold(recipe):
        note(line)
    found = {problem.place: problem for problem in problems_beside(recipe)}  # once for all variants of a stage
    if found:
        raise ManifestError(list(found.values()))


def _is_awaited(problem: Problem, note: Callable[[str], None]) -> bool:
    """Whether it is only that a parameter has no value yet, which is told: a run needs one, a right manifest need not
    say it."""
    if problem.code != Fault.PARAMETER_REQUIRED:
        return False
    note(f"{problem.place}: {problem.cause}: what depends on it is checked once it has one")
    return True


def problems_beside(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is not there, and destinations that two nodes share."""
    recipe = replace(recipe, path=without_detours(recipe.path))
    yield from _missing(recipe)
    yield from _written_twice(recipe)


def untold(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each parameter that no stage reads, and for each sink whose package is not installed here: no
    run fails of it."""
    for name, place in recipe.unread.items():
        yield f"{place}: no stage reads the parameter {name!r}: write ${{params.{name}}} where it belongs, or remove it"
    for name, place in recipe.sinks.items():
        if not SINKS[name].installed:
            yield f"{place}: {name} is told of no run here: it needs {SINKS[name].package}: {install(name)}"


def _missing(recipe: Recipe) -> Iterator[Problem]:
    """What the params name beside the manifest, and is not there; a checkpoint may come later."""
    for node in recipe.nodes.values():
        try:
            content_paths(node.params, recipe.path.parent, inside=False)
        except UsageError as error:
            place = node.places.of(error.field) or node.places[""]
            yield Problem(Fault.NOT_THERE, place, error.cause, error.cure)


def _written_twice(recipe: Recipe) -> Iterator[Problem]:
    session = Session(recipe=recipe, store=Store(default_root()), selected=frozenset(recipe.nodes), offline=True)
    for error in written_twice(session):
        if error.place is not None:
            yield Problem(Fault.BAD_VALUE, error.place, error.cause, error.cure)
