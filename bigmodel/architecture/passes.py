"""Which parts of a model a forward runs, and how often: what reads a prompt runs once, the rest for each token made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .structure import Architecture
from .texts import text_config

ENCODER = re.compile(r"(?:(?!\w*decoder\.)\w+\.){0,2}(?:\w+_)?encoder\.")
"""Of an encoder-decoder: T5's `encoder.`, BART's `model.encoder.`; not the `decoder.bert.encoder.` of a BERT."""
SHARED = re.compile(r"(?:\w+\.)?shared\.")
TOWER = re.compile(
    r"(?:\w+\.){0,2}(?:vision_tower|vision_model|vision_encoder|visual|audio_tower|multi_modal_projector|qformer)\."
)
"""Of a model that reads pictures or sounds beside texts."""


def encodes(config: Mapping[str, Any]) -> bool:
    """Return whether an encoder reads what a decoder then answers. config: complete."""
    return bool(config.get("is_encoder_decoder") or text_config(config).get("is_encoder_decoder"))


def reads_alone(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return what tells of a tensor's name whether only a prompt meets it, and no token that is made: that of an
    encoder, or of a tower that sees or hears. config: complete."""
    patterns = (ENCODER, TOWER) if encodes(config) else (TOWER,)
    return lambda name: any(pattern.match(name) for pattern in patterns)


def deciding_blocks(architecture: Architecture) -> list[str]:
    """Return the blocks that meet the tokens that are made: not those of an encoder, or of a tower that sees or
    hears."""
    alone = reads_alone(architecture.config)
    whole = (module.name for module in architecture.modules if module.class_name in architecture.no_split)
    return [name for name in whole if not alone(f"{name}.")]


def repeats(config: Mapping[str, Any], name: str) -> int:
    """Return how often a forward runs the module of a tensor, or of that name. ALBERT's layers are few, each of which
    runs several times (arXiv 1909.11942); the table that both halves of an encoder-decoder share is run by the names
    that it has in them. config: complete."""
    if encodes(config) and SHARED.match(f"{name}."):
        return 0
    if config.get("model_type") != "albert" or ".albert_layer_groups." not in f".{name}.":
        return 1
    return max(1, int(config["num_hidden_layers"]) // int(config["num_hidden_groups"]))
