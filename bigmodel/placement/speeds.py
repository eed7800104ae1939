"""How fast bytes move and hops are: what `optimal` weighs placements by."""

from __future__ import annotations

from dataclasses import dataclass

from bigpipe.sizes import format_transfer


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second, and seconds per hop. The defaults are of an ordinary machine; only ratios decide.

    A token is decoded by reading every weight once, so reading speed is computing speed.
    """

    gpu: float = 1.0e12
    """A GPU reading its own memory."""
    link: float = 2.0e10
    """From RAM to a GPU."""
    ram: float = 2.0e10
    """A CPU reading its memory."""
    disk: float = 1.5e9
    hop: float = 3.0e-5
    """Seconds to hand activations from one device to another."""

    def resident(self, device: object, nbytes: int) -> float:
        """Seconds to compute with weights that lie where they compute."""
        return nbytes / (self.ram if device == "cpu" else self.gpu)

    def streamed(self, home: object, runner: object, nbytes: int) -> float:
        """Seconds to compute with weights that pass from `home` (cpu or disk) through `runner`."""
        path = self.disk if home == "disk" else self.link
        if runner != "cpu":
            path = min(path, self.link)
        return max(nbytes / path, self.resident(runner, nbytes))

    def describe(self) -> str:
        named = {"GPU memory": self.gpu, "link": self.link, "RAM": self.ram, "disk": self.disk}
        return ", ".join(f"{name} {format_transfer(speed)}/s" for name, speed in named.items())
