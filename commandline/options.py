"""What several commands take: options, and how their values are read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from bigpipe.errors import UsageError
from bigpipe.names import SPELLINGS

from .completing import PARAMETERS


def pairs(context: click.Context, option: click.Parameter, written: tuple[str, ...]) -> dict[str, str]:
    """Return the values of `-p NAME=VALUE` options by name. Raise UsageError."""
    found = {}
    for text in written:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"-p {text!r} is not NAME=VALUE", "write for example -p scheme=nf4")
        found[name] = value
    return found


AGE_UNITS = MappingProxyType({"m": "minutes", "h": "hours", "d": "days", "w": "weeks"})


def age(context: click.Context, option: click.Parameter, written: str | None) -> timedelta | None:
    """Return how long ago `12h`, `30d` or `2w` is. Raise UsageError."""
    if written is None:
        return None
    match = re.fullmatch(r"([0-9]{1,4})([mhdw])", written)
    if match is None:
        raise UsageError(f"{written!r} is no age", "write for example 12h, 30d or 2w")
    return timedelta(**{AGE_UNITS[match[2]]: int(match[1])})


class FromHome(click.Path):
    """A path in which `~` is the home: of `--store=~/cache` a shell leaves it standing. `-` is none: it would be a file
    that is called so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if os.fspath(value) == "-":
            name = f"{param.opts[-1]} -" if isinstance(param, click.Option) else "-"
            raise UsageError(f"{name}: no stream is read or written here", "name a file; one called so is ./-")
        return super().convert(os.path.expanduser(value), param, ctx)


PATH = FromHome(path_type=Path)
MANIFEST = click.argument("manifest", type=PATH)
STORE = click.option("--store", type=PATH, help="The store; else $BIGPIPE_HOME, else the XDG cache.")
PARAMS = click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    shell_complete=PARAMETERS,
    help="Set a recipe's parameter.",
)
REMOTE = click.option(
    "--remote",
    metavar="URL",
    help="A store that others share, by address or path; else $BIGPIPE_REMOTE, else the recipe's. Empty: none.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
JOBS = click.option("--jobs", type=click.IntRange(min=1), help="Nodes side by side at the most.")
SMOKE = click.option(
    "--smoke", is_flag=True, help="All of it small: made-up models, few rows, a store of its own; gates are only told."
)
EXECUTOR = click.option(
    "--executor", metavar="NAME[:ADDRESS]", help="Run nodes on a cluster: ray, or ray:HOST:PORT. Else they run here."
)
YES = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would go.")
OFFLINE = click.option("--offline", is_flag=True, help="Never use the network.")


def require_values(command: click.Command, args: Sequence[str]) -> None:
    """Raise UsageError for an option whose value would be the command's next option: click takes any text for it."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    names = {name for option in options for name in option.opts if name.startswith("--")}
    lone = {
        name for option in options for name in option.opts
        if option.is_flag or option.count or isinstance(option.flag_value, str)
    }  # fmt: skip
    typed = args[: args.index("--")] if "--" in args else args
    for name, following in pairwise(typed):
        if name in names - lone and following in names:
            cure = f"give it one; a value that is spelled so is written {name}={following}"
            raise UsageError(f"{name} is without its value: {following} is an option", cure)


class ManyDtypes(click.Command):
    """Takes `--dtypes float16 int8` as accelerate does: every dtype's name that follows belongs to the option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from bigpipe.bigmodel.formats import DTYPES

        known = {*DTYPES, *SPELLINGS}  # one that is spelled as others do is no model: what reads it says so
        spread: list[str] = []
        listing = False
        for arg in args:
            follows = listing and arg.lower() in known and spread[-1] != "--dtypes"
            spread += ["--dtypes", arg] if follows else [arg]
            listing = follows or arg.startswith("--dtypes=") or "--dtypes" in spread[-2:]
        return super().parse_args(ctx, spread)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from bigpipe.bigmodel.formats import DTYPES

        for option in self.params:
            if isinstance(option, click.Option) and option.name == "dtypes":
                option.help = f"Any of {' '.join(DTYPES)}."
        super().format_options(ctx, formatter)
