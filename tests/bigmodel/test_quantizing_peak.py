"""Predicted memory of quantizing while a model loads, against real loads by transformers and bitsandbytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.real import describe_here

from bigpipe.bigmodel.footprint.budgets import KV_BYTES, Budget, Workload
from bigpipe.errors import UsageError

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1536, "intermediate_size": 6144,
    "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 4000,
}  # fmt: skip
LOAD = """
import gc, re, sys
import bitsandbytes, torch, transformers

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

source, scheme, target = sys.argv[1:4]
four = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme}
config = transformers.BitsAndBytesConfig(**({"load_in_8bit": True} if scheme == "int8" else four))
options = {"quantization_config": config} if target else {}
before = status("RssAnon")
open("/proc/self/clear_refs", "w").write("5")
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16, device_map="cpu", **options)
peak = status("VmHWM") - status("RssFile") - status("RssShmem")
gc.collect()
print(peak - status("RssAnon"))
if target:
    model.save_pretrained(target)
"""


def load(source: Path, scheme: str, target: Path | None) -> int:
    """Bytes at the peak above what the loaded model holds, in a process of its own; saved to `target` if given."""
    setting = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(source), scheme, str(target or "")]
    done = subprocess.run(command, env={**os.environ, **setting}, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantizing_while_loading_needs_what_is_said_and_a_quantized_checkpoint_nothing(
    tmp_path: Path, scheme: str
) -> None:
    import transformers

    config = transformers.LlamaConfig(**LLAMA)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "model")
    term = Budget(describe_here(LLAMA), scheme, Workload()).quantizing
    assert term is not None
    assert term.basis == "bound"
    assert term.low <= load(tmp_path / "model", scheme, tmp_path / "quantized") <= term.high + 16 * 2**20
    assert load(tmp_path / "quantized", scheme, None) < 8 * 2**20


def test_only_quantized_dtypes_are_quantized() -> None:
    description = describe_here(LLAMA)
    assert Budget(description, "float16", Workload()).quantizing is None
    assert "quantizing" not in Budget(description, "float16", Workload()).terms()
    term = Budget(description, "nf4", Workload()).terms()["quantizing"]
    assert term.low == 1536 * 6144 * 2


@pytest.mark.parametrize("dtype", sorted(KV_BYTES))
def test_a_cache_has_a_dtype_of_its_own(dtype: str) -> None:
    description = describe_here(LLAMA)
    plain, other = (Budget(description, "float16", Workload(kv_dtype=kind)) for kind in (None, dtype))
    assert other.kv_cache.bytes * 2 == plain.kv_cache.bytes * KV_BYTES[dtype]
    assert other.activations == plain.activations
    assert other.cpu.bytes - plain.cpu.bytes == other.kv_cache.bytes - plain.kv_cache.bytes
    assert f"{KV_BYTES[dtype]} bytes per element" in other.kv_cache.formula


def test_an_unknown_cache_dtype_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="int3") as caught:
        Budget(describe_here(LLAMA), "float16", Workload(kv_dtype="int3"))
    assert "float8" in str(caught.value)


def test_a_cuda_context_is_a_bound_around_what_is_usual() -> None:
    term = Budget(describe_here(LLAMA), "float16", Workload()).runtime
    assert term.basis == "bound"
    assert term.low < 320 * 2**20 == term.bytes < term.high
    assert term.formula.startswith("CUDA context")
