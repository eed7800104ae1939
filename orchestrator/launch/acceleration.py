"""The configuration file that accelerate's launcher is given: the manifest's own file, with our decisions over it.

The launcher never sees the ambient default (`~/.cache/huggingface/accelerate/default_config.yaml`), nor flags:
`accelerate launch --cpu --num_processes 2` starts one process in accelerate 1.15.0. `distributed_type: MULTI_GPU` is
what makes it call torchrun; together with `use_cpu: true`, and `PartialState(cpu=True)` in the ranks, that starts CPU
ranks over gloo.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bigpipe import plainyaml
from bigpipe.errors import UsageError
from bigpipe.files import read_file
from bigpipe.orchestrator.contract import Launch, Machine, Stage

from .schedulers import Standing

TAKEN = tuple(name for name in Launch.model_fields if name not in ("config_file", "max_restarts", "join_seconds"))
"""The keys that a manifest and a configuration file share."""
WRITTEN: Mapping[str, str] = {"fp16": ": dtype: float16", "bf16": ": dtype: bfloat16"}
"""A mixed precision → the field that makes a kind compute in that dtype."""
LARGEST = 2**20
"""Bytes of a configuration file."""
REPLACED = (None, "NO", "MULTI_CPU", "MULTI_GPU")
"""Values of `distributed_type` that we set ourselves; others (FSDP, DEEPSPEED, MULTI_XPU …) are kept where ranks heed
them."""
IMPOSSIBLE = ("XLA", "TPU")
"""These start ranks without torchrun, inside the launcher."""


@dataclass(frozen=True, slots=True)
class Acceleration:
    """How the ranks of a node come up."""

    launch: Launch
    """With what the configuration file says, where the manifest does not."""
    cpu: bool
    settings: Mapping[str, Any]
    """All of the file for the launcher."""

    @property
    def local_ranks(self) -> range:
        """The global ranks on this machine."""
        return self.launch.local_ranks

    def environment(self, machine: Machine) -> dict[str, str]:
        """Variables for the ranks, where the user has not set them."""
        variables = {
            "OMP_NUM_THREADS": str(max(1, machine.cpus // len(self.local_ranks))),
            # So that bits are the same with any number of threads: MKL else divides sums by it. As fast, measured.
            "MKL_CBWR": "AUTO,STRICT",
        }
        if self.launch.num_machines == 1:
            # gloo would look up the host's own name, which a laptop may not resolve, and listen where others can reach.
            variables["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        return variables


def effective_launch(launch: Launch, base: Path, ask: Callable[[], Standing | None] = lambda: None) -> Launch:
    """Return `launch` with what its `config_file` says where the manifest does not, and of several machines which one
    this is and where machine 0 is, as the scheduler says that started them. ask: gives where this machine stands; asked
    where there are several. Raise UsageError."""
    launch = _merge(launch, _read(launch, base))
    _require_even(launch)
    if launch.num_machines == 1 or (place := ask()) is None:
        return launch
    if place.count not in (None, launch.num_machines):
        cause = f"launch.num_machines is {launch.num_machines}, and {place.scheduler} started {place.count}"
        raise UsageError(cause, "ask it for as many, or write as many", field="launch.num_machines")
    address = launch.main_process_ip or place.address
    if address is None:
        cause = f"{place.scheduler} does not say where machine 0 is"
        raise UsageError(cause, "write its address: launch.main_process_ip", field="launch.num_machines")
    told = {"machine_rank": place.rank, "main_process_ip": address}
    return Launch.model_validate({**launch.model_dump(exclude_unset=True), **told})


def runs_on_cpu(launch: Launch, base: Path) -> bool:
    """Return whether the `config_file` says `use_cpu`: ranks then see no GPU, and plans count none. Raise UsageError
    for a file that cannot be used."""
    return bool(_read(launch, base).get("use_cpu"))


def require_heeded(launch: Launch, kind: Stage[Any]) -> None:
    """Raise UsageError for a `mixed_precision` that the ranks of a kind do not heed."""
    asked = launch.mixed_precision
    if asked in (None, "no") or kind.ranks.mixes:
        return
    cause = f"{kind.kind} computes in one dtype, and mixed_precision {asked} would change nothing"
    cure = f"say what to compute in under `with`{WRITTEN.get(asked, '')}, and here mixed_precision: 'no'"
    raise UsageError(cause, cure, field="launch.mixed_precision")


def accelerate(
    launch: Launch, base: Path, machine: Machine, *, meets: bool = False, mixes: bool = True
) -> Acceleration:
    """Settle how `launch` is to be started on `machine`. meets: the other machines are called, and told of any port.
    mixes: as of the kind's `Ranks`. Raises UsageError where it cannot be."""
    file = _read(launch, base) if mixes else _unmixed(_read(launch, base))
    launch = _merge(launch, file)
    if meets and launch.num_machines > 1 and not launch.main_process_port:
        launch = launch.model_copy(update={"main_process_port": _free_port()})
    _check(launch)
    cpu = _on_cpu(launch, file, machine)
    single = launch.num_processes == 1
    kind = file.get("distributed_type")
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        **file,
        **{name: getattr(launch, name) for name in TAKEN},
        "distributed_type": ("NO" if single else "MULTI_GPU") if kind in REPLACED else kind,
        "use_cpu": cpu,
        # 0: any free port; the default is a fixed one, which two nodes or two users would fight for.
        "main_process_port": launch.main_process_port or 0,
        "mixed_precision": launch.mixed_precision or "no",
    }
    return Acceleration(launch, cpu, {name: value for name, value in settings.items() if value is not None})


