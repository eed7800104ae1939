"""What only a GPU shows: loading onto it, generating with most layers away from it, quantizing on it, and its memory.

    python benchmarks/gpu.py [--only peaks training load quantize offloaded] [--size 1.3B] [--cap 1] [--prompts 16]
        [--tokens 8] [--device cuda] [--out FILE]

load: a checkpoint onto the device, from a cold disk and again from the page cache, against safetensors' own loader;
with the limits of both ways: what this disk reads and what this bus copies, measured in the same run. offloaded:
`streamed.py` with as many layers on the GPU as `--cap` GiB hold, the rest in RAM and then on disk, against accelerate.
quantize: int8 and nf4 there and on the CPU, with equal bytes. peaks: a forward and a generation, predicted from the
config against `max_memory_allocated`, less what a small model of the same class leaves there: the workspaces of the
libraries. training: two steps of a LoRA on plain, int8 and nf4 weights, foreseen bytes against those taken; without
bitsandbytes on plain ones. With `--device cpu` all of it runs where there is no GPU, without peaks. What needs little
time comes first. One JSON at the end, of what there is where SIGINT ends it, and after each measurement what there is
so far in `--out`. More, where an hour is at hand: `--size 7B --cap 8 --prompts 64 --tokens 16`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import facts
from peak_models import EVALUATION, Case, smaller
from peaks import NEW_TOKENS, build, run
from quantize import differing
from reshard import SHAPES, forget, make_source

HERE = Path(__file__).parent
PEAKS = ("qwen2.5-0.5b", "gpt2-medium", "smollm2-360m", "olmoe-6-layers")
BLOCK = 256 * 2**20
Measurements = Iterator[tuple[str, Callable[[], Any]]]
"""By name: each is begun when the one before it has ended, and costs only itself where it fails."""


def synchronised(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def disk_speed(folder: Path) -> float:
    """Bytes a second of reading the weights one after the other, nothing of them in the page cache."""
    forget(folder)
    started, nbytes = time.perf_counter(), 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK):
                nbytes += len(block)
    return nbytes / (time.perf_counter() - started)


def bus_speed(device: str) -> float:
    """Bytes a second of copying pinned memory to the device."""
    import torch

    block = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.empty_like(block, device=device)
    there.copy_(block)
    synchronised(device)
    started = time.perf_counter()
    for _ in range(8):
        there.copy_(block, non_blocking=True)
    synchronised(device)
    return 8 * BLOCK / (time.perf_counter() - started)


def load_once(arm: str, folder: Path, device: str) -> None:
    """Everything on the device, all copies ended."""
    if arm == "bigpipe":
        import bigpipe

        bigpipe.load(folder, {"": 0 if device == "cuda" else "cpu"}, dtype="float16")
    else:
        from safetensors.torch import load_file

        kept = [load_file(path, device=device) for path in sorted(folder.glob("*.safetensors"))]
        assert kept
    synchronised(device)


def load_arm(arm: str, folder: Path, device: str) -> dict[str, float]:
    """Seconds of each, beyond imports and the start of the device."""
    import torch
    import transformers

    import bigpipe

    assert bigpipe.load
    torch.zeros(1, device=device)
    transformers.logging.set_verbosity_error()
    found = {}
    for name in ("cold", "warm"):
        if name == "cold":
            forget(folder)
        started = time.perf_counter()
        load_once(arm, folder, device)
        found[name] = round(time.perf_counter() - started, 3)
    return found


def load(options: argparse.Namespace, folder: Path) -> Measurements:
    source = folder / "model"
    make_source(source, options.size, "safetensors")
    yield "bytes", lambda: sum(path.stat().st_size for path in source.glob("*.safetensors"))
    yield "disk bytes/s", lambda: round(child(options, "disk", source))
    yield "bus bytes/s", lambda: round(child(options, "bus", source))
    for arm in ("bigpipe", "safetensors"):
        yield arm, partial(child, options, f"load {arm}", source)


def offloaded(options: argparse.Namespace, folder: Path) -> Measurements:
    """As many layers stay as the cap holds beside the embeddings and half a gibibyte of caches and activations."""
    hidden, feed_forward, layers, _ = SHAPES[options.size]
    layer = 2 * (4 * hidden * hidden + 2 * hidden * feed_forward)
    outside = 2 * hidden * (50272 + 2050) + 2**29
    resident = min(1.0, max(0.0, (options.cap * 2**30 - outside) / layer) / layers)
    yield "resident", lambda: round(resident, 3)
    for away in ("cpu", "disk"):
        yield away, partial(
            script, "streamed.py", "--home", home(options.device), "--away", away, "--size", options.size,
            "--dtype", "float16", "--resident", f"{resident:.3f}", "--prompts", options.prompts,
            "--tokens", options.tokens, "--folder", folder,
        )  # fmt: skip


def script(name: str, *arguments: object) -> Any:
    """The JSON that another benchmark prints."""
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def home(device: str) -> str:
    return "0" if device == "cuda" else "cpu"


def quantize(options: argparse.Namespace, folder: Path) -> Measurements:
    make_source(folder / "plain", middling(options), "safetensors")
    for scheme in ("int8", "nf4"):
        yield scheme, partial(quantized, options, folder, scheme)


def middling(options: argparse.Namespace) -> str:
    return "1.3B" if options.device == "cuda" else str(options.size)


def quantized(options: argparse.Namespace, folder: Path, scheme: str) -> dict[str, Any]:
    seconds = {
        device: child(options, f"quantize {scheme} {device}", folder / "plain", folder / f"{scheme}-{device}")
        for device in dict.fromkeys((options.device, "cpu"))
    }
    made = [folder / f"{scheme}-{device}" for device in seconds]
    return {"seconds": seconds, "different tensors": len(differing(made[0], made[-1]))}


def quantize_arm(scheme: str, device: str, source: Path, out: Path) -> float:
    import torch

    from bigpipe.bigmodel.quantization import quantize_checkpoint

    torch.zeros(1, device=device)
    forget(source)
    started = time.perf_counter()
    quantize_checkpoint(source, out, scheme=scheme, device=device)
    return round(time.perf_counter() - started, 3)


def training(options: argparse.Namespace, folder: Path) -> Measurements:
    """Two steps of a LoRA: bytes of the plan and bytes that were taken, and tokens a second."""
    for scheme in ("none", *(("int8", "nf4") if find_spec("bitsandbytes") else ())):
        (folder / scheme).mkdir()
        yield scheme, partial(trained, middling(options), scheme, folder / scheme)


def trained(size: str, scheme: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, HERE / "finetune.py", "--size", size, "--scheme", scheme, "--folder", folder]
    said = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE).stdout
    numbers = json.loads(said.splitlines()[-1])
    return {name: numbers[name] for name in ("foreseen", "taken", "tokens_per_second")}


def peaks(options: argparse.Namespace, folder: Path) -> Measurements:
    """Of weights, cache and activations; what the driver keeps is not in `max_memory_allocated`."""
    for name in PEAKS if options.device == "cuda" else ():
        yield name, partial(child, options, f"peaks {name}", folder)


def peak_rows(name: str) -> Iterator[dict[str, Any]]:
    from bigpipe.bigmodel.architecture import describe_architecture

    case = EVALUATION[name]
    architecture = describe_architecture(case.config)
    for dtype in ("float16", "float32"):
        beside = after_a_small_one(case, dtype)
        model = build(case.config, dtype).to("cuda")
        for batch_size, length in case.shapes:
            for work in ("forward", "generate"):
                measured = peak_of(model, case, batch_size, length, work) - beside
                predicted = on_gpu(architecture, dtype, batch_size, length, work)
                yield {
                    "model": name, "dtype": dtype, "batch_size": batch_size, "length": length, "work": work,
                    "measured": measured, "predicted": predicted, "error": round(predicted / measured - 1, 4),
                }  # fmt: skip
        del model


def after_a_small_one(case: Case, dtype: str) -> int:
    """Bytes that stay allocated after a small model of the same class has run: the workspaces of the libraries, which a
    plan counts with the runtime."""
    import torch

    small = build(smaller(case.config), dtype).to("cuda")
    for work in ("forward", "generate"):
        peak_of(small, case, 1, 16, work)
    del small
    gc.collect()
    return int(torch.cuda.memory_allocated())


def peak_of(model: Any, case: Case, batch_size: int, length: int, work: str) -> int:
    """Bytes at the most."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(case, OnDevice(model), batch_size, length, work)
    return int(torch.cuda.max_memory_allocated())


