"""Other systems, in environments of their own, that `make exports` installs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def program(name: str) -> Path:
    """The command of a system; its variable says where it is."""
    path = os.environ.get(name)
    if not path:
        pytest.skip(f"{name} is not set: `make exports` installs it")
    return Path(path).absolute()
