"""What weight files hold, of either format and wherever they are read, and of several files together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from bigpipe.errors import InvalidCheckpoint

from .bytesource import ByteSource
from .files import POINTER_SIZE, file_format_of, refuse_pointer
from .headers import read_header
from .tensors import Contents, invalid

ANSWER = "fetch the file again: what came in its place may say why"
BEGINNINGS: Mapping[bytes, tuple[str, str]] = {
    b"<": ("HTML or XML, as a server answers, and no weights", ANSWER),
    b'{"': ("JSON, as a server answers, and no weights", ANSWER),
    b"GGUF": ("a GGUF file, by another name", "give the model that it was made of"),
    b"PK\3\4": ("a zip file, as torch.save writes it, by another name", "let its name end in .bin"),
}
"""How a file begins → what it is, and what helps."""
LONGEST = 9
"""Bytes that tell."""


def read_contents(source: ByteSource, file: Path, *, placed: bool = True) -> Contents:
    """Return what a weight file holds; `file` is what the tensors will name as theirs. Raise InvalidCheckpoint.
    Not placed: where the tensors of a torch file lie is not looked up (see `read_torch_file`)."""
    if source.size < POINTER_SIZE:
        refuse_pointer(source.read(0, source.size), file)
    try:
        if file_format_of(file) == "safetensors":
            return read_header(source, file)
        from .pickles import read_torch_file

        return read_torch_file(source, file, placed=placed)
    except InvalidCheckpoint:
        _refuse_another(source, file)
        raise


def _refuse_another(source: ByteSource, file: Path) -> None:
    """Raise InvalidCheckpoint where a file that is not what its name says shows what it is."""
    beginning = source.read(0, min(source.size, LONGEST))
    counts = 0 in beginning[:8]  # a length of a header may begin as a text does, and ends in zeros
    for start, (told, cure) in BEGINNINGS.items():
        own = start == b"PK\3\4" and file.suffix != ".safetensors"
        if beginning.startswith(start) and not own and not (counts and cure is ANSWER):
            raise invalid(file, f"is {told}", cure)
    if beginning[8:9] == b"{" and file.suffix != ".safetensors":
        raise invalid(file, "is a safetensors file, by another name", "let its name end in .safetensors")


def join_contents(found: Mapping[Path, Contents], prefix: Callable[[Path], str] = lambda file: "") -> Contents:
    """Return what files hold together, each name after its file's prefix. Raise InvalidCheckpoint for a name twice."""
    whole = Contents({})
    for file, own in found.items():
        before = prefix(file)
        for name in (*own.tensors, *own.tied):
            if before + name in whole.tensors or before + name in whole.tied:
                raise invalid(file, "stands in another file of this model too", "save the model anew", tensor=name)
        whole.tensors.update((before + name, tensor) for name, tensor in own.tensors.items())
        whole.tied.update((before + alias, before + name) for alias, name in own.tied.items())
        whole.metadata.update(own.metadata)
    return whole


def check_weight_map(index: Path | str, weight_map: Mapping[str, str], contents: Contents) -> None:
    """Raise InvalidCheckpoint unless every tensor is in the file that the index names."""
    for name, file in weight_map.items():
        stored = contents.tensors.get(contents.tied.get(name, name))
        if stored is None or stored.file.name != file:
            cause = f"says this tensor is in {file}, but it is {f'in {stored.file.name}' if stored else 'nowhere'}"
            raise invalid(index, cause, "save the model anew", tensor=name)
