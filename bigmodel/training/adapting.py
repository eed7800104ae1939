"""peft's adapter on a loaded model, and its files: the same bytes for the same adapter, whoever writes them where."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.adapters import PREFIX, copies, read_tensors, require_made_for
from bigpipe.bigmodel.checkpoint import open_adapter
from bigpipe.bigmodel.formats import packed_modules
from bigpipe.errors import InvalidCheckpoint, UsageError, first_few
from bigpipe.files import make_directory, write_file

from .examples import TASKS
from .settings import Training
from .targets import default_targets

if TYPE_CHECKING:
    import torch

    from bigpipe.bigmodel.architecture import Architecture
    from bigpipe.bigmodel.checkpoint import AdapterDescription, ModelDescription

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`owner/name`, as the Hub calls one."""
MODULE = re.compile(r"(\w+)\(\n.*?^\)", re.DOTALL | re.MULTILINE)
"""A module as torch prints it: its class, and all that it holds."""


def require_peft() -> None:
    """Raise UsageError where peft is not installed."""
    if find_spec("peft") is None:
        raise UsageError("finetune needs peft, which is not installed", "pip install 'bigpipe-ml[peft]'")


def check_adapter(
    adapter: AdapterDescription, model: ModelDescription, architecture: Architecture, memo: Path | None = None
) -> None:
    """Raise UsageError and InvalidCheckpoint, before a model is loaded, for an adapter that training does not go on
    from: of a method that is not done here, made for another model, or with weights of the model's own that are
    quantized in this one. What peft makes of its config is compared again once the model is there."""
    require_made_for(adapter, model, architecture, memo)
    held = [name.removeprefix(PREFIX).replace(".base_layer.", ".").removesuffix(".weight") for name in copies(adapter)]
    if packed := sorted(packed_modules(model, architecture, memo).intersection(held)):
        cause = (
            f"{adapter.where} holds weights of the model itself, which are quantized in this one: {first_few(packed)}"
        )
        raise UsageError(cause, "wire the model as it was before it was quantized")


def attach(model: Any, training: Training, adapter: Path | None = None) -> Any:
    """Return the model with an adapter that is trained, and all else frozen; random numbers come from torch's own.

    adapter: one to go on from; weights of the model that it holds take the place of the
    model's, as peft does it. Raise UsageError and InvalidCheckpoint for one that is not LoRA, or was made for another
    model.
    """
    _keep_less(model, training)
    if adapter is not None:
        return _continued(model, adapter)
    return wrap(model, lora_config(training, model.config.model_type))


def lora_config(training: Training, model_type: str) -> Any:
    """Return peft's config of a new adapter. Its own choice of modules is written out: for classes that hold their
    experts in one parameter it would take none."""
    import peft

    asked = training.lora
    targets = default_targets().get(model_type) if asked.target_modules is None else asked.target_modules
    return peft.LoraConfig(
        r=asked.r,
        lora_alpha=asked.lora_alpha,
        lora_dropout=asked.lora_dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type=TASKS[training.task].peft_type,
    )


def wrap(model: Any, config: Any) -> Any:
    """Return the model as peft wraps it; it may have no weights. Raise UsageError for what peft cannot do with it, in
    its words."""
    import peft

    try:
        return peft.get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        first = MODULE.sub(r"\1", str(error)).partition("\n")[0]
        dropout = "dropout" in first
        cure = "set it to 0" if dropout else "name other target_modules: ends of names of linear modules"
        field = f"lora.{'lora_dropout' if dropout else 'target_modules'}"
        raise UsageError(f"peft cannot adapt {type(model).__name__}: {first}", cure, field=field) from error


def _keep_less(model: Any, training: Training) -> None:
    """Gradient checkpointing: a layer's activations are computed again rather than kept."""
    if not training.gradient_checkpointing or not getattr(model, "supports_gradient_checkpointing", False):
        return
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _continued(model: Any, adapter: Path) -> Any:
    import peft

    config = read_config(adapter)
    opened = open_adapter(adapter)
    file = opened.file
    there = {name: tuple(tensor.shape) for name, tensor in opened.tensors.items()}
    try:
        made = peft.get_peft_model(model, config)
    except ValueError as error:
        cause = f"{file} was made for another model: {str(error).partition(chr(10))[0]:.200}"
        raise InvalidCheckpoint(cause, "wire the model it was trained on") from error
    own = dict(made.named_parameters(remove_duplicate=False))
    held = {name: own[name] for name in copies(opened.described) if name in own}
    wanted = {name: tuple(value.shape) for name, value in (held | adapter_tensors(made)).items()}
    if differing := sorted(there.items() ^ wanted.items()):
        names = list(dict.fromkeys(name for name, _ in differing))
        cause = f"{file} was made for another model: {len(names)} of its tensors differ, {first_few(names)}"
        raise InvalidCheckpoint(cause, "wire the model it was trained on")
    load_tensors(made, read_tensors(opened))
    return made


def copies_in(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's folder that are the model's own weights, as they are stored."""
    opened = open_adapter(adapter)
    names = copies(opened.described)
    return read_tensors(replace(opened, tensors={name: opened.tensors[name] for name in names}))


def trained_on(adapter: Path) -> tuple[str | None, str | None]:
    """Return the repository that an adapter's config names as what it was trained on, and the commit; None for a path,
    which says nothing elsewhere."""
    opened = open_adapter(adapter)
    name, revision = opened.described.base_model, opened.config.get("revision")
    if name is None or not REPOSITORY.fullmatch(name) or os.path.exists(name):
        return None, None
    return name, revision if isinstance(revision, str) else None


def read_config(adapter: Path) -> Any:
    """Return the LoraConfig of an adapter's folder. Raise InvalidCheckpoint for one that is damaged or another kind."""
    import peft

    file = adapter / CONFIG
    try:
        config = peft.LoraConfig.from_pretrained(str(adapter), local_files_only=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise InvalidCheckpoint(f"{file} cannot be used: {first}", "give an adapter that peft saved") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UsageError(f"{file} is of {kind}, and finetune goes on with LORA", "train it with peft itself")
    config.inference_mode = False
    config.base_model_name_or_path = None  # `trained_on` tells it; peft warns that another model has no such name
    return config


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by the names that peft stores them under."""
    import peft

    found: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def load_tensors(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an attached adapter these values."""
    import peft

    peft.set_peft_model_state_dict(model, dict(tensors))


def trained(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield name and parameter of everything that is trained."""
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


def write_adapter(
    model: Any, out: Path, base_model: str | None, revision: str | None, beside: Mapping[str, torch.Tensor] = NOTHING
) -> dict[str, tuple[str, int]]:
    """Write peft's two files, and return their (hex sha256, size). base_model: the repository that the model came from,
    and its commit; no path of this machine enters. beside: weights of the model that are stored with the adapter."""
    from safetensors.torch import save

    make_directory(out)
    own = {name: value.detach().cpu().contiguous() for name, value in adapter_tensors(model).items()}
    tensors = {**beside, **own}
    return {
        WEIGHTS: write_file(out / WEIGHTS, save(tensors, metadata={"format": "pt"})),
        CONFIG: write_file(out / CONFIG, _config_text(model, base_model, revision)),
    }


def _config_text(model: Any, base_model: str | None, revision: str | None) -> str:
    """As peft writes it, but for its order of sets, which differs from process to process."""
    config = model.peft_config["default"].to_dict()
    base = model.get_base_model()
    config |= {"inference_mode": True, "base_model_name_or_path": base_model, "revision": revision}
    if config.get("task_type") is None:
        config["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return json.dumps(config, indent=2, sort_keys=True, default=sorted)
