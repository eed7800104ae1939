"""The way in: `bigpipe` and `python -m bigpipe`."""

from __future__ import annotations

import gc
import os
import resource


def main() -> None:
    """Start-up makes objects by the hundred thousand, a large recipe by the million, and no garbage: the collector
    looks less often from here on. Nor are the metadata of all distributions read for plugins of pydantic."""
    gc.set_threshold(1_000_000)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # it would hold secrets
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        from .cli import main as run_command

        run_command()
    except KeyboardInterrupt:  # before the command could answer it
        os._exit(130)


if __name__ == "__main__":
    main()
