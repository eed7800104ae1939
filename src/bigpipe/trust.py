"""What may run besides bigpipe's own code: nothing, unless the caller or the manifest says so. And how much a model's
own files may take, which are not trusted either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidCheckpoint, UsageError


@dataclass(frozen=True, slots=True)
class Limits:
    """What the config, the tokenizer and the chat template of a model may take before anything is computed with them.
    Known models take a tenth of it at most."""

    seconds: float = 120
    """For building the model's class once; for loading its tokenizer once; for the prompts of one batch."""
    memory: int = 4 * 2**30
    """Bytes, for each of these."""
    modules: int = 200_000
    """Of a model's class; layers, experts and labels that a config asks for."""
    sequences: int = 64
    """Beams, or texts, that are made of one prompt at a time."""

    def exceeded(self, name: str, cause: str) -> InvalidCheckpoint:
        """Return the error for one of these that was met. cause: what would take more."""
        value = getattr(self, name)
        more = f"{2 * value >> 20}MiB" if name == "memory" else f"{2 * value:g}" if name == "seconds" else 2 * value
        cure = f"do not use the model, or raise the limit for it: `trust: {{limits: {{{name}: {more}}}}}`"
        return InvalidCheckpoint(cause, cure)


MOST_WAITING = 10
"""Times the seconds that something may take, after which it is over although it hardly had a processor."""


def took_too_long(elapsed: float, busy: float, seconds: float) -> bool:
    """Return whether something has taken more than so many seconds. busy: those in which it had a processor. On a
    machine where others want it too, waiting is nobody's fault, for ten times as long."""
    return elapsed > seconds and (busy > seconds / 2 or elapsed > MOST_WAITING * seconds)


@dataclass(frozen=True, slots=True)
class Trust:
    """Python modules and repositories whose code may run."""

    modules: tuple[str, ...] = ()
    """Python modules that `module:name` references may import; what they contain is included."""
    remote_code: tuple[str, ...] = ()
    """`org/model@commit`: pinned repositories whose own Python files may run."""

    @classmethod
    def of(cls, given: Trust | Sequence[str]) -> Trust:
        """A trust as it is, or one in the named modules."""
        if isinstance(given, Trust):
            return given
        if not isinstance(given, str | Sequence) or not all(isinstance(module, str) for module in given):
            raise UsageError(f"trust is {given!r:.80}", 'give names of modules, such as ["mingpt"]', field="trust")
        return cls((given,) if isinstance(given, str) else tuple(given))

    limits: Limits = Limits()
    """Of what a model's files may take."""

    def allows_module(self, reference: str) -> bool:
        """Return whether the module of `module:name` is trusted."""
        module = reference.partition(":")[0]
        return any(module == trusted or module.startswith(f"{trusted}.") for trusted in self.modules)

    def home(self, reference: str, base: Path | None) -> Path | None:
        """Return the directory in which the module of `module:name` is looked for first: `base` where it is trusted."""
        return base if self.allows_module(reference) else None

    def require_module(self, reference: str, what: str) -> None:
        """Raise UsageError where the module of `module:name` is not trusted. what: the subject of the sentence."""
        if not self.allows_module(reference):
            module = reference.partition(":")[0]
            package = module.partition(".")[0]
            raise UsageError(
                f"{what}: module {module} is not trusted",
                f"read its source and, if you trust it, write `trust: {{modules: [{package}]}}`",
            )

    def allows_code(self, repo: Any, commit: Any) -> bool:
        """Return whether the Python files that came with a repository may run: only at the commit that was named."""
        return bool(repo and commit) and f"{repo}@{commit}" in self.remote_code
