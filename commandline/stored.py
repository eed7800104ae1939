"""Commands about the store: what it holds, what runs did, letting go."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import click

from bigpipe.errors import UsageError
from bigpipe.orchestrator import report
from bigpipe.sizes import format_transfer

from .completing import RAN, REMOVABLE, RUNS
from .options import DRY_RUN, JSON, PATH, STORE, YES, age
from .printing import confirmed, hand_over, redraw, say, say_each, screen, show, show_json


def _print(answer: report.Inspection, as_json: bool) -> None:
    show(as_json, lambda: answer.data, lambda: answer.text, [answer.error] if answer.error else [])


@click.command("ls")
@JSON
@STORE
def list_artifacts(as_json: bool, store: Path | None) -> None:
    """List the artifacts in the store and the runs that are on record.

    Example: bigpipe ls
    """
    _print(report.list_store(store=store, screen=screen()), as_json)


@click.command("show")
@click.argument("run", required=False, default="last", shell_complete=RUNS)
@click.option("--watch", is_flag=True, help="Again and again, until the run is over.")
@JSON
@STORE
def show_record(run: str, watch: bool, as_json: bool, store: Path | None) -> None:
    """Show the record of RUN (an id, the start of one, or `last`).

    Example: bigpipe show last --watch
    """
    if watch and as_json:
        raise UsageError("--watch draws for people, and --json answers once", "leave one out")
    if not watch:
        _print(report.show_run(run, store=store, screen=screen()), as_json)
        return
    say_each((found.text for found in report.follow_run(run, store=store, screen=screen())), redraw)


@click.command("ps")
@JSON
@STORE
def list_running(as_json: bool, store: Path | None) -> None:
    """List the runs that go on, where each stands, and its process.

    Example: bigpipe ps
    """
    _print(report.running(store=store, screen=screen()), as_json)


@click.command()
@click.argument("run", required=False, default="last", shell_complete=RUNS)
@click.argument("node", required=False, shell_complete=RAN)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, until the run is over.")
@JSON
@STORE
def log(run: str, node: str | None, follow: bool, as_json: bool, store: Path | None) -> None:
    """Print what the nodes of RUN (an id, the start of one, or `last`, which is the default) wrote.

    Example: bigpipe log last generate --follow
    """
    if follow and as_json:
        raise UsageError("--follow prints for people, and --json answers once", "leave one out")
    if as_json:
        show_json(report.answered(report.logged(run, node, store=store)))
        return
    say_each(report.follow_log(run, node, store=store) if follow else report.log_lines(run, node, store))


@click.command()
@click.argument("run", shell_complete=RUNS)
@click.argument("other", shell_complete=RUNS)
@click.option("--markdown", is_flag=True, help="Tables for a pull request: bytes, memory, metrics, texts side by side.")
@JSON
@STORE
def diff(run: str, other: str, markdown: bool, as_json: bool, store: Path | None) -> None:
    """Say what differs between two runs, or two lock files: params, inputs, metrics, digests, versions.

    Example: bigpipe diff 20260103 last --markdown
    """
    if markdown and as_json:
        raise UsageError("--markdown is for people, and --json for programs", "leave one out")
    if markdown:
        hand_over(report.review(run, other, store=store))
    else:
        _print(report.diff(run, other, store=store), as_json)


@click.command("report")
@click.argument("runs", nargs=-1, shell_complete=RUNS)
@click.option(
    "-o",
    "--out",
    type=PATH,
    default=Path("report.html"),
    show_default=True,
    help="The file: HTML or, where its name ends in .md, Markdown.",
)
@JSON
@STORE
def write_report(runs: tuple[str, ...], out: Path, as_json: bool, store: Path | None) -> None:
    """Write what RUNS did (ids, starts of ids, or `last`, which is the default) as one page.

    The page needs no network. Several runs are shown side by side, with what differs between them.

    Example: bigpipe report last -o report.html
    """
    _print(report.write_report(runs, out, store=store), as_json)


@click.command()
@click.argument("node", shell_complete=RAN)
@click.argument("directory", type=PATH)
@click.option(
    "--run", default="last", show_default=True, shell_complete=RUNS, help="An id of a run, or the start of one."
)
@JSON
@STORE
def get(node: str, directory: Path, run: str, as_json: bool, store: Path | None) -> None:
    """Copy what NODE gave in a run to DIRECTORY, as real files that need the store no more.

    Example: bigpipe get quantize dist/model
    """
    _print(report.get_artifact(node, directory, run=run, store=store), as_json)


def _free(work: Callable[[bool], report.Inspection], yes: bool, dry_run: bool, as_json: bool) -> None:
    """Ask before anything goes: `work`, which is told whether to only look, says what."""
    if not (yes or dry_run):
        foreseen = work(True)
        size = format_transfer(foreseen.data["freed_bytes"])
        if as_json or not sys.stdin.isatty():
            cure = "see it with --dry-run, and go on with --yes"
            raise UsageError(f"{size} would be freed, and there is nobody to ask", cure)
        say(foreseen.text)
        if foreseen.data["freed"] and not confirmed(f"Free {size}?"):
            say("nothing was removed")
            return
    _print(work(dry_run), as_json)


@click.command("rm")
@click.argument("targets", nargs=-1, required=True, metavar="RUN|ARTIFACT|NODE...", shell_complete=REMOVABLE)
@click.option("--run", default="last", show_default=True, shell_complete=RUNS, help="The run whose NODEs are meant.")
@YES
@DRY_RUN
@JSON
@STORE
def remove(targets: tuple[str, ...], run: str, yes: bool, dry_run: bool, as_json: bool, store: Path | None) -> None:
    """Remove records and logs of RUNs, or ARTIFACTs: by the digits that `ls` prints, or as what NODEs gave in a run.

    What is removed is made again when a run needs it. Nothing that a run which goes on may use is removed.

    Example: bigpipe rm quantize@scheme=nf4 --dry-run
    """
    _free(lambda look: report.remove(targets, look, run=run, store=store, screen=screen()), yes, dry_run, as_json)


@click.command()
@click.option(
    "--older-than",
    callback=age,
    metavar="AGE",
    help="Only what was made longer ago: 12h, 30d, 2w; 0d: all that can go.",
)
@click.option(
    "--keep-runs", type=click.IntRange(min=0), metavar="N", help="How many runs stay on record; else the latest 200."
)
@YES
@DRY_RUN
@JSON
@STORE
def gc(
    older_than: timedelta | None, keep_runs: int | None, yes: bool, dry_run: bool, as_json: bool, store: Path | None
) -> None:
    """Free what no existing manifest or lock file names any more, after asking.

    Of a manifest in a checkout of git that is not where it was, of other -p values than the last ones, and of commands
    without a recipe, what ran in the last 30 days stays, or in the AGE that is given.

    Example: bigpipe gc --older-than 30d --dry-run
    """
    _free(
        lambda look: report.collect_garbage(look, older_than, keep_runs, store=store, screen=screen()),
        yes,
        dry_run,
        as_json,
    )


COMMANDS = (list_artifacts, list_running, show_record, log, diff, write_report, get, remove, gc)
