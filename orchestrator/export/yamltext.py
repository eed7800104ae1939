"""Plain values as YAML that people read: texts of several lines as blocks, nothing sorted, nothing folded."""

from __future__ import annotations

import yaml

from bigpipe.orchestrator.contract import Json


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def yaml_text(value: Json) -> str:
    """Return a value as a YAML document; every text in it is read back as it is, whatever it holds."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