def on_gpu(architecture: Any, dtype: str, batch_size: int, length: int, work: str) -> int:
    """Bytes of weights, cache and activations, as predicted."""
    from bigpipe.bigmodel.footprint import Budget, Workload

    generates = work == "generate"
    output = NEW_TOKENS if generates else None
    workload = Workload(batch_size=batch_size, sequence_length=length, all_logits=not generates, output_length=output)
    budget = Budget(architecture, dtype, workload)
    return budget.weights.bytes + budget.kv_cache.bytes + budget.activations.bytes


class OnDevice:
    """A model that takes its inputs to where it is."""

    def __init__(self, model: Any) -> None:
        self._model, self.config, self.dtype = model, model.config, model.dtype

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**self._moved(inputs))

    def generate(self, **options: Any) -> Any:
        return self._model.generate(**self._moved(options))

    def _moved(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to("cuda") if hasattr(value, "to") else value for name, value in values.items()}


PARTS: dict[str, Callable[[argparse.Namespace, Path], Measurements]] = {
    "peaks": peaks, "training": training, "load": load, "quantize": quantize, "offloaded": offloaded,
}  # fmt: skip


def child(options: argparse.Namespace, work: str, *paths: Path) -> Any:
    """What a process of its own answers: each starts with a device that holds nothing."""
    command = [sys.executable, __file__, "--device", options.device, "--child", work, *map(str, paths)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.splitlines()[-1]
    )


