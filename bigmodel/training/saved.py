"""What a step leaves on the disk, from which another process goes on as if nothing had happened.

    state-120.safetensors    adapter, optimizer and each rank's random numbers after step 120
    state.json               sealed: which of these is whole (its sha256), and the losses until then

The record is replaced only once the file that it names is on the disk; what no record names is not believed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.files import Damaged, hash_file, read_sealed, write_file, write_sealed

if TYPE_CHECKING:
    import torch

RECORD, STATE = "state.json", "state-{}.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What Adam keeps of each parameter."""


@dataclass(slots=True)
class Progressed:
    """How far a training came, and what it measured."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of each step."""
    tokens: int = 0
    """Learnt from, all ranks together."""
    seconds: float = 0.0


def save_state(folder: Path, progressed: Progressed, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make this the state to go on from. A crash at any moment leaves this one or the one before."""
    from safetensors.torch import save

    file = folder / STATE.format(progressed.step)
    sha256, _ = write_file(file, save({name: value.cpu().contiguous() for name, value in tensors.items()}))
    write_sealed(folder / RECORD, {**asdict(progressed), "sha256": sha256})
    for other in folder.glob(STATE.format("*")):
        if other != file:
            other.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[Progressed, dict[str, torch.Tensor]] | None:
    """Return what `save_state` left last; None where there is none that is whole."""
    from safetensors.torch import load_file

    with suppress(Damaged, OSError, ValueError, TypeError, KeyError):
        record = read_sealed(folder / RECORD)
        sha256, progressed = record.pop("sha256"), Progressed(**record)
        file = folder / STATE.format(progressed.step)
        if hash_file(file) == sha256:
            return progressed, load_file(file)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """Return Adam's moments as `NAME.exp_avg` and so on. names: of its parameters, in their order."""
    import torch

    state = optimizer.state_dict()["state"]
    return {
        f"{name}.{moment}": torch.as_tensor(state[index][moment])
        for index, name in enumerate(names)
        for moment in MOMENTS
        if index in state
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the optimizer what `optimizer_tensors` took of it."""
    state = {
        index: {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS if f"{name}.{moment}" in tensors}
        for index, name in enumerate(names)
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(device: torch.device) -> torch.Tensor:
    """Return all that this process draws random numbers from, as bytes: torch's, the GPU's, numpy's and Python's."""
    import numpy
    import torch

    _, keys, place, has_gauss, gauss = numpy.random.get_state()
    version, numbers, following = random.getstate()
    parts = [
        torch.get_rng_state(),
        torch.from_numpy(numpy.asarray(keys, numpy.uint32).view(numpy.uint8).copy()),
        torch.tensor([place, has_gauss, version], dtype=torch.int64).view(torch.uint8),
        torch.tensor([gauss, following or 0.0, following is not None], dtype=torch.float64).view(torch.uint8),
        torch.tensor(numbers, dtype=torch.int64).view(torch.uint8),
    ]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    return torch.cat(parts)


def restore_random(state: torch.Tensor, device: torch.device) -> None:
    """The inverse of `random_state`, in a process with the same libraries. After a state that a CPU saved a GPU's own
    random numbers stay."""
    import numpy
    import torch

    sizes = [len(torch.get_rng_state()), 624 * 4, 3 * 8, 3 * 8, 625 * 8]
    generator, keys, whole, real, numbers, gpu = torch.split(state, [*sizes, len(state) - sum(sizes)])
    torch.set_rng_state(generator.clone())
    (place, has_gauss, version), (gauss, following, follows) = (
        _numbers(whole, torch.int64),
        _numbers(real, torch.float64),
    )
    found = keys.clone().numpy().view(numpy.uint32)
    numpy.random.set_state(("MT19937", found, int(place), int(has_gauss), float(gauss)))
    random.setstate((int(version), tuple(map(int, _numbers(numbers, torch.int64))), following if follows else None))
    if device.type == "cuda" and len(gpu):
        torch.cuda.set_rng_state(gpu.clone(), device)


def _numbers(part: torch.Tensor, dtype: torch.dtype) -> list[Any]:
    found: list[Any] = part.clone().view(dtype).tolist()
    return found
