"""What `bigpipe doctor` finds: the machine, versions, the Hub, the store, and whether the parts work here."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bigpipe.environment import says_offline
from bigpipe.errors import BigpipeError, StageFailed, UsageError
from bigpipe.files import existing
from bigpipe.filesystems import is_address
from bigpipe.machine import DOCTOR_FORMAT, detect, unasked_driver
from bigpipe.modules import import_attribute
from bigpipe.orchestrator.contract import Json, Launch, Machine, Stage, Surroundings
from bigpipe.orchestrator.launch import run_alone
from bigpipe.orchestrator.recipe import PROBES
from bigpipe.orchestrator.store import default_root
from bigpipe.sizes import format_free, format_size
from bigpipe.tables import PLAIN, Screen, columns
from bigpipe.versions import INSTALL_GPU, INSTALL_RUN, RUN, missing, package_version

PACKAGES = (
    "bigpipe-ml", "torch", "transformers", "accelerate", "bitsandbytes", "huggingface_hub", "safetensors", "pydantic",
)  # fmt: skip
GPUS = "gpus"
"""The check that is made without a probe."""
PROBE_SECONDS = 120.0
PROBED_RANKS = 2


def examine(store: Path | None = None, *, environment: Mapping[str, str] | None = None) -> dict[str, Json]:
    """`bigpipe.doctor/1`; `plan --machine` reads it back. Takes some ten seconds: it really starts what it checks."""
    root = store or default_root()
    machine, there = detect(root), existing(root)
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return {
        "schema": DOCTOR_FORMAT,
        "machine": asdict(machine),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "hub": _hub(),
        "store": {"path": str(root), "free": machine.disk_free, "writable": writable},
        "checks": {**_gpus(machine), **{name: _probe(name, machine, environment) for name in PROBES}},
    }


def _gpus(machine: Machine) -> dict[str, dict[str, Json]]:
    """A check that fails where there is a driver of GPUs and plans cannot ask it; nothing where all is as it seems."""
    if machine.gpus or not unasked_driver():
        return {}
    detail = "a driver of NVIDIA GPUs is here, and nvidia-ml-py, which asks it, is not: plans count none, and use none"
    return {GPUS: {"ok": False, "detail": detail, "seconds": 0.0}}


def unsound(found: Mapping[str, Json]) -> list[BigpipeError]:
    """Return an error for each thing that does not work here."""
    store = found["store"]
    errors: list[BigpipeError] = []
    if not store["writable"]:
        cure = "make it writable for you, or set --store or BIGPIPE_HOME"
        errors.append(UsageError(f"the store cannot be written: {store['path']}", cure))
    endpoint = found["hub"]["endpoint"]
    if not is_address(endpoint, login=True):
        errors.append(_no_address(endpoint))
    cure = INSTALL_RUN if missing(RUN) else "repair it, or do without the kinds that use it"
    errors += [
        StageFailed(f"{name} does not work here: {check['detail']}", INSTALL_GPU if name == GPUS else cure)
        for name, check in found["checks"].items()
        if not check["ok"]
    ]
    return errors


def doctor_text(found: Mapping[str, Json], screen: Screen = PLAIN) -> str:
    """The same for people."""
    machine, hub, store = found["machine"], found["hub"], found["store"]
    rows = [
        ("machine", f"{machine['name']}: {machine['cpus']} CPUs, {format_size(machine['memory'])} of memory, "
                    f"{format_size(machine['memory_available'])} available"),
        *(("GPU", f"{gpu['index']}: {gpu['name']}, {format_size(gpu['memory'])}, {format_size(gpu['free'])} free")
          for gpu in machine["gpus"]),
        ("platform", found["platform"]),
        ("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in found["versions"].items())),
        ("Hub", f"{hub['endpoint']}, {'offline, ' * hub['offline']}token {'present' if hub['token'] else 'absent'}"),
        ("Hub cache", hub["cache"]),
        ("store", f"{store['path']}: {format_free(store['free'])}{' (read-only)' * (not store['writable'])}"),
    ]  # fmt: skip
    for name, check in found["checks"].items():
        rows.append((f"{'✓' if check['ok'] else '✗'} {name}", check["detail"]))
    return columns(rows, screen)


def _probe(name: str, machine: Machine, environment: Mapping[str, str] | None) -> dict[str, Json]:
    target = PROBES[name]
    stage: Stage[Any] = import_attribute(target)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bigpipe-doctor-") as folder:
        launch = Launch(num_processes=PROBED_RANKS)
        around = Surroundings(base=Path(folder), machine=machine, memo=Path(folder, "memo"), launch=launch)
        parent = os.environ if environment is None else environment
        try:
            outcome = run_alone(
                stage, target, {}, around, Path(folder, "work"), parent_environment=parent, timeout=PROBE_SECONDS
            )
            ok, detail = True, str(outcome.metrics["detail"])
        except BigpipeError as error:
            ok, detail = False, error.cause  # the cure names a log in a folder that is about to go
    return {"ok": ok, "detail": detail, "seconds": round(time.monotonic() - started, 1)}


def _hub() -> dict[str, Json]:
    try:
        from huggingface_hub import constants, get_token
    except ValueError as error:  # it reads the address as it is imported
        raise _no_address(os.environ.get("HF_ENDPOINT", "")) from error
    return {
        "endpoint": constants.ENDPOINT,
        "cache": str(constants.HF_HUB_CACHE),
        "offline": says_offline(os.environ),
        "token": get_token() is not None,
    }


def _no_address(endpoint: str) -> UsageError:
    return UsageError(f"HF_ENDPOINT is not an address: {endpoint}", "write it as https://huggingface.co")
