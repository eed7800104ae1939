"""Predicted against measured peak memory of real forwards and generations on the CPU.

    python benchmarks/peaks.py [--set evaluation|calibration] [--models NAME …] [--measured REPORT …]

Each measurement has a process of its own: forked after the libraries are imported, warmed up on a small model of the
same class, then the model with random weights, then one forward or one `generate`. Measured is anonymous memory: the
high-water mark of resident memory, reset before the work, less pages of files, less what the process held before the
model. Predicted is weights + KV cache + activations of `bigpipe.bigmodel.footprint.budgets`, from the config alone. The
formulas and constants were fitted to the calibration set, and to none of the evaluation set.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from machine import facts
from peak_models import CALIBRATION, EVALUATION, Case, smaller

from bigpipe.bigmodel.architecture import Architecture, describe_architecture
from bigpipe.bigmodel.footprint import Budget, Workload

DTYPES = ("float32", "float16", "bfloat16")
NEW_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """Sizes in bytes."""

    model: str
    dtype: str
    batch_size: int
    length: int
    work: str
    measured: int
    weights_measured: int
    predicted: int = 0
    weights_predicted: int = 0
    basis: str = ""
    formula: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_beside_weights(self) -> float:
        """Of cache and activations alone, where errors of the formulas are not diluted by the exact weights."""
        return (self.predicted - self.weights_predicted) / (self.measured - self.weights_measured) - 1


def anonymous() -> int:
    """Bytes of the process's anonymous memory now."""
    return _status("RssAnon")


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_anonymous() -> int:
    """Bytes at the high-water mark since `reset_peak`; pages of files are taken to be as many as now."""
    return _status("VmHWM") - _status("RssFile") - _status("RssShmem")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(re.search(rf"{name}:\s+(\d+) kB", file.read())[1]) * 1024  # type: ignore[index]


