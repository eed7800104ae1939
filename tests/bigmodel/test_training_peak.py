"""Predicted training memory, against the anonymous memory of real steps in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support.real import describe_here

from bigpipe.bigmodel.footprint.budget import Workload, budget

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16000,
}  # fmt: skip
LENGTH = 512
STEPS = """
import json, re, sys
import torch, transformers

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

config, optimizer, checkpointing = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "num_hidden_layers": 1, "hidden_size": 64}))
before = status("RssAnon")
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).train()
if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
update = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](model.parameters())
open("/proc/self/clear_refs", "w").write("5")
tokens = torch.randint(1000, (1, int(sys.argv[4])))
for _ in range(2):
    model(input_ids=tokens, labels=tokens).loss.backward()
    update.step()
    update.zero_grad()
print(status("VmHWM") - status("RssFile") - status("RssShmem") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_real_steps_stay_within_the_interval(optimizer: str, checkpointing: bool) -> None:
    command = [sys.executable, "-c", STEPS, json.dumps(LLAMA), optimizer, str(checkpointing), str(LENGTH)]
    setting = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **setting}, capture_output=True, text=True, check=True)
    workload = Workload(sequence_length=LENGTH, gradient_checkpointing=checkpointing)
    term = budget(describe_here(LLAMA), "float32", workload).training[optimizer]
    assert term is not None
    assert term.low <= int(done.stdout) <= term.high, (int(done.stdout) / term.bytes, term)
