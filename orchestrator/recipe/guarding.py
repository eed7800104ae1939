"""Kinds of others: what their functions raise that are asked in passing is told as theirs, with the line that raised
it. Of those that a session asks (`forecast`, `check`, `pin`), it keeps the traceback; `run` has a log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from bigpipe.errors import StageFailed
from bigpipe.modules import foreign
from bigpipe.orchestrator.contract import Forecast, Params, Pinned, Stage

_OF_THE_STAGE = ("unmeasured", "warms")
_OF_ITS_PLANNING = ("facts", "apart", "resumed", "leads_to")


def guarded(stage: Stage[Any]) -> Stage[Any]:
    """Return the same Stage, of which these functions raise BigpipeErrors only."""
    own: dict[str, Any] = {name: _guarded(stage, stage, name) for name in _OF_THE_STAGE}
    planning: dict[str, Any] = {name: _guarded(stage, stage.planning, name) for name in _OF_ITS_PLANNING}
    if (pin := stage.planning.pin) is not None:
        planning["pin"] = partial(_given, stage.kind, "pin", (Pinned, type(None)), pin)
    if stage.settled is not None:
        own["settled"] = partial(_settled, stage)
    own["forecast"] = partial(_given, stage.kind, "forecast", (Forecast,), stage.forecast)
    return replace(stage, **own, planning=replace(stage.planning, **planning))


def _guarded(stage: Stage[Any], holder: object, name: str) -> Callable[..., Any] | None:
    function = getattr(holder, name)
    return None if function is None else partial(_ask, stage.kind, name, function)


def _ask(kind: str, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    with foreign(f"kind {kind}: `{name}` fails", "mend it", StageFailed):
        return function(*arguments)


def _settled(stage: Stage[Any], params: Params) -> Stage[Any]:
    found: Stage[Any] = _given(stage.kind, "settled", (Stage,), _ask, stage.kind, "settled", stage.with_params, params)
    return guarded(found)


def _given(kind: str, name: str, types: tuple[type, ...], function: Callable[..., Any], *arguments: Any) -> Any:
    found = function(*arguments)
    if not isinstance(found, types):
        raise StageFailed(f"kind {kind}: `{name}` gave {found!r:.80}", f"give back a {types[0].__name__}")
    return found