def build(config: Mapping[str, Any], dtype: str) -> Any:
    """The class that the config names, with weights drawn from one small block of random numbers."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, config["architectures"][0])
    with no_init_weights():
        model = model_class._from_config(
            CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)), dtype=getattr(torch, dtype)
        )
    model.tie_weights()
    if dtype == "float16":  # as `from_pretrained` does
        for name in model._keep_in_fp32_modules or ():
            for path, module in model.named_modules():
                if path.endswith(f".{name}"):
                    module.float()
    block = torch.randn(65_521, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(getattr(torch, dtype))
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block[: part.numel()])
    return model.eval()


def inputs_of(case: Case, model: Any, batch_size: int, length: int, work: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    config = model.config
    if case.pixels:
        return {"pixel_values": torch.randn(batch_size, 3, case.pixels, case.pixels).to(model.dtype)}
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.randint(10, vocabulary, (batch_size, length), generator=generator)
    if work == "forward" and config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def run(case: Case, model: Any, batch_size: int, length: int, work: str) -> None:
    import torch

    inputs = inputs_of(case, model, batch_size, length - NEW_TOKENS if work == "generate" else length, work)
    with torch.inference_mode():
        if work == "generate":
            model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
        else:
            model(**inputs)


def measure(case: Case, dtype: str, batch_size: int, length: int, work: str) -> tuple[int, int]:
    """(bytes at the peak, bytes of the weights), in this process, which is new."""
    small = build(smaller(case.config), dtype)
    run(case, small, batch_size, 16, work)
    del small
    gc.collect()
    before = anonymous()
    model = build(case.config, dtype)
    gc.collect()
    weights = anonymous() - before
    reset_peak()
    run(case, model, batch_size, length, work)
    return peak_anonymous() - before, weights


def in_a_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, in a forked process."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError(f"a measurement ended with status {status}")
    return json.loads(answer)


def import_libraries(cases: Mapping[str, Case]) -> None:
    import torch
    import transformers
    from transformers.generation import utils  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for case in cases.values():
        getattr(transformers, case.config["architectures"][0])


def rows(cases: Mapping[str, Case], dtypes: Sequence[str]) -> Iterator[Row]:
    import_libraries(cases)
    for name, case in cases.items():
        architecture = describe_architecture(case.config)
        for dtype in dtypes:
            for batch_size, length in case.shapes:
                for work in ("forward", "generate") if architecture.generates else ("forward",):
                    yield _row(name, case, architecture, dtype, batch_size, length, work)


def _row(name: str, case: Case, architecture: Architecture, dtype: str, batch_size: int, length: int, work: str) -> Row:
    started = time.monotonic()
    peak, weights = in_a_child(lambda: measure(case, dtype, batch_size, length, work))
    row = predict(architecture, Row(name, dtype, batch_size, length, work, peak, weights))
    print(
        f"{name:16s} {dtype:9s} {batch_size:2d}×{length:<5d} {work:9s} measured {peak / 2**20:8.1f} "
        f"predicted {row.predicted / 2**20:8.1f} MiB {row.error * 100:+6.1f} %  beside weights "
        f"{(row.measured - row.weights_measured) / 2**20:8.1f} {row.error_beside_weights * 100:+6.1f} % "
        f"weights {(weights - row.weights_predicted) / 2**20:+.1f}  {time.monotonic() - started:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return row


def predict(architecture: Architecture, row: Row) -> Row:
    """The same row with what bigpipe says of it."""
    generates = row.work == "generate"
    workload = Workload(
        batch_size=row.batch_size, sequence_length=row.length, all_logits=not generates,
        output_length=NEW_TOKENS if generates else None,
    )  # fmt: skip
    found = Budget(architecture, row.dtype, workload)
    return replace(
        row, predicted=found.cpu.bytes, weights_predicted=found.weights.bytes, basis=found.cpu.basis,
        formula=found.cpu.formula,
    )  # fmt: skip


def predict_again(files: Sequence[Path], cases: Mapping[str, Case]) -> list[Row]:
    """Rows that were measured before, with today's predictions."""
    kept = [Row(**row) for file in files for row in json.loads(file.read_bytes())["rows"]]
    names = dict.fromkeys(row.model for row in kept)
    architectures = {name: describe_architecture(cases[name].config) for name in names}
    return [predict(architectures[row.model], row) for row in kept]


def statistics_of(found: Sequence[Row]) -> dict[str, Any]:
    errors = sorted(row.error * 100 for row in found)
    return {
        "rows": len(errors),
        "median of |error| %": round(statistics.median(abs(error) for error in errors), 2),
        "95th percentile %": round(errors[min(len(errors) - 1, int(0.95 * len(errors)))], 2),
        "lowest %": round(errors[0], 2),
        "highest %": round(errors[-1], 2),
    }


SETTING = "glibc.malloc.mmap_threshold=1048576"
"""What is freed goes back to the system, as in workers (`launch.environment.ALLOCATOR`), but in pages of 4 KiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("evaluation", "calibration"), default="evaluation")
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--measured", nargs="*", type=Path, help="reports of before: predict again, measure nothing")
    parser.add_argument("--glibc-default", action="store_true", help="leave the allocator as it comes")
    options = parser.parse_args()
    if not options.glibc_default and os.environ.get("GLIBC_TUNABLES") != SETTING:
        environment = {**os.environ, "GLIBC_TUNABLES": SETTING}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606
    cases = EVALUATION if options.set == "evaluation" else CALIBRATION
    cases = {name: case for name, case in cases.items() if not options.models or name in options.models}
    found = predict_again(options.measured, cases) if options.measured else list(rows(cases, options.dtypes))
    arms = {
        name: statistics_of([row for row in found if row.model == name]) for name in {row.model: 0 for row in found}
    }
    arms["all"] = statistics_of(found)
    report = {"benchmark": "peaks", "machine": facts(), "set": options.set, "arms": arms}
    report["rows"] = [asdict(row) for row in found]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
