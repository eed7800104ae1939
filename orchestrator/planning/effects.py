"""What nodes write outside the store must be nobody's source: not the recipe's, not another node's, not the store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bigpipe.errors import BigpipeError, UsageError
from bigpipe.files import lies_in, real_folders
from bigpipe.modules import code_files, top_level
from bigpipe.orchestrator.recipe import Node, is_built_in

from .content import content_paths
from .session import Session

CURE = "choose a destination that nothing else uses, such as dist/model"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a destination must not replace."""

    what: str
    place: str
    """An absolute path, or an address."""
    whole: bool = True
    """Nor may a destination lie in it."""
    cure: str = CURE

    def clashes(self, destination: str) -> bool:
        return _lies_in(self.place, destination) or (self.whole and _lies_in(destination, self.place))


def _lies_in(one: str, other: str) -> bool:
    if os.path.isabs(one) and os.path.isabs(other):
        return lies_in(Path(one), Path(other))
    return one == other or one.startswith(other.rstrip("/") + "/")


def refuse_clash(session: Session, node: Node) -> None:
    """Raise UsageError where `node` would write over, or into, what must stay."""
    if written := _written(session, node):
        _refuse(node, written, chain(_kept(session), _written_by(session.nodes, session, node)))


def clash_with(session: Session, node: Node, others: Iterable[Node]) -> BigpipeError | None:
    """Return an error where `node` would write to what one of those writes that have their turn in this run: of two
    that may be skipped, both were not."""
    try:
        if written := _written(session, node):
            _refuse(node, written, _written_now(session, node, others))
    except BigpipeError as error:
        error.place = error.place or node.places.of(error.field)
        return error
    return None


def _written_now(session: Session, writer: Node, others: Iterable[Node]) -> Iterator[Kept]:
    for node in others:
        for name in chain.from_iterable(_written(session, node).values()):
            yield Kept(f"what {node.name} writes in this run", name, cure=_apart(node, writer) or CURE)


def written_twice(session: Session) -> Iterator[UsageError]:
    """Yield where a node writes to where one before it does: what is known without looking anywhere."""
    for index, node in enumerate(session.nodes):
        try:
            if written := _written(session, node):
                _refuse(node, written, _written_by(session.nodes[:index], session, node))
        except UsageError as error:
            error.place = error.place or node.places.of(error.field)
            yield error


def _refuse(node: Node, written: Mapping[str, Sequence[str]], keep: Iterable[Kept]) -> None:
    for kept in keep:
        for field, names in written.items():
            if any(map(kept.clashes, names)):
                cause = f"{node.name} would write to {names[0]}, which is, holds or lies in {kept.what}"
                raise UsageError(cause, kept.cure, field=field)


def _written(session: Session, node: Node) -> Mapping[str, Sequence[str]]:
    writes = node.kind.planning.writes
    return session.ask(node, writes, session.foreseeing(node)) if writes else {}


def _kept(session: Session) -> Iterator[Kept]:
    yield Kept("the store", str(session.store.root))
    if session.shared is not None:
        yield Kept("the remote store", session.shared.place)
    yield from _files("the recipe", [session.recipe.path])
    for node in session.recipe.nodes.values():
        yield from _read(session, node)


def _written_by(nodes: Sequence[Node], session: Session, writer: Node) -> Iterator[Kept]:
    for node in nodes:
        if node is not writer and not (_conditional(session, node) and _conditional(session, writer)):
            names = chain.from_iterable(_written(session, node).values())
            cure = _apart(node, writer) or CURE
            yield from (Kept(f"what {node.name} writes", name, cure=cure) for name in names)


def _apart(node: Node, other: Node) -> str:
    """How two variants of a stage get places of their own; "" where they are none."""
    axes = [axis for axis, value in node.variant.items() if other.variant.get(axis) != value]
    if node.stage != other.stage or not axes:
        return ""
    return f"give each variant a place of its own, such as dist/{'-'.join(f'${{matrix.{axis}}}' for axis in axes)}"


def _conditional(session: Session, node: Node) -> bool:
    """May it be skipped? Of two that may, one is perhaps meant to run where the other does not."""
    above = session.recipe.ancestors(node.name)
    nodes = [session.recipe.nodes[name] for name in (node.name, *above)]
    return any(each.when is not None or (each.first is not None and each.on_fail == "skip") for each in nodes)


def _read(session: Session, node: Node) -> Iterator[Kept]:
    """What a node takes from outside the store: all that its key depends on, and more."""
    what, reads, leads_to = f"what {node.name} reads", node.kind.planning.reads, node.kind.planning.leads_to
    trees, files = content_paths(node.params, session.base, strict=False)
    yield from (Kept(what, str(tree)) for tree in trees)
    yield from _files(what, files)
    if leads_to is not None:
        with suppress(BigpipeError):  # of a node that is not selected, something may be missing
            yield from _files(what, list(session.ask(node, leads_to, session.base)))
    if not is_built_in(node.location):
        home = session.recipe.trust.home(node.location, session.base)
        code = [path for _, path in code_files(top_level(node.location), home)]
        yield from _files(f"the code of {node.name}", code)
    if node.launch.config_file is not None:
        yield from _files(what, [session.base / node.launch.config_file])
    if reads is not None:
        yield from (Kept(what, place) for place in session.ask(node, reads, session.foreseeing(node)))


def _files(what: str, files: list[Path]) -> Iterator[Kept]:
    yield from (Kept(what, str(place), whole=False) for place in sorted(real_folders(files)))
