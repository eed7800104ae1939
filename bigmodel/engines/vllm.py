"""engine: vllm: a server of vLLM's, started on this machine for as long as it is asked.

`vllm serve` runs as a child, on loopback, with a key that nobody else knows and that no command line shows; its options
are those of vLLM 0.11 and later (`vllm serve --help`). It ends with whoever asks it, however that ends.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field

from bigpipe.bigmodel.formats import format_of
from bigpipe.bigmodel.tasks import require_tokenizer
from bigpipe.errors import BigpipeError, DoesNotFit, StageFailed, UsageError
from bigpipe.machine import Machine
from bigpipe.programs import Ended, Program, running_program, signal_in_words
from bigpipe.sizes import counted

from .asked_tasks import held_tasks
from .endpoint import Endpoint, connecting
from .engine import Engine, Wanted
from .openai import APART, Asked

MODULE = "vllm.entrypoints.cli.main"
"""What the program `vllm` runs."""
MODEL = "model"
"""What the server calls it."""
METHODS = frozenset({
    "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4",
    "quark", "torchao",
})  # fmt: skip
"""The ways weights are packed that vLLM 0.11 computes with, as `quantization_config` names them."""
LOOKS = 0.2
"""Seconds between two looks whether it is ready."""
PORTS = 3
"""How many are tried, where another program takes the one that was free."""
TAKEN = "ddress already in use"
"""In what it prints then."""
SHARE = 0.9
"""Of a GPU's memory, what vLLM takes where nobody says."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
DYING = 2.0
"""Seconds in which a server that cannot be reached may turn out to have ended."""
NOT_PASSED_ON = frozenset({"GLIBC_TUNABLES"})
"""Variables of a worker that are for one that computes itself."""