def answer(options: argparse.Namespace) -> Any:
    work, *paths = options.child
    name, *rest = work.split()
    places = list(map(Path, paths))
    arms: dict[str, Callable[..., Any]] = {
        "disk": lambda: disk_speed(places[0]),
        "bus": lambda: bus_speed(options.device),
        "load": lambda arm: load_arm(arm, places[0], options.device),
        "quantize": lambda scheme, device: quantize_arm(scheme, device, *places),
        "peaks": lambda model: list(peak_rows(model)),
    }
    return arms[name](*rest)


def gpu_facts(device: str) -> dict[str, Any]:
    import torch

    if device != "cuda":
        return {}
    return {"name": torch.cuda.get_device_name(), "bytes": torch.cuda.get_device_properties(0).total_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=SHAPES, default="1.3B")
    parser.add_argument("--cap", type=float, default=1, help="GiB of GPU memory, for `offloaded`")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary folder otherwise")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(answer(options)))
        return
    report: dict[str, Any] = {"benchmark": "gpu", "device": gpu_facts(options.device), "machine": facts()}
    try:
        for name in options.only:
            measure(name, options, report)
    except KeyboardInterrupt:
        report["interrupted"] = True
        write(options.out, report)
    print(json.dumps(report, indent=1))


def measure(name: str, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """One part, into the report, which is written after each of its measurements."""
    started, found = time.perf_counter(), report.setdefault(name, {})

    def note(each: str, value: Any) -> None:
        found[each] = value
        report[f"{name} took"] = round(time.perf_counter() - started, 1)
        print(json.dumps({name: {each: value}}, indent=1), file=sys.stderr, flush=True)
        write(options.out, report)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        try:
            for each, attempt in PARTS[name](options, Path(folder)):
                note(each, attempted(attempt))
        except OSError as error:  # what all of the part needs could not be written
            note("failed", str(error))


def write(out: Path | None, report: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(report, indent=1))


def attempted(measurement: Callable[[], Any]) -> Any:
    """One that fails costs itself: time on such a machine is dear."""
    try:
        return measurement()
    except (subprocess.CalledProcessError, OSError) as error:
        return {"failed": str(error)}


if __name__ == "__main__":
    main()
