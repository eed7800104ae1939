"""The command that shows a page."""

from __future__ import annotations

from pathlib import Path

import click

from .options import OFFLINE, PATH, STORE
from .printing import own_stdout


@click.command()
@click.argument("directory", type=PATH, default=".")
@click.option("--host", help="Listen there instead of on loopback; the address then carries a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: any that is free.")
@click.option("--also", multiple=True, type=PATH, metavar="DIR", help="More models to look at, below DIR.")
@click.option("--allow-cancel", is_flag=True, help="Let the page interrupt runs.")
@OFFLINE
@STORE
def ui(
    directory: Path, host: str | None, port: int, also: tuple[Path, ...], allow_cancel: bool, offline: bool,
    store: Path | None,
) -> None:  # fmt: skip
    """Show a page: what a model needs, the recipes of DIRECTORY with their plans, runs while they go on.

    Example: bigpipe ui
    """
    from bigpipe.webpage.serving import serve

    serve(
        directory, host=host, port=port, also=also, allow_cancel=allow_cancel, offline=offline, store=store,
        announce=lambda address: click.echo(f"{address}  (Ctrl-C ends it)", file=own_stdout()),  # its token too
    )  # fmt: skip


COMMANDS = (ui,)
