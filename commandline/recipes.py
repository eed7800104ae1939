"""Commands about a recipe."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bigpipe
from bigpipe.errors import ManifestError, UsageError
from bigpipe.files import write_named
from bigpipe.orchestrator import report
from bigpipe.sizes import format_transfer
from bigpipe.tables import columns

from .completing import NODES, RUNS, TARGETS
from .options import EXECUTOR, JOBS, JSON, MANIFEST, OFFLINE, PARAMS, PATH, REMOTE, SMOKE, STORE, FromHome
from .printing import fail_all, own_stderr, say, screen, show, show_json

if TYPE_CHECKING:
    pass

MACHINE = click.option(
    "--machine", type=FromHome(exists=True, path_type=Path), help="Plan for `doctor --json` of another one."
)
NAMED_ELSEWHERE = "-"
"""`--remote` without an address."""


@click.command()
@MANIFEST
@click.argument("nodes", nargs=-1, shell_complete=NODES)
@PARAMS
@click.option(
    "--force", multiple=True, metavar="NODE", shell_complete=NODES, help="Run this node whatever the store holds."
)
@click.option("--locked", is_flag=True, help="Refuse inputs that differ from the lock file.")
@OFFLINE
@JOBS
@EXECUTOR
@click.option("--keep-going", is_flag=True, help="Let other branches finish when a node fails.")
@SMOKE
@JSON
@click.option("--events", type=PATH, help="Append every event as a JSON line to this file.")
@STORE
@REMOTE
def run(manifest: Path, nodes: tuple[str, ...], events: Path | None, as_json: bool, **options: Any) -> None:
    """Run a recipe, or NODEs of it and what they stand on. Nothing that is in the store runs again.

    Example: bigpipe run manifests/quickstart.yaml -p scheme=nf4
    """
    if options["executor"] is None and not options["smoke"]:  # else nobody waits to be called
        from bigpipe.orchestrator import commands

        with closing(report.choose_reporter(own_stderr())) as reporter:
            asked = {name: options[name] for name in ("params", "store", "offline")}
            status = commands.attend(manifest, nodes, reporter=reporter, **asked)
        if status is not None:
            if as_json:
                from bigpipe.orchestrator.running import run_json

                found = run_json(manifest, options["params"], (), status="attended", exit_code=status)
                show_json(found, indent=None)
            sys.exit(status)
    with closing(report.choose_reporter(own_stderr(), events=events)) as reporter:
        result = bigpipe.run(manifest, nodes, reporter=reporter, check=False, **options)
    if as_json:
        show_json(result.as_json(), indent=None)
    else:
        say(report.results_text(result, screen=screen()))
    fail_all(result.errors)


@click.command()
@MANIFEST
@click.argument("nodes", nargs=-1, shell_complete=NODES)
@PARAMS
@click.option("--explain", is_flag=True, help="Add keys, every change and every forecast metric.")
@click.option("--markdown", is_flag=True, help="A table for a pull request, or for the summary of a CI job.")
@MACHINE
@SMOKE
@click.option("--probe", is_flag=True, help="Take what is foreseen, for some seconds, on the real devices.")
@JOBS
@EXECUTOR
@OFFLINE
@JSON
@STORE
@REMOTE
def plan(
    manifest: Path, nodes: tuple[str, ...], machine: Path | None, explain: bool, markdown: bool, probe: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Say what would run, why, what it costs, and whether it fits.

    Example: bigpipe plan manifests/opt13b_int8.yaml --machine gpu-box.json
    """
    from bigpipe.machine import read_machine
    from bigpipe.orchestrator import running
    from bigpipe.orchestrator.planning import plan_text

    if markdown and (as_json or explain):
        other = "--json" if as_json else "--explain"
        raise UsageError(f"--markdown and {other} are two ways to say it", "leave one out")
    if probe:
        running.refuse_elsewhere(machine, options["executor"])
    there = read_machine(machine) if machine else None
    with closing(report.choose_reporter(own_stderr())) as reporter:
        planned = bigpipe.plan(manifest, nodes, machine=there, reporter=reporter, **options)
        rows = running.probe(planned, reporter) if probe else None
    short = running.shortages(planned, rows) if rows else []

    def text() -> str:
        if markdown:
            return report.plan_markdown(planned, rows)
        told = plan_text(planned, explain=explain, screen=screen())
        return told if rows is None else f"{told}\n\n{report.probe_text(rows, screen())}"

    errors = [*planned.errors(), *short]
    show(as_json, lambda: report.plan_json(planned, rows), text, errors, as_file=markdown)


