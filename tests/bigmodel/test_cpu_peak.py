"""The peak on a CPU: what it adds to a GPU's terms, and one real measurement."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.architectures import ALL
from support.real import describe_here

from bigpipe.bigmodel.footprint import kv_cache
from bigpipe.bigmodel.footprint.budgets import Budget, Term, Workload, capped_length

MIB = 2**20
LONG: dict[str, Any] = {"max_position_embeddings": 4096}


def peak(config: dict[str, Any], dtype: str = "bfloat16", **workload: Any) -> Term:
    return Budget(describe_here(config), dtype, Workload(**{"sequence_length": 1024, **workload})).cpu


def test_a_plain_forward_holds_the_logits_of_every_token() -> None:
    config = {**ALL["llama"], **LONG, "vocab_size": 50_000}
    more = peak(config, all_logits=True).bytes - peak(config).bytes
    assert 0.9 < more / (1024 * 50_000 * 2) < 1.1  # with what such a product keeps
    capped = {**ALL["gemma2"], **LONG, "vocab_size": 50_000}
    assert peak(capped, all_logits=True).bytes - peak(capped).bytes > 1.5 * 1024 * 50_000 * 2


def test_latent_attention_writes_its_scores_out() -> None:
    """Queries are 24 wide in these heads and values 16, for which no flash kernel exists on a CPU."""
    config = {**ALL["deepseek_v3"], **LONG}
    scores = 4 * 4 * 1024 * 1024
    longer, shorter = (peak(config, sequence_length=length) for length in (2048, 1024))
    assert longer.bytes - shorter.bytes > 3 * 2.25 * scores  # before and after the softmax, and a byte of what is -inf
    assert longer.formula.count("scores written out") == 1
    whole = Budget(describe_here(config), "float32", Workload(sequence_length=2048)).weights.bytes
    assert peak(config, "float32", sequence_length=2048).bytes - whole < 1.2 * 9 * 4 * 2048**2 + 14 * MIB
    alike = {**config, "v_head_dim": 24}
    assert peak(alike, sequence_length=2048).bytes < shorter.bytes


def test_experts_in_16_bits_keep_a_kernel_for_every_number_of_tokens() -> None:
    """Eight loads at most where there are eight experts in all, whatever their width; none in float32."""
    config = {**ALL["mixtral"], **LONG, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    wide = {**config, "hidden_size": 512, "intermediate_size": 1024}
    kept = {dtype: float(peak(wide, dtype).formula.split()[-5]) for dtype in ("float32", "bfloat16", "float16")}
    two_matrices = 2 * 8 * 700 * 2**10
    assert kept["bfloat16"] == kept["float16"] == round((10 * MIB + two_matrices) / MIB, 1)
    assert kept["float32"] == 13
    deep = float(peak({**wide, "num_hidden_layers": 40}, sequence_length=256).formula.split()[-5])
    assert kept["bfloat16"] < deep < 10 + 20 * two_matrices // MIB // 2, "loads repeat; one kernel serves all layers"


def test_a_small_cache_leaves_holes_in_the_heap() -> None:
    """Of four layers: keys of 1 MiB are mapped one by one, those of a token less come from the heap.

    The last token is never cached: a sequence of 1,024 has keys of 1,023.
    """
    config = {**ALL["llama"], **LONG, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    config |= {"hidden_size": 512, "head_dim": 128, "intermediate_size": 512, "vocab_size": 64}
    assert kv_cache(config, 1, 1024, 2).bytes == 4 * 2 * MIB
    small, mapped = (peak(config, sequence_length=length).bytes for length in (1024, 1025))
    assert 1.9 * MIB < small - mapped < 2 * MIB, "a quarter of the cache, less what one token adds"
    assert "holes" not in peak(config, sequence_length=1024, all_logits=True).formula, "a plain forward grows nothing"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the tunables")
def test_keys_that_grow_in_a_real_heap_leave_such_holes() -> None:
    script = (
        "import re, sys, torch\n"
        "def held(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "torch.cat([torch.zeros(1, 8, 4, 128, dtype=torch.float16)] * 2, dim=2)\n"
        "before, token = held(), torch.ones(1, 8, 1, 128, dtype=torch.float16)\n"
        "cache = [torch.ones(1, 8, int(sys.argv[1]), 128, dtype=torch.float16) for _ in range(56)]\n"
        "for step in range(4): cache = [torch.cat([cache.pop(0), token], dim=2) for _ in range(56)]\n"
        "print((held() - before) / sum(tensor.nbytes for tensor in cache) - 1)\n"
    )
    beyond = {}
    for tokens in (256, 600):
        environment = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={MIB}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tokens)], env=environment, capture_output=True, text=True, check=True
        )
        beyond[tokens] = float(done.stdout)
    assert beyond[600] < 0.05 < beyond[256]


def test_a_short_answer_of_an_encoder_decoder_has_a_short_cache() -> None:
    whole, short, longer = (kv_cache(ALL["bart"], 2, 64, 4, output).bytes for output in (None, 4, 5))
    token = longer - short
    assert (whole, short) == (2 * 64 * token, (64 + 4) * token)
    assert capped_length(describe_here(ALL["t5"]), 4096) == 4096  # n_positions is 512, and means nothing
    assert peak(ALL["t5"], output_length=4).bytes < peak(ALL["t5"], all_logits=True).bytes


@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "t5", "bart", "vit", "whisper", "gpt_oss", "mamba"])
def test_every_peak_has_an_interval_and_its_formula(name: str) -> None:
    term = peak(ALL[name])
    assert 0 < term.low < term.bytes < term.high
    assert "weights + cache + " in term.formula
    assert term.basis in ("calibrated", "bound")


@pytest.mark.slow
def test_a_real_process_needs_what_was_predicted() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "peaks.py"
    command = [sys.executable, script, "--set", "calibration", "--models", "llama-gqa"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    found = json.loads(done.stdout)["arms"]["all"]
    assert found["rows"] == 18
    assert found["lowest %"] > -2
    assert found["95th percentile %"] < 15
    assert found["median of |error| %"] < 5


def test_layers_that_are_counted_by_kind() -> None:
    """LXMERT's `num_hidden_layers` is a mapping: language, vision, both."""
    config = {"model_type": "lxmert", "architectures": ["LxmertModel"], "hidden_size": 64, "num_attention_heads": 4,
              "intermediate_size": 96, "vocab_size": 160, "l_layers": 2, "x_layers": 1, "r_layers": 1}  # fmt: skip
    assert isinstance(describe_here(config).config["num_hidden_layers"], dict)
    assert peak(config).bytes > 0
