"""A plain script of peft and transformers that trains what `finetune` trains, with nothing of bigpipe in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler


def train_plainly(
    model: Path,
    out: Path,
    texts: Sequence[str],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 1,
    max_length: int = 512,
    seed: int = 0,
    quantized: bool = False,
    device: str = "cpu",
    **lora: Any,
) -> list[float]:
    """Return the loss of each step, and save the adapter."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

    tokenizer = AutoTokenizer.from_pretrained(model)
    placed = {} if device == "cpu" else {"device_map": {"": device}}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=None if quantized else torch.float32, **placed)
    if quantized:
        base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed(seed)
    model_with = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    parameters = [each for each in model_with.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    tokens = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]

    def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        pad = tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in rows]),
        }

    sampler = DistributedSampler(tokens, 1, 0, seed=seed)
    own = torch.Generator()  # else the loader draws seeds for workers from the numbers that dropout is drawn from
    loader, losses, epoch = DataLoader(tokens, batch_size, sampler=sampler, collate_fn=collate, generator=own), [], 0
    model_with.train()
    while len(losses) < steps:
        sampler.set_epoch(epoch)
        for batch in list(loader)[: steps - len(losses)]:
            loss = model_with(**{name: values.to(device) for name, values in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        epoch += 1
    model_with.save_pretrained(out, save_embedding_layers=False)
    return losses