@click.command()
@click.argument("manifests", nargs=-1, required=True, type=PATH)
@PARAMS
@JSON
def validate(manifests: tuple[Path, ...], params: dict[str, str], as_json: bool) -> None:
    """Check manifests without running anything: syntax, fields, wiring, cycles, gates. All errors at once.

    Example: bigpipe validate manifests/*.yaml
    """
    from bigpipe.orchestrator import commands

    errors = commands.validate(manifests, params, lambda line: say(line, err=True))
    problems = [each for error in errors.values() if isinstance(error, ManifestError) for each in error.problems]
    absent = [error for error in errors.values() if not isinstance(error, ManifestError)]
    wrong = [*([ManifestError(problems)] if problems else []), *absent]
    data = {str(path): {"valid": path not in errors} for path in manifests}
    fine = "\n".join(f"{path}: ok" for path in manifests if path not in errors)
    show(as_json, lambda: {"schema": "bigpipe.validate/1", "manifests": data}, lambda: fine, wrong)


@click.command()
@MANIFEST
@PARAMS
@click.option("--exit-code", is_flag=True, help="Exit with 10 where something would run.")
@OFFLINE
@JSON
@STORE
@click.option(
    "--remote",
    is_flag=False,
    flag_value=NAMED_ELSEWHERE,
    metavar="[URL]",
    help="Also say which nodes the remote store has: this one, else $BIGPIPE_REMOTE, else the recipe's.",
)
def status(
    manifest: Path, exit_code: bool, as_json: bool, remote: str | None, store: Path | None, **options: Any
) -> None:
    """Say of every node whether it is cached, and if not, why.

    Example: bigpipe status manifests/quickstart.yaml --exit-code
    """
    from bigpipe.orchestrator import commands

    with closing(report.choose_reporter(own_stderr())) as reporter:
        address = None if remote == NAMED_ELSEWHERE else remote
        planned = bigpipe.plan(manifest, preflight=False, store=store, remote=address, reporter=reporter, **options)
        there = commands.shared(planned) if remote is not None else {}
    rows = [(name, str(node.action), node.decision.reason) for name, node in planned.nodes.items()]
    nodes = {name: {"action": action, "reason": reason, "shared": there.get(name)} for name, action, reason in rows}
    if there:
        told = {True: "shared", False: "not shared", None: ""}
        rows = [(name, f"{action} {told[there[name]]}".strip(), reason) for name, action, reason in rows]
    stale = commands.stale(planned) if exit_code else None
    show(
        as_json,
        lambda: {"schema": "bigpipe.status/1", "remote": report.remote_json(planned.session.remote), "nodes": nodes},
        lambda: columns(rows, screen()),
        [stale] if stale else [],
    )


@click.command()
@MANIFEST
@click.argument("node", shell_complete=NODES)
@PARAMS
@OFFLINE
@JSON
@STORE
@REMOTE
def why(manifest: Path, node: str, as_json: bool, **options: Any) -> None:
    """Say why NODE would run, or ran last: which value changed, from what, to what, where.

    Example: bigpipe why manifests/quickstart.yaml quantize
    """
    from bigpipe.orchestrator import commands

    answers = commands.why(manifest, node, **options)
    show(as_json, lambda: {"schema": "bigpipe.why/1", "nodes": answers}, lambda: report.why_text(answers))


@click.command()
@MANIFEST
@PARAMS
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "mermaid", "dot", "svg", "html"]),
    help="How it is drawn; else as the name of -o ends, else text.",
)
@click.option("-o", "--out", type=PATH, help="Draw it there: .html .svg .dot .mmd .txt; else it is printed.")
@click.option("--run", shell_complete=RUNS, help="Say what this run made of the nodes: an id, the start of one, last.")
@JSON
@STORE
def graph(
    manifest: Path, params: dict[str, str], form: str | None, out: Path | None, run: str | None, as_json: bool,
    store: Path | None,
) -> None:  # fmt: skip
    """Draw the nodes after matrix expansion, and what they stand on.

    Example: bigpipe graph manifests/matrix_int8_nf4.yaml -o graph.html
    """
    recipe = bigpipe.load_manifest(manifest, params=params)
    became = report.became_of(recipe, run, store=store) if run else {}
    size = report.write_graph(recipe, out, form, became) if out else 0
    show(
        as_json,
        lambda: report.graph_json(recipe, became, out),
        lambda: (
            f"{out}: {format_transfer(size)}"
            if out
            else report.graph_text(recipe, form or "text", became, screen=screen())
        ),
        as_file=not out and form not in (None, "text"),
    )


