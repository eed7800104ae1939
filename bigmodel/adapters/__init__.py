"""Adapters: what peft's LoRA files say of a model's weights, and the merge of both into one checkpoint.

    merge_adapter("llama", "llama-lora", "llama-tuned")

`method` reads the config and refuses by name what is not done here, `changes` finds the stored tensor of each change,
`arithmetic` computes rows of the changed tensors as peft does (`unpacking` those of packed ones), `merging` hands them
to the one loop that writes, and `attaching` lets an adapter stand beside a loaded model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .attaching import Attachment, attach, attachment, read_tensors
    from .changes import PREFIX, Bound, bind, copies, require_made_for
    from .merging import (
        Merge,
        MergedCheckpoint,
        changed_checkpoint,
        is_packed,
        merge_adapter,
        merge_opened,
        merging_memory,
    )
    from .method import Combination, Lora, read_lora

__getattr__, __all__ = face(__name__)
