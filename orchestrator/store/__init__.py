"""What computations gave, by key, and their bytes, by content; what runs did, and what recipes were made of."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .artifacts import Artifact, KeyRecord, remove_tree
    from .claims import Claim, Wrong
    from .fetching import known_rate, lacking, note_rate
    from .garbage import RUNS, Freed, GcReport, Keeping
    from .hashing import StatMemo, canonical, digest_of
    from .layout import default_root, explained, make_directory, memo_directory, names_in
    from .remote import Away, Remote, open_remote
    from .store import Store
    from .work import Work

__getattr__, __all__ = face(__name__)
