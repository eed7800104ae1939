"""Commands without a recipe: one stage kind about one model. What they take is generated from the kind."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import bigpipe
from bigpipe.errors import BigpipeError, ManifestError, Place, UsageError
from bigpipe.files import parse_json, refuse_overlap
from bigpipe.names import or_path
from bigpipe.orchestrator import recipe, report

from .completing import MODELS, offering
from .options import JSON, OFFLINE, STORE
from .printing import fail_all, hand_over, own_stderr, say, screen, show_json

if TYPE_CHECKING:
    from bigpipe.orchestrator.stage import Stage

SINGLES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "quantize": ("quantize", {}),
    "shard": ("shard", {}),
    "place": ("dispatch", {}),
    "generate": ("distributed-infer", {"task": "text-generation"}),
    "evaluate": ("evaluate", {}),
    "finetune": ("finetune", {}),
    "merge": ("merge", {}),
}
"""Command → the kind that it runs, where there is such a kind, and fields that it sets unless told."""
HELP = {
    "quantize": "--scheme int8 -o dist/model",
    "shard": "--max-shard-size 2GB -o dist/model",
    "place": "--max-memory cpu=8GiB --max-memory disk=100GiB -o placement",
    "generate": "--prompts 'Hello, my name is' --max-new-tokens 16",
    "evaluate": "--data texts.jsonl",
    "finetune": "--data texts.jsonl -o adapter",
    "merge": "--adapter ./adapter -o dist/merged",
}


class KindCommand(click.Command):
    """Its options are the fields of a kind, read when they are asked for: a start of another command costs nothing."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        options = {option.name: option for option in _options(str(self.name))}
        own = [param for param in super().get_params(ctx) if param.name not in options or param.name == "help"]
        return [*options.values(), *own]

    @property
    def offered(self) -> bool:
        """Is there such a kind here?"""
        return SINGLES[str(self.name)][0] in recipe.stage_kinds()


def _stage(command: str) -> Stage[Any]:
    return recipe.load_stage(SINGLES[command][0])


