"""The `bigpipe` command. Parses, calls, prints; holds no logic."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

import bigpipe
from bigpipe.errors import BigpipeError, Interrupted, ManifestError, UsageError
from bigpipe.options import DTYPES, JOBS, JSON, MANIFEST, OFFLINE, PARAMS, STORE, ManyDtypes, pairs

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """Commands in the order of work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bigpipe-ml", prog_name="bigpipe")
def cli() -> None:
    """Recipes in git that download, size, shard, quantize, place and run models larger than memory."""


def main() -> None:
    """Entry point. Leaves at once: taking the interpreter apart lasts as long as all the work of a cached run."""
    status: Any = 0
    try:
        command()
    except SystemExit as leaving:
        status = leaving.code or 0
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def command() -> None:
    """Every BigpipeError becomes its message and exit code; only bugs show a traceback."""
    try:
        cli.main(standalone_mode=False)
    except BigpipeError as error:
        fail(error)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        click.echo("error: the disk is full\n  make room; what was finished is kept", err=True)
        sys.exit(1)


def fail(error: BigpipeError) -> None:
    """Print cause, place and cure, also as an annotation where GitHub reads it, and exit."""
    from bigpipe.orchestrator.report.reporters import error_text

    click.echo(error_text(error, os.environ), err=True)
    sys.exit(error.status if isinstance(error, Interrupted) else error.exit_code)


def fail_all(errors: Sequence[BigpipeError]) -> None:
    """Print all of them; the first decides the exit code. None: go on."""
    for error in errors[1:]:
        click.echo(str(error), err=True)
    if errors:
        fail(errors[0])


def show(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@cli.command()
@MANIFEST
@click.argument("nodes", nargs=-1)
@PARAMS
@click.option("--force", multiple=True, metavar="NODE", help="Run this node whatever the store holds.")
@click.option("--locked", is_flag=True, help="Refuse inputs that differ from the lock file.")
@OFFLINE
@JOBS
@click.option("--keep-going", is_flag=True, help="Let other branches finish when a node fails.")
@JSON
@click.option("--events", type=click.Path(path_type=Path), help="Append every event as a JSON line to this file.")
@STORE
def run(
    manifest: Path, nodes: tuple[str, ...], params: tuple[str, ...], events: Path | None, as_json: bool, **options: Any
) -> None:
    """Run a recipe, or NODEs of it and what they stand on. Nothing that is in the store runs again.

    Example: bigpipe run manifests/quickstart.yaml -p scheme=nf4
    """
    from bigpipe.orchestrator.report.reporters import choose_reporter

    with choose_reporter(sys.stderr, events=events) as reporter:
        result = bigpipe.run(manifest, nodes, params=pairs(params), reporter=reporter, check=False, **options)
    if as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=False))
    else:
        from bigpipe.orchestrator.report.rendering import results_text

        click.echo(results_text(result))
    fail_all(result.errors)


