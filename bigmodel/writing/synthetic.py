"""Made-up weights in the shape of a real model, streamed to disk: for trying recipes, disks and machines at full size.

A tensor's bytes depend on its name, its format and the seed alone. Matrices have the spread that transformers' own
initialisation gives (normal, `initializer_range`), norms are 1 and biases 0, so that activations keep a sane size. The
normal values come from one block of a million, in pieces of 64 Ki from places that hash of name and position chooses:
copying at the speed of memory, where fresh random numbers would be many times slower than the disk. No two pieces begin
at the same place but by chance, yet values do repeat: these weights are for measuring bytes and time, not quality.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.checkpoint import CASTABLE, CHUNK, MAX_CONFIG, FileFormat, ModelDescription, itemsize, read_json
from bigpipe.bigmodel.formats import without_quantization
from bigpipe.errors import UsageError
from bigpipe.files import write_file
from bigpipe.sizes import size_of

from .conversion import Conversion, cast, encode_config
from .plans import PlannedTensor, ShardPlan
from .shards import PIECES_IN_FLIGHT
from .writer import SavedCheckpoint, Traffic, write_checkpoint

BLOCK = 2**20
"""Elements of the block that all random tensors are cut from."""
PIECE = 2**16
"""Elements cut at a time."""


def read_shape(config: str | Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Return a config, read from its file (relative to `base`) where it is the name of one. Raise UsageError."""
    if not isinstance(config, str):
        return dict(config)
    file = base / config
    if not file.is_file():
        raise UsageError(f"synthetic.config: there is no file {file}", "relative paths start at the manifest")
    return read_json(file, file.parent, MAX_CONFIG)


@dataclass(frozen=True, slots=True)
class SyntheticModel:
    """A model to make up: weights and config.json of an architecture."""

    given: Mapping[str, Any]
    """What config.json shall say, besides the dtype and the class."""
    architecture: Architecture
    dtype: str = "float16"
    """Of floating-point tensors; those that the class keeps as float32 stay so."""
    seed: int = 0
    format: FileFormat = "safetensors"
    max_shard_size: int | str = "5GB"

    @property
    def description(self) -> ModelDescription:
        """What `write` writes: every tensor that checkpoints of this class keep. Raise UsageError for other dtypes."""
        dtype, architecture = self.dtype, self.architecture
        if dtype not in CASTABLE:
            raise UsageError(f"synthetic weights cannot be {dtype}", f"choose one of {', '.join(sorted(CASTABLE))}")
        given = without_quantization(self.given)  # what is made up is plain
        config = {"architectures": [architecture.class_name], **given, "dtype": dtype}
        kept = [tensor for tensor in architecture.tensors() if tensor.persistent]
        return ModelDescription(
            config=json.loads(encode_config(config)),  # as whoever reads the file will see it: keys are strings
            tensors={tensor.name: (architecture.dtype_of(tensor, dtype), tensor.shape) for tensor in kept},
            format=self.format,
            tied=architecture.aliases if self.format == "bin" else {},
        )

    @property
    def plans(self) -> list[ShardPlan]:
        """The weight files that `write` will write."""
        described, size = self.description, size_of("max_shard_size", self.max_shard_size)
        return Conversion(max_shard_size=size, format=self.format).plans(
            described.tensors or {}, described.tied, described.config
        )

    def write(self, out: Path, *, journal: Path | None = None, traffic: Traffic | None = None) -> SavedCheckpoint:
        """Write weights and config.json into `out`, in constant memory. `journal` as in `write_checkpoint`."""
        config = encode_config(self.description.config or {})
        return write_checkpoint(
            out,
            self.plans,
            RandomTensors(self.seed, spread_of(self.given)).produce,
            journal=journal,
            fingerprint=lambda file: f"synthetic {self.seed}",
            traffic=traffic or Traffic(),
            beside=lambda: {"config.json": write_file(out / "config.json", config)},
        )


def spread_of(config: Mapping[str, Any]) -> float:
    """Standard deviation of fresh weights, under the names that configs give it; transformers' usual 0.02 otherwise."""
    for name in ("initializer_range", "init_std", "initializer_factor"):
        value = config.get(name)
        if isinstance(value, int | float) and 0 < value < 1:
            return float(value)
    return 0.02


class RandomTensors:
    """Produces the tensors of a made-up model."""

    def __init__(self, seed: int, spread: float) -> None:
        self.seed = seed
        self.spread = spread
        self._blocks: dict[str, memoryview] = {}
        self._buffers = itertools.cycle([bytearray(CHUNK) for _ in range(PIECES_IN_FLIGHT + 1)])

    def produce(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        """The bytes of one tensor, in pieces that stay as they are until three more were taken."""
        kind = _kind(tensor)
        if kind == "normal":
            yield from self._normal(tensor)
        elif kind == "positions":
            yield from self._positions(tensor)
        else:
            one = _one(tensor.dtype) if kind == "ones" else bytes(itemsize(tensor.dtype))
            piece = memoryview(one * (min(CHUNK, tensor.nbytes) // len(one)))
            for start in range(0, tensor.nbytes, CHUNK):
                yield piece[: tensor.nbytes - start]

    def _normal(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        block, width = self._block(tensor.dtype), itemsize(tensor.dtype)
        for start in range(0, tensor.nbytes, CHUNK):
            piece = memoryview(next(self._buffers))[: min(CHUNK, tensor.nbytes - start)]
            for at in range(0, len(piece), PIECE * width):
                wanted = piece[at : at + PIECE * width]
                digest = hashlib.sha256(f"{self.seed}\0{tensor.name}\0{start + at}".encode()).digest()
                place = int.from_bytes(digest[:8], "little") % (BLOCK - PIECE) * width
                wanted[:] = block[place : place + len(wanted)]
            yield piece

    def _positions(self, tensor: PlannedTensor) -> Iterator[memoryview]:
        import numpy

        row = numpy.arange(tensor.shape[-1], dtype=tensor.dtype)
        yield memoryview(numpy.broadcast_to(row, tensor.shape).tobytes())

    def _block(self, dtype: str) -> memoryview:
        """A block of normal values: sums of four uniform ones from the Philox stream, which numpy keeps stable."""
        if dtype not in self._blocks:
            import numpy

            stream = numpy.random.Philox(key=self.seed & (2**64 - 1))
            parts = stream.random_raw(BLOCK).view(numpy.uint16).reshape(BLOCK, 4)
            sums = parts.sum(axis=1, dtype=numpy.float32) / 65536 - numpy.float32(2)
            values = sums * numpy.float32(self.spread * 3**0.5)
            filled = bytearray(BLOCK * itemsize(dtype))
            cast(memoryview(values.tobytes()), "float32", dtype, memoryview(filled))
            self._blocks[dtype] = memoryview(filled)
        return self._blocks[dtype]


def _kind(tensor: PlannedTensor) -> str:
    last = tensor.name.rpartition(".")[2]
    if tensor.dtype not in CASTABLE:
        return "positions" if last == "position_ids" and tensor.shape else "zeros"
    if last in ("bias", "running_mean") or last.endswith("_bias"):
        return "zeros"
    if len(tensor.shape) == 1 and (last == "running_var" or last.endswith("weight")):
        return "ones"
    return "normal"


def _one(dtype: str) -> bytes:
    one = bytearray(itemsize(dtype))
    cast(memoryview(b"\0\0\x80\x3f"), "float32", dtype, memoryview(one))
    return bytes(one)
