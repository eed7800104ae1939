"""Adapters as peft trains and saves them, with random weights, and what peft itself makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def tuned(base: Path, folder: Path, *, seed: int = 1, model: Any = None, **config: Any) -> Path:
    """Save an adapter for the model in `base`, none of whose tensors is zero; config: of peft's LoraConfig."""
    import torch

    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model or loaded(base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.save_pretrained(folder)
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    """The model of a checkpoint, of the class that its config names, in the dtype that it is stored in."""
    import json

    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **{"dtype": "auto", **options}).eval()


def with_adapter(base: Path, adapter: Path, **options: Any) -> Any:
    """peft's own model: the adapter beside the weights."""
    return pytest.importorskip("peft").PeftModel.from_pretrained(loaded(base, **options), str(adapter)).eval()


def merged_by_peft(base: Path, adapter: Path, **options: Any) -> Any:
    return with_adapter(base, adapter, **options).merge_and_unload()
