"""engine: transformers: each rank holds the model, as `dispatch` placed it or whole."""

from __future__ import annotations

from bigpipe.bigmodel.tasks import Arguments

from .engine import Engine


class Transformers(Arguments):
    """It serves nobody: how it computes stands beside `engine`."""


ENGINE = Engine(name="transformers", settings=Transformers)
