"""What child processes inherit of the environment: an allow-list, without tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from .redaction import has_password, without_passwords

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

PLACES = frozenset({
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE",
    "HF_DATASETS_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "TMPDIR", "TEMP", "TMP",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE", "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "GOOGLE_APPLICATION_CREDENTIALS",
})  # fmt: skip
"""Files and folders."""
KEPT_OUT = frozenset({"CUDA_INJECTION32_PATH", "CUDA_INJECTION64_PATH", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"})
"""In spite of their prefix: they load other code, or let a file of weights do so."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Of these the first that is set says whether the Hub may be asked, as in `huggingface_hub.constants`."""
ONLINE = f"without --offline, {' and '.join(OFFLINE)}"
"""How to run so that what is away may be asked."""


class Environment(Mapping[str, str]):
    """The variables that a process has now. Whoever prints it, or the frame of an exception that holds it, shows none
    of them."""

    def __init__(self) -> None:
        self._variables = dict(os.environ)

    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __repr__(self) -> str:
        return f"Environment({len(self)} variables)"


def inherited(parent: Mapping[str, str], *, passwords: bool = False, besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the variables that a child may see. passwords: also those in addresses, such as a proxy's. besides: what
    the names of further ones begin with."""
    allowed = {name: value for name, value in parent.items() if _allowed(name) or name.startswith(besides)}
    allowed |= absolute_places(allowed, Path.cwd())
    if passwords:
        return allowed
    return {name: without_passwords(value) if has_password(value) else value for name, value in allowed.items()}


def absolute_places(environment: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Return the variables with those that name a file or folder made absolute from `directory`, where they are
    relative: who reads them may run in another one."""
    relative = [name for name in PLACES.intersection(environment) if not environment[name].startswith(("/", "~", "$"))]
    return {
        **environment,
        **{name: os.path.abspath(directory / environment[name]) for name in relative if environment[name]},
    }


def says_offline(environment: Mapping[str, str]) -> bool:
    """Return whether the environment says that the Hub may not be asked."""
    said = next((environment[name] for name in OFFLINE if environment.get(name)), "")
    return said.upper() in {"1", "ON", "YES", "TRUE"}


def _allowed(name: str) -> bool:
    if name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_")) and name != "HF_TOKEN_PATH" and "TOKEN" in name:
        return name == "HF_HUB_DISABLE_IMPLICIT_TOKEN"
    return name in EXACT or (name.startswith(PREFIXES) and name not in KEPT_OUT)


def python_path(written: str) -> str:
    """Return where children import from: as the command does, made absolute since they may run in another directory.
    written: PYTHONPATH as it is."""
    entries = [os.path.abspath(entry) for entry in written.split(os.pathsep) if entry]
    home = str(Path(__file__).parents[1])  # of the package, which the command may have found by a changed `sys.path`
    if home not in entries and "site-packages" not in home:
        entries.append(home)
    return os.pathsep.join(entries)
