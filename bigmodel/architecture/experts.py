"""Mixtures of experts: which weights are an expert's, how many experts a token visits, and how many a batch does.

A class holds its experts either in one: parameters of which each entry of the outermost dimension is an expert's; or
apart: a list named `experts`, or of a class so named, with a module for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .structure import Architecture, ModuleSpec
from .texts import text_config

CHOSEN = (
    "num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "experts_per_token", "moe_top_k",
    "moe_k",
)  # fmt: skip
"""How configs call the number of experts that a token visits."""


def stacked_experts(class_name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return how many experts a module with direct parameters of these shapes holds in one; 0: it is nothing such.
    Experts that all tokens visit are none that are chosen."""
    counts = {shape[0] if shape else 0 for shape in shapes}
    named = class_name.endswith("Experts") and not class_name.endswith("SharedExperts")
    alike = len(counts) == 1 and any(len(shape) == 3 for shape in shapes)
    return counts.pop() if named and alike else 0


def lists_experts(name: str, class_name: str) -> bool:
    """Are the children of this module, which has no tensors of its own, experts?"""
    called = name.rpartition(".")[2] == "experts" and class_name in ("ModuleList", "ModuleDict")
    return called or (class_name.endswith("Experts") and not class_name.endswith("SharedExperts"))


def experts_per_token(config: Mapping[str, Any]) -> int:
    """Return how many experts of a layer a token visits by a complete config; 0 where it does not say."""
    text = text_config(config)
    return next((value for name in CHOSEN if isinstance(value := text.get(name), int) and value > 0), 0)


def visited_share(experts: int, chosen: int, tokens: int = 1) -> float:
    """Return the share of `experts` that so many tokens are expected to visit, each `chosen` of them by even chances:
    1 − (1 − k/E)^tokens."""
    return 1.0 if not chosen else 1 - (1 - min(1.0, chosen / experts)) ** tokens


def expert_tensors(architecture: Architecture, *, listed: bool = True) -> dict[str, int]:
    """Return tensor name → how many experts of its layer it belongs to, or is one of. listed: those held apart too."""
    found: dict[str, int] = {}
    for module in architecture.modules:
        parameters = [tensor for tensor in module.tensors if not tensor.buffer]
        if count := stacked_experts(module.class_name, [tensor.shape for tensor in parameters]):
            found |= dict.fromkeys((tensor.name for tensor in parameters), count)
        elif listed and not parameters and lists_experts(module.name, module.class_name):
            found |= _of_the_list(architecture, module)
    return found


def _of_the_list(architecture: Architecture, module: ModuleSpec) -> dict[str, int]:
    depth, start = module.name.count(".") + 2, f"{module.name}."
    inside = [inner for inner in architecture.modules if inner.name.startswith(start) and inner.tensors]
    experts = {".".join(inner.name.split(".")[:depth]) for inner in inside}
    return {tensor.name: len(experts) for inner in inside for tensor in inner.tensors} if len(experts) > 1 else {}
