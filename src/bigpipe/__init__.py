"""bigpipe: recipes in git that download, size, shard, quantize, place and run models larger than memory.

    >>> import bigpipe
    >>> result = bigpipe.run("manifests/quickstart.yaml", params={"scheme": "nf4"})
    >>> result.path("generate")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .faces import face

if TYPE_CHECKING:
    from .bigmodel.checkpoint import Checkpoint
    from .bigmodel.checkpoint import open_checkpoint
    from .bigmodel.footprint import Estimate
    from .bigmodel.footprint import estimate
    from .bigmodel.execution import load
    from .bigmodel.placement import Placement
    from .bigmodel.placement import place
    from .bigmodel.quantization import quantize_checkpoint
    from .bigmodel.writing import save_checkpoint
    from .errors import BigpipeError
    from .errors import ManifestError
    from .orchestrator.commands import plan
    from .orchestrator.commands import run
    from .orchestrator.recipe import Recipe
    from .orchestrator.commands import load_manifest
    from .orchestrator.planning import Plan
    from .orchestrator.running import RunResult
    from .orchestrator.stage import Stage

__getattr__, __all__ = face(__name__)  # noqa: PLE0605 (spelled out in the test of the export list)
