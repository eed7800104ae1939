"""The model card of a converted model: what it was made from, how, and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigpipe import plainyaml
from bigpipe.bigmodel.architecture import library_of
from bigpipe.bigmodel.checkpoint import (
    ADAPTER_CONFIG,
    ARCHITECTURE_FILE,
    MAX_CONFIG,
    choose_weights,
    read_json,
    variants,
)
from bigpipe.bigmodel.formats import named, packing_of
from bigpipe.errors import InvalidCheckpoint
from bigpipe.files import read_file
from bigpipe.redaction import redact_value
from bigpipe.sizes import format_size

from .provenance import Provenance, Step, version

FRONT_MATTER = re.compile(r"\A\ufeff?(?:\s|<!--(?:(?!-->).)*-->)*---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
"""After a byte order mark, empty lines and comments."""
MOST_KEYS = 1000

LARGEST_README = 2**20
UNTOLD = frozenset({"files", "fetched_bytes", "timeline"})
"""Metrics that say nothing about the model, with all that lies in them."""
TASKS = re.compile(r"[a-z]+(-[a-z]+)+")
"""Names of pipeline tasks on the Hub; a `module:function` is none."""

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}  # fmt: skip
"""Task of an adapter, as peft names it → the class of transformers' models for it."""

LICENCE = ("license", "license_name", "license_link")
"""Metadata of a card. Where the first is `other`, the Hub asks for the rest."""

TEMPLATE = """\
{{ metadata }}
# {{ title }}

Made from {% if base %}[{{ base }}](https://huggingface.co/{{ base }})
{%- else %}{{ "made-up weights" if synthetic else "a local model" }}{% endif %}
{%- if commit %} at commit `{{ commit }}`{% endif %}
{%- if scheme %}, quantized to {{ scheme }} with {{ method }}{% endif %}.
{% if loading %}
```python
{{ loading }}
```
{% endif %}{% if measured %}
## Measured

| node | metric | value |
|---|---|---|
{% for node, metric, value in measured -%}
| {{ node }} | {{ metric }} | {{ value }} |
{% endfor %}{% endif %}{% if left %}
## Tried and left

| node | why |
|---|---|
{% for node, why in left -%}
| {{ node }} | {{ why }} |
{% endfor %}{% endif %}
## Recipe

Made by bigpipe {{ version }} from the recipe `{{ recipe_name }}`
{%- if git %} at git commit `{{ git.commit }}`{{ ", with changes that are not in it" if git.dirty }}{% endif %}.
`provenance.json` has every step with its parameters and digests.
{% if used %}
| parameter | value |
|---|---|
{% for name, value in used -%}
| {{ name }} | {{ value }} |
{% endfor %}{% endif %}
{{ fence }}yaml
{{ recipe }}
{{ fence }}
"""

CONFIGS = ("model_index.json", "config.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model")
"""One of these lies beside a model that AutoTokenizer loads."""


def card_of(model: Path, provenance: Provenance, name: str, extra: Mapping[str, Any]) -> str:
    """Return the text of a card for what lies in `model`, by what led to it. name: of the destination, for whoever
    loads it. extra: added to, or put in place of, the metadata."""
    from jinja2 import Environment

    # Markdown, not HTML: the values are the recipe's own and the Hub sanitises what it shows.
    template = Environment(autoescape=False, keep_trailing_newline=True).from_string(TEMPLATE)  # noqa: S701
    longest = max((len(run) for run in re.findall("`+", provenance.text)), default=0)
    base, scheme = provenance.param("download", "repo"), provenance.param("quantize", "scheme")
    if (model / ADAPTER_CONFIG).exists():  # what it was trained on may be quantized, it is not
        scheme = None
    download, metadata = provenance.last("download"), {**_metadata(model, provenance, base, scheme, extra), **extra}
    text = template.render(
        metadata=_front_matter(metadata),
        title=name.rstrip("/").rpartition("/")[2],
        base=base,
        synthetic=provenance.param("download", "synthetic"),
        commit=download and download.metrics.get("commit"),
        scheme=scheme,
        method=scheme and named(scheme).method,
        loading=_loading(model, name),
        measured=[[_cell(text) for text in row] for step in provenance.steps for row in _measured(step)],
        left=[(_cell(step.node), _cell(step.left)) for step in provenance.steps if step.left],
        version=version(),
        git=provenance.git,
        used=[(name, _cell(value)) for name, value in provenance.used().items()],
        recipe_name=provenance.recipe,
        recipe=provenance.text.rstrip("\n"),
        fence="`" * max(3, longest + 1),
    )
    return redact_value(text)


