"""Answers kept on disk, each in a file of its own that is either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def remember(path: Path, answer: Any) -> None:
    """Write the JSON `answer` in one step. A memo that cannot be written costs time later, so it is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
            file.write(json.dumps(answer))  # json.dump would encode in Python, ten times slower
        os.replace(file.name, path)
    except OSError:
        return


def recall(path: Path) -> Any:
    """What was remembered under `path`, or None."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
