"""Commands that answer without a recipe: what a model needs, which kinds there are, what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import bigpipe
from bigpipe.errors import UsageError
from bigpipe.orchestrator import recipe, report

from .completing import KINDS, MODELS, SHELLS, script
from .options import JSON, OFFLINE, PARAMS, PATH, STORE, ManyDtypes
from .printing import own_stdout, say, screen, show, show_json


@click.command(cls=ManyDtypes)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=MODELS)
@click.option("--dtypes", multiple=True, metavar="DTYPE...")
@click.option("--library-name", "--library_name", type=click.Choice(["transformers", "timm", "diffusers"]))
@click.option("--head", type=click.Choice(["auto", "none"]), default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--sequence-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--revision", default="main", show_default=True)
@click.option("--subfolder", metavar="PATH", help="The folder of the repository or directory that holds the model.")
@click.option("--variant", metavar="NAME", help="Of the weights: fp16 for model.fp16.safetensors.")
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
    from bigpipe.bigmodel import footprint
    from bigpipe.orchestrator.store import memo_directory

    if compare and len(models) < 2:
        raise UsageError("--compare needs two models or more", f"bigpipe estimate {models[0]} OTHER --compare")
    options |= {name: " ".join(options[name]).replace(",", " ").split() for name in ("dtypes", "lora_targets")}
    answers = [bigpipe.estimate(model, memo=memo_directory(store), **options) for model in models]
    show(
        as_json,
        lambda: footprint.report_json(answers),
        lambda: footprint.report(answers, compared=compare, explain=explain, stream=own_stdout()),
        footprint.misfits(answers),
    )


@click.command()
@click.argument("file", type=PATH)
@click.option("--model", required=True, metavar="REPO", shell_complete=MODELS, help="A Hub repository.")
@JSON
def init(file: Path, model: str, as_json: bool) -> None:
    """Write a first recipe for a model, and the JSON schema that makes an editor complete and check it.

    Example: bigpipe init opt.yaml --model facebook/opt-125m
    """
    from bigpipe.orchestrator.recipe import initialise

    files = [str(written) for written in initialise(file, model)]
    show(
        as_json,
        lambda: {"schema": "bigpipe.init/1", "files": files},
        lambda: "\n".join(f"wrote {written}" for written in files),
    )


@click.command()
@click.argument("kinds", nargs=-1, metavar="MODULE:STAGE...")
@click.option(
    "--recipe",
    "manifest",
    type=PATH,
    help="With the stages and parameters of this recipe, for an editor to offer, and the kinds of its own modules.",
)
@PARAMS
@click.option("--outputs", is_flag=True, help="The schema of what `--json` prints, and of events, instead.")
@click.option("--json", "as_json", is_flag=True, help="A refusal is JSON too; a schema always is.")
def schema(kinds: tuple[str, ...], manifest: Path | None, params: dict[str, str], outputs: bool, as_json: bool) -> None:
    """Print the JSON schema of manifests, generated from the registered kinds, and from those of modules of yours.

    Example: bigpipe schema --recipe opt.yaml > bigpipe.schema.json
    """
    if [bool(kinds), manifest is not None, outputs].count(True) > 1:
        raise UsageError("MODULE:STAGE, --recipe and --outputs name three schemas", "ask for one of them at a time")
    if params and manifest is None:
        raise UsageError("-p sets a parameter of a recipe, and none is named", "name it: --recipe FILE")
    if manifest is not None:
        show_json(recipe.recipe_schema(bigpipe.load_manifest(manifest, params=params)))
    else:
        show_json(report.outputs_schema() if outputs else recipe.manifest_schema(more=kinds))


@click.command()
@click.argument("kind", required=False, shell_complete=KINDS)
@click.option("--markdown", is_flag=True, help="The whole reference as Markdown.")
@JSON
def kinds(kind: str | None, markdown: bool, as_json: bool) -> None:
    """List the stage kinds, or show one: ports, fields, metrics.

    Example: bigpipe kinds quantize
    """
    if markdown or kind or as_json:
        show(as_json, lambda: report.kinds_json(kind), lambda: report.kinds_markdown(kind), as_file=markdown)
    else:
        say(report.kinds_overview(screen()))


@click.command()
@JSON
@STORE
def doctor(as_json: bool, store: Path | None) -> None:
    """Say what this machine has and whether everything bigpipe stands on works here.

    Example: bigpipe doctor --json > this-machine.json
    """
    from bigpipe.orchestrator.planning import doctor_text, examine, unsound

    found = examine(store)
    show(as_json, lambda: found, lambda: doctor_text(found, screen()), unsound(found))


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@JSON
def completion(shell: str, as_json: bool) -> None:
    """Print what makes a shell complete commands, options, nodes, parameters, runs, kinds and models.

    Read it where the shell starts: `eval "$(bigpipe completion bash)"` in ~/.bashrc, or the same with zsh in ~/.zshrc;
    `bigpipe completion fish > ~/.config/fish/completions/bigpipe.fish`.

    Example: bigpipe completion bash
    """
    text = script(shell)
    show(as_json, lambda: {"schema": "bigpipe.completion/1", "text": text}, lambda: text, as_file=True)


COMMANDS = (estimate, init, schema, kinds, doctor, completion)
