"""Names that share their bytes in a torch file, of which a safetensors file holds one: only those that the class ties.

transformers gives the name that is left out the tensor of the other where the config's class ties them. Names that lie
at one place and are not tied are two tensors with the same numbers, and without its own the second would be random. So
are those that no class of transformers could tie: bytes that are written twice lose nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import describe_opened

from .snapshot import known_architecture

if TYPE_CHECKING:
    from bigpipe.bigmodel.checkpoint import Checkpoint, ModelDescription

    from .structure import Architecture

INPUTS = re.compile(r"(^|\.)(shared|embed\w*|wte|word_embeddings|tok_embeddings)\.weight$")
"""Embeddings of tokens, which the parts of one model share whatever its head does."""


def untied(described: ModelDescription, architecture: Architecture | None = None) -> ModelDescription:
    """Return a checkpoint in which each alias that its class does not tie is a tensor of its own. architecture: what a
    class of the user's own is, where it has been asked; otherwise it is taken to tie nothing."""
    own = _own(described, architecture) if described.tensors is not None else {}
    if not own:
        return described
    tensors = dict(described.tensors or {})
    tensors |= {alias: tensors[kept] for alias, kept in own.items()}
    return replace(described, tensors=tensors, tied=_without(described.tied, own))


def untied_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """As `untied`, of a checkpoint that is open."""
    return set_free(checkpoint, _own(describe_opened(checkpoint)))


def set_free(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Return a checkpoint in which those of these names that are aliases are tensors of their own, each read where the
    bytes of both are."""
    own = {name: checkpoint.tied[name] for name in names if name in checkpoint.tied}
    if not own:
        return checkpoint
    tensors = {alias: replace(checkpoint.tensors[kept], name=alias) for alias, kept in own.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **tensors}, tied=_without(checkpoint.tied, own))


def _without(tied: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    return {alias: kept for alias, kept in tied.items() if alias not in own}


def _own(described: ModelDescription, architecture: Architecture | None = None) -> dict[str, str]:
    """Alias → stored name, of those that are not tied."""
    if not described.tied:
        return {}
    are_tied = _ties(described, architecture)
    pairs = {alias: kept for alias, kept in described.tied.items() if kept in (described.tensors or {})}
    return {alias: kept for alias, kept in pairs.items() if not are_tied(alias, kept)}


def _ties(described: ModelDescription, architecture: Architecture | None) -> Callable[[str, str], bool]:
    """What tells of two stored names whether the class ties them."""
    config = described.config
    if config is not None and described.custom is None:
        architecture = architecture or (None if "auto_map" in config else known_architecture(config))
        if architecture is None:
            return _are_inputs if _says_untied(config) else lambda *names: True
    if architecture is None:
        return lambda *names: False
    known, groups = architecture, [set(group) for group in architecture.tied]

    def are_tied(*names: str) -> bool:
        return any(all(group.intersection(known.spellings(name)) for name in names) for group in groups)

    return are_tied


def _says_untied(config: Mapping[str, Any]) -> bool:
    """Is the head one of its own? The config of a whole model comes before that of its text model."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    told = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(told) and told[0] is False


def _are_inputs(*names: str) -> bool:
    return all(INPUTS.search(name) for name in names)
