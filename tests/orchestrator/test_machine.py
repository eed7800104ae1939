from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from bigpipe import machine
from bigpipe.bigmodel.hub import hub_errors
from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract.types import Gpu, Machine
from bigpipe.orchestrator.planning import doctor
from bigpipe.orchestrator.planning.plan import machine_line

GIB = 2**30


def test_this_machine_is_described(tmp_path: Path) -> None:
    here = machine.detect(tmp_path / "not" / "there" / "yet")
    assert 1 <= here.cpus <= (psutil.cpu_count() or 1)
    assert 0 < here.memory_available <= here.memory <= psutil.virtual_memory().total
    assert here.disk_free == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)
    assert here.name


def test_a_description_survives_json() -> None:
    there = Machine("a100", 96, 1024 * GIB, 900 * GIB, 10**13, (Gpu(0, "A100", 80 * GIB, 79 * GIB),))
    text = json.dumps(asdict(there))
    assert machine.machine_from_json(json.loads(text)) == there
    document = {"schema": "bigpipe.doctor/1", "machine": json.loads(text), "versions": {}}
    assert machine.machine_from_json(document) == there


@pytest.mark.parametrize("wrong", [{}, {"schema": "bigpipe.run/1"}, {"name": "x", "cpus": "many"}])
def test_what_describes_no_machine_is_a_usage_error(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"describe|description"):
        machine.machine_from_json(wrong)


def test_the_tightest_memory_limit_counts(tmp_path: Path) -> None:
    outer, inner = tmp_path, tmp_path / "inner"
    inner.mkdir()
    (outer / "memory.max").write_text(f"{4 * GIB}\n")
    (outer / "memory.current").write_text(f"{3 * GIB}\n")
    (outer / "memory.stat").write_text(f"anon {GIB}\ninactive_file {2 * GIB}\n")
    (inner / "memory.max").write_text("max\n")
    assert machine.memory_limit([inner, outer]) == (4 * GIB, GIB)
    (inner / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (inner / "memory.usage_in_bytes").write_text(str(GIB))
    assert machine.memory_limit([inner, outer]) == (2 * GIB, GIB)
    assert machine.memory_limit([]) == (None, 0)


def test_the_tightest_cpu_quota_counts(tmp_path: Path) -> None:
    assert machine.cpu_limit([tmp_path]) == math.inf
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_limit([tmp_path]) == math.inf
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_limit([tmp_path]) == 1.5
    (tmp_path / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_limit([tmp_path]) == 1.0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["a", "b", "c"]),
        ("", []),
        ("-1", []),
        ("2,0", ["c", "a"]),
        ("GPU-bb", ["b"]),
        ("1,7,0", ["b"]),
    ],
)
def test_visible_devices_are_numbered_as_torch_does(visible: str | None, names: list[str]) -> None:
    gpus = [(Gpu(index, name, 80 * GIB, GIB), f"GPU-{name * 2}") for index, name in enumerate("abc")]
    found = machine.visible_gpus(gpus, visible)
    assert [gpu.name for gpu in found] == names
    assert [gpu.index for gpu in found] == list(range(len(names)))


def test_a_machine_file_is_read_or_explained(tmp_path: Path) -> None:
    path = tmp_path / "there.json"
    for text in (None, "{", "[1]", "{}"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UsageError, match=r"doctor --json|description"):
            machine.read_machine(path)


