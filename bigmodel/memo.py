"""Answers kept on disk, each in a file of its own that is either whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigpipe.files import make_directory, write_file


def remember(path: Path, answer: Any) -> None:
    """Write the JSON `answer` in one step. A memo that cannot be written costs time later, so it is no error."""
    try:
        make_directory(path.parent, durable=False)
        # json.dump would encode in Python, ten times slower
        write_file(path, json.dumps(answer), durable=False, mode=0o600)
    except OSError:
        return


def recall(path: Path) -> Any:
    """What was remembered under `path`, or None."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
