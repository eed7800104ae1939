"""`download`: a model or an adapter from the Hub, from a directory, or made up in the shape of a config.

From the Hub nothing is copied: the artifact refers to the blobs where the Hub cache keeps them, each verified once. A
directory is copied, because it may change; synthetic weights are streamed to disk in constant memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from bigpipe.orchestrator.stage import (
    Bytes,
    CheckContext,
    Code,
    FileOrLiteral,
    FileSize,
    Folder,
    ForecastContext,
    Json,
    Machine,
    Metrics,
    Params,
    Passing,
    Pinned,
    Planning,
    Stage,
    late,
)

from .revisions import commit_of, pinned, reads

OWN_CLASS = "bigpipe_architecture.json"
"""As the library calls it, which is not imported to look for it."""
REPOSITORY = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


class Synthetic(Params):
    config: Annotated[str | dict[str, Any], FileOrLiteral]
    """A `config.json`, or what would stand in it."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float16"
    """Of the weights."""
    seed: int = 0
    """Of the weights; the same seed gives the same bytes."""
    format: Literal["safetensors", "bin"] = "safetensors"
    """Of the files."""
    max_shard_size: FileSize = 5_000_000_000
    """The most bytes of weights in one file."""


class CustomClass(Params):
    class_: Code = Field(alias="class")
    """`module:Class`, importable from the manifest's directory; the module must be listed under `trust.modules`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Updates the class's `get_default_config()`, where it has one; else its keyword arguments."""
    no_split_module_classes: list[str] | None = None
    """Classes whose modules stay on one device, such as blocks with a residual connection."""


def _meant(repo: str) -> str:
    """How to write what is no name of a repository."""
    if repo.startswith((".", "/", "~")):
        return f"of a directory, write `path: {repo}`"
    parts = urlsplit(repo).path.strip("/").split("/") if "://" in repo else []
    return f"write {'/'.join(parts[:2])}" if len(parts) >= 2 else "write it as owner/name"