@pytest.mark.slow
def test_the_doctor_sees_that_everything_works_here(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_canary123456"}
    found = doctor.examine(tmp_path / "store", environment=environment)
    assert {name: check["ok"] for name, check in found["checks"].items()} == {
        "torch": True,
        "bitsandbytes": True,
        "launcher": True,
    }
    assert found["checks"]["launcher"]["detail"] == "2 ranks met"
    assert found["store"]["writable"]
    assert "hf_canary" not in json.dumps(found)
    path = tmp_path / "there.json"
    path.write_text(json.dumps(found))
    assert machine.read_machine(path) == machine.machine_from_json(found["machine"])
    text = doctor.doctor_text(found)
    assert "✓ launcher" in text
    assert "torch 2" in text


def test_the_doctor_reports_what_is_broken(tmp_path: Path) -> None:
    broken = tmp_path / "bitsandbytes"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no kernels here')")
    check = doctor._probe("bitsandbytes", machine.detect(tmp_path), {**os.environ, "PYTHONPATH": str(tmp_path)})
    assert not check["ok"]
    assert "no kernels here" in check["detail"]


class Nvml(ModuleType):
    """NVML's bindings, and a driver of one GPU of 80 GiB, of which it keeps one: `versions` of what it can tell."""

    NVMLError = type("NVMLError", (Exception,), {})
    nvmlMemory_v2 = 0x2000028

    def __init__(self, versions: int) -> None:
        super().__init__("pynvml")
        self.versions = versions

    def nvmlInit(self) -> None:
        """Is there."""

    nvmlShutdown = nvmlInit

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "A100"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if version is None:
            return SimpleNamespace(total=80 * GIB, free=70 * GIB)
        if self.versions < 2:
            raise self.NVMLError("Function Not Found")
        return SimpleNamespace(total=80 * GIB, reserved=GIB, free=70 * GIB)


@pytest.mark.parametrize(("versions", "memory"), [(2, 79), (1, 80)])
def test_what_a_driver_keeps_of_a_gpu_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: int, memory: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(versions))
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.detect(tmp_path).gpus == (Gpu(0, "A100", memory * GIB, 70 * GIB),)


def test_the_doctor_tells_of_gpus_that_plans_cannot_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", {})
    monkeypatch.setattr(machine, "_gpus", lambda environment: ())
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert doctor.unsound(doctor.examine(tmp_path)) == []
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    [error] = doctor.unsound(doctor.examine(tmp_path))
    assert "plans count none" in error.cause
    assert error.cure == "pip install 'bigpipe-ml[gpu]'"


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("https://huggingface.co", True), ("http://mirror:8080/hf", True), ("http://ada:word@mirror", True),
        ("huggingface.co", False), ("ftp://mirror", False), ("https://", False), ("https://mirror:0", False),
        ("https://mirror:many", False), ("http://[::1", False),
    ],
)  # fmt: skip
def test_the_doctor_and_the_library_call_the_same_an_address_of_a_hub(address: str, right: bool) -> None:
    found = {"store": {"writable": True}, "hub": {"endpoint": address}, "checks": {}}
    told = [error.cause for error in doctor.unsound(found)]
    assert told == ([] if right else [f"HF_ENDPOINT is not an address: {address}"])
    with pytest.raises((ValueError, UsageError)) as error, hub_errors(address, "org/model"):
        raise ValueError("huggingface_hub does, as it is imported, where it cannot read the address")
    assert isinstance(error.value, ValueError) or told == [error.value.cause]


def test_gpus_of_a_kind_are_told_together_and_a_disk_without_end_as_one() -> None:
    gpus = tuple(Gpu(index, "NVIDIA H100 80GB", 80 << 30, 80 << 30) for index in range(8))
    other = Gpu(8, "NVIDIA L4", 24 << 30, 24 << 30)
    box = Machine("box", 96, 1 << 40, 1 << 40, 1 << 60, gpus)
    assert machine_line(box) == "96 CPUs, 1.0 TiB RAM, 8 × NVIDIA H100 80GB 80.0 GiB, no limit of disk"
    mixed = replace(box, gpus=(*gpus[:1], other), disk_free=5 << 30)
    assert machine_line(mixed).endswith("NVIDIA H100 80GB 80.0 GiB, NVIDIA L4 24.0 GiB, 5.0 GiB disk free")
    assert machine_line(replace(box, gpus=())).endswith("no GPU, no limit of disk")