@click.command()
@MANIFEST
@PARAMS
@click.option("--check", is_flag=True, help="Only say whether the lock file still holds; exit 10 where not.")
@OFFLINE
@JSON
@STORE
def lock(manifest: Path, as_json: bool, **options: Any) -> None:
    """Write MANIFEST.lock: commits, sizes and digests of all inputs, for review and for `run --locked`.

    Example: bigpipe lock manifests/opt13b_int8.yaml
    """
    from bigpipe.orchestrator import commands

    file = str(commands.lock(manifest, note=lambda line: say(line, err=True), **options))
    show(as_json, lambda: {"schema": "bigpipe.lock/1", "lock": file}, lambda: file)


@click.command()
@click.argument("target", shell_complete=TARGETS)
@MANIFEST
@PARAMS
@click.option("-o", "--out", type=PATH, help="Write it there; else it is printed.")
@click.option(
    "--check", is_flag=True, help="Only say whether the file still is what would be written; exit 10 where not."
)
@MACHINE
@OFFLINE
@JSON
def export(
    target: str, manifest: Path, out: Path | None, check: bool, machine: Path | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Write a recipe for another system that runs it. TARGET: github, airflow, argo, dockerfile.

    Its parameters become inputs there; `-p` says what holds where none is given.

    Example: bigpipe export github manifests/quickstart.yaml -o .github/workflows/quickstart.yaml
    """
    from bigpipe.machine import read_machine
    from bigpipe.orchestrator import commands

    if check and out is None:
        raise UsageError("--check compares with a file", "name it: -o FILE")
    there = read_machine(machine) if machine else None
    with closing(report.choose_reporter(own_stderr())) as reporter:
        found = commands.export(target, manifest, machine=there, out=out, reporter=reporter, **options)
    if check and out:
        found.require_same(out)
    size = write_named(out, found.text) if out and not check else 0
    for fact in found.unknown:
        say(f"not known: {fact}", err=True)
    show(
        as_json,
        lambda: found.as_json(manifest, out),
        lambda: (
            f"{out}: {'as it would be written' if check else format_transfer(size)}" if out else found.text.rstrip("\n")
        ),
        as_file=not out,
    )


def _exchange(work: str, manifest: Path, nodes: tuple[str, ...], as_json: bool, options: dict[str, Any]) -> None:
    from bigpipe.orchestrator import commands

    with closing(report.choose_reporter(own_stderr())) as reporter:
        done = getattr(commands, work)(manifest, nodes, reporter=reporter, **options)
    show(
        as_json,
        lambda: report.exchange_json(f"bigpipe.{work}/1", done),
        lambda: report.exchange_text(done, screen()),
        done.errors,
    )


@click.command()
@MANIFEST
@click.argument("nodes", nargs=-1, shell_complete=NODES)
@PARAMS
@JSON
@STORE
@REMOTE
def push(manifest: Path, nodes: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Give to the remote store what the store has of a recipe, or of NODEs and what they stand on.

    Example: bigpipe push manifests/quickstart.yaml --remote s3://team/cache
    """
    _exchange("push", manifest, nodes, as_json, options)


@click.command()
@MANIFEST
@click.argument("nodes", nargs=-1, shell_complete=NODES)
@PARAMS
@JSON
@STORE
@REMOTE
def pull(manifest: Path, nodes: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Bring to the store what the remote store has of a recipe, or of NODEs and what they stand on. Nothing runs.

    Example: bigpipe pull manifests/quickstart.yaml --remote s3://team/cache
    """
    _exchange("pull", manifest, nodes, as_json, options)


COMMANDS = (run, plan, validate, status, why, graph, lock, export, push, pull)
