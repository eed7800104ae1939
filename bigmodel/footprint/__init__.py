"""What a model needs: bytes of weights, cache, activations and training, and the smallest change that fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .activations import activations_kept
    from .budgets import WORKSPACE, Budget, Workload, capped_length, cut_length, runtime_of
    from .estimates import Estimate, estimate, estimate_sighting, misfits, report, report_json
    from .kvcache import kv_cache, layer_kinds
    from .sighting import Sighting, architecture_of, look
    from .weights import compute_bytes

__getattr__, __all__ = face(__name__)
