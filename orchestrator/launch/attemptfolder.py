"""The folder in which an attempt and its processes leave what they say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Mode = Literal["run", "prepare", "launch", "rank", "finish"]


class AttemptFolder:
    """The files of one attempt, and what they are called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = path / "job.json"
        self.log = path / "log.txt"
        self.events = path / "events"
        self.processes = path / "processes"
        self.acceleration = path / "accelerate.yaml"
        self.launch_failure = path / "launch.json"

    def outcome(self, mode: Mode, rank: int = 0) -> Path:
        return self.path / (f"rank-{rank}.json" if mode == "rank" else f"outcome-{mode}.json")

    def output_pipe(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.pipe"

    def clear(self) -> None:
        """Remove what an earlier attempt left here, which must not be taken for the work of a new one."""
        for pattern in ("outcome-*.json", "rank-*", "launch.json", "events/*", "processes/*/*"):
            for path in self.path.glob(pattern):
                path.unlink()
