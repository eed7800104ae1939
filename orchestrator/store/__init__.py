"""What computations gave, by key, and their bytes, by content; what runs did, and what recipes were made of."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .artifacts import remove_tree
    from .hashing import canonical, digest_of
    from .keyrecord import KeyRecord
    from .location import default_root, memo_directory
    from .memo import StatMemo
    from .sealing import explained, make_directory
    from .store import Store, Work

__getattr__, __all__ = face(__name__)
