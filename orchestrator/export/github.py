"""A workflow of GitHub Actions: one job that plans into its summary, runs, and keeps the store in the cache
(https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-syntax).

A text of the recipe stands in a step only as a quoted word or as the value of a variable.
"""

from __future__ import annotations

import re
import shlex

from bigpipe.orchestrator.contract import Json

from .targets import Target
from .work import Parameter, Work
from .yamltext import yaml_text

HEAD = """\
# Written by `bigpipe export github`: write it anew when the recipe has other parameters, secrets or kinds.
# The repository's variable BIGPIPE_RUNNER names another runner than the one below; its secrets are taken by name, and
# what sinks need by the name of a variable or a secret.
"""
MOST_INPUTS = 25
"""That a workflow may ask for when it is started by hand."""
THIS = "${{ github.run_id }}-${{ github.run_attempt }}"
"""What a key ends in: it can be written once, and what is made depends on more than recipe and lock file."""
STORE = ("~/.cache/bigpipe", "~/.cache/huggingface")
"""What is kept from run to run: the store, and the Hub's cache, into which it links."""
RUN = """\
status=0
{run} > "$RUNNER_TEMP/result.json" || status=$?
echo "result=$(tail -n 1 "$RUNNER_TEMP/result.json")" >> "$GITHUB_OUTPUT"
exit "$status"
"""
OWN_TOKEN = "GITHUB_TOKEN"  # noqa: S105  its name
"""A secret that every workflow has, and that none may declare."""
MADE = "contains(fromJSON(steps.run.outputs.result).nodes.*.status, 'succeeded')"
"""Something was made, which the cache has not. Asked of a run that succeeded: only then there surely is a result."""


def workflow(work: Work) -> str:
    """Return the workflow. It starts by hand, from other workflows, and when the recipe or its lock file changes."""
    inputs = {each.plain: _input(each) for each in work.parameters[:MOST_INPUTS]}
    runner = "self-hosted" if work.gpus else "ubuntu-latest"
    secrets = {name: {"required": False} for name in (*work.secrets, *work.settings) if name != OWN_TOKEN}
    return HEAD + yaml_text({
        "name": work.recipe,
        "on": {
            "push": {"paths": [_pattern(name) for name in (work.manifest, f"{work.manifest}.lock")]},
            "workflow_dispatch": {"inputs": inputs} if inputs else {},
            "workflow_call": {
                **({"inputs": inputs} if inputs else {}),
                **({"secrets": secrets} if secrets else {}),
                "outputs": {
                    "result": {
                        "description": "What the run did, as one line of JSON.",
                        "value": "${{ jobs.bigpipe.outputs.result }}",
                    }
                },
            },
        },
        "permissions": {"contents": "read"},
        "jobs": {
            "bigpipe": {
                "runs-on": f"${{{{ vars.BIGPIPE_RUNNER || '{runner}' }}}}",
                "defaults": {"run": {"shell": "bash"}},
                "outputs": {"result": "${{ steps.run.outputs.result }}"},
                "steps": _steps(work),
            }
        },
    })  # fmt: skip


def _steps(work: Work) -> list[Json]:
    files = ", ".join(_quoted(_pattern(name)) for name in (work.manifest, f"{work.manifest}.lock"))
    key, paths = f"bigpipe-{work.plain}_", "\n".join(STORE)  # `_` is in no plain name: no key begins as another's
    own = f"{key}${{{{ hashFiles({files}) }}}}-"
    environment = {"env": variables} if (variables := _environment(work)) else {}
    plan = work.shell(["bigpipe", "plan", work.manifest, "--markdown"])
    return [
        {"uses": "actions/checkout@v6", "with": {"persist-credentials": False}},
        {"uses": "actions/setup-python@v6", "with": {"python-version": "3.12"}},
        {"name": "Install", "run": f"pip install {shlex.join(work.requirements)}"},
        {
            "name": "Take the store from the cache",
            "uses": "actions/cache/restore@v5",
            "with": {"path": paths, "key": f"{own}{THIS}", "restore-keys": f"{own}\n{key}"},
        },
        {"name": "Plan", **environment, "run": f'{plan} >> "$GITHUB_STEP_SUMMARY"\n'},
        {"name": "Run", "id": "run", **environment, "run": RUN.format(run=work.shell(work.run()))},
        {
            "name": "Keep the store in the cache",
            "uses": "actions/cache/save@v5",
            "if": f"always() && (job.status != 'success' || {MADE})",
            "with": {"path": paths, "key": f"{own}{THIS}"},
        },
    ]


def _input(parameter: Parameter) -> Json:
    said = f"else {parameter.given}" if parameter.given else "else as the recipe says"
    return {"description": f"{parameter.name}; {said}", "type": "string", "required": False}


def _environment(work: Work) -> dict[str, Json]:
    """What the steps see that plan and run: values of parameters, and the secrets, which are in no other step. A
    variable that is nowhere set is empty."""
    values = {each.variable: _value(each, asked=index < MOST_INPUTS) for index, each in enumerate(work.parameters)}
    secrets = {name: f"${{{{ secrets.{name} }}}}" for name in work.secrets}
    settings = {name: f"${{{{ vars.{name} || secrets.{name} }}}}" for name in work.settings}
    return {**{name: value for name, value in values.items() if value}, **secrets, **settings}


def _value(parameter: Parameter, *, asked: bool) -> str:
    """An expression: what was asked for, else what was given; "" where neither can be."""
    parts = [f"inputs.{parameter.plain}"] * asked + [_quoted(parameter.given)] * bool(parameter.given)
    return f"${{{{ {' || '.join(parts)} }}}}" if parts else ""


def _quoted(text: str) -> str:
    """A text in an expression (https://docs.github.com/en/actions/reference/workflows-and-actions/expressions)."""
    return "'" + text.replace("'", "''") + "'"


def _pattern(path: str) -> str:
    """A path where a pattern is read."""
    return re.sub(r"([*?+!\[\]\\])", r"\\\1", path)


TARGET = Target(
    title="GitHub Actions", write=workflow, evaluates="${{", reserved="GITHUB_", given=(OWN_TOKEN,)
)  # fmt: skip
