"""`bigpipe ui`: a page that says what a model needs, shows recipes and their plans, and runs while they go on.

`serving` listens, `safety` lets in what may come in, `application` answers, `asking` asks children that are bounded;
`answering` is what they do about a model, and `looking` reads the records of runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .answering import answer
    from .serving import serve

__getattr__, __all__ = face(__name__)
