"""bigpipe: recipes in git that download, size, shard, quantize, place and run models larger than memory.

    >>> import bigpipe
    >>> result = bigpipe.run("manifests/quickstart.yaml", params={"scheme": "nf4"})
    >>> result.path("generate")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bigmodel.checkpoint.view import Checkpoint as Checkpoint
    from .bigmodel.checkpoint.view import open_checkpoint as open_checkpoint
    from .bigmodel.footprint.estimates import Estimate as Estimate
    from .bigmodel.footprint.estimates import estimate as estimate
    from .bigmodel.execution import load as load
    from .bigmodel.placement import Placement as Placement
    from .bigmodel.placement import place as place
    from .bigmodel.quantization import quantize_checkpoint as quantize_checkpoint
    from .bigmodel.writing import save_checkpoint as save_checkpoint
    from .errors import BigpipeError as BigpipeError
    from .errors import ManifestError as ManifestError
    from .orchestrator.commands import plan as plan
    from .orchestrator.commands import run as run
    from .orchestrator.recipe import Recipe as Recipe
    from .orchestrator.commands import load_manifest as load_manifest
    from .orchestrator.planning import Plan as Plan
    from .orchestrator.running import RunResult as RunResult
    from .orchestrator.stage import Stage as Stage

_EXPORTS = {
    "BigpipeError": "errors:BigpipeError",
    "Checkpoint": "bigmodel.checkpoint.view:Checkpoint",
    "Estimate": "bigmodel.footprint.estimates:Estimate",
    "ManifestError": "errors:ManifestError",
    "Placement": "bigmodel.placement:Placement",
    "Plan": "orchestrator.planning.plan:Plan",
    "Recipe": "orchestrator.recipe.graph:Recipe",
    "RunResult": "orchestrator.running.result:RunResult",
    "Stage": "orchestrator.stage:Stage",
    "estimate": "bigmodel.footprint.estimates:estimate",
    "load": "bigmodel.execution:load",
    "load_manifest": "orchestrator.commands:load_manifest",
    "open_checkpoint": "bigmodel.checkpoint.view:open_checkpoint",
    "place": "bigmodel.placement:place",
    "plan": "orchestrator.commands:plan",
    "quantize_checkpoint": "bigmodel.quantization:quantize_checkpoint",
    "run": "orchestrator.commands:run",
    "save_checkpoint": "bigmodel.writing:save_checkpoint",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605 (spelled out in the test of the export list)


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): `import bigpipe` costs nothing heavy."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'bigpipe' has no attribute {name!r}")
    module, attribute = _EXPORTS[name].split(":")
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
