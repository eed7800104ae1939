"""What `dispatch` writes and `distributed-infer` reads: a placement, and how a model is loaded into it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.execution.loading import TOTAL_SHARE
from bigpipe.bigmodel.placement import Device, Placement
from bigpipe.orchestrator.stage import StageContext

from .sources import sources_of

if TYPE_CHECKING:
    import torch

PLACEMENT = "placement.json"


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """A placement and what else decides how its weights are held."""

    placement: Placement
    special_dtypes: dict[str, str] = field(default_factory=dict)
    no_split_module_classes: list[str] | None = None

    @property
    def gpus(self) -> int:
        """How many GPUs one rank owns: its numbers count from 0."""
        return max((home + 1 for home in self.placement.device_map.values() if isinstance(home, int)), default=0)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.placement.as_json(),
            "special_dtypes": self.special_dtypes,
            "no_split_module_classes": self.no_split_module_classes,
        }

    @classmethod
    def read(cls, artifact: Path) -> PlacedModel:
        data = json.loads((artifact / PLACEMENT).read_bytes())
        return cls(Placement.from_json(data), data["special_dtypes"], data["no_split_module_classes"])

    def load(
        self, ctx: StageContext, *, dtype: str | None = None, memory: int | None = None, first_gpu: int = 0
    ) -> torch.nn.Module:
        """The model on port `model`, placed. dtype: wins over the placement's."""
        from bigpipe.bigmodel.execution.loading import load

        return load(
            ctx.input("model"),
            self.placement,
            dtype=dtype,
            special_dtypes=self.special_dtypes,
            no_split_module_classes=self.no_split_module_classes,
            memory=memory,
            room=int(ctx.machine.memory * TOTAL_SHARE),
            first_gpu=first_gpu,
            trust=ctx.trust,
            base=ctx.base,
            trust_remote_code=sources_of(ctx).trust_remote_code,
        )


def whole(device: int | str) -> PlacedModel:
    """All of a model on one device, without a limit."""
    home: Device = device if isinstance(device, int) else "cpu"
    return PlacedModel(Placement(device_map={"": home}, weights={}, max_memory={}, strategy="custom"))
