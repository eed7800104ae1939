"""Checkpoints and what goes with them, written in one pass and constant memory.

`plans` says which tensor goes into which file, `writer` writes the files, whatever they are made of: `conversion` reads
them from another checkpoint, `saving` from a model in memory, `synthetic` makes them up, and `quantization` encodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .containers import SafetensorsFile, container
    from .conversion import (
        WORKERS,
        Conversion,
        RangeReader,
        carry_side_files,
        cast_while_read,
        config_with_dtype,
        convert,
        encode_config,
        is_cast,
        planned_bytes,
        refuse_in_place,
    )
    from .finished import Finished, key_of
    from .plans import PlannedTensor, ShardPlan, file_name, plan_shards, require_size
    from .saving import save_checkpoint
    from .synthetic import SyntheticModel, read_shape
    from .writer import (
        Files,
        OutputFile,
        Produce,
        ReportProgress,
        SavedCheckpoint,
        Traffic,
        WriteBeside,
        prepare,
        write_checkpoint,
        write_files,
        write_index,
    )

__getattr__, __all__ = face(__name__)
