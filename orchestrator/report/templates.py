"""Templates of pages: everything in them is escaped, and shown as `clean` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shown import clean

if TYPE_CHECKING:
    from jinja2 import BaseLoader, Environment

    from bigpipe.orchestrator.contract import Json


def page_environment(loader: BaseLoader | None = None) -> Environment:
    """Return what makes pages of templates. loader: finds these by name."""
    from jinja2 import Environment  # of pages

    return Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_as_shown, auto_reload=False
    )


def _as_shown(value: Json) -> Json:
    """No secret, and nothing that is not to be seen."""
    return clean(value) if type(value) is str else value
