"""Whether a published quantized model is what it says it comes from: recomputed from its source, byte for byte.

    reproduce("org/opt-125m-nf4")                            its own record says of what
    reproduce("dist/model", "facebook/opt-125m@27dcfa74")    or whoever asks does

`records` reads what a repository says of how it was made, `expecting` works out what must be stored then, `comparing`
recomputes that and holds it against what is there, `reproducing` is the whole way. `attesting` says all of it in the
words of others (`statements`), signed or not (`bundles`), and checks a directory against what is said of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .attesting import Attested, Checked, attest, check_directory
    from .reproducing import Reproduction, reproduce
    from .results import ComparedFile, Difference

__getattr__, __all__ = face(__name__)
