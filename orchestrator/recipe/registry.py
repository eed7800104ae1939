"""Where stage kinds are found: the built-in ones by name, others through the entry-point group `bigpipe.stages`.

Nothing is imported until a manifest uses it. Entry points are looked for only when a kind is not built in, or when all
kinds are listed: reading the metadata of every installed distribution costs more than the rest of a start.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract.stage import Stage

from .problems import did_you_mean

GROUP = "bigpipe.stages"

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "download": "bigpipe.plugins.download:STAGE",
        "estimate": "bigpipe.plugins.estimate:STAGE",
        "shard": "bigpipe.plugins.shard:STAGE",
        "quantize": "bigpipe.plugins.quantize:STAGE",
        "dispatch": "bigpipe.plugins.dispatch:STAGE",
        "distributed-infer": "bigpipe.plugins.distributed_infer:STAGE",
        "save": "bigpipe.plugins.save:STAGE",
    }
)

PROBES: Mapping[str, str] = MappingProxyType(
    {
        "torch": "bigpipe.plugins.probes:TORCH",
        "bitsandbytes": "bigpipe.plugins.probes:BITSANDBYTES",
        "launcher": "bigpipe.plugins.probes:RANKS",
    }
)
"""What `doctor` checks → the stage it runs for that."""


def stage_kinds() -> Mapping[str, str]:
    """Kind → `module:attribute`, built-in kinds first. Imports no kind.

    Raises UsageError where two distributions, or one and bigpipe itself, offer the same name.
    """
    from importlib.metadata import entry_points

    kinds = dict(BUILT_IN)
    owners = dict.fromkeys(BUILT_IN, "bigpipe")
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        owner = entry.dist.name if entry.dist is not None else entry.module
        if entry.name in kinds:
            # The same distribution seen twice on sys.path is no second offer.
            if (kinds[entry.name], owners[entry.name]) == (entry.value, owner):
                continue
            cause = f"the stage kind {entry.name!r} is offered by {owners[entry.name]} and by {owner}"
            raise UsageError(cause, f"uninstall one, or rename the kind in the entry points of {owner}")
        kinds[entry.name], owners[entry.name] = entry.value, owner
    return MappingProxyType(kinds)


def locate(kind: str) -> str:
    """`module:attribute` of one kind. Installed distributions are looked through only where it is not built in.

    Raises UsageError for a kind that nobody offers.
    """
    if kind in BUILT_IN:
        return BUILT_IN[kind]
    kinds = stage_kinds()
    if kind not in kinds:
        raise UsageError(f"unknown stage kind {kind!r}", did_you_mean(kind, kinds, otherwise="there are"))
    return kinds[kind]


def load_stage(kind: str) -> Stage[Any]:
    """The Stage of one kind; imports its module and no other.

    Raises UsageError for a kind that nobody offers, or that cannot be imported, or is not what its entry point says.
    """
    target = locate(kind)
    module, _, attribute = target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        cause = f"the stage kind {kind!r} cannot be loaded from {target}: {error}"
        raise UsageError(cause, "reinstall or update the distribution that offers it") from error
    if not isinstance(found, Stage) or found.kind != kind:
        what = f"a Stage of kind {found.kind!r}" if isinstance(found, Stage) else f"a {type(found).__name__}"
        raise UsageError(f"{target} is {what}, not the Stage of kind {kind!r}", "correct its entry point")
    return found
