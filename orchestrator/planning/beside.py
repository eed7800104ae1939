"""What is wrong with a recipe that a look at it alone does not tell, and no work, network or store is needed for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bigpipe.errors import Problem, UsageError
from bigpipe.files import without_detours
from bigpipe.orchestrator.recipe import Fault, Recipe
from bigpipe.orchestrator.sinks import SINKS, install
from bigpipe.orchestrator.store import Store, default_root

from .content import content_paths
from .effects import written_twice
from .session import Session


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
