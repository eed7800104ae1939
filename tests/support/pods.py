"""What a pod of an exported workflow sees, as Argo and Kubernetes make it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """A word of a command, or a variable's value, as Kubernetes reads it: `$(NAME)` of variables that there are, and
    `$$` for a `$` (k8s.io/kubernetes/third_party/forked/golang/expansion/expand.go)."""

    def read(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", read, text)


def container_of(template: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The container, and the annotations of its pod."""
    return template["container"], template.get("metadata", {}).get("annotations", {})


def variables(template: Mapping[str, Any], arguments: Mapping[str, str]) -> dict[str, str]:
    """Those of its container that are no secrets, by the arguments of the workflow."""
    container, annotations = container_of(template)
    given = {key: _argued(value, arguments) for key, value in annotations.items()}
    found: dict[str, str] = {}
    for each in container["env"]:
        if "value" in each:
            found[each["name"]] = expanded(_argued(each["value"], arguments), found)
        elif "fieldRef" in each["valueFrom"]:
            key = re.fullmatch(r"metadata\.annotations\['(.*)'\]", each["valueFrom"]["fieldRef"]["fieldPath"])
            assert key is not None
            found[each["name"]] = given[key[1]]
    return found


def _argued(text: str, arguments: Mapping[str, str]) -> str:
    return re.sub(r"\{\{workflow\.parameters\.([\w-]+)\}\}", lambda found: arguments[found[1]], text)
