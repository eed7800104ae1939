"""Damages files on purpose, the same way for the same number, and opens them in a process that is watched.

    python -m attack.mutations FILE START END FIRST COUNT

prints one JSON line per mutant: `{"mutant", "error"}` or `{"mutant", "tensors": {name: [dtype, shape, sha256]}}`. The
process may not take more than `MEMORY` bytes beyond what it starts with, and importing, executing or spawning anything
while a mutant is open ends it.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
from pathlib import Path
from typing import Any

MEMORY = 200 * 2**20
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)


def mutant(original: bytes, start: int, end: int, number: int) -> bytes:
    """`original` with one to four changes between `start` and `end`; as it is where `number` is negative."""
    if number < 0:
        return original
    chance = random.Random(number)  # noqa: S311
    content = bytearray(original)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(start, min(end, len(content)))
        how = chance.randrange(7)
        if how == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            content[at] = chance.choice(EXTREMES)
        elif how == 2:
            del content[at : at + chance.randrange(1, 9)]
        elif how == 3:
            content[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif how == 4:
            width = chance.choice((2, 4, 8))
            content[at : at + width] = (2 ** (8 * width) - chance.choice((1, 2, 2**7))).to_bytes(width, "little")
        elif how == 5:
            other, size = chance.randrange(start, end), chance.randrange(1, 40)
            content[at : at + size] = original[other : other + size]
        else:
            content[at : at + 1] = chance.choice((b"9", b"[", b"{", b'"', b"\\", b"c", b"R", b"(", b"\x85", b"0"))
    return bytes(content)


def main(file: Path, start: int, end: int, first: int, count: int) -> None:
    from bigpipe.bigmodel.checkpoint import open_checkpoint, pickles  # noqa: F401  so that nothing is left to import
    from bigpipe.errors import BigpipeError

    import numpy  # noqa: F401  isort: skip

    original = file.read_bytes()
    target = file.with_name(f"mutant{file.suffix}")
    limit_memory()
    watch = Watch()
    for number in range(first, first + count):
        target.write_bytes(mutant(original, start, end, number))
        answer: dict[str, Any] = {"mutant": number}
        watch.on = True
        try:
            checkpoint = open_checkpoint(target)
            answer["tensors"] = {
                name: [
                    checkpoint.tensors[kept].dtype,
                    checkpoint.tensors[kept].shape,
                    hashlib.sha256(checkpoint.read(name)).hexdigest(),
                ]
                for name, kept in {**{name: name for name in checkpoint.tensors}, **checkpoint.tied}.items()
            }
        except BigpipeError as error:
            answer["error"] = type(error).__name__
            if not (error.cause and error.cure and str(target) in error.cause):
                raise AssertionError(f"an error without place or cure: {error!r}") from error
        finally:
            watch.on = False
        sys.stdout.write(json.dumps(answer) + "\n")


class Watch:
    """Ends the process when something is done that reading a file never needs."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        banned = ("import", "exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen", "os.posix_spawn")
        if self.on and event in banned:
            self.on = False
            raise SystemExit(f"{event} {arguments[:1]}")


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]))
