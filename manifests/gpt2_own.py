"""GPT-2 as a class of one's own: plain torch, parameters named as in minGPT's checkpoints.

`gpt2xl_offload.yaml` runs it. It stands for any class that transformers does not know: bigpipe builds it empty, fills
it from the checkpoint, places it over devices and calls `complete` with the prompts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

SIZES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt-nano": {"n_layer": 3, "n_head": 3, "n_embd": 48},
}
"""Layers, heads and width per `model_type` (Radford et al. 2019, table 2)."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.register_buffer("bias", torch.ones(1, 1, block_size, block_size).tril())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] → the same; a token sees itself and what stands before it."""
        batch, length, width = hidden.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(hidden).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, block_size)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden))
        widened = functional.gelu(self.mlp["c_fc"](self.ln_2(hidden)), approximate="tanh")
        return hidden + self.mlp["c_proj"](widened)


class GPT(nn.Module):
    @staticmethod
    def get_default_config() -> SimpleNamespace:
        """What a recipe's `config` updates."""
        return SimpleNamespace(model_type="gpt2", vocab_size=50257, block_size=1024)

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = SIZES[config.model_type]
        width, heads = size["n_embd"], size["n_head"]
        self.block_size = config.block_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, width),
                "wpe": nn.Embedding(config.block_size, width),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList(Block(width, heads, config.block_size) for _ in range(size["n_layer"])),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] int64 → logits [batch, length, vocabulary]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        body = self.transformer
        hidden = body["drop"](body["wte"](tokens) + body["wpe"](positions))
        for block in body["h"]:
            hidden = block(hidden)
        return self.lm_head(body["ln_f"](hidden))

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Greedy: [batch, length] → [batch, length + max_new_tokens]."""
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.block_size :])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1).to(tokens.device)], dim=1)
        return tokens


def complete(
    model: GPT, rows: list[dict[str, Any]], *, tokenizer: str, max_new_tokens: int = 10, **_: Any
) -> list[dict[str, Any]]:
    """The task of the recipe: one text per prompt. `tokenizer` is a repository or a directory."""
    from transformers import AutoTokenizer

    coder = AutoTokenizer.from_pretrained(tokenizer)
    answers = []
    for row in rows:
        tokens = coder(row["prompt"], return_tensors="pt").input_ids
        made = model.generate(tokens, max_new_tokens)[0, tokens.shape[1] :]
        answers.append({"text": coder.decode(made, skip_special_tokens=True)})
    return answers
