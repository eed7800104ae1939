"""Modules that somebody hands over, without what trainers put around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.errors import UsageError

if TYPE_CHECKING:
    import torch

COMPILED = "_orig_mod"
"""Where torch.compile keeps the module that it compiles."""


def require_module(model: object) -> torch.nn.Module:
    """Return a torch module without what torch.compile, DataParallel or DistributedDataParallel put around it.
    Raise UsageError for what is none, a class most often, and for one whose parameters have no shape yet."""
    import torch

    if not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__}"
        cure = "give a torch module, which may be empty (built under accelerate's init_empty_weights()), or a path"
        raise UsageError(f"{what} is no model", cure)
    if any(map(torch.nn.parameter.is_lazy, [*model.parameters(), *model.buffers()])):
        cause = f"{type(model).__name__} has parameters that have no shape before it has seen an input"
        raise UsageError(cause, "run it once, and then give it")
    compiled, parallel = hasattr(model, COMPILED), torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel
    if compiled or isinstance(model, parallel):
        return require_module(getattr(model, COMPILED if compiled else "module"))
    return model
