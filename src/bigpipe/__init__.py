"""bigpipe: recipes in git that download, size, shard, quantize, place and run models larger than memory.

    >>> import bigpipe
    >>> result = bigpipe.run("manifests/quickstart.yaml", params={"scheme": "nf4"})
    >>> result["generate"].metrics["tokens_per_second"], result.path("generate")

`import bigpipe` costs nothing heavy: each name is imported on first use.
"""

from typing import TYPE_CHECKING

from .faces import face

if TYPE_CHECKING:
    from .bigmodel.adapters import merge_adapter as merge_adapter
    from .bigmodel.checkpoint import Checkpoint as Checkpoint, open_checkpoint as open_checkpoint
    from .bigmodel.evaluation import Evaluation as Evaluation, evaluate as evaluate
    from .bigmodel.execution import load as load
    from .bigmodel.footprint import Estimate as Estimate, estimate as estimate
    from .bigmodel.inference import split_between_processes as split_between_processes
    from .bigmodel.origin import (
        Attested as Attested,
        Checked as Checked,
        Reproduction as Reproduction,
        attest as attest,
        check_directory as check_directory,
        reproduce as reproduce,
    )
    from .bigmodel.placement import Placement as Placement, place as place
    from .bigmodel.quantization import quantize_checkpoint as quantize_checkpoint
    from .bigmodel.training import TrainedAdapter as TrainedAdapter, finetune as finetune
    from .bigmodel.writing import save_checkpoint as save_checkpoint
    from .errors import BigpipeError as BigpipeError, ManifestError as ManifestError
    from .orchestrator.commands import load_manifest as load_manifest, plan as plan, run as run, runs as runs
    from .orchestrator.planning import Plan as Plan
    from .orchestrator.recipe import Recipe as Recipe
    from .orchestrator.running import RunRecord as RunRecord, RunResult as RunResult
    from .orchestrator.stage import Stage as Stage
    from .versions import __version__ as __version__

__getattr__, __all__ = face(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