def _schemas(stage: Stage[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of each field, and what those refer to."""
    found = recipe.described_schema(stage.params)
    return found["properties"], found.get("$defs", {})


def _options(command: str) -> Iterable[click.Option]:
    stage = _stage(command)
    properties, definitions = _schemas(stage)
    for name, schema in properties.items():
        yield _option(name, schema, _types(schema, definitions))
    for port, needed in recipe.fed_ports(stage).items():
        if port != "model":
            many = stage.inputs[port].many
            note = f"What is wired to the port `{port}`: a repository or a directory." + " Again for more." * many
            names = [f"--{port}", f"wired_{port}"]
            yield click.Option(names, required=needed, multiple=many, metavar="MODEL", help=note, shell_complete=MODELS)
    if stage.runs_in == "ranks":
        count = click.IntRange(min=1)
        yield click.Option(["--num-processes"], type=count, help="Ranks that share the work.")


def _option(name: str, schema: Mapping[str, Any], types: set[str]) -> click.Option:
    dashed, note = name.replace("_", "-"), " ".join(str(schema.get("description", "")).split())
    if types <= {"boolean", "null"}:
        return click.Option([f"--{dashed}/--no-{dashed}", f"with_{name}"], default=None, help=note)
    several = bool(types & {"array", "object"})
    choices = [*map(str, schema.get("enum", ()))]
    metavar = "|".join(choices) or ("KEY=VALUE" if "object" in types else "VALUE")
    names = [f"--{dashed}", *([f"--{name}"] if "_" in name else []), f"with_{name}"]
    return click.Option(
        names, multiple=several, metavar=metavar, help=note + " Again for more." * several,
        shell_complete=offering(lambda given: choices),
    )  # fmt: skip


def _types(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> set[str]:
    """What JSON types a schema admits."""
    if "$ref" in schema:
        return _types(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    found = {schema["type"]} if isinstance(schema.get("type"), str) else set(schema.get("type", ()))
    for choice in (*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("oneOf", ())):
        found |= _types(choice, definitions)
    return found or {"string"}


def _value(given: Any, types: set[str], items: set[str]) -> Any:
    """What was written as a field has it. items: the types of what a list holds."""
    if isinstance(given, bool):
        return given
    if isinstance(given, str):
        return _scalar(given, types)
    if "object" in types and all("=" in text for text in given):
        pairs = (text.partition("=") for text in given)
        return {key: _scalar(value, {"number"}) for key, _, value in pairs}
    files = [text for text in given if _names_file(text)] if "array" in types and "string" in types else []
    if files and len(given) > 1:
        raise UsageError(f"{files[0]} is a file, and there are {len(given)} values", "name several files by one glob")
    if "array" in types and not files:
        return [_scalar(text, items) for text in given]
    if len(given) > 1:
        raise UsageError(f"{' '.join(given)} is more than one value", "give KEY=VALUE for a map, else the option once")
    return _scalar(given[0], types)


def _names_file(text: str) -> bool:
    """Is it a file, and no text itself? One that is not there, too, where its ending says so: `texts.jsonl`."""
    from bigpipe.bigmodel.tasks import READERS

    return bool(glob.glob(text)) or (not re.search(r"\s", text) and Path(text).suffix.lower() in READERS)


def _scalar(text: str, types: set[str]) -> Any:
    if types <= {"string", "null"}:
        return text
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _fields(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    properties, definitions = _schemas(_stage(command))
    found = dict(SINGLES[command][1])
    for name, schema in properties.items():
        value = given.get(f"with_{name}")
        if value is None or value == ():
            continue
        lists = [each for each in (schema, *schema.get("anyOf", ())) if "items" in each]
        items = _types(lists[0]["items"], definitions) if lists else {"string"}
        found[name] = _value(value, _types(schema, definitions), items & {"string", "number", "integer"})
    return found


def _typed(command: str, given: Mapping[str, Any]) -> dict[recipe.Keys, str]:
    """Path below the fields of the kind → the options that were typed for what is there."""
    found: dict[recipe.Keys, str] = {}
    for name in _schemas(_stage(command))[0]:
        value, called = given.get(f"with_{name}"), recipe.option(name)
        if isinstance(value, bool):
            found[name,] = called if value else called.replace("--", "--no-", 1)
        elif isinstance(value, str):
            found[name,] = f"{called} {value}"
        elif value:
            found[name,] = " ".join(f"{called} {each}" for each in value)
            for index, each in enumerate(value):
                found[name, index] = found[name, each.partition("=")[0]] = f"{called} {each}"
    return found


def _in_own_words(asked: recipe.Single, error: BigpipeError) -> BigpipeError:
    """Return an error in the words of who typed options, and has seen no recipe."""
    if isinstance(error, ManifestError):
        told = [
            replace(each, cause=_told(asked, each.cause, each.place), cure=recipe.in_options(each.cure, asked.kind))
            for each in error.problems
        ]
        return ManifestError(told)
    error.cause = _told(asked, error.cause, error.place)
    error.cure = recipe.in_options(error.cure, asked.kind)
    typed = error.place.argument.rpartition(" ")[2] if error.place else ""
    return or_path(error, typed) if typed in _flat(asked.models.values()) else error


BEFORE = re.compile(r"^(?:[\w.\[\]-]+: )+")
"""The stage and the field that stand before a cause."""


def _told(asked: recipe.Single, cause: str, place: Place | None) -> str:
    """A cause; where its place says what was typed, without the stage and the field before it."""
    typed = place is not None and place.argument and not place.argument.startswith("bigpipe ")
    return recipe.in_options(BEFORE.sub("", cause) if typed else cause, asked.kind)


def single(command: str) -> KindCommand:
    """Return the command of a kind."""

    @click.argument("model", shell_complete=MODELS)
    @click.option("-o", "--out", metavar="DIR", help="Where the result goes; else it stays in the store.")
    @click.option("--print-recipe", is_flag=True, help="Print the recipe that does the same, and run nothing.")
    @click.option("--revision", help="Of a repository: a branch, a tag or a commit.")
    @click.option("--trust", multiple=True, metavar="MODULE", help="A module of yours that may be imported.")
    @OFFLINE
    @JSON
    @STORE
    def run(
        model: str, out: str | None, print_recipe: bool, revision: str | None, trust: tuple[str, ...],
        offline: bool, as_json: bool, store: Path | None, **given: Any,
    ) -> None:  # fmt: skip
        wired = {name.removeprefix("wired_"): value for name, value in given.items() if name.startswith("wired_")}
        ranks = given.get("num_processes")
        asked = recipe.Single(
            name=command, kind=SINGLES[command][0], revision=revision, trust=trust,
            to=out and os.path.expanduser(out),
            models={"model": model, **{port: value for port, value in wired.items() if value}},
            fields=_fields(command, given), typed=_typed(command, given),
            launch={"num_processes": ranks} if ranks else {},
        )  # fmt: skip
        if revision and recipe.source_of(model)[0] == "path":
            raise UsageError(f"--revision {revision}: {model} is a directory, which has none", "leave it out")
        if print_recipe:
            show_recipe(asked, as_json)
        else:
            _run(asked, as_json, store=store, offline=offline)

    kind = SINGLES[command][0]
    run.__doc__ = (
        f"What the kind {kind} does, about MODEL (a repository or a directory), without a recipe.\n\n"
        f"Options are the fields of the kind: see `bigpipe kinds {kind}`.\n\n"
        f"Example: bigpipe {command} facebook/opt-125m {HELP[command]}"
    )
    return click.command(command, cls=KindCommand)(run)


def _understood(asked: recipe.Single) -> str:
    """Return the recipe of what was asked. Raise what is wrong with it."""
    text = asked.manifest()
    try:
        recipe.load_recipe(Path(f"bigpipe {asked.name}"), text=text, arguments=asked.arguments())
    except BigpipeError as error:
        raise _in_own_words(asked, error) from error
    return text


def show_recipe(asked: recipe.Single, as_json: bool) -> None:
    text = _understood(asked)
    if as_json:
        show_json(report.answered({"schema": "bigpipe.recipe/1", "text": text}))
        return
    taken = asked.to is not None and asked.saved_as is None
    note = f"# then: bigpipe get {asked.name} {shlex.quote(asked.to or '')}\n" if taken else ""
    hand_over(note + text.rstrip("\n"))


def _run(asked: recipe.Single, as_json: bool, *, store: Path | None, offline: bool) -> None:
    taken = Path(asked.to) if asked.to is not None and asked.saved_as is None else None
    if taken is not None and taken.exists() and any(taken.iterdir() if taken.is_dir() else (taken,)):
        raise UsageError(f"{taken} is there already", "name a directory that is not there, or an empty one")
    if taken is not None:
        refuse_overlap(taken, filter(Path.exists, map(Path, _flat(asked.models.values()))))
    with closing(report.choose_reporter(own_stderr())) as reporter:
        path = Path(f"bigpipe {asked.name}")
        try:
            result = bigpipe.run(
                path, text=asked.manifest(), typed=asked.arguments(), reporter=reporter, check=False, store=store,
                offline=offline,
            )  # fmt: skip
        except BigpipeError as error:
            raise _in_own_words(asked, error) from error
    if taken is not None and result.status == "succeeded":
        report.get_artifact(asked.name, taken, run=result.run, store=store)
    if as_json:
        show_json(result.as_json(), indent=None)
    else:
        say(report.results_text(result, screen=screen()))
        if asked.to is None and result.status == "succeeded":
            say(_kept(asked.name, result.path(asked.name), store))
    fail_all([_in_own_words(asked, error) for error in result.errors])


def _kept(name: str, path: Path | None, store: Path | None) -> str:
    """Where a result stays, and what takes it out of the store."""
    taking = ["bigpipe", "get", name, "DIR", *(["--store", str(store)] if store else [])]
    return f"in the store: {path}; as files of yours: {shlex.join(taking)}"


def _flat(models: Iterable[str | tuple[str, ...]]) -> Iterator[str]:
    for each in models:
        yield from (each,) if isinstance(each, str) else each


COMMANDS = tuple(map(single, SINGLES))
