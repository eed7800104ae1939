"""`save`: what a recipe made, as real files: in a directory, behind an fsspec URL, or on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator, model_validator

from bigpipe.names import begins_address, listed
from bigpipe.orchestrator.stage import Bytes, Metrics, Params, Planning, Port, Stage, late

GONE = ("memory",)
"""File systems of fsspec that end with the process that fills them."""
READ_ONLY = ("http", "https", "data", "github", "gist", "git", "reference", "zip", "tar", "libarchive")
"""File systems of fsspec that nothing here can write through."""


OWN = ("hf", "file", "local")
"""What needs no package of fsspec's."""
SIGNED_BY: Mapping[str, str] = {
    **dict.fromkeys(("s3", "s3a"), "AWS_"),
    **dict.fromkeys(("gs", "gcs"), "GOOGLE_"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "AZURE_"),
}
"""File systems of fsspec → what the names of variables begin with by which their packages sign in."""


def _schemes(to: str) -> list[str]:
    return [part.partition("://")[0] for part in to.split("::")] if "://" in to else []


SCHEMES = r"(hf|s3|gs|gcs|az|abfs|https?|file):"


class SaveParams(Params):
    to: str
    """A path relative to the manifest, an fsspec URL, or `hf://owner/name`."""
    private: bool = True
    """Of a Hub repository that is made by this."""
    revision: str = "main"
    """A branch of a Hub repository, which is made, or a pull request that is open (`refs/pr/1`)."""
    overwrite: bool = False
    """Replace whatever is there. Not needed for what the same recipe wrote and nobody has changed since."""
    card: dict[str, Any] = Field(default_factory=dict)
    """Metadata of the model card: `license`, `language`, `tags`…"""

    @field_validator("to")
    @classmethod
    def _names_a_repository(cls, to: str) -> str:
        if to.startswith("hf://") and not re.fullmatch(r"hf://[\w.-]+/[\w.-]+/?", to):
            raise ValueError(f"{to} does not name a repository; write it as hf://owner/name")
        return to

    @property
    def schemes(self) -> list[str]:
        """Of an address, that one goes through another (`simplecache::s3://…`) included."""
        return _schemes(self.to)

    @field_validator("to")
    @classmethod
    def _outlasts_the_run(cls, to: str) -> str:
        for scheme in _schemes(to):
            if scheme in GONE:
                raise ValueError(f"{to} is gone once the run is over; name a directory, a bucket or a repository")
            if scheme in READ_ONLY:
                raise ValueError(
                    f"{to} cannot be written: {scheme} only reads; name a directory, a bucket, a repository"
                )
        return to

    @field_validator("to")
    @classmethod
    def _is_spelled_out(cls, to: str) -> str:
        if "://" not in to and (any(map(begins_address, to.split("/"))) or re.match(SCHEMES, to)):
            scheme, _, rest = to.partition(":")
            raise ValueError(f"{to} is neither a path nor an address; write {scheme}://{rest.lstrip('/')}, or a path")
        if re.match(r"(file|local)://(?!/)", to):
            raise ValueError(f"{to} is no absolute path; write a path alone, which begins at the manifest")
        return to

    @model_validator(mode="after")
    def _belongs_to_the_hub(self) -> SaveParams:
        idle = [
            name for name in ("private", "revision") if getattr(self, name) != type(self).model_fields[name].default
        ]
        if idle and not self.to.startswith("hf://"):
            raise ValueError(f"{listed(idle)} of a Hub repository, and {self.to} is none; leave it out")
        return self


class SaveMetrics(Metrics):
    url: str
    bytes: Bytes
    files: int
    commit: str | None = None


def settled(params: SaveParams) -> Stage[SaveParams]:
    """A plan looks at a destination as this user, and so must what writes there."""
    foreign = {scheme for scheme in params.schemes if scheme not in OWN}
    signed = {SIGNED_BY[scheme] for scheme in foreign if scheme in SIGNED_BY}
    return replace(STAGE, inherits=("FSSPEC_", *sorted(signed))) if foreign else STAGE


STAGE = Stage(
    kind="save",
    version=6,
    params=SaveParams,
    metrics=SaveMetrics,
    inputs={
        "model": Port("checkpoint", optional=True, others=("adapter",)),
        "results": Port("results", optional=True),
        "reports": Port("report", optional=True, many=True),
    },
    output="report",
    run=late("bigpipe.plugins.saving:run"),
    forecast=late("bigpipe.plugins.saving:forecast"),
    planning=Planning(
        check=late("bigpipe.plugins.saving:check"),
        present=late("bigpipe.plugins.saving:present"),
        writes=late("bigpipe.plugins.saving:writes"),
        extras=late("bigpipe.plugins.extras:of_destination"),
    ),
    smoke=late("bigpipe.plugins.smoking:save"),
    secrets=("HF_TOKEN",),
    settled=settled,
    reproducible=False,
    needs_input=True,
    title="Write a model, results and reports to a directory, a URL or the Hub, with a model card and provenance",
)
