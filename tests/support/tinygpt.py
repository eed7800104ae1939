"""A language model of one's own: plain torch, no transformers config. What a user with a class brings to bigpipe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

SIZES = {
    "nano": {"n_layer": 2, "n_head": 2, "n_embd": 32},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


class Attention(nn.Module):
    """Causal self-attention; the mask is a buffer that no checkpoint holds."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)
        mask = torch.ones(block_size, block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        parts = self.inward(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask[:length, :length])
        return self.outward(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, block_size)
        self.before_mlp = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.before_attention(hidden))
        # The norm's weight, taken without calling the norm: what a class does whose blocks must stay whole.
        normed = functional.layer_norm(hidden, hidden.shape[-1:], self.before_mlp.weight, self.before_mlp.bias)
        return hidden + self.narrow(functional.gelu(self.widen(normed)))


class GPT(nn.Module):
    @staticmethod
    def get_default_config() -> SimpleNamespace:
        return SimpleNamespace(model_type="nano", vocab_size=None, block_size=None)

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = SIZES[config.model_type]
        width = size["n_embd"]
        self.block_size = config.block_size
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.block_size, width)
        self.blocks = nn.ModuleList(Block(width, size["n_head"], config.block_size) for _ in range(size["n_layer"]))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, length] int64 → logits [batch, length, vocabulary]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Greedy continuation: [batch, length] → [batch, length + max_new_tokens]."""
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.block_size :])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        return tokens


def continue_text(model: GPT, rows: list[dict[str, Any]], max_new_tokens: int = 8, **_: Any) -> list[dict[str, Any]]:
    """A task for `module:function`: bytes are tokens."""
    answers = []
    for row in rows:
        tokens = torch.tensor([list(row["prompt"].encode())])
        made = model.generate(tokens, max_new_tokens)[0, tokens.shape[1] :]
        answers.append({"text": bytes(made.tolist()).decode("latin-1")})
    return answers
