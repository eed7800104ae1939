"""One way in which a checkpoint stores weights, as a value: how it is recognised, and how it packs a matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray

    from bigpipe.bigmodel.checkpoint import Decoder, TensorInfo

    Codes = NDArray[Any]
    Scales = NDArray[numpy.float32]

Shape = tuple[int, int]
"""(out, in) features of a matrix."""
Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Stored name → (torch dtype name, shape)."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a packed weight."""

    suffix: str
    """Of its name: what follows the module's name and a dot."""
    dtype: str
    shape: tuple[int, ...]
    loaded: int | None = None
    """Bytes of it in memory once the module is loaded, where it becomes something else; None: as stored."""

    @property
    def nbytes(self) -> int:
        from bigpipe.bigmodel.checkpoint import tensor_nbytes

        return tensor_nbytes(self.dtype, self.shape)

    @property
    def held(self) -> int:
        return self.nbytes if self.loaded is None else self.loaded


class Encoder(Protocol):
    """One thread's way from numbers to codes, with buffers of its own."""

    def encode(self, bits: Codes, measured: Any = None) -> tuple[Codes, Scales]:
        """Return (codes, scales) of numbers given as their bits; `measured` as of the packing."""


class MeasuringEncoder(Encoder, Protocol):
    def absmax(self, bits: Codes) -> Scales:
        """Return the largest magnitudes alone, for packings that must know those of a whole weight first."""


class Packing(Protocol):
    """How a format stores the matrix of a linear module, and computes with it. Its fields are what a user may set.

    What is heavy (numpy, torch, the library that computes) is imported by the methods that need it.
    """

    bits: ClassVar[int]
    """Per number, as the format's name promises."""
    takes: ClassVar[tuple[str, ...]] = ()
    """The fields that a user may set."""
    quantizing: ClassVar[tuple[int, int, int]] = (0, 0, 0)
    """Bytes per element of the largest matrix while transformers quantizes a 16-bit checkpoint as it loads: the least,
    as measured, the most."""
    keeps_inputs: ClassVar[bool] = False
    """Is the input of each product kept for its gradient, where checkpointing lets go of all else?"""
    by_rows: ClassVar[bool] = False
    """Encoded in whole rows; else in runs of whole blocks of `encoders.BLOCK` numbers."""
    through: ClassVar[str | None] = None
    """The dtype that numbers are rounded to before they are encoded, whatever they were."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Return all that `stored` may name: the codes first, and last the one that no other format has."""

    @property
    def measures(self) -> bool:
        """Return whether a whole weight is measured before it is encoded; what sums its scales depends on threads."""
        return False

    def stored(self, shape: Shape, dtype: str, measured: Any = None) -> tuple[StoredTensor, ...]:
        """Return the tensors, in the order of `suffixes`, of a matrix of `shape` (out, in) and `dtype`.

        measured: what `measure` gave; None: not known yet, and sizes are right within `spread`.
        """

    def as_stored(self, parts: Collection[str]) -> Packing:
        """Return it with the options that a weight of which these parts are stored was packed with. parts: suffixes."""
        return self

    def spread(self) -> tuple[int, int]:
        """Return by how many bytes a stored matrix may be smaller and larger than predicted."""
        return 0, 0

    def transient(self, tokens: int, hidden: int, inner: int, largest: int) -> tuple[int, str]:
        """Return the bytes that one product of `tokens` rows takes besides, and what they are, in words.

        hidden, inner: widths of the model; largest: elements of its largest packed matrix.
        """

    def learning(self, largest: int, itemsize: int) -> int:
        """Return the bytes that gradients through the largest packed matrix take besides: it is unpacked.

        largest: its elements; itemsize: bytes of a number of what is computed in.
        """
        return itemsize * largest

    def config(self, skipped: list[str] | None) -> dict[str, Any]:
        """Return the `quantization_config`; skipped: names of modules that were left alone by the user's choice."""

    def encoder(self, dtype: str, size: int, device: str | None = None) -> Encoder:
        """Return an encoder of up to `size` numbers of `dtype`; device: a torch device, or None for numpy."""

    @property
    def computes_in(self) -> str | None:
        """Return the dtype that codes are unpacked to where they are computed with; None: any that the model has."""
        return None

    def measure(self, absmax: Scales, threads: int) -> Any:
        """Return what is to be known of a weight from its largest magnitudes; threads: as many as torch would use."""
        return None

    def beside(self, shape: Shape, dtype: str, scales: Scales, measured: Any, threads: int) -> dict[str, bytes]:
        """Return the contents of all stored tensors but the codes, by suffix."""

    def wrong(self, config: Mapping[str, Any]) -> str | None:
        """Return what no module can be made from in a `quantization_config`, in words; None: there is nothing."""
        return None

    def refuse_misstated(
        self, linear: torch.nn.Module, parts: Mapping[str, TensorInfo], read: Callable[[TensorInfo], bytes]
    ) -> None:
        """Raise InvalidCheckpoint where what is said beside the codes cannot be of a matrix of `linear`'s shape: what
        computes with it believes it. parts: by suffix; read: gives the bytes of one."""
        return None

    def module(self, linear: torch.nn.Module, shapes: Shapes, config: Mapping[str, Any]) -> torch.nn.Module:
        """Return the empty module that takes the place of `linear`; shapes: of the stored tensors, by suffix."""

    def attach(self, module: Any, parts: Mapping[str, torch.Tensor]) -> None:
        """Give the module its weight, whose tensors (by suffix) are used as they are, without a copy."""

    def detach(self, module: Any) -> None:
        """Forget what was derived from the weight. A placeholder takes the weight's place afterwards."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A plain tensor that stored ones make."""

    parts: tuple[str, ...]
    """Their names, the codes first."""
    dtype: str
    shape: tuple[int, ...]
    decoder: Decoder


class Decoding(Protocol):
    """How a checkpoint with scales beside its codes is read as a plain one. Equal to others of the same settings."""

    def made(self, stored: Tensors, dtype: str) -> Mapping[str, Decoded]:
        """Return plain tensors of `dtype` by name. Raise InvalidCheckpoint where codes and scales do not fit."""

    def dropped(self, name: str) -> bool:
        """Return whether a stored tensor that makes no plain one is of no use to a plain checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    name: str
    """As `scheme` and the dtypes of an estimate say it: nf4."""
    title: str
    """As people call it: bitsandbytes nf4."""
    method: str = ""
    """`quant_method` of its config."""
    tensors: tuple[str, ...] = ()
    """How stored names end that tell it: those of codes, whose dtype is no wide float, and those of what is beside."""
    packing: Packing | None = None
    """None: nothing is packed, or nothing here can pack or unpack it."""
    computes: bool = True
    """Can a model be run from it?"""
    decoding: Decoding | None = None
    """How its tensors become plain ones, exactly, whatever is done with them; None: they do not."""


PLAIN = Format(name="plain", title="plain numbers")
