"""Puts a finished model, with results and reports, where others find it: a directory, an fsspec URL, the Hub.

    publish(Contents(model=folder), open_destination("dist/model"), Provenance(recipe="opt13b"), scratch=folder)

Beside the files stand a model card and `provenance.json`: what led to them, and the digest of each. By these a later
`publish` knows what it may replace, and a `Receipt` whether everything is there still.
"""

from .addresses import open_destination
from .destinations import Destination, Directory
from .provenance import Provenance, Step
from .publish import Contents, publish
from .receipt import RECEIPT, Receipt
from .replacing import check_destination, is_present

__all__ = [
    "RECEIPT", "Contents", "Destination", "Directory", "Provenance", "Receipt", "Step", "check_destination",
    "is_present", "open_destination", "publish",
]  # fmt: skip