def foreseen_card(model: Path | None, extra: Mapping[str, Any]) -> str:
    """Return what is known of a card before there is a model: `extra`, and the licence that a README.md in `model`
    says; "" where that is nothing."""
    told = {**(_license(model / "README.md", extra) if model else {}), **extra}
    return _front_matter(told) if any(value is not None for value in told.values()) else ""


def _front_matter(metadata: Mapping[str, Any]) -> str:
    known = {key: value for key, value in metadata.items() if value is not None}
    return redact_value(f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n")


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says of where a model comes from; as it is written there, whatever that is."""

    metadata: Mapping[str, Any]
    commit: str | None
    """Of the base model, as `TEMPLATE` says it."""

    @property
    def base(self) -> Any:
        return self.metadata.get("base_model")


def read_card(folder: Path) -> Card:
    """Return what the README.md in `folder` says; where there is none, or it is damaged, it says nothing."""
    text = _text(folder / "README.md")
    commit = re.search(r"^Made from \[[^\]]*\]\([^)]*\) at commit `([0-9a-f]{40})`", text, re.MULTILINE)
    return Card(front_matter(text), commit and commit[1])


def _cell(value: Any) -> str:
    """A value in a row of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return " ".join(text.replace("|", "\\|").split())


def _metadata(model: Path, provenance: Provenance, base: Any, scheme: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """In the Hub's terms, https://huggingface.co/docs/hub/model-cards#model-card-metadata; None: not known."""
    measured = provenance.measured("distributed-infer")
    task = measured and measured.params.get("task")
    relation = "quantized" if scheme else None
    if (model / ADAPTER_CONFIG).exists():
        relation, base = "adapter", _adapted(model) or (base if provenance.last("finetune") else None)
    return {
        "base_model": base,
        "base_model_relation": relation if base else None,
        **_license(model / "README.md", extra),
        "library_name": _library(model),
        "pipeline_tag": task if TASKS.fullmatch(str(task)) else None,
        "tags": ["bigpipe", *([f"{packing_of(scheme).bits}-bit", named(scheme).method] if scheme else [])],
    }


def _config(model: Path) -> dict[str, Any]:
    """The config of a model that a library's own classes load; empty where there is none, or it cannot be read."""
    file = next((file for name in CONFIGS if (file := model / name).is_file()), None)
    if file is None or (model / ARCHITECTURE_FILE).exists():
        return {}
    try:
        return read_json(file, model, MAX_CONFIG)
    except InvalidCheckpoint:
        return {}


def _library(model: Path) -> str | None:
    """As the Hub calls it: peft, transformers, diffusers or timm; None where the files do not tell."""
    if (model / ADAPTER_CONFIG).exists():
        return "peft"
    config = _config(model)
    library = library_of(config)
    return library if library != "transformers" or not {"model_type", "architectures"}.isdisjoint(config) else None


def _loading(model: Path, where: str) -> str:
    """How transformers loads it: as the class that was saved, and by that of `auto_map` which means it where it came
    with its own code, which must be allowed then; with its tokenizer, if there is one. Empty for what another library
    loads, but for adapters, which peft adds to their model."""
    if (model / ADAPTER_CONFIG).exists():
        return _loading_adapter(model, where)
    config = _config(model)
    saved = config.get("architectures")
    name = str(saved[0]) if isinstance(saved, list) and len(saved) == 1 else "AutoModel"
    mapped = found if isinstance(found := config.get("auto_map"), Mapping) else {}
    for auto, target in mapped.items():
        name = str(auto) if str(auto).startswith("AutoModel") and str(target).endswith(f".{name}") else name
    if _library(model) != "transformers" or not name.isidentifier():
        return ""
    tokenizer = any((model / file).exists() for file in TOKENIZERS)
    lines = [f"from transformers import {', '.join(['AutoTokenizer'] * tokenizer + [name])}", ""]
    options = ', device_map="auto"' + (", trust_remote_code=True" if name in mapped else "")
    if variant := _variant(model):
        options = f', variant="{variant}"{options}'
    lines += [f'model = {name}.from_pretrained("{where}"{options})']
    allowed = ", trust_remote_code=True" if _brings_tokenizer(model, mapped) else ""
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{where}"{allowed})'] * tokenizer
    return "\n".join(lines)


def _variant(model: Path) -> str | None:
    """As `fp16`, where transformers finds the weights by no other name."""
    with suppress(InvalidCheckpoint):
        found = choose_weights([path.name for path in model.iterdir()], model)
        return next(iter(variants(found.files)), None) if found else None
    return None


def _loading_adapter(model: Path, where: str) -> str:
    """Empty where it is not known of which model."""
    base = _adapted(model)
    if base is None:
        return ""
    told = _json(model, ADAPTER_CONFIG)
    mapping = found if isinstance(found := told.get("auto_mapping"), Mapping) else {}
    name = str(mapping.get("base_model_class") or CLASSES.get(str(told.get("task_type")), "AutoModel"))
    if not name.isidentifier():
        return ""
    lines = [f"from transformers import {name}", "from peft import PeftModel", ""]
    lines += [f'model = {name}.from_pretrained("{base}", device_map="auto")']
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(model, "{where}")'])


def _adapted(model: Path) -> str | None:
    """The repository of the model that an adapter belongs to, as it says itself; None: none, or a path."""
    name = _json(model, ADAPTER_CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and REPOSITORY.fullmatch(name) else None


def _brings_tokenizer(model: Path, mapped: Mapping[str, Any]) -> bool:
    """Does AutoTokenizer run code of the model's: a tokenizer's, or where no class is named, that of its config?"""
    told = _json(model, TOKENIZER_CONFIG)
    return bool(told.get("auto_map")) or ("AutoConfig" in mapped and not told.get("tokenizer_class"))


def _json(model: Path, name: str) -> dict[str, Any]:
    """Empty where there is no such file, or it cannot be read."""
    try:
        return read_json(model / name, model, MAX_CONFIG)
    except (InvalidCheckpoint, OSError):
        return {}


def _measured(step: Step) -> list[tuple[str, str, str]]:
    """(node, metric, value) per number, nested ones by their path; only what was measured, not what was estimated."""
    if step.kind == "estimate":
        return []

    def flatten(prefix: str, value: Any) -> Iterator[tuple[str, str, str]]:
        if prefix in UNTOLD:
            return
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield step.node, prefix, _readable(prefix, value)

    return list(flatten("", step.metrics))


def _readable(name: str, value: float) -> str:
    if re.search(r"bytes|predicted|measured|peak", name):
        return format_size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _license(readme: Path, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's own card says of its licence; nothing of it where `extra` names another."""
    told = {} if "license" in extra else front_matter(_text(readme))
    return {name: told.get(name) for name in LICENCE}


def _text(readme: Path) -> str:
    try:
        return read_file(readme, LARGEST_README).decode(errors="replace")
    except OSError:
        return ""


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a README.md; without the keys that cannot be read, such as those with an alias."""
    if (match := FRONT_MATTER.match(text)) is None:
        return {}
    try:
        return _mapping(match[1])
    except plainyaml.NotPlain:
        found: dict[str, Any] = {}
    for key in re.split(r"\n(?=\w)", match[1], maxsplit=MOST_KEYS):
        with suppress(plainyaml.NotPlain):
            found |= _mapping(key)
    return found


def _mapping(text: str) -> dict[str, Any]:
    """Raise NotPlain."""
    found = plainyaml.load(text)
    return found if isinstance(found, dict) else {}
