"""What a model consists of: modules, tensors and ties, from its config alone or from the names of its tensors.

`describe_architecture` asks a snapshot of common families, else the class itself in a child process; `outline` guesses
from names. The answer is an `Architecture`, which holds all that sizes, quantization and placement ask of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .asking import (
        LIBRARIES,
        Matching,
        Request,
        architecture_of,
        ask_child,
        ask_matching,
        ask_names,
        class_source,
        describe_architecture,
        library_of,
        read_request,
        request_key,
    )
    from .experts import CHOSEN, expert_tensors, experts_per_token, lists_experts, stacked_experts, visited_share
    from .instantiation import describe_module, storage_of, tied_groups, with_empty_parameters
    from .outlining import BUFFERS, outline
    from .passes import deciding_blocks, encodes, reads_alone, repeats
    from .shrinking import shrunk
    from .snapshot import known_architecture, missing_snapshot
    from .structure import (
        ATTENTION,
        PLAIN_TORCH,
        Architecture,
        CachedTensor,
        Head,
        ModuleSpec,
        TensorSpec,
        is_named,
        kept_in_float32,
    )
    from .texts import looks_ahead, position_limit, read_limit, text_config, together_limit
    from .ties import set_free, untied, untied_checkpoint
    from .wrapping import COMPILED, require_module

__getattr__, __all__ = face(__name__)
