"""Counts what a model's own forward keeps alive, allocation by allocation, on tensors that have shapes but no bytes.

Device-independent: what an allocator would have handed out at the worst moment, besides weights and buffers. What
kernels need inside (workspaces, flash attention's own) is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Adds a storage's bytes when it is first seen, and takes them off when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.at = ""
        self.sizes: dict[int, int] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        self.sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor):
                self._see(value)
        if self.alive > self.peak:
            self.peak, self.at = self.alive, str(function)
        return output

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            return
        self.sizes[key] = size
        self.alive += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.alive -= size
        self.sizes.pop(key, None)


def peak_of_prefill(config: dict[str, Any], batch_size: int, length: int, dtype: torch.dtype) -> tuple[int, str]:
    """(bytes, operation) of the largest set of tensors alive while a prompt is read, the cache included."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, config["architectures"][0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        model = model_class._from_config(built, dtype=dtype).eval()
        inputs: dict[str, Any] = {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}
        if model.can_generate():
            inputs |= {"logits_to_keep": 1, "use_cache": True}
        allocations = Allocations()
        for tensor in (*model.parameters(), *model.buffers()):
            allocations.ignore(tensor)
        with torch.no_grad(), allocations:
            model(**inputs)
    return allocations.peak, allocations.at
