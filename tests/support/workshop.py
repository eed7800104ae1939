"""A folder with a recipe, a store of its own and the toy kinds: where the engine's tests work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bigpipe

TOYS = Path(__file__).parent / "toys"
SOURCE = Path(__file__).parents[2] / "src"


def environment(folder: Path) -> dict[str, str]:
    """What a command needs to find bigpipe, the toys and the folder's store."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TOYS), str(SOURCE)]),
        "BIGPIPE_HOME": str(folder / "store"),
    }


class Workshop:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / "recipe.yaml"

    def run(self, text: str | None = None, **options):
        """`bigpipe.run` in this process; failures are in the result."""
        if text is not None:
            self.manifest.write_text(text)
        (self.folder / "journal").unlink(missing_ok=True)
        return bigpipe.run(self.manifest, **{"check": False, **options})

    def command(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """The `bigpipe` command as its users call it, in this folder."""
        return subprocess.run(
            [sys.executable, "-m", "bigpipe", *arguments],
            cwd=self.folder, env={**environment(self.folder), **environ}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def json(self, *arguments: str):
        return json.loads(self.command(*arguments, "--json").stdout)

    @property
    def ran(self) -> list[str]:
        """The nodes whose bodies ran since the last `run`, in the order they began."""
        journal = self.folder / "journal"
        return journal.read_text().split() if journal.exists() else []


def statuses(result) -> dict[str, str]:
    return {name: str(state.status) for name, state in result.nodes.items()}
