"""The environment of a worker: what any child inherits, the node's `env`, and the secrets it lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from bigpipe.allocator import ALLOCATOR
from bigpipe.environment import inherited, python_path
from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import Stage, Surroundings
from bigpipe.redaction import HUB_TOKENS

from .lifeline import PARENT_VARIABLE

LOADS_CODE = frozenset({
    "LD_PRELOAD", "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "CUDA_INJECTION64_PATH", "GCONV_PATH", "BASH_ENV",
    "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT", "PYTHONUSERBASE", "PYTHONPLATLIBDIR", "PYTHONBREAKPOINT",
    "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS", PARENT_VARIABLE,
})  # fmt: skip
"""What a node's `env` may not set: these run other code in our workers, or untie them."""


DEVICE_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""GPUs as NVML numbers them, so that a plan, its workers and its probe mean the same device."""


def worker_environment(stage: Stage[Any], surroundings: Surroundings, parent: Mapping[str, str]) -> dict[str, str]:
    """Return all variables of a worker. Raise UsageError where the node's `env` would load other code into it."""
    own = surroundings.environment
    refused = sorted(LOADS_CODE & own.keys())
    if refused:
        raise UsageError(f"env may not set {', '.join(refused)}", "it would load other code into the worker")
    speaks = sees_hub_token(stage, own)
    # Who asks nobody needs no password of a proxy
    environment = inherited(parent, passwords=speaks or stage.asks, besides=stage.inherits)
    environment |= {
        "GLIBC_TUNABLES": parent.get("GLIBC_TUNABLES", ALLOCATOR),
        **DEVICE_ORDER,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "utf-8:replace",
        "PYTHONSAFEPATH": "1",  # or a torch.py in the working directory would be imported for torch
        "TOKENIZERS_PARALLELISM": "false",
    }
    if surroundings.offline:
        environment["HF_HUB_OFFLINE"] = "1"
    if not speaks:
        environment |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_TOKEN_PATH": os.devnull}
    return {**environment, **own, "PYTHONPATH": python_path(own.get("PYTHONPATH", parent.get("PYTHONPATH", "")))}


def visible_secrets(stage: Stage[Any], secrets: Iterable[str], parent: Mapping[str, str]) -> dict[str, str]:
    """Return those secrets that a node lists and that are set. A Hub token under an older name counts as HF_TOKEN."""
    found = {name: parent[name] for name in secrets if name in parent}
    if "HF_TOKEN" not in found and sees_hub_token(stage, found):
        token = next((parent[name] for name in HUB_TOKENS if parent.get(name)), None)
        found |= {"HF_TOKEN": token} if token else {}
    return found


def sees_hub_token(stage: Stage[Any], environment: Iterable[str]) -> bool:
    """May this node use the Hub token, be it from the environment or the file that `hf auth login` wrote?"""
    return any(name in HUB_TOKENS for name in (*stage.secrets, *environment))
