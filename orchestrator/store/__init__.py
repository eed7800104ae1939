"""What computations gave, by key, and their bytes, by content; what runs did, and what recipes were made of."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .artifacts import remove_tree as remove_tree
    from .hashing import canonical as canonical, digest_of as digest_of
    from .keyrecord import KeyRecord as KeyRecord
    from .location import default_root as default_root, memo_directory as memo_directory
    from .memo import StatMemo as StatMemo
    from .sealing import explained as explained, make_directory as make_directory
    from .store import Store as Store, Work as Work
else:
    __getattr__ = face(
        __name__,
        artifacts="remove_tree",
        hashing="canonical digest_of",
        keyrecord="KeyRecord",
        location="default_root memo_directory",
        memo="StatMemo",
        sealing="explained make_directory",
        store="Store Work",
    )
