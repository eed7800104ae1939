"""Predicted training memory, against the anonymous memory of real steps in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support.real import build, describe_here

from bigpipe.bigmodel.footprint.budgets import Budget, Workload, adapters_of

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16000,
}  # fmt: skip
LENGTH = 512
STEPS = """
import contextlib, json, re, sys
import torch, transformers

class Adapted(torch.nn.Module):
    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, states):
        return self.linear(states) + self.up(self.down(states))

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def adapt(model, rank, targets):
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(module, rank))

asked = json.loads(sys.argv[1])
small = {**asked["config"], "num_hidden_layers": 1, "hidden_size": 64}
transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
before = status("RssAnon")
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**asked["config"])).train()
if asked["checkpointing"]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
if asked["optimizer"] == "lora":
    adapt(model, asked["rank"], asked["targets"])
    model.enable_input_require_grads()
kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lora": torch.optim.AdamW}
update = kinds[asked["optimizer"]](parameter for parameter in model.parameters() if parameter.requires_grad)
open("/proc/self/clear_refs", "w").write("5")
tokens = torch.randint(1000, (1, asked["length"]))
for _ in range(2):
    with torch.autocast("cpu", torch.bfloat16) if asked["mixed"] else contextlib.nullcontext():
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    update.step()
    update.zero_grad()
trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(status("VmHWM") - status("RssFile") - status("RssShmem") - before, trained)
"""
TARGETS = ("q_proj", "v_proj", "down_proj")


def steps(**asked: Any) -> tuple[int, int]:
    """(bytes at the peak, trained parameters) of two real steps in a process of their own."""
    asked = {"config": LLAMA, "length": LENGTH, "checkpointing": False, "mixed": False, **asked}
    setting = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEPS, json.dumps(asked)]
    done = subprocess.run(command, env={**os.environ, **setting}, capture_output=True, text=True, check=True)
    peak, trained = done.stdout.split()
    return int(peak), int(trained)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_real_steps_stay_within_the_interval(optimizer: str, checkpointing: bool) -> None:
    peak, _ = steps(optimizer=optimizer, checkpointing=checkpointing)
    _assert_within(peak, "float32", optimizer, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_written_by_hand_stay_within_the_interval(checkpointing: bool) -> None:
    peak, trained = steps(optimizer="lora", checkpointing=checkpointing, rank=16, targets=TARGETS)
    assert trained == adapters_of(describe_here(LLAMA), 16, TARGETS)
    _assert_within(peak, "float32", "lora", checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_stays_within_the_interval_of_mixed_precision(checkpointing: bool) -> None:
    peak, _ = steps(optimizer="adamw", checkpointing=checkpointing, mixed=True)
    _assert_within(peak, "bfloat16", "adamw", checkpointing)


def _assert_within(peak: int, dtype: str, optimizer: str, checkpointing: bool) -> None:
    workload = Workload(
        sequence_length=LENGTH, gradient_checkpointing=checkpointing, lora_rank=16, lora_targets=TARGETS
    )
    term = Budget(describe_here(LLAMA), dtype, workload).training[optimizer]
    assert term is not None
    assert term.basis == "bound"
    assert term.low <= peak <= term.high, (peak / term.bytes, peak, term)


def test_states_of_8_bit_adam_are_those_of_the_real_optimizer() -> None:
    """To the byte, but for the table of 256 numbers that all of them share."""
    import bitsandbytes
    import torch

    model = build({**LLAMA, "num_hidden_layers": 2, "vocab_size": 1000})
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    held = sum(
        value.nbytes
        for states in optimizer.state.values()
        for name, value in states.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")
    )
    training = Budget(
        describe_here(LLAMA | {"num_hidden_layers": 2, "vocab_size": 1000}), "float32", Workload()
    ).training
    assert training["adamw_8bit"].bytes - training["sgd"].bytes == held
