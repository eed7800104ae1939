"""Families: what a class fuses, ties, renames or keeps in another dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.architectures import ALL
from support.models import save_model
from support.real import build

from .layout import LAYOUTS, Layout


def family(architecture: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model = build(ALL[architecture])
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        save_model(model.to(options.get("dtype", torch.float32)), folder, tokenizer=False, max_shard_size="40KB")

    return make


NAMES = (
    "llama", "llama-tied", "gemma2", "phi3", "opt", "gpt2", "bloom", "gpt_neox", "falcon-40b", "gpt_bigcode",
    "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba", "qwen3_next", "jamba", "bert", "roberta", "electra",
    "deberta-v2", "vit", "swin", "resnet", "wav2vec2", "clip", "t5", "bart", "whisper", "llava", "qwen2_vl", "gemma3n",
    "t5gemma", "blip-2",
)  # fmt: skip
HALF = ("mixtral", "t5", "wav2vec2", "blip-2", "mamba")
"""Those of which a part stays in float32 or is fused."""
FAMILIES = {
    **{name: Layout(make=family(name), verdict="equal") for name in NAMES},
    **{
        f"{name} in bfloat16": Layout(make=family(name, dtype=torch.bfloat16), verdict="equal", dtype="bfloat16")
        for name in HALF
    },
}
LAYOUTS |= FAMILIES