@cli.command()
@MANIFEST
@click.argument("nodes", nargs=-1)
@PARAMS
@click.option("--explain", is_flag=True, help="Add keys, every change and every forecast metric.")
@click.option(
    "--machine",
    type=click.Path(exists=True, path_type=Path),
    help="Plan for `bigpipe doctor --json` of another machine.",
)
@JOBS
@OFFLINE
@JSON
@STORE
def plan(
    manifest: Path, nodes: tuple[str, ...], params: tuple[str, ...], machine: Path | None, explain: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Say what would run, why, what it costs, and whether it fits.

    Example: bigpipe plan manifests/opt13b_int8.yaml --machine gpu-box.json
    """
    from bigpipe.machine import read_machine
    from bigpipe.orchestrator.report.rendering import plan_json, plan_text
    from bigpipe.orchestrator.report.reporters import choose_reporter

    options["machine"] = read_machine(machine) if machine else None
    with choose_reporter(sys.stderr) as reporter:
        planned = bigpipe.plan(manifest, nodes, params=pairs(params), reporter=reporter, **options)
    if as_json:
        show(plan_json(planned))
    else:
        click.echo(plan_text(planned, explain=explain))
    fail_all(planned.errors())


@cli.command()
@click.argument("manifests", nargs=-1, required=True, type=click.Path(path_type=Path))
@PARAMS
@JSON
def validate(manifests: tuple[Path, ...], params: tuple[str, ...], as_json: bool) -> None:
    """Check manifests without running anything: syntax, fields, wiring, cycles, gates. All errors at once.

    Example: bigpipe validate manifests/*.yaml
    """
    from bigpipe.orchestrator.commands import validate as check

    errors = check(manifests, pairs(params))
    if as_json:
        show({str(path): [str(problem) for problem in found.problems] for path, found in errors.items()})
    for path in (path for path in manifests if path not in errors):
        click.echo(f"{path}: ok", err=as_json)
    if errors:
        fail(ManifestError([problem for found in errors.values() for problem in found.problems]))


@cli.command()
@MANIFEST
@PARAMS
@click.option("--exit-code", is_flag=True, help="Exit with 10 where something would run.")
@JSON
@STORE
def status(manifest: Path, params: tuple[str, ...], exit_code: bool, as_json: bool, store: Path | None) -> None:
    """Say of every node whether it is cached, and if not, why.

    Example: bigpipe status manifests/quickstart.yaml --exit-code
    """
    from bigpipe.orchestrator import commands
    from bigpipe.orchestrator.report.rendering import columns

    planned = commands.status(manifest, params=pairs(params), store=store)
    rows = [(name, str(node.action), node.decision.reason) for name, node in planned.nodes.items()]
    if as_json:
        show({name: {"action": action, "reason": reason} for name, action, reason in rows})
    else:
        click.echo(columns(rows))
    if exit_code and (stale := commands.stale(planned)):
        fail(stale)


@cli.command()
@MANIFEST
@click.argument("node")
@PARAMS
@JSON
@STORE
def why(manifest: Path, node: str, params: tuple[str, ...], as_json: bool, store: Path | None) -> None:
    """Say why NODE would run, or ran last: which value changed, from what, to what, where.

    Example: bigpipe why manifests/quickstart.yaml quantize
    """
    from bigpipe.orchestrator import commands
    from bigpipe.orchestrator.report.rendering import why_text

    answers = commands.why(manifest, node, params=pairs(params), store=store)
    if as_json:
        show(answers)
    else:
        click.echo(why_text(answers))


@cli.command()
@MANIFEST
@PARAMS
@click.option("--format", "form", type=click.Choice(["text", "mermaid", "dot"]), default="text", show_default=True)
def graph(manifest: Path, params: tuple[str, ...], form: str) -> None:
    """Draw the nodes after matrix expansion, and what they stand on.

    Example: bigpipe graph manifests/matrix_int8_nf4.yaml --format mermaid
    """
    from bigpipe.orchestrator.report.rendering import graph_text

    click.echo(graph_text(bigpipe.load_manifest(manifest, params=pairs(params)), form))


@cli.command()
@MANIFEST
@PARAMS
@click.option("--check", is_flag=True, help="Only say whether the lock file still holds; exit 10 where not.")
@STORE
def lock(manifest: Path, params: tuple[str, ...], check: bool, store: Path | None) -> None:
    """Write MANIFEST.lock: commits, sizes and digests of all inputs, for review and for `run --locked`.

    Example: bigpipe lock manifests/opt13b_int8.yaml
    """
    from bigpipe.orchestrator import commands

    click.echo(commands.lock(manifest, check=check, params=pairs(params), store=store))


@cli.command(cls=ManyDtypes)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--dtypes", multiple=True, metavar="DTYPE...", help=f"Any of {' '.join(DTYPES)}.")
@click.option("--library-name", "--library_name", type=click.Choice(["transformers", "timm", "diffusers"]))
@click.option("--head", type=click.Choice(["auto", "none"]), default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--sequence-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--revision", default="main", show_default=True)
@click.option("--memory", help="Say whether it fits, and the smallest change that does: 24GiB.")
@click.option("--double-quant", is_flag=True, help="nf4 and fp4 with double quantization.")
@click.option("--kv-dtype", metavar="DTYPE", help="Of cached keys and values: float8; else what the model computes in.")
@click.option("--train", type=click.Choice(["adamw", "adamw_8bit", "sgd", "lora"]), help="Fit a training step instead.")
@click.option("--lora-rank", type=click.IntRange(min=1), default=8, show_default=True, help="For training with LoRA.")
@click.option("--lora-targets", multiple=True, metavar="NAME,...", help="The linear modules that get adapters; or all.")
@click.option("--gradient-checkpointing", is_flag=True, help="For training.")
@click.option("--trust-remote-code", "--trust_remote_code", is_flag=True, help="Run the code of a pinned --revision.")
@click.option("--compare", is_flag=True, help="Several models side by side in one table.")
@click.option("--explain", is_flag=True, help="Each term's formula, inputs, interval and source.")
@OFFLINE
@JSON
@STORE
def estimate(
    models: tuple[str, ...], compare: bool, explain: bool, as_json: bool, store: Path | None, **options: Any
) -> None:
    """What a model needs in memory, per dtype, from its headers alone. MODEL: a repository, a URL or a directory.

    Example: bigpipe estimate facebook/opt-13b --dtypes int8 --batch-size 4 --memory 16GiB
    """
    from bigpipe.bigmodel.footprint.text import report
    from bigpipe.bigmodel.hub.session import own_session
    from bigpipe.orchestrator.store.location import memo_directory

    own_session(models)
    if compare and len(models) < 2:
        raise UsageError("--compare needs two models or more", f"bigpipe estimate {models[0]} OTHER --compare")
    options |= {name: " ".join(options[name]).replace(",", " ").split() for name in ("dtypes", "lora_targets")}
    answers = [bigpipe.estimate(model, memo=memo_directory(store), **options) for model in models]
    if as_json:
        show([answer.as_json() for answer in answers] if len(answers) > 1 else answers[0].as_json())
    else:
        click.echo(report(answers, compared=compare, explain=explain, stream=sys.stdout))


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="REPO", help="A Hub repository.")
def init(file: Path, model: str) -> None:
    """Write a first recipe for a model, and the JSON schema that makes an editor complete and check it.

    Example: bigpipe init opt.yaml --model facebook/opt-125m
    """
    from bigpipe.orchestrator.commands import initialise

    for written in initialise(file, model):
        click.echo(f"wrote {written}")


@cli.command()
@click.argument("kinds", nargs=-1, metavar="MODULE:STAGE...")
def schema(kinds: tuple[str, ...]) -> None:
    """Print the JSON schema of manifests, generated from the registered kinds, and from those of modules of yours.

    Example: bigpipe schema > bigpipe.schema.json
    """
    from bigpipe.orchestrator.recipe.schema import manifest_schema

    show(manifest_schema(more=kinds))


@cli.command()
@click.argument("kind", required=False)
@click.option("--markdown", is_flag=True, help="The whole reference as Markdown.")
@JSON
def kinds(kind: str | None, markdown: bool, as_json: bool) -> None:
    """List the stage kinds, or show one: ports, fields, metrics.

    Example: bigpipe kinds quantize
    """
    from bigpipe.orchestrator.report import reference

    if as_json:
        show(reference.as_json(kind))
    elif markdown or kind:
        click.echo(reference.markdown(kind), nl=False)
    else:
        click.echo(reference.overview())


@cli.command()
@JSON
@STORE
def doctor(as_json: bool, store: Path | None) -> None:
    """Say what this machine has and whether everything bigpipe stands on works here.

    Example: bigpipe doctor --json > this-machine.json
    """
    from bigpipe.orchestrator.planning.doctor import doctor_text, examine

    found = examine(store)
    if as_json:
        show(found)
    else:
        click.echo(doctor_text(found))


@cli.command("ls")
@JSON
@STORE
def list_artifacts(as_json: bool, store: Path | None) -> None:
    """List the artifacts in the store and the runs that are on record.

    Example: bigpipe ls
    """
    _print("list_store", as_json, store)


@cli.command("show")
@click.argument("run", required=False, default="last")
@JSON
@STORE
def show_run(run: str, as_json: bool, store: Path | None) -> None:
    """Show the record of RUN (an id, the start of one, or `last`).

    Example: bigpipe show last
    """
    _print("show_run", as_json, store, run)


@cli.command()
@click.argument("run")
@click.argument("node", required=False)
@STORE
def log(run: str, node: str | None, store: Path | None) -> None:
    """Print what the nodes of RUN (an id, the start of one, or `last`) wrote.

    Example: bigpipe log last generate
    """
    from bigpipe.orchestrator.report import inspection

    for line in inspection.log_lines(run, node, store):
        click.echo(line)


@cli.command()
@click.argument("run")
@click.argument("other")
@JSON
@STORE
def diff(run: str, other: str, as_json: bool, store: Path | None) -> None:
    """Say what differs between two runs: params, inputs, metrics, digests.

    Example: bigpipe diff 20260103 last
    """
    _print("diff_runs", as_json, store, run, other)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@JSON
@STORE
def gc(dry_run: bool, as_json: bool, store: Path | None) -> None:
    """Delete artifacts that no existing manifest or lock file names.

    Example: bigpipe gc --dry-run
    """
    _print("collect_garbage", as_json, store, dry_run)


@cli.command()
@click.option("--repair", is_flag=True, help="Quarantine what is damaged, so that it is made again.")
@JSON
@STORE
def verify(repair: bool, as_json: bool, store: Path | None) -> None:
    """Hash every object in the store and compare. Exit 6 where something is damaged.

    Example: bigpipe verify --repair
    """
    _print("verify_store", as_json, store, repair)


def _print(name: str, as_json: bool, store: Path | None, *args: Any) -> None:
    """Call the inspection of that name; print its text, or its data as JSON; fail with what it found wrong."""
    from bigpipe.orchestrator.report import inspection

    answer: inspection.Answer = getattr(inspection, name)(*args, store=store)
    if as_json:
        show(answer.data)
    else:
        click.echo(answer.text)
    if answer.error:
        fail(answer.error)
