"""From a config to the model that it describes, by the library that knows its class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bigpipe.errors import InvalidCheckpoint, UsageError
from bigpipe.modules import import_attribute

from .asking import Request
from .structure import named_classes

if TYPE_CHECKING:
    import torch

UNSAFE_KEYS = frozenset({
    "auto_map", "trust_remote_code", "quantization_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "custom_pipelines", "use_kernels",
})  # fmt: skip
"""Left out of every config, nested ones too: they fetch or run code, or change what the plain class is made of."""
HEADS = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM",
    "AutoModelForMaskedLM", "AutoModelForCTC", "AutoModelForImageClassification",
)  # fmt: skip
"""Where a config names no class: what its type most likely generates or predicts, else the bare model."""


def instantiate(request: Request) -> torch.nn.Module:
    """The model, on whatever device and in whatever dtype rule here."""
    builders = {"transformers": _transformers, "diffusers": _diffusers, "timm": _timm, "custom": _custom}
    model: torch.nn.Module = builders[request.library](request)
    return model


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:  # how transformers writes infinity into JSON
            return float(value["__float__"])
        return {key: _clean(entry) for key, entry in value.items() if key not in UNSAFE_KEYS}
    return [_clean(entry) for entry in value] if isinstance(value, list) else value


def _transformers(request: Request) -> Any:
    import torch
    from transformers import AutoModel

    if request.code and request.config.get("auto_map"):
        return _remote_code(request)
    named = _named_class(request.config)
    config = _config_class(request.config, named).from_dict(_clean(request.config))
    if request.head == "auto" and named is not None:
        _refuse_another(named, config)
    model_class = AutoModel if request.head == "none" else named or _likely_class(config)
    build = model_class.from_config if model_class.__name__.startswith("Auto") else model_class._from_config
    return build(config, dtype=torch.get_default_dtype())


def _remote_code(request: Request) -> Any:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(request.code), trust_remote_code=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto = getattr(transformers, _auto_class(request.config) if request.head == "auto" else "AutoModel")
    return auto.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=True)


def _auto_class(config: Mapping[str, Any]) -> str:
    """The name in `auto_map` that leads to the class under `architectures`, whose weights are stored; where none does,
    the first one with a head."""
    listed = {name: str(value) for name, value in config["auto_map"].items() if name.startswith("AutoModel")}
    saved = named_classes(config)
    own = (name for name, value in listed.items() if value.rpartition(".")[2] in saved)
    return next(own, next((name for name in listed if name != "AutoModel"), "AutoModel"))


def _named_class(raw: Mapping[str, Any]) -> Any:
    """The first class of transformers among those that a config names; None where there is none."""
    import transformers

    found = [getattr(transformers, name, None) for name in named_classes(raw)]
    return next((c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)


def _refuse_another(named: Any, config: Any) -> None:
    """Raise InvalidCheckpoint where the named class is of another type of model: transformers takes the type's own."""
    from transformers.models.auto import modeling_auto

    tables = (names for table, names in vars(modeling_auto).items() if table.endswith("_MAPPING_NAMES"))
    of_type = (names.get(config.model_type) for names in tables)
    listed = any(named.__name__ in (found if isinstance(found, tuple) else (found,)) for found in of_type)
    if not listed and not isinstance(config, getattr(named, "config_class", None) or object):
        cause = f"config.json says model_type {config.model_type!r}, and architectures names {named.__name__}"
        raise InvalidCheckpoint(
            cause, f"make them agree; that class is one of model_type {named.config_class.model_type!r}"
        )


def _config_class(raw: Mapping[str, Any], named: Any) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    if named is not None:
        return named.config_class
    if raw.get("auto_map"):
        raise UsageError(
            f"the model (type {kind!r}) brings its own code (auto_map in config.json), which bigpipe does not run",
            "read that code; if you trust it, pin its commit and allow it: trust: {remote_code: [org/model@commit]}",
        )
    raise UsageError(
        f"transformers {transformers.__version__} does not know model type {kind!r}",
        "upgrade transformers, name the library with library_name, or describe the class under `architecture`",
    )


def _likely_class(config: Any) -> Any:
    import transformers

    mappings = [getattr(transformers, auto)._model_mapping for auto in HEADS]
    found = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), transformers.AutoModel)
    return found[0] if isinstance(found, tuple | list) else found


@contextlib.contextmanager
def _importing(library: str) -> Iterator[None]:
    """A library that is there and broken is a user's to repair, as one that is missing is to install."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # torchvision made for another torch raises RuntimeError
        cause = f"{library} is installed, but importing it fails: {type(error).__name__}: {error}"
        raise UsageError(cause, f"repair it until this works: python -c 'import {library}'") from error


def _timm(request: Request) -> Any:
    with _importing("timm"):
        import timm

    config = _clean(request.config)
    options = dict(config.get("model_args") or {})
    if isinstance(config.get("num_classes"), int):
        options.setdefault("num_classes", config["num_classes"])
    return timm.create_model(config["architecture"], pretrained=False, **options)


def _diffusers(request: Request) -> Any:
    """A single diffusers model, or a pipeline as one tree whose children are its components."""
    import torch

    config = request.config
    if "model_index" not in config:
        return _diffusers_component(config["_class_name"], config)
    class_name = str(config["model_index"].get("_class_name", "Pipeline"))
    pipeline: torch.nn.Module = type(class_name, (torch.nn.Module,), {})()
    for name, component in config["components"].items():
        library, class_name = config["model_index"][name]
        if library == "diffusers":
            pipeline.add_module(name, _diffusers_component(class_name, component))
        elif library == "transformers":
            asked = Request(library=library, config={**component, "architectures": [class_name]})
            pipeline.add_module(name, _transformers(asked))
    return pipeline


def _diffusers_component(class_name: str, config: Mapping[str, Any]) -> Any:
    with _importing("diffusers"):
        import diffusers

        model_class = getattr(diffusers, class_name, None)
    if model_class is None or not hasattr(model_class, "from_config"):
        raise UsageError(f"diffusers {diffusers.__version__} has no model {class_name!r}", "upgrade diffusers")
    return model_class.from_config(_clean(config))


def _custom(request: Request) -> Any:
    """`Class(default config updated with `config`)` where it has `get_default_config()`, else `Class(**config)`."""
    import torch

    try:
        model_class = import_attribute(str(request.custom_class), request.base)
    except AttributeError as error:
        raise UsageError(f"{request.custom_class}: {error}", "check `architecture.class`") from error
    if hasattr(model_class, "get_default_config"):
        default = model_class.get_default_config()
        for name, value in request.config.items():
            if isinstance(default, dict):
                default[name] = value
            else:
                setattr(default, name, value)
        model = model_class(default)
    else:
        model = model_class(**request.config)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{request.custom_class} gives no torch.nn.Module", "check `architecture.class`")
    return model
