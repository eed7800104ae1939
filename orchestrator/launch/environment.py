"""The environment of a worker: an allow-list of the command's, the node's `env`, and secrets, which are
kept out of everything that is written or shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from bigpipe.errors import BigpipeError, UsageError
from bigpipe.orchestrator.contract import Event, Json, Stage, Surroundings

from .lifeline import PARENT_VARIABLE

EXACT = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "CONDA_PREFIX",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "CC", "CXX",
    "PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONUTF8",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "TRACEPARENT", "TRACESTATE", "CUBLAS_WORKSPACE_CONFIG", "GLIBC_TUNABLES",
})  # fmt: skip
PREFIXES = (
    "LC_", "XDG_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SAFETENSORS_", "TOKENIZERS_", "CUDA_", "NVIDIA_", "NCCL_",
    "GLOO_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "SSL_CERT_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "BNB_",
    "TRITON_", "ROCM_", "HIP_", "ROCR_",
)  # fmt: skip
ALLOCATOR = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.trim_threshold=33554432:glibc.malloc.hugetlb=1"
"""glibc gives back what is freed from 1 MiB up. Left to itself it raises that bound to 32 MiB as larger blocks are
freed, and keeps smaller ones in a heap with holes: small models then need 3 to 21 % more than their tensors, and than
a plan says. Mapping costs page faults, a sixth of a prefill, most of which huge pages save again; a trim threshold that
is not given would fall to 128 KiB. An older glibc ignores what it does not know, another C library all of it."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HF_API_TOKEN")
"""HF_TOKEN and the names it has had."""
LOADS_CODE = frozenset({
    "LD_PRELOAD", "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT", PARENT_VARIABLE,
})  # fmt: skip
"""What a node's `env` may not set: these run other code in our workers, or untie them."""

MASK = "***"
SHORTEST = 4
"""Values shorter than this are left alone: masking every `a` would spoil the text and give the value away."""


def worker_environment(stage: Stage[Any], surroundings: Surroundings, parent: Mapping[str, str]) -> dict[str, str]:
    """Return all variables of a worker. Raise UsageError where the node's `env` would load other code into it."""
    own = surroundings.environment
    refused = sorted(LOADS_CODE & own.keys())
    if refused:
        raise UsageError(f"env may not set {', '.join(refused)}", "it would load other code into the worker")
    environment = {name: value for name, value in parent.items() if _allowed(name)}
    environment |= {
        "GLIBC_TUNABLES": parent.get("GLIBC_TUNABLES", ALLOCATOR),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML numbers them, so that a plan and its ranks mean the same device
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "utf-8:replace",
        "PYTHONSAFEPATH": "1",  # or a torch.py in the working directory would be imported for torch
        "TOKENIZERS_PARALLELISM": "false",
    }
    if surroundings.offline:
        environment["HF_HUB_OFFLINE"] = "1"
    if not sees_hub_token(stage, own):
        environment |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_TOKEN_PATH": os.devnull}
    return {**environment, **own, "PYTHONPATH": _python_path(own.get("PYTHONPATH", parent.get("PYTHONPATH", "")))}


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


def _allowed(name: str) -> bool:
    if name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_")) and name != "HF_TOKEN_PATH" and "TOKEN" in name:
        return name == "HF_HUB_DISABLE_IMPLICIT_TOKEN"
    return name in EXACT or name.startswith(PREFIXES)


def _python_path(written: str) -> str:
    """Where workers import from: as the command does, made absolute since they run in another directory."""
    entries = [os.path.abspath(entry) for entry in written.split(os.pathsep) if entry]
    home = str(Path(__file__).parents[3])  # of the package, which the command may have found by a changed `sys.path`
    if home not in entries and "site-packages" not in home:
        entries.append(home)
    return os.pathsep.join(entries)


class Redactor:
    """Replaces secret values by `***`, also URL-quoted, JSON-escaped, and each line of a value that has several."""

    def __init__(self, values: Iterable[str]) -> None:
        forms: set[str] = set()
        for value in values:
            for part in {value, value.strip(), *value.splitlines()}:
                forms |= {part, quote(part, safe=""), quote_plus(part), json.dumps(part)[1:-1], repr(part)[1:-1]}
        masked = sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)
        self.longest = max(map(len, masked), default=0)
        self._pattern = re.compile("|".join(map(re.escape, masked))) if masked else None

    @classmethod
    def of(cls, secrets: Iterable[str], environment: Mapping[str, str], parent: Mapping[str, str]) -> Redactor:
        """Return what masks these variables of `environment`, and the Hub token that lies where `parent` says."""
        return cls([*(environment.get(name, "") for name in secrets), stored_hub_token(parent) or ""])

    def text(self, text: str) -> str:
        return self._pattern.sub(MASK, text) if self._pattern else text

    def value(self, value: Json) -> Json:
        """The same, in every string of a JSON value, keys included."""
        if self._pattern is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def error(self, error: BigpipeError) -> BigpipeError:
        """The same error, its texts masked."""
        error.cause, error.cure = self.text(error.cause), self.text(error.cure)
        error.args = (error.cause, error.cure)
        return error

    def event(self, event: Event) -> Event:
        if self._pattern is None:
            return event
        return replace(event, **{field.name: self.value(getattr(event, field.name)) for field in fields(event)})


def stored_hub_token(environment: Mapping[str, str]) -> str | None:
    """The token that `hf auth login` left on disk, so that it can be masked too. None where there is none."""
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(environment.get("HOME", ""), ".cache")
    home = environment.get("HF_HOME") or os.path.join(cache, "huggingface")
    path = Path(environment.get("HF_TOKEN_PATH") or os.path.join(home, "token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
