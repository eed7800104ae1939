"""What a published model says of how it was made: the provenance that `save` writes, else its config and its card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint import ModelDescription
from bigpipe.bigmodel.formats import BUILT_IN, format_of, plain_dtype
from bigpipe.bigmodel.hub import COMMIT, Choice
from bigpipe.bigmodel.publishing import Provenance, Step, led_to, read_card, read_provenance
from bigpipe.bigmodel.quantization import Settings
from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.names import listed

ADDRESS = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[^@\s]+))?")
"""`owner/name`, perhaps at a revision."""
CURE = "name what it was made from: --source OWNER/NAME@COMMIT, or a directory"
UNSAID = "its recipe took no repository, and where its directory or weights came from is not on record"
MADE_UP = "its recipe took a miniature, with weights that were made up"
RECOMPUTED = ("download", "shard", "quantize")
UNTOUCHING = ("estimate", "evaluate", "distributed-infer", "dispatch", "finetune", "save")
"""Kinds that change no weights of the model that they are given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model on the Hub or in a directory."""

    place: str
    """`owner/name`, or a path."""
    local: bool = False
    """It is a path. What is on record is a repository, whatever lies here under its name."""
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
    choice: Choice = field(default_factory=Choice)
    """Which files of a directory it was made from."""
    casts: tuple[str, ...] = ()
    """The dtypes that all weights had one after the other before they were quantized, where steps wrote them anew."""
    ours: bool = False
    """bigpipe published it: names, config and side files are then known to the byte, too."""
    notes: tuple[str, ...] = ()


def read_record(name: str, folder: Path, described: ModelDescription) -> Record:
    """Return what a model in `folder`, which is called `name`, says of itself. Raise UsageError where it is not
    quantized in a format that can be recomputed, or was made by steps that are not; InvalidCheckpoint where what it
    says cannot be read."""
    found = format_of(described)
    if found.name not in BUILT_IN:
        cure = f"only {listed(BUILT_IN)} of bitsandbytes are recomputed"
        raise UsageError(f"{name} cannot be recomputed: it is {found.title}", cure)
    published = read_provenance(folder)
    try:
        if published is not None and (step := published.provenance.last("quantize")) is not None:
            return _of_steps(name, published.provenance, step)
        return _of_config(folder, described, found.name)
    except (TypeError, ValueError) as error:  # of values that whoever published it wrote
        cause = f"{name}: what it says of how it was made cannot be read: {error}"
        raise InvalidCheckpoint(cause, "take it as it was published") from None


def _of_steps(name: str, provenance: Provenance, quantize: Step) -> Record:
    steps = [step for step in led_to(provenance.model, provenance.steps) or provenance.steps if not step.left]
    if any(step.kind == "merge" for step in steps):
        cause = f"{name} was made with an adapter, whose merge is not recomputed"
        raise UsageError(cause, f"run its recipe again: {provenance.recipe!r} is in its provenance.json")
    casts = [step for step in steps if step.kind == "shard" and step.params.get("dtype")]
    before = [step for step in casts if steps.index(step) < steps.index(quantize)]
    others = [step for step in steps if step.kind not in (*RECOMPUTED, *UNTOUCHING)]
    others += [step for step in casts if step not in before]
    notes = [
        f"step {step.node} ({step.kind}) is not recomputed: what it changed shows as differences" for step in others
    ]
    download = provenance.last("download")
    known = {each.name for each in fields(Settings) if each.init}
    return Record(
        settings=Settings(**{key: value for key, value in quantize.params.items() if key in known}),
        source=_downloaded(download.params, download.metrics) if download else None,
        unsaid=MADE_UP if download and download.params.get("miniature") else UNSAID,
        choice=_choice(download.params if download else {}),
        casts=tuple(step.params["dtype"] for step in before),
        ours=True,
        notes=tuple(notes),
    )


def _downloaded(params: Mapping[str, Any], metrics: Mapping[str, Any]) -> Source | None:
    repo = params.get("repo")
    if repo is None or not ADDRESS.fullmatch(repo) or params.get("miniature"):
        return None
    commit, folder = commit_of(metrics.get("commit")), params.get("subfolder")
    return Source(place=repo, commit=commit, choice=_choice(params), subfolder=folder)


def _choice(params: Mapping[str, Any]) -> Choice:
    """Which files a download took."""
    names = {"include": "include", "exclude": "exclude", "library": "library_name", "variant": "variant"}
    return Choice(**{ours: params[theirs] for ours, theirs in names.items() if params.get(theirs)})


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
    named = card.base if isinstance(card.base, list) else [card.base] if card.base else []
    base = ADDRESS.fullmatch(named[0]) if len(named) == 1 and isinstance(named[0], str) else None
    if base is not None:
        commit = commit_of(base["revision"]) or commit_of(card.commit)
        return Record(settings=settings, source=Source(place=base["repo"], commit=commit))
    loaded = (described.config or {}).get("_name_or_path")
    hint = f"; its config was loaded from {loaded}" if isinstance(loaded, str) and loaded else ""
    return Record(settings=settings, source=None, unsaid=f"its card names {_named(named)}{hint}")


def _named(bases: Sequence[Any]) -> str:
    """What a card names that is not one repository."""
    if len(bases) == 1:
        return f"{bases[0]!r:.80} as base_model, which is no repository"
    return f"{len(bases)} base models" if bases else "no base_model"


def commit_of(told: Any) -> str | None:
    """Return what may be a commit, where it is one."""
    return told if isinstance(told, str) and re.fullmatch(COMMIT, told) else None
