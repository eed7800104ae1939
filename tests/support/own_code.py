"""A model whose class comes with it: two linear modules, by code beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NAMES = ("one", "two")
CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "ownquantized"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.one = torch.nn.Linear(64, 64, bias=False)
        self.two = torch.nn.Linear(64, 64, bias=False)
        self.post_init()
"""


def make_own_model(folder: Path) -> Path:
    """Return the folder, made, with `one` and `two` of 64 times 64 numbers in a file each."""
    folder.mkdir(parents=True)
    weights = {f"{name}.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) for name in NAMES}
    files = {name: f"model-{number:05}-of-00002.safetensors" for number, name in enumerate(weights, start=1)}
    for name, file in files.items():
        save_file({name: weights[name]}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    mapped = {"AutoConfig": "own_quantized.OwnConfig", "AutoModel": "own_quantized.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "ownquantized", "auto_map": mapped}))
    (folder / "own_quantized.py").write_text(CODE)
    return folder
