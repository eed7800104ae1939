"""bigpipe: recipes in git that download, size, shard, quantize, place and run models larger than memory.

    >>> import bigpipe
    >>> result = bigpipe.run("manifests/quickstart.yaml", params={"scheme": "nf4"})
    >>> result.path("generate")

`import bigpipe` costs nothing heavy: each name is imported on first use.
"""

from typing import TYPE_CHECKING

from .faces import face

if TYPE_CHECKING:
    from .bigmodel.adapters import merge_adapter
    from .bigmodel.checkpoint import Checkpoint, open_checkpoint
    from .bigmodel.execution import load
    from .bigmodel.footprint import Estimate, estimate
    from .bigmodel.inference import split_between_processes
    from .bigmodel.placement import Placement, place
    from .bigmodel.quantization import quantize_checkpoint
    from .bigmodel.writing import save_checkpoint
    from .errors import BigpipeError, ManifestError
    from .orchestrator.commands import load_manifest, plan, run
    from .orchestrator.planning import Plan
    from .orchestrator.recipe import Recipe
    from .orchestrator.running import RunResult
    from .orchestrator.stage import Stage

__getattr__, __all__ = face(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
