"""Where a store is. Alone in a module, so that who only remembers answers there imports nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def default_root(environment: Mapping[str, str] | None = None) -> Path:
    """Return `$BIGPIPE_HOME`, else `bigpipe` in the XDG cache directory."""
    environment = os.environ if environment is None else environment
    if home := environment.get("BIGPIPE_HOME"):
        return Path(home).expanduser().absolute()
    cache = environment.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "bigpipe"


def memo_directory(store: str | Path | None = None) -> Path:
    """Return where a store keeps answers that are dear to get."""
    return (Path(store).absolute() if store else default_root()) / "memo"
