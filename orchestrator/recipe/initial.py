"""The manifest that `bigpipe init` writes: every built-in kind, ready to be cut down."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.files import make_directory, write_file

from .arguments import quoted
from .graph import load_recipe
from .interpolation import escape
from .schema import recipe_schema

_TEMPLATE = """\
# yaml-language-server: $schema=@schema@
version: 1
name: @name@
params:
  gpu: 22GiB # what one GPU may hold; change it here or with -p gpu=…
stages:
  download:
    uses: download
    with:
      @source@
  estimate:
    uses: estimate
    inputs: download
    with:
      dtypes: [float16, int8]
      batch_size: 1
      sequence_length: 2048
    gates:
      - int8.inference_high <= ${params.gpu} # known from headers: decided before weights are downloaded
  shard:
    uses: shard
    inputs: download
    with:
      max_shard_size: 5GB
      dtype: float16
  quantize:
    uses: quantize
    inputs: shard
    with:
      scheme: int8
  dispatch:
    uses: dispatch
    inputs: quantize
    with:
      device_map: auto
      # or cap devices:
      # max_memory:
      #   0: ${params.gpu}
      #   cpu: 48GiB
      #   disk: 200GiB
  generate:
    uses: distributed-infer
    inputs:
      model: quantize
      placement: dispatch
    with:
      task: text-generation
      prompts:
        - Hello, my name is
      max_new_tokens: 32
  save:
    uses: save
    inputs:
      model: quantize
      results: generate
      reports: [estimate]
    with:
      to: @to@
"""


def initial_manifest(repo: str, name: str, schema: str = "bigpipe.schema.json") -> str:
    """Return a manifest over all built-in kinds for a Hub repository, or for a local checkpoint (`./…`, `/…`, `~…`).
    schema: path or URL of the JSON schema, relative to the manifest."""
    name = re.sub(r"[^\w.-]+", "-", name).strip("-") or "recipe"
    key, where = source_of(repo)
    source = f"{key}: {as_text(where)}" + ("\n      revision: main" if key == "repo" else "")
    values = {
        "schema": schema.replace("\n", ""),
        "name": as_text(name),
        "source": source,
        "to": as_text(f"dist/{name}"),
    }
    text = _TEMPLATE
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def source_of(model: str) -> tuple[str, str]:
    """Return what `download` calls it, `repo` or `path`, and its value. A directory that is there, and what is written
    as a path (`./…`, `/…`, `~…`), is one."""
    local = model.startswith((".", "/", "~")) or os.path.isdir(model)
    return ("path", model) if local else ("repo", model)


def as_text(value: str) -> str:
    """`value` as a YAML text that means itself: quoted unless it is plainly a word, `${` escaped."""
    plain = value.replace("/", "").replace("-", "").replace("_", "").replace(".", "")
    if plain.isascii() and plain.isalnum() and value[0].isalpha() and value.lower() not in ("null", "true", "false"):
        return value
    return quoted(escape(value))


def _seen_from(folder: Path, model: str) -> str:
    """A model as a recipe in this folder writes it: relative paths begin beside the recipe."""
    if source_of(model)[0] != "path" or model.startswith(("/", "~")):
        return model
    path = os.path.relpath(model, os.path.realpath(folder))
    if path == os.path.normpath(model):
        return model
    return path if path.startswith(".") else os.path.join(os.curdir, path)


def initialise(file: Path, model: str) -> list[Path]:
    """Write a first recipe for `model`, and the JSON schema its first line names. Never overwrites a recipe."""
    if os.path.lexists(os.path.join(os.path.realpath(file.parent), file.name)):  # its folders may have to be made
        raise UsageError(f"{file} exists", "give another name; `bigpipe init` never overwrites a recipe")
    schema = file.parent / "bigpipe.schema.json"
    text = initial_manifest(_seen_from(file.parent, model), file.stem, schema.name)
    recipe = load_recipe(file, text=text, arguments={("stages", "download", "with"): f"--model {model}"})
    try:
        make_directory(file.parent)
        write_file(schema, json.dumps(recipe_schema(recipe), indent=2) + "\n")
        write_file(file, text)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}", "give another place, or make room") from error
    return [file, schema]
