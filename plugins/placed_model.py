"""What `dispatch` writes and `distributed-infer` reads: a placement, and how a model is loaded into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.bigmodel.placement import Placement
from bigpipe.orchestrator.stage import StageContext

from .sources import sources_of

if TYPE_CHECKING:
    import torch

PLACEMENT = "placement.json"


def read_placement(artifact: Path) -> Placement:
    return Placement.from_json(json.loads((artifact / PLACEMENT).read_bytes()))


def load_placed(
    placement: Placement,
    ctx: StageContext,
    *,
    dtype: str | None = None,
    memory: int | None = None,
    first_gpu: int = 0,
) -> torch.nn.Module:
    """The model on port `model`, placed. dtype: wins over the placement's."""
    from bigpipe.bigmodel.execution.loading import TOTAL_SHARE, load

    return load(
        ctx.input("model"),
        placement,
        dtype=dtype,
        memory=memory,
        room=int(ctx.machine.memory * TOTAL_SHARE),
        first_gpu=first_gpu,
        trust=ctx.trust,
        base=ctx.base,
        trust_remote_code=sources_of(ctx).trust_remote_code,
    )
