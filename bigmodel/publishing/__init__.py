"""Puts a finished model, with results and reports, where others find it: a directory, an fsspec URL, the Hub.

    publish(Contents(model=folder), open_destination("dist/model"), Provenance(recipe="opt13b"), scratch=folder)

Beside the files stand a model card and `provenance.json`: what led to them, and the digest of each. By these a later
`publish` knows what it may replace, and a `Receipt` whether everything is there still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .addresses import open_destination
    from .card import Card, foreseen_card, read_card
    from .destinations import RECEIPT, Destination, Directory, Receipt, Stored, is_present
    from .provenance import PROVENANCE, Provenance, Published, Step, led_to, read_provenance
    from .publication import Contents, check_destination, publish

__getattr__, __all__ = face(__name__)