class DownloadParams(Params):
    repo: Annotated[str, WithJsonSchema({"type": "string", "pattern": rf"^{REPOSITORY}$"})] | None = None
    """A repository on the Hub, `owner/name`. Exactly one of `repo`, `path` and `synthetic` is given."""
    revision: str = "main"
    """A branch, a tag or a commit; what moves is pinned to its commit."""
    path: Folder | None = None
    """A local directory; it enters the key by content. Links to other folders are not followed."""
    synthetic: Synthetic | None = None
    """Made-up weights in the shape of a config, written in constant memory."""
    include: tuple[str, ...] = ()
    """Globs of the files to take; none: one weight format, configs and tokenizer."""
    exclude: tuple[str, ...] = ()
    """Globs of files to leave out, before anything is chosen."""
    subfolder: str | None = None
    """The folder of the repository or directory that holds the model; it becomes the root."""
    variant: str | None = None
    """Of the weights, as `fp16` in `model.fp16.safetensors`; parts of a pipeline without it are taken plain."""
    library_name: Literal["transformers", "diffusers", "timm"] | None = None
    """Found from the files, unless given."""
    architecture: CustomClass | None = None
    """The class of a model without a transformers config; it travels inside the artifact."""
    miniature: bool = False
    """In its place a small model of the same kind, with made-up weights: its tokenizer and vocabulary, few narrow
    layers of every kind that it has. For trying a recipe; `bigpipe run --smoke` sets it."""

    @field_validator("repo")
    @classmethod
    def _owner_and_name(cls, repo: str | None) -> str | None:
        if repo is not None and not re.fullmatch(REPOSITORY, repo):
            raise ValueError(f"{repo!r} is not the name of a repository; {_meant(repo)}")
        return repo

    @field_validator("subfolder")
    @classmethod
    def _below(cls, subfolder: str | None) -> str | None:
        if subfolder is not None and not {"", ".", ".."}.isdisjoint(subfolder.rstrip("/").split("/")):
            raise ValueError(f"{subfolder!r} is not the path of a folder in it; write it as text_model or a/b")
        return subfolder and subfolder.rstrip("/")

    @model_validator(mode="after")
    def _one_source(self) -> DownloadParams:
        given = [name for name in ("repo", "path", "synthetic") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of repo, path and synthetic says where the model comes from; found {found}")
        if given != ["repo"] and "revision" in self.model_fields_set:
            raise ValueError(f"revision belongs to a repo; {given[0]} has none")
        if given == ["synthetic"] and self.architecture is not None and self.library_name is not None:
            raise ValueError(
                "library_name says whose class a config names, and architecture names one; give one of them"
            )
        if given == ["synthetic"] and (self.include or self.exclude or self.subfolder or self.variant):
            raise ValueError("include, exclude, subfolder and variant choose among files; synthetic makes all it needs")
        if self.miniature and (self.synthetic is not None or self.architecture is not None):
            field = "architecture" if self.architecture else "synthetic"
            raise ValueError(f"miniature makes the config small that a model has; write a small {field}.config instead")
        if self.variant is not None and self.include:
            raise ValueError("include names the files to take, variant chooses among all; give one of them")
        return self

    def choice(self) -> dict[str, Any]:
        """Which files of a repository are the model."""
        return {"include": self.include, "exclude": self.exclude, "library": self.library_name, "variant": self.variant}


class DownloadMetrics(Metrics):
    bytes: Bytes
    """Of all files."""
    files: int
    fetched_bytes: Bytes
    """Over the network, this time."""
    commit: str | None = None
    """What the revision was; of repositories only."""


def pin(params: DownloadParams, context: CheckContext) -> Pinned | None:
    found = pinned(params, context, "layout")
    if found is None:
        return None
    commit, listing = commit_of(params, found), late("bigpipe.plugins.downloading:listing")
    return replace(found, files=lambda: listing(params, context, commit))


def only(params: DownloadParams, context: ForecastContext) -> Sequence[str]:
    """The files that the Hub cache has, where the Hub may not be asked for more."""
    if params.repo is None or not late("bigpipe.plugins.library:is_offline")(context):
        return []
    found: list[str] = late("bigpipe.plugins.downloading:only")(params, context)
    return found


def facts(params: DownloadParams, machine: Machine) -> Mapping[str, Json]:
    """Which tensors a made-up model has is decided by the library that defines its class."""
    if params.synthetic is None or params.architecture is not None:
        return {}
    from importlib import metadata

    library = params.library_name or "transformers"
    return {library: metadata.version(library)}


def apart(params: DownloadParams) -> Sequence[str]:
    """What is not asked for says nothing."""
    return [] if params.miniature else ["miniature"]


def leads_to(params: DownloadParams, base: Path) -> Sequence[Path]:
    """The source of a class that the directory itself names."""
    if params.path is None or params.architecture is not None:
        return []
    if not os.path.isfile(base / params.path / (params.subfolder or "") / OWN_CLASS):  # nothing is imported without one
        return []
    found: list[Path] = late("bigpipe.plugins.downloading:source_of_class")(params, base)
    return found


STAGE = Stage(
    kind="download",
    version=6,
    params=DownloadParams,
    metrics=DownloadMetrics,
    inputs={},
    output="checkpoint",
    outputs=("adapter",),
    run=late("bigpipe.plugins.downloading:run"),
    forecast=late("bigpipe.plugins.downloading:forecast"),
    planning=Planning(
        check=late("bigpipe.plugins.downloading:check"),
        pin=pin,
        pin_asks=("repo", "revision"),
        only=only,
        reads=reads,
        facts=facts,
        apart=apart,
        leads_to=leads_to,
    ),
    passing=Passing(streams=True),
    smoke=late("bigpipe.plugins.smoking:download"),
    secrets=("HF_TOKEN",),
    title="Bring a model or an adapter here: from the Hub, from a directory, or made up in the shape of a config",
)
