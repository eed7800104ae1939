"""What a published model says of how it was made: the provenance that `save` writes, else its config and its card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.formats import BUILT_IN, format_of, plain_dtype
from bigpipe.bigmodel.hub import COMMIT, Choice
from bigpipe.bigmodel.publishing import Provenance, read_card, read_provenance
from bigpipe.bigmodel.quantization import Settings
from bigpipe.errors import UsageError
from bigpipe.names import listed

CURE = "name what it was made from: --source OWNER/NAME@COMMIT, or a directory"
RECOMPUTED = ("download", "shard", "quantize")
UNTOUCHING = ("estimate", "evaluate", "distributed-infer", "dispatch", "finetune", "save")
"""Kinds that change no weights of the model that they are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model on the Hub or in a directory."""

    place: str
    """`owner/name`, or a path."""
    commit: str | None = None
    """None: not recorded, or a directory."""
    choice: Choice = field(default_factory=Choice)
    subfolder: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How a published model was made, as far as it says."""

    settings: Settings
    source: Source | None
    """None: not said."""
    unsaid: str = ""
    """Why not, in words."""
    cast: str | None = None
    """The dtype of all weights before they were quantized, where a step wrote them anew."""
    ours: bool = False
    """bigpipe published it: names, config and side files are then known to the byte, too."""
    notes: tuple[str, ...] = ()


def read_record(name: str, folder: Path, described: ModelDescription) -> Record:
    """Return what a model in `folder`, which is called `name`, says of itself. Raise UsageError where it is not
    quantized in a format that can be recomputed, or was made by steps that are not."""
    found = format_of(described)
    if found.name not in BUILT_IN:
        cure = f"only {listed(BUILT_IN)} of bitsandbytes are recomputed"
        raise UsageError(f"{name} cannot be recomputed: it is {found.title}", cure)
    published = read_provenance(folder)
    if published is not None and (step := published.provenance.last("quantize")) is not None:
        return _of_steps(name, published.provenance, step.params)
    return _of_config(folder, described, found.name)


def _of_steps(name: str, provenance: Provenance, params: Mapping[str, Any]) -> Record:
    steps = [step for step in provenance.steps if not step.left]
    if any(step.kind == "merge" for step in steps):
        cause = f"{name} was made with an adapter, whose merge is not recomputed"
        raise UsageError(cause, f"run its recipe again: {provenance.recipe!r} is in its provenance.json")
    others = [step for step in steps if step.kind not in (*RECOMPUTED, *UNTOUCHING)]
    notes = [
        f"step {step.node} ({step.kind}) is not recomputed: what it changed shows as differences" for step in others
    ]
    download = provenance.last("download")
    known = {each.name for each in fields(Settings) if each.init}
    return Record(
        settings=Settings(**{key: value for key, value in params.items() if key in known}),
        source=_downloaded(download.params, download.metrics) if download else None,
        unsaid="its recipe took no repository, and where its directory or weights came from is not on record",
        cast=provenance.param("shard", "dtype"),
        ours=True,
        notes=tuple(notes),
    )


def _downloaded(params: Mapping[str, Any], metrics: Mapping[str, Any]) -> Source | None:
    if params.get("repo") is None:
        return None
    names = {"include": "include", "exclude": "exclude", "library": "library_name", "variant": "variant"}
    choice = {ours: params[theirs] for ours, theirs in names.items() if params.get(theirs)}
    return Source(
        place=params["repo"], commit=commit_of(metrics.get("commit")), choice=Choice(**choice),
        subfolder=params.get("subfolder"),
    )  # fmt: skip


def _of_config(folder: Path, described: ModelDescription, scheme: str) -> Record:
    """BitsAndBytesConfig as transformers saves it, and the card's `base_model`."""
    told = described.quantization or {}
    if (storage := str(told.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")) != "uint8":
        raise UsageError(f"its codes are stored as {storage}, which are not recomputed", "quantize to uint8 storage")
    settings = Settings(
        scheme=scheme,
        bnb_4bit_use_double_quant=bool(scheme != "int8" and told.get("bnb_4bit_use_double_quant")),
        skip_modules=told.get("llm_int8_skip_modules"),
        dtype=plain_dtype(described),
    )
    card = read_card(folder)
    named = [card.base] if isinstance(card.base, str) else list(card.base or ())
    if len(named) == 1 and isinstance(named[0], str):
        return Record(settings=settings, source=Source(place=named[0], commit=commit_of(card.commit)))
    said = f"its card names {len(named)} base models" if named else "its card names no base_model"
    loaded = (described.config or {}).get("_name_or_path")
    hint = f"; its config was loaded from {loaded}" if isinstance(loaded, str) and loaded else ""
    return Record(settings=settings, source=None, unsaid=said + hint)


def commit_of(told: Any) -> str | None:
    """Return what may be a commit, where it is one."""
    return told if isinstance(told, str) and re.fullmatch(COMMIT, told) else None
