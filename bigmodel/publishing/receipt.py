"""What was published: every file with its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bigpipe.errors import StageFailed

RECEIPT = "receipt.json"
SCHEMA = "bigpipe.receipt/1"


@dataclass(frozen=True, slots=True)
class Stored:
    """One file at the destination. `mark`: what a look without reading told of it when it was written."""

    sha256: str
    size: int
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    url: str
    files: Mapping[str, Stored]
    commit: str | None = None

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def text(self) -> str:
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return json.dumps({"schema": SCHEMA, "url": self.url, "commit": self.commit, "files": files}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Return the receipt that lies in `folder`. Raise StageFailed where there is none that can be read."""
        try:
            data = json.loads((folder / RECEIPT).read_bytes())
            files = {name: Stored(**file) for name, file in data["files"].items()}
            return cls(data["url"], files, data["commit"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StageFailed(f"{folder / RECEIPT} is not a receipt: {error}", "run the step again") from error
