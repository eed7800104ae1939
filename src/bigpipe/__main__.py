"""The way in: `bigpipe` and `python -m bigpipe`."""

from __future__ import annotations

import gc


def main() -> None:
    """Start-up makes objects by the hundred thousand, and no garbage: the collector looks less often from here on."""
    gc.set_threshold(200_000)
    from .cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
