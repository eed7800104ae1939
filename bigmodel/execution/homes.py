"""What a device map means on this machine: where each weight lives and where it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from bigpipe.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    import torch

Home = int | Literal["cpu", "disk"]
"""A GPU's number, RAM, or the checkpoint's own files."""

DeviceMap = Mapping[str, int | str]
"""Module or parameter name → home. The longest name that leads to a weight decides; "" is the rest."""


class Placed(Protocol):
    """What loading asks of a `Placement`."""

    @property
    def device_map(self) -> DeviceMap: ...
    @property
    def max_memory(self) -> Mapping[Home, int | None]: ...
    @property
    def dtype(self) -> str | None: ...


class Homes:
    """first_gpu: added to every GPU number of the map, which counts from 0 for each rank.

    Raises UsageError for a device that has no such name, DoesNotFit for a GPU this machine lacks.
    """

    def __init__(self, device_map: DeviceMap, first_gpu: int = 0) -> None:
        self.device_map = {name: parse_home(home) for name, home in device_map.items()}
        self.first_gpu = first_gpu
        self.main = self._main()
        """Where everything without a GPU of its own computes."""

    def home(self, name: str) -> Home:
        """KeyError where nothing covers `name`."""
        while True:
            if name in self.device_map:
                return self.device_map[name]
            if not name:
                raise KeyError(name)
            name = name.rpartition(".")[0]

    def execution(self, name: str) -> torch.device:
        """Where the module or parameter computes: on its GPU, else on the first GPU of the map, else on the CPU."""
        import torch

        home = self.home(name)
        return torch.device("cuda", home + self.first_gpu) if isinstance(home, int) else self.main

    @property
    def several(self) -> bool:
        """Do inputs have to move between modules?"""
        return self.main.type != "cpu"

    def check_covers(self, names: Iterable[str]) -> None:
        """Raises UsageError, listing what no entry of the map leads to."""
        missing = [name for name in names if not self.covers(name)]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UsageError(
                f"the device map covers no device for {', '.join(missing[:5])}{more}",
                'add an entry for each, or "": cpu for all the rest',
            )

    def covers(self, name: str) -> bool:
        try:
            self.home(name)
        except KeyError:
            return False
        return True

    def _main(self) -> torch.device:
        import torch

        gpus = sorted(home + self.first_gpu for home in self.device_map.values() if isinstance(home, int))
        if not gpus:
            return torch.device("cpu")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus[-1] >= found:
            raise DoesNotFit(
                f"the device map names GPU {gpus[-1]}, and this machine has {found or 'none'}",
                "place the model for this machine's devices, for example with max_memory: {cpu: …, disk: …}",
            )
        return torch.device("cuda", gpus[0])


def parse_home(device: int | str) -> Home:
    """Accepts what device maps are written with: 0, "0", "cuda:0", "cuda", "cpu", "disk"."""
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return device
    text = str(device).removeprefix("cuda:")
    if text in ("cpu", "disk"):
        return "cpu" if text == "cpu" else "disk"
    if text == "cuda":
        return 0
    if text.isdecimal():
        return int(text)
    raise UsageError(f"{device!r} is not a device", "use a GPU's number, cpu or disk")