def _read(launch: Launch, base: Path) -> dict[str, Any]:
    if launch.config_file is None:
        return {}
    path = base / launch.config_file
    try:
        data = plainyaml.load(read_file(path, LARGEST))
    except (OSError, plainyaml.NotPlain) as error:
        raise UsageError(
            f"launch.config_file {path}: {error}", "write one with `accelerate config --config_file`"
        ) from error
    if not isinstance(data, dict):
        raise UsageError(f"launch.config_file {path} holds no map", "write one with `accelerate config --config_file`")
    if data.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise UsageError(f"launch.config_file {path} is for {data['compute_environment']}", "use one for LOCAL_MACHINE")
    if data.get("distributed_type") in IMPOSSIBLE:
        raise UsageError(f"launch.config_file {path} asks for {data['distributed_type']}", "ranks run on CPUs or GPUs")
    # YAML reads a bare NO or no as false; port 0 is any, as none is.
    bare = {"mixed_precision": "no"} if data.get("mixed_precision") is False else {}
    port = data.get("main_process_port") or None
    return {**data, **bare, "main_process_port": port, "distributed_type": data.get("distributed_type") or "NO"}


def _unmixed(file: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says to ranks without an `Accelerator`. How one would share out and train a model (FSDP, DeepSpeed,
    Megatron-LM) they never ask, but its launcher needs the library for it, or GPUs, and starts ranks otherwise."""
    return {name: value for name, value in file.items() if not name.endswith(("_config", "distributed_type"))}


def _merge(launch: Launch, file: Mapping[str, Any]) -> Launch:
    found = {name: file[name] for name in TAKEN if file.get(name) is not None and name not in launch.model_fields_set}
    if not found:
        return launch
    try:
        return Launch.model_validate({**found, **launch.model_dump(exclude_unset=True)})
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ": ".join(["launch.config_file", *map(str, wrong["loc"])])
        raise UsageError(f"{where}: {wrong['msg']}", f"correct it in {launch.config_file}") from error


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _require_even(launch: Launch) -> None:
    if launch.num_processes % launch.num_machines:
        raise UsageError(
            f"launch: {launch.num_processes} processes cannot be spread evenly over {launch.num_machines} machines",
            "num_processes counts the ranks of all machines together",
            field="launch.num_processes",
        )


def _check(launch: Launch) -> None:
    _require_even(launch)
    if launch.num_machines == 1:
        return
    if launch.main_process_ip is None or not launch.main_process_port:
        raise UsageError(
            f"launch: {launch.num_machines} machines need main_process_ip and main_process_port",
            "the address of the machine where bigpipe runs, and a port on it that the others can reach; or start it on"
            " each machine by SLURM, torchrun or Kubernetes, whose variables say both",
        )
    if launch.machine_rank != 0:
        raise UsageError(
            f"launch: a run is driven from machine 0, and this is machine {launch.machine_rank}",
            "run bigpipe on machine 0 alone, over a store that all machines share; it says what to start on the others",
        )


def _on_cpu(launch: Launch, file: Mapping[str, Any], machine: Machine) -> bool:
    if not machine.gpus and file.get("distributed_type") in REPLACED:
        return True  # whatever torch may find: what nobody planned with is not used
    if "use_cpu" in file:
        return bool(file["use_cpu"])
    chosen = str(file.get("gpu_ids") or "all")
    gpus = len(machine.gpus) if chosen == "all" else len(chosen.split(","))
    return gpus < launch.local_processes
