"""What peft makes of a model without its weights: asked of the class itself on the meta device, in a child process.

    python -m bigpipe.bigmodel.training.rehearsing QUESTION.json ANSWER.json

Most adapters are told from the names of linear modules alone (`targets`). Where peft's rules reach beyond those
(experts that a class holds in one parameter, modules of other classes that a name matches, classes that it excludes),
only peft itself knows: the function that wraps the model of a run wraps it here.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.architecture import ask_child, read_request, with_empty_parameters
from bigpipe.bigmodel.memo import answered
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import BY_NAME, BigpipeError, UsageError
from bigpipe.files import write_file
from bigpipe.versions import package_version

from .adapting import adapter_tensors, lora_config, wrap
from .settings import Lora, Training

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name → dtype and shape, as peft stores them."""


def rehearse(
    source: Path | Mapping[str, Any], training: Training, optional: Sequence[str], sources: Sources
) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of the adapter that peft puts on a model, and its config. source: the model's directory, where
    its own code may run, or its config. optional: those of `target_modules` that may be names of nothing. The answer is
    kept in the memo. Raise UsageError for what peft does not adapt, and for a name of nothing."""
    asked = json.dumps(
        {
            "source": str(source) if isinstance(source, Path) else source,
            "remote": sources.trust_remote_code,
            "lora": asdict(training.lora),
            "task": training.task,
            "optional": [*optional],
        },
        default=str, sort_keys=True,
    )  # fmt: skip
    versions = [package_version(name) for name in ("torch", "transformers", "peft")]
    key = hashlib.sha256(f"{versions} {asked}".encode()).hexdigest()

    def ask() -> dict[str, Any]:
        answer = ask_child(__name__, asked, "asking peft which modules it adapts", sources.trust.limits)
        if "error" in answer:
            raise BY_NAME.get(answer["error"], UsageError)(answer["cause"], answer["cure"], field=answer["field"])
        return answer

    file = sources.memo / "adapters" / f"{key}.json" if sources.memo else None
    answer = ask() if isinstance(source, Path) else answered(file, key, ask)  # a directory's code may change
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in answer["tensors"].items()}, answer["config"]


def main(question: str, answer: str) -> None:
    warnings.simplefilter("ignore")
    asked = json.loads(Path(question).read_bytes())
    try:
        said = _answer(asked)
    except BigpipeError as error:
        said = {"error": type(error).__name__, "cause": error.cause, "cure": error.cure, "field": error.field}
    write_file(Path(answer), json.dumps(said), durable=False)


def _answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    targets = asked["lora"]["target_modules"]
    lora = Lora(**{**asked["lora"], "target_modules": tuple(targets) if isinstance(targets, list) else targets})
    training = Training(task=asked["task"], lora=lora, max_steps=1)
    tensors, config = _wrapped(asked, training)
    for end in asked["optional"]:
        others = tuple(each for each in lora.target_modules or () if each != end)
        try:
            changed = not others or _wrapped(asked, replace(training, lora=replace(lora, target_modules=others)))[0]
        except UsageError:  # peft needs it beside the others
            continue
        if changed == tensors:
            cure = "leave it out, or name what there is"
            raise UsageError(f"target_modules: {end!r} is the name of nothing that peft adapts", cure)
    return {"tensors": tensors, "config": config}


def _wrapped(asked: Mapping[str, Any], training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    source = asked["source"]
    request = read_request(
        Path(source) if isinstance(source, str) else source, sources=Sources(trust_remote_code=asked["remote"])
    )
    model: Any = with_empty_parameters(request, torch.float32)
    made = wrap(model, lora_config(training, model.config.model_type))
    tensors = {
        name: (str(value.dtype).removeprefix("torch."), list(value.shape))
        for name, value in adapter_tensors(made).items()
    }
    config = made.peft_config["default"]
    names = {name: sorted(getattr(config, name) or ()) for name in ("target_modules", "target_parameters")}
    return tensors, names


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # the answer is on disk; taking torch apart again would take longer
