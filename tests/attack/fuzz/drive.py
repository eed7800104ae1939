"""`python -m attack.fuzz.drive TARGET SECONDS [FOLDER]`: coverage-guided fuzzing of one target with atheris.

Starts from the inputs that are kept, and leaves what it finds in FOLDER/TARGET: inputs that reach new code, and
`crash-…`, `timeout-…` and `oom-…`. The seed is `BIGPIPE_SEED`, else chosen and printed. Ends with 0 where every input
ended in a value or a BigpipeError.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

MEMORY = 3000
"""MiB that the process may take."""
LONGEST = {"yaml": 4096, "safetensors": 4096, "torch_zip": 4096, "expressions": 600, "records": 2048, "hub": 2048}
ROOMS = (
    "bigmodel.checkpoint", "bigmodel.hub", "orchestrator.recipe", "orchestrator.store", "orchestrator.lock",
    "orchestrator.running",
)  # fmt: skip
"""What is watched."""
SLOWEST = 60
"""Seconds that one input may take."""


def main(name: str, seconds: str, found: str = "") -> None:
    import atheris

    with atheris.instrument_imports(include=["bigpipe"]):
        from attack.fuzz.targets import TARGETS

        for room in ROOMS:  # what is imported late too
            package = import_module(f"bigpipe.{room}")
            for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                import_module(module.name)
    from attack.fuzz.kept import kept

    target = TARGETS[name]
    folder = Path(found or tempfile.mkdtemp(prefix="fuzz-")) / name
    folder.mkdir(parents=True, exist_ok=True)
    for data in kept(name):
        (folder / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    seed = os.environ.get("BIGPIPE_SEED") or str(int.from_bytes(os.urandom(3)) + 1)
    sys.stderr.write(f"{name}: BIGPIPE_SEED={seed}, {seconds} s, found inputs go to {folder}\n")
    options = [
        f"-max_total_time={seconds}", f"-seed={seed}", f"-rss_limit_mb={MEMORY}", f"-timeout={SLOWEST}",
        f"-max_len={LONGEST[name]}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(folder)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
