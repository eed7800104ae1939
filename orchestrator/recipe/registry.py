"""Where stage kinds are found: the built-in ones by name, others through the entry-point group `bigpipe.stages`, or as
`module:attribute` in a module that the manifest trusts.

Nothing is imported until a manifest uses it. Entry points are looked for only when a kind is not built in, or when all
kinds are listed: reading the metadata of every installed distribution costs more than the rest of a start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bigpipe.errors import UsageError
from bigpipe.modules import foreign, import_attribute, is_reference, only_here, top_level
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.contract import Stage
from bigpipe.trust import Trust

GROUP = "bigpipe.stages"

_KINDS = (
    "download", "estimate", "shard", "quantize", "dispatch", "distributed-infer", "finetune", "evaluate", "merge",
    "command", "save",
)  # fmt: skip
BUILT_IN: Mapping[str, str] = {kind: f"bigpipe.plugins.{kind.replace('-', '_')}:STAGE" for kind in _KINDS}

PROBES: Mapping[str, str] = {
    "torch": "bigpipe.plugins.probes:TORCH",
    "bitsandbytes": "bigpipe.plugins.probes:BITSANDBYTES",
    "launcher": "bigpipe.plugins.probes:RANKS",
}
"""What `doctor` checks → the stage it runs for that."""


class Offer(NamedTuple):
    """A kind that a manifest may use."""

    stage: Stage[Any]
    location: str
    """`module:attribute`, where workers import it from."""


def stage_kinds() -> Mapping[str, str]:
    """Return kind → `module:attribute`, built-in kinds first. Imports no kind. Raise UsageError where two
    distributions, or one and bigpipe itself, offer the same name."""
    from importlib.metadata import entry_points

    kinds, owners = dict(BUILT_IN), dict.fromkeys(BUILT_IN, "bigpipe")
    offers = {  # a set: the same distribution seen twice on sys.path is no second offer
        (entry.name, entry.value, entry.dist.name if entry.dist is not None else entry.module)
        for entry in entry_points(group=GROUP)
    }
    for name, location, owner in sorted(offers):
        if name in kinds:
            cause = f"the stage kind {name!r} is offered by {owners[name]} and by {owner}"
            raise UsageError(cause, f"uninstall one, or rename the kind in the entry points of {owner}")
        kinds[name], owners[name] = location, owner
    return kinds


def distributions_of(location: str) -> set[str]:
    """Return the distributions that offer `module:attribute` as a kind."""
    from importlib.metadata import entry_points

    return {entry.dist.name for entry in entry_points(group=GROUP) if entry.dist and entry.value == location}


def is_built_in(location: str) -> bool:
    """Return whether `module:attribute` is a part of bigpipe."""
    return top_level(location) == "bigpipe"


def locate(uses: str, trust: Trust) -> str:
    """Return `module:attribute` of the kind that is named so after `uses:`.

    Raise UsageError where nobody offers such a kind, or the module of a `module:attribute` is not trusted."""
    if ":" in uses:
        if not is_reference(uses):
            raise UsageError(f"{uses!r} is not module:name of a stage kind", "write for example my_kinds:STAGE")
        trust.require_module(uses, f"the stage kind {uses}")
        return uses
    if uses in BUILT_IN:
        return BUILT_IN[uses]
    kinds = stage_kinds()
    if uses not in kinds:
        raise UsageError(f"unknown stage kind {uses!r}", did_you_mean(uses, kinds, otherwise="there are"))
    return kinds[uses]


def load_stage(uses: str, trust: Trust = Trust(), base: Path | None = None) -> Stage[Any]:
    """Return the Stage that is named so after `uses:`; imports its module and no other of the kinds.

    base: the directory in which a trusted module is looked for first. Raise UsageError as `locate` does, and where the
    kind cannot be imported, or is not what its entry point says.
    """
    location = locate(uses, trust)
    what = f"the stage kind {uses!r} cannot be loaded from {location}"
    try:
        with foreign(what, "mend the module: it must import"):
            found = import_attribute(location, trust.home(location, base))
    except UsageError as told:
        error = told.__cause__
        if not isinstance(error, ImportError | AttributeError | SyntaxError):
            raise
        cure = "reinstall or update its distribution" if ":" not in uses else _module_cure(location, error)
        raise UsageError(f"{what}: {error}", cure) from error
    except SystemExit as error:
        raise UsageError(f"{what}: it ends the program", "mend the module: it must import") from error
    if not isinstance(found, Stage):
        raise UsageError(f"{location} is a {type(found).__name__}, not a Stage", "name a Stage value of the module")
    if found.runs_in != "inline" and (folder := only_here(location, trust.home(location, base))):
        cure = "put the module beside the recipe, or install it"
        raise UsageError(f"{location} lies in {folder}, where workers do not look for it", cure)
    if ":" not in uses and found.kind != uses:
        raise UsageError(f"{location} is the Stage of kind {found.kind!r}, not of {uses!r}", "correct its entry point")
    if is_built_in(location):
        return found
    from .following import require_followed  # of what uses others' kinds
    from .guarding import guarded

    require_followed(found, location)
    return guarded(found)


def _module_cure(location: str, error: Exception) -> str:
    module = location.partition(":")[0]
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return "put the module beside the manifest, or install it"
    if isinstance(error, AttributeError):
        return f"name a Stage value of {module}, and check that it imports"
    return f"correct {module}: it must import"


def named_stage(uses: str) -> Stage[Any]:
    """Return the Stage of a kind that somebody names: a module they name is trusted, and may lie in this directory."""
    return load_stage(uses, Trust((uses.partition(":")[0],)) if ":" in uses else Trust(), Path.cwd())