class Vllm(Asked):
    concurrency: int = Field(64, ge=1, le=1024)
    """Questions that are under way at once; vLLM makes batches of them."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share each layer."""
    data_parallel_size: int = Field(1, ge=1)
    """Copies of the model, each on as many GPUs."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of a prompt and what follows; null: as many as the model has positions."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """The share of each GPU's memory that it takes; null: vLLM's own, 0.9."""
    startup: float = Field(900.0, gt=0)
    """Seconds until it must take questions: it loads and compiles first."""

    @property
    def gpus(self) -> int:
        return self.tensor_parallel_size * self.data_parallel_size


def _check(settings: Vllm, wanted: Wanted) -> None:
    if not sys.platform.startswith("linux"):
        raise UsageError(f"vLLM runs on Linux, and this is {sys.platform}", _CURE, field="engine")
    if find_spec("vllm") is None:
        cure = "pip install 'bigpipe-ml[vllm]', best into an environment of its own: it brings a torch of its own"
        raise UsageError("engine vllm needs vllm, not installed here", cure, field="engine")
    needed, there = settings.gpus, len(wanted.machine.gpus)
    if needed > there:
        cause = f"vLLM would take {counted(needed, 'GPU')} ({settings.tensor_parallel_size} for each of "
        cause += f"{settings.data_parallel_size} copies), and there are {there}"
        raise DoesNotFit(cause, f"lower serving.tensor_parallel_size or data_parallel_size, or {_CURE}", field="engine")
    if wanted.dtype == "float64":
        raise UsageError("vLLM computes in no float64", "take float32, or a half", field="dtype")
    _check_model(wanted)


def _holds(settings: Vllm, machine: Machine) -> Mapping[int, int]:
    """It takes the first GPUs, and its share of each whatever the model needs."""
    share = settings.gpu_memory_utilization or SHARE
    return {gpu.index: int(share * gpu.memory) for gpu in machine.gpus[: settings.gpus]}


_CURE = "use engine: transformers, or engine: openai for a server elsewhere"


def _check_model(wanted: Wanted) -> None:
    model = wanted.model
    if model is None or model.tensors is None:
        return
    if model.config is None or model.own_class is not None:
        cause = "vLLM knows models by their config.json, and this one is of a class of your own"
        raise UsageError(cause if model.own_class else "vLLM needs config.json", _CURE, field="engine")
    method = (model.quantization or {}).get("quant_method") or format_of(model).method
    if method and method not in METHODS:
        raise UsageError(f"vLLM does not compute with weights packed as {method}", _CURE, field="engine")
    require_tokenizer(model)


def _command(settings: Vllm, wanted: Wanted, port: int) -> list[str]:
    options = {
        "--host": "127.0.0.1",
        "--port": port,
        "--served-model-name": MODEL,
        "--dtype": wanted.dtype or "auto",
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--data-parallel-size": settings.data_parallel_size,
        "--max-model-len": settings.max_model_len,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--runner": "pooling" if wanted.task == "feature-extraction" else None,
    }
    given = [str(each) for option, value in options.items() if value is not None for each in (option, value)]
    return [sys.executable, "-m", MODULE, "serve", str(wanted.path), *given]


def _environment(key: str) -> Mapping[str, str]:
    own = {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**{name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}, **own}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class _PortTaken(Exception):
    pass


@contextmanager
def _serve(settings: Vllm, wanted: Wanted) -> Iterator[Endpoint]:
    """Raise StageFailed where no server comes up, with the last of what it printed."""
    for tries in range(1, PORTS + 1):
        with ExitStack() as opened:
            try:
                endpoint = _started(settings, wanted, opened)
            except _PortTaken as error:
                if tries < PORTS:
                    continue
                raise StageFailed(f"vLLM found its port taken, {PORTS} times over", str(error)) from error
            yield endpoint
            return


def _started(settings: Vllm, wanted: Wanted, opened: ExitStack) -> Endpoint:
    """A server that takes questions, which ends with `opened`."""
    key, port = secrets.token_urlsafe(32), _free_port()
    folder = wanted.folder or Path.cwd()
    program = opened.enter_context(
        running_program(_command(settings, wanted, port), folder=folder, environment=_environment(key), grace=GRACE)
    )

    def lost() -> None:
        if (ended := program.ended(DYING)) is not None:
            raise _gone(ended)

    endpoint = opened.enter_context(
        connecting(
            f"http://127.0.0.1:{port}/v1",
            settings.concurrency,
            model=MODEL,
            key=key,
            chat=settings.chat,
            goes_on=True,
            timeout=settings.timeout,
            retries=settings.retries,
            longest_wait=settings.longest_wait,
            lost=lost,
        )
    )
    _await(endpoint, program, settings.startup)
    return endpoint


def _await(endpoint: Endpoint, program: Program, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (endpoint.is_well() and program.ended() is None):
        if (ended := program.ended(LOOKS)) is not None:
            if any(TAKEN in line for line in ended.last):
                raise _PortTaken(f"port {urlsplit(endpoint.url).port} of 127.0.0.1")
            raise _gone(ended)
        if time.monotonic() > deadline:
            cause = f"vLLM takes no questions {seconds:g} s after it was started{_lines(program.last)}"
            raise StageFailed(cause, "raise `startup`, or look at what it printed", field="serving")


def _gone(ended: Ended) -> BigpipeError:
    how = f"with exit status {ended.status}"
    if ended.status < 0:
        how = f"by {signal_in_words(-ended.status)}"
    cause = f"vLLM's server ended {how}{_lines(ended.last) or ', and printed nothing'}"
    return StageFailed(cause, "the log of the node has all that it printed; what is answered stays", field="engine")


def _lines(last: tuple[str, ...]) -> str:
    return "".join(f"\n    {line}" for line in last)


ENGINE = Engine(
    name="vllm", settings=Vllm, serve=_serve, tasks=held_tasks, apart=(*APART, "startup"), check=_check,
    packages=("vllm",), holds=_holds,
)  # fmt: skip
