"""Runs the steps of a workflow as GitHub's runner does, as far as a machine without it can.

Expressions are `A || B` over inputs, secrets, variables and literals; `uses:` steps are left out. A script goes to
`bash --noprofile --norc -eo pipefail` (https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax).
"""

from __future__ import annotations

import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .workshop import environment

BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
PLAIN = ("bash", "-e")


def with_the_command(folder: Path) -> dict[str, str]:
    """An environment in which `bigpipe` is this one."""
    command = folder / "bin/bigpipe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m bigpipe "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    found = environment(folder)
    return {**found, "PATH": f"{command.parent}:{found['PATH']}"}


def evaluated(text: str, contexts: Mapping[str, Mapping[str, str]]) -> str:
    """A text with the expressions in it replaced."""
    return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: _value(found[1], contexts), text, flags=re.DOTALL)


def _value(expression: str, contexts: Mapping[str, Mapping[str, str]]) -> str:
    parts = re.findall(r"'(?:[^']|'')*'|[\w.-]+", expression)
    assert " || ".join(parts) == expression, expression
    values = [
        part[1:-1].replace("''", "'")
        if part.startswith("'")
        else contexts[part.partition(".")[0]].get(part.partition(".")[2], "")
        for part in parts
    ]
    return next(filter(None, values), "")


class Runner:
    """One job. `outputs` and `summary` are what its steps left there."""

    def __init__(self, workflow: Mapping[str, Any], folder: Path, environment: Mapping[str, str], **contexts: Any):
        self.steps = {step["name"]: step for step in workflow["jobs"]["bigpipe"]["steps"] if "run" in step}
        self.folder, self.contexts = folder, {"inputs": {}, "secrets": {}, "vars": {}, **contexts}
        self.temporary = folder / "runner"
        self.temporary.mkdir(exist_ok=True)
        files = {"GITHUB_STEP_SUMMARY": "summary", "GITHUB_OUTPUT": "output", "GITHUB_ENV": "env"}
        self.environment = {
            **environment, "GITHUB_ACTIONS": "true", "RUNNER_TEMP": str(self.temporary),
            **{name: str(self.temporary / file) for name, file in files.items()},
        }  # fmt: skip

    def run(self, name: str, shell: tuple[str, ...] = BASH) -> subprocess.CompletedProcess[str]:
        step = self.steps[name]
        script = self.temporary / "step.sh"
        script.write_text(evaluated(step["run"], self.contexts))
        own = {key: evaluated(value, self.contexts) for key, value in step.get("env", {}).items()}
        return subprocess.run(
            [*shell, script], cwd=self.folder, env={**self.environment, **own}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    @property
    def summary(self) -> str:
        return (self.temporary / "summary").read_text()

    @property
    def outputs(self) -> dict[str, str]:
        lines = (self.temporary / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)
