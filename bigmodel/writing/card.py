"""The model card of a converted model: what it was made from, how, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)

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
    """int8, nf4 or fp4, where the model was quantized."""
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
        width = {"int8": "8-bit", "nf4": "4-bit", "fp4": "4-bit"}.get(self.scheme or "")
        told = {
            "base_model": self.base_model,
            "base_model_relation": "quantized" if self.base_model and self.scheme else None,
            "license": self.license,
            "library_name": self.library,
            "pipeline_tag": self.task,
            "tags": ["bigpipe", *([width, "bitsandbytes"] if width else [])],
        }
        return {key: value for key, value in {**told, **self.extra}.items() if value is not None}

    def summary(self) -> str:
        source = (
            f"[{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_model else "a local model"
        )
        at = f" at commit `{self.commit}`" if self.commit else ""
        how = f", quantized to {self.scheme} with bitsandbytes" if self.scheme else ""
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


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a README.md; empty where there is none, or it is damaged."""
    match = FRONT_MATTER.match(text)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
