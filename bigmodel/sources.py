"""Where answers about a model may come from, and what may run for them: one value that is passed all the way down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.trust import Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What may be read and run to find a model, and where answers are kept."""

    trust: Trust = Trust()
    """Modules that a model's own class, or a function, may come from."""
    trust_remote_code: bool = False
    """May the Python files that came with the model run?"""
    base: Path | None = None
    """The directory where trusted modules are looked for first."""
    memo: Path | None = None
    """A directory for answers: what is known of a commit is not fetched again, and a class is built once."""
    offline: bool = False
    """The Hub is not asked; what lies in its cache is used."""
    environment: Mapping[str, str] | None = field(default=None, repr=False)
    """What the Hub's address, cache and token are read from, over the process's own environment."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """What a Hub said before, as `hub.answers` gives it: believed only where the Hub cannot be asked."""
