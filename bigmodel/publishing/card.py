"""The model card of a converted model: what it was made from, how, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE
from bigpipe.bigmodel.formats import named, packing_of
from bigpipe.sizes import format_size

from .provenance import Provenance, Step, version

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)

UNTOLD = frozenset({"files", "fetched_bytes"})
"""Metrics that say nothing about the model."""
TASKS = re.compile(r"[a-z]+(-[a-z]+)+")
"""Names of pipeline tasks on the Hub; a `module:function` is none."""

TEMPLATE = """\
---
{{ metadata }}---

# {{ title }}

{{ summary }}
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
{% endfor %}{% endif %}
## Recipe

Made by bigpipe {{ version }} from the recipe `{{ recipe_name }}`. `provenance.json` has every step with its parameters
and digests.

{{ fence }}yaml
{{ recipe }}
{{ fence }}
"""

LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{where}")"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    title: str
    base_model: str | None = None
    """owner/name on the Hub."""
    source: str = "a local model"
    """What it was made from, where that has no name on the Hub."""
    commit: str | None = None
    scheme: str | None = None
    """The format it was quantized to."""
    license: str | None = None
    library: str | None = None
    task: str | None = None
    loading: str = ""
    measured: Sequence[tuple[str, str, str]] = ()
    recipe: str = ""
    recipe_name: str = ""
    version: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the recipe adds to, or puts in place of, the metadata."""

    def metadata(self) -> dict[str, Any]:
        """The Hub's terms, https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
        tags = [f"{packing_of(self.scheme).bits}-bit", named(self.scheme).method] if self.scheme else []
        told = {
            "base_model": self.base_model,
            "base_model_relation": "quantized" if self.base_model and self.scheme else None,
            "license": self.license,
            "library_name": self.library,
            "pipeline_tag": self.task,
            "tags": ["bigpipe", *tags],
        }
        return {key: value for key, value in {**told, **self.extra}.items() if value is not None}

    def summary(self) -> str:
        source = f"[{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_model else self.source
        at = f" at commit `{self.commit}`" if self.commit else ""
        how = f", quantized to {self.scheme} with {named(self.scheme).method}" if self.scheme else ""
        return f"Made from {source}{at}{how}."

    def text(self) -> str:
        from jinja2 import Environment

        # Markdown, not HTML: the values are the recipe's own and the Hub sanitises what it shows.
        template = Environment(autoescape=False, keep_trailing_newline=True).from_string(TEMPLATE)  # noqa: S701
        longest = max((len(run) for run in re.findall("`+", self.recipe)), default=0)
        return template.render(
            metadata=yaml.safe_dump(self.metadata(), sort_keys=False, allow_unicode=True),
            title=self.title,
            summary=self.summary(),
            loading=self.loading,
            measured=[tuple(text.replace("|", "\\|") for text in row) for row in self.measured],
            version=self.version,
            recipe_name=self.recipe_name,
            recipe=self.recipe.rstrip("\n"),
            fence="`" * max(3, longest + 1),
        )


def card_of(model: Path, provenance: Provenance, name: str, extra: Mapping[str, Any]) -> Card:
    """Return the card of what lies in `model`, by what led to it. name: of the destination, for whoever loads it."""
    source, quantize = provenance.last("download"), provenance.last("quantize")
    infer = provenance.last("distributed-infer")
    task = str(infer.params.get("task")) if infer else ""
    by_transformers = (model / "config.json").is_file() and not (model / ARCHITECTURE_FILE).exists()
    readme = model / "README.md"
    return Card(
        title=name.rstrip("/").rpartition("/")[2],
        base_model=source.params.get("repo") if source else None,
        source="made-up weights" if source and source.params.get("synthetic") else "a local model",
        commit=source.metrics.get("commit") if source else None,
        scheme=str(quantize.params.get("scheme")) if quantize else None,
        license=front_matter(readme.read_text(errors="replace")).get("license") if readme.is_file() else None,
        library="transformers" if by_transformers else None,
        task=task if TASKS.fullmatch(task) else None,
        loading=LOADING.format(where=name) if by_transformers else "",
        measured=[row for step in provenance.steps for row in _measured(step)],
        recipe=provenance.text,
        recipe_name=provenance.recipe,
        version=version(),
        extra=extra,
    )


def _measured(step: Step) -> list[tuple[str, str, str]]:
    """(node, metric, value) per number, nested ones by their path; only what was measured, not what was estimated."""
    if step.kind == "estimate":
        return []

    def flatten(prefix: str, value: Any) -> Iterator[tuple[str, str, str]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix not in UNTOLD:
            yield step.node, prefix, _readable(prefix, value)

    return list(flatten("", step.metrics))


def _readable(name: str, value: float) -> str:
    if re.search(r"bytes|predicted|measured|peak", name):
        return format_size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a README.md; empty where there is none, or it is damaged."""
    match = FRONT_MATTER.match(text)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
