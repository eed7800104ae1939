"""Commands about the store: what it holds, what runs did, letting go and checking."""

from __future__ import annotations

from pathlib import Path

import click

from bigpipe.errors import UsageError
from bigpipe.orchestrator import report

from .completing import RAN, RUNS
from .options import JSON, STORE
from .printing import redraw, say, show


def _print(answer: report.Inspection, as_json: bool) -> None:
    show(as_json, lambda: answer.data, lambda: answer.text, [answer.error] if answer.error else [])


@click.command("ls")
@JSON
@STORE
def list_artifacts(as_json: bool, store: Path | None) -> None:
    """List the artifacts in the store and the runs that are on record.

    Example: bigpipe ls
    """
    _print(report.list_store(store=store), as_json)


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
        _print(report.show_run(run, store=store), as_json)
        return
    for found in report.follow_run(run, store=store):
        redraw(found.text)


@click.command("ps")
@JSON
@STORE
def list_running(as_json: bool, store: Path | None) -> None:
    """List the runs that go on, where each stands, and its process.

    Example: bigpipe ps
    """
    _print(report.running(store=store), as_json)


@click.command()
@click.argument("run", shell_complete=RUNS)
@click.argument("node", required=False, shell_complete=RAN)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, until the run is over.")
@STORE
def log(run: str, node: str | None, follow: bool, store: Path | None) -> None:
    """Print what the nodes of RUN (an id, the start of one, or `last`) wrote.

    Example: bigpipe log last generate --follow
    """
    lines = report.follow_log(run, node, store=store) if follow else report.log_lines(run, node, store)
    for line in lines:
        say(line)


@click.command()
@click.argument("run", shell_complete=RUNS)
@click.argument("other", shell_complete=RUNS)
@JSON
@STORE
def diff(run: str, other: str, as_json: bool, store: Path | None) -> None:
    """Say what differs between two runs: params, inputs, metrics, digests.

    Example: bigpipe diff 20260103 last
    """
    _print(report.diff_runs(run, other, store=store), as_json)


@click.command("report")
@click.argument("runs", nargs=-1, shell_complete=RUNS)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
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
@click.argument("directory", type=click.Path(path_type=Path))
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


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@JSON
@STORE
def gc(dry_run: bool, as_json: bool, store: Path | None) -> None:
    """Delete artifacts that no existing manifest or lock file names.

    Example: bigpipe gc --dry-run
    """
    _print(report.collect_garbage(dry_run, store=store), as_json)


@click.command()
@click.option("--repair", is_flag=True, help="Quarantine what is damaged, so that it is made again.")
@JSON
@STORE
def verify(repair: bool, as_json: bool, store: Path | None) -> None:
    """Hash every object in the store and compare. Exit 6 where something is damaged.

    Example: bigpipe verify --repair
    """
    _print(report.verify_store(repair, store=store), as_json)


COMMANDS = (list_artifacts, list_running, show_record, log, diff, write_report, get, gc, verify)
