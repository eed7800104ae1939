"""Placements of architectures, asked for in one call."""

from __future__ import annotations

from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.placement import Placement, PlacementRequest, place_architecture as placed

BESIDES = ("tensor_bytes", "headroom", "machine", "speeds")


def place_architecture(architecture: Architecture, **fields: Any) -> Placement:
    """`fields`: those of a request, and what is known of the model and the machine."""
    besides = {name: fields.pop(name) for name in BESIDES if name in fields}
    return placed(architecture, PlacementRequest(**fields), **besides)
