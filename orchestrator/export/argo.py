"""A Workflow of Argo: a container for each task, on a volume that holds the store
(https://argo-workflows.readthedocs.io/en/latest/fields/).

Values of parameters reach the shell as variables, names as quoted words. Kubernetes reads `$(NAME)` and `$$` in the
words of a command and in the value of a variable
(https://kubernetes.io/docs/tasks/inject-data-application/define-command-argument-container/): in a script they are
escaped, and values, which may be given when the workflow is submitted, come by annotations, in which it reads nothing.
"""

from __future__ import annotations

import re

from bigpipe.orchestrator.contract import Json

from .targets import Target
from .work import Parameter, Task, Work
from .yamltext import yaml_text

HEAD = """\
# Written by `bigpipe export argo`: write it anew when the recipe has other stages or parameters.
# `bigpipe-image` has bigpipe and the recipe (`bigpipe export dockerfile`), the claim `bigpipe-store` is shared by all
# pods, and the secret `bigpipe-secrets` may hold the variables that stages and sinks ask for.
"""
IMAGE, CLAIM, SECRETS = "bigpipe-image", "bigpipe-store", "bigpipe-secrets"
"""Parameters of the workflow. No plain name of the recipe's holds a `-`."""
STORE = "/store"
USER = 10001
"""Who the image of `bigpipe export dockerfile` runs as."""
RETRIES = 3
"""Further attempts of a task that ended with 75: try again."""
GPU = "nvidia.com/gpu"


def workflow(work: Work) -> str:
    parameters = [_parameter(IMAGE, f"{work.plain.lower()}:latest"), _parameter(CLAIM, "bigpipe-store"),
                  _parameter(SECRETS, f"{work.plain.lower()}-secrets"),
                  *(_parameter(each.plain, each.given) for each in work.parameters)]  # fmt: skip
    return HEAD + yaml_text({
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": f"{work.plain.lower()}-"},
        "spec": {
            "entrypoint": "recipe",
            "arguments": {"parameters": parameters},
            "volumes": [
                {"name": "store", "persistentVolumeClaim": {"claimName": _value_of(CLAIM)}}
            ],
            "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
            "templates": [
                {"name": "recipe", "dag": {"tasks": [_in_order(task) for task in work.tasks]}},
                *(_template(work, task) for task in work.tasks),
            ],
        },
    })  # fmt: skip


def _parameter(name: str, value: str) -> Json:
    return {"name": name, "value": value}


def _value_of(name: str) -> str:
    return f"{{{{workflow.parameters.{name}}}}}"


def _in_order(task: Task) -> Json:
    before = {"depends": " && ".join(_template_name(name) for name in task.after)} if task.after else {}
    return {"name": _template_name(task.name), "template": _template_name(task.name), **before}


def _template_name(name: str) -> str:
    """No task is called as the template of the whole is, nor as a word of `depends`."""
    return f"node-{name}"


def _template(work: Work, task: Task) -> Json:
    annotations = {_annotation(each): _value_of(each.plain) for each in work.parameters}
    return {
        "name": _template_name(task.name),
        **({"metadata": {"annotations": annotations}} if annotations else {}),
        "retryStrategy": {
            "limit": str(RETRIES),
            "retryPolicy": "Always",
            "expression": "asInt(lastRetry.exitCode) == 75 || lastRetry.status == 'Error'",  # Error: its node was lost
            "backoff": {"duration": "30s", "factor": "2"},
        },
        "container": {
            "image": _value_of(IMAGE),
            "command": ["sh", "-c"],
            "args": [escaped(f"exec {work.shell(work.run(task.asks))}")],
            "env": [
                {"name": "BIGPIPE_HOME", "value": f"{STORE}/bigpipe"},
                {"name": "HF_HOME", "value": f"{STORE}/huggingface"},
                *map(_variable, work.parameters),
                *map(_secret, (*work.secrets, *work.settings)),
            ],
            "resources": _resources(task),
            "volumeMounts": [{"name": "store", "mountPath": STORE}],
        },
    }


def escaped(script: str) -> str:
    """A script as it stands in the words of a container's command."""
    return re.sub(r"\$(?=[$(])", "$$", script)


def _annotation(parameter: Parameter) -> str:
    return f"bigpipe/{parameter.plain}"


def _variable(parameter: Parameter) -> Json:
    return {
        "name": parameter.variable,
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{_annotation(parameter)}']"}},
    }


def _secret(name: str) -> Json:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": _value_of(SECRETS), "key": name, "optional": True}}}


def _resources(task: Task) -> Json:
    """Memory that is not known is not asked for; of what is, a pod may take no more."""
    memory = {"memory": f"{-(-task.ram // 2**20)}Mi"} if task.ram is not None else {}
    limits = {**memory, **({GPU: str(task.gpus)} if task.gpus else {})}
    return {"requests": {"cpu": str(task.cpus), **memory}, **({"limits": limits} if limits else {})}


TARGET = Target(title="Argo Workflows", write=workflow, evaluates="{{", sized=True)
