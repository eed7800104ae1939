"""The child process of `architecture`: builds models on the meta device and says what they consist of.

    python -m bigpipe.bigmodel.architecture.instantiation QUESTION.json ANSWERS.json

Each model is built twice, as float32 and as bfloat16: a tensor whose dtype did not follow keeps it in every dtype.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import BigpipeError, InvalidCheckpoint, UsageError
from bigpipe.files import write_file
from bigpipe.modules import import_attribute

from .caching import observe
from .inquiry import ATTENTION
from .structure import Architecture, ModuleSpec, TensorSpec

if TYPE_CHECKING:
    import torch

UNSAFE_KEYS = frozenset({
    "auto_map", "trust_remote_code", "quantization_config", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "custom_pipelines", "use_kernels",
})  # fmt: skip
"""Left out of every config, nested ones too: they fetch or run code, or change what the plain class is made of."""


MEMORY_LIMIT = 16 * 2**30
"""Bytes. Modules on the meta device take kilobytes each; only a hostile config asks for this much."""


def main(question: str, answers: str) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    results = [_answer(request) for request in json.loads(Path(question).read_bytes())]
    write_file(Path(answers), json.dumps(results), durable=False)


def _names(request: Mapping[str, Any]) -> dict[str, str]:
    """What `ask_names` asks for: stored name → the class's own."""
    import torch

    from bigpipe.bigmodel.checkpoint import TensorInfo, match

    model = on_meta(torch.float32, lambda: instantiate(request))
    tensors = {name: TensorInfo(name, "float32", (), Path(), 0) for name in request["names"]}
    matches = match(model, tensors, dict[str, None]())
    recipes = {name: recipe for name, recipe in matches.plain.items() if recipe.fuse is None or len(recipe.sources) > 1}
    return {source.name: name for name, recipe in recipes.items() for source in recipe.sources}


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if "names" in request:
            return {"names": _names(request)}
        return describe(request).as_json()
    except BigpipeError as error:
        return {"error": type(error).__name__, "cause": error.cause, "cure": error.cure}
    except ImportError as error:
        cure = f"install what it needs, for example: pip install {error.name or 'the library'}"
        return {"error": "UsageError", "cause": f"building the model needs a library: {error}", "cure": cure}
    except Exception as error:  # a foreign config or class may raise anything; the answer must name it
        cause = f"the model's class cannot be built from its config: {type(error).__name__}: {error}"
        return {"error": "InvalidCheckpoint", "cause": cause, "cure": "check config.json against the model's class"}


def describe(request: Mapping[str, Any], *, with_cache: bool = True) -> Architecture:
    """Return what the model that a `Request` (its fields as a map) asks for consists of, and caches if it generates."""
    import torch

    model = on_meta(torch.float32, lambda: instantiate(request))
    other = on_meta(torch.bfloat16, lambda: instantiate(request))
    found = report(model, other, request)
    return replace(found, cache=observe(other)) if found.generates and with_cache else found


def instantiate(request: Mapping[str, Any]) -> torch.nn.Module:
    """The model that a `Request` (its fields as a map) asks for, on whatever device and in whatever dtype rule here."""
    builders = {"transformers": _transformers, "diffusers": _diffusers, "timm": _timm, "custom": _custom}
    return builders[request["library"]](request)


def on_meta(dtype: torch.dtype, build: Any) -> torch.nn.Module:
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), _linspace_on_cpu():
            model: torch.nn.Module = build()
    except (NotImplementedError, RuntimeError):
        # Mostly the class computes with values while it is built: only its parameters can live on the meta device
        from accelerate import init_empty_weights

        with init_empty_weights():
            model = build()
    finally:
        torch.set_default_dtype(default)
    return model


def _linspace_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Stochastic-depth schedules take `.item()` of a linspace, which the meta device cannot give."""
    import torch
    from torch.overrides import TorchFunctionMode

    class LinspaceOnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is torch.linspace and "device" not in kwargs:
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    return LinspaceOnCpu()


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:  # how transformers writes infinity into JSON
            return float(value["__float__"])
        return {key: _clean(entry) for key, entry in value.items() if key not in UNSAFE_KEYS}
    return [_clean(entry) for entry in value] if isinstance(value, list) else value


def _transformers(request: Mapping[str, Any]) -> torch.nn.Module:
    import torch
    from transformers import AutoModel

    raw = request["config"]
    if request["code"] and raw.get("auto_map"):
        return _remote_code(request)
    config_class = _config_class(raw)
    config = config_class.from_dict(_clean(raw))
    model_class = AutoModel if request["head"] == "none" else _model_class(raw, config)
    dtype = torch.get_default_dtype()
    build = model_class.from_config if model_class.__name__.startswith("Auto") else model_class._from_config
    model: torch.nn.Module = build(config, dtype=dtype)
    return model


def _config_class(raw: Mapping[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    for name in raw.get("architectures") or ():
        model_class = getattr(transformers, str(name), None)
        if (config_class := getattr(model_class, "config_class", None)) is not None:
            return config_class
    if raw.get("auto_map"):
        raise UsageError(
            f"the model (type {kind!r}) brings its own code (auto_map in config.json), which bigpipe does not run",
            "read that code; if you trust it, pin its commit and allow it: trust: {remote_code: [org/model@commit]}",
        )
    raise UsageError(
        f"transformers {transformers.__version__} does not know model type {kind!r}",
        "upgrade transformers, name the library with library_name, or describe the class under `architecture`",
    )


HEADS = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM",
    "AutoModelForMaskedLM", "AutoModelForCTC", "AutoModelForImageClassification",
)  # fmt: skip
"""Where a config names no class: what its type most likely generates or predicts, else the bare model."""


def _model_class(raw: Mapping[str, Any], config: Any) -> Any:
    import transformers

    for name in raw.get("architectures") or ():
        model_class = getattr(transformers, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    for auto in HEADS:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    return transformers.AutoModel


def _remote_code(request: Mapping[str, Any]) -> torch.nn.Module:
    import torch
    import transformers

    directory = request["code"]
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = [name for name in request["config"]["auto_map"] if name.startswith("AutoModelFor")]
    auto = getattr(transformers, names[0] if names and request["head"] == "auto" else "AutoModel")
    model: torch.nn.Module = auto.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=True)
    return model


@contextlib.contextmanager
def _importing(library: str) -> Iterator[None]:
    """A library that is there and broken is a user's to repair, as one that is missing is to install."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # torchvision made for another torch raises RuntimeError
        raise UsageError(
            f"{library} is installed, but importing it fails: {type(error).__name__}: {error}",
            f"repair it until this works: python -c 'import {library}'",
        ) from error


def _timm(request: Mapping[str, Any]) -> torch.nn.Module:
    with _importing("timm"):
        import timm

    config = _clean(request["config"])
    options = dict(config.get("model_args") or {})
    if isinstance(config.get("num_classes"), int):
        options.setdefault("num_classes", config["num_classes"])
    if request["head"] == "none":
        options["num_classes"] = 0
    model: torch.nn.Module = timm.create_model(config["architecture"], pretrained=False, **options)
    return model


def _diffusers(request: Mapping[str, Any]) -> torch.nn.Module:
    """A single diffusers model, or a pipeline as one tree whose children are its components."""
    import torch

    config = request["config"]
    if "model_index" not in config:
        return _diffusers_component(config["_class_name"], config)
    class_name = str(config["model_index"].get("_class_name", "Pipeline"))
    pipeline: torch.nn.Module = type(class_name, (torch.nn.Module,), {})()
    for name, component in config["components"].items():
        library, class_name = config["model_index"][name]
        if library == "diffusers":
            pipeline.add_module(name, _diffusers_component(class_name, component))
        elif library == "transformers":
            question = {"config": {**component, "architectures": [class_name]}, "head": "auto", "code": None}
            pipeline.add_module(name, _transformers(question))
    return pipeline


def _diffusers_component(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    with _importing("diffusers"):
        import diffusers

        model_class = getattr(diffusers, class_name, None)
    if model_class is None or not hasattr(model_class, "from_config"):
        raise UsageError(f"diffusers {diffusers.__version__} has no model {class_name!r}", "upgrade diffusers")
    model: torch.nn.Module = model_class.from_config(_clean(dict(config)))
    return model


def _custom(request: Mapping[str, Any]) -> torch.nn.Module:
    import torch

    base = Path(request["base"]) if request["base"] else None
    try:
        found = import_attribute(request["custom_class"], base)
    except AttributeError as error:
        raise UsageError(f"{request['custom_class']}: {error}", "check `architecture.class`") from error
    model = instantiate_custom(found, request["config"])
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{request['custom_class']} gives no torch.nn.Module", "check `architecture.class`")
    return model


def instantiate_custom(model_class: Any, config: Mapping[str, Any]) -> Any:
    """`Class(default config updated with `config`)` where it has `get_default_config()`, else `Class(**config)`."""
    if not hasattr(model_class, "get_default_config"):
        return model_class(**config)
    default = model_class.get_default_config()
    for name, value in config.items():
        if isinstance(default, dict):
            default[name] = value
        else:
            setattr(default, name, value)
    return model_class(default)


def report(model: torch.nn.Module, other: torch.nn.Module, request: Mapping[str, Any]) -> Architecture:
    """What `model` consists of. `other` is the same model built in another default dtype."""
    following = {name: _name(tensor.dtype) for name, tensor in _named_tensors(other)}
    unsaved = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
    no_split = request["no_split"] or getattr(model, "_no_split_modules", None) or ()
    return Architecture(
        class_name=type(model).__name__,
        modules=tuple(_module(name, module, following, unsaved) for name, module in model.named_modules()),
        no_split=tuple(sorted(no_split)),
        tied=tuple(_tied(model)),
        output_embedding=_embedding(model, "get_output_embeddings"),
        input_embedding=_embedding(model, "get_input_embeddings"),
        keep_in_fp32=tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ())),
        keep_in_fp32_strict=tuple(sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())),
        config=_complete_config(model, request),
        library=request["library"],
        generates=_generates(model),
    )


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module(name: str, module: torch.nn.Module, following: Mapping[str, str], unsaved: frozenset[str]) -> ModuleSpec:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    prefix = f"{name}." if name else ""

    def tensor(local: str, value: torch.Tensor, buffer: bool) -> TensorSpec:
        full, dtype = prefix + local, _name(value.dtype)
        persistent = full not in unsaved and not (buffer and local in module._non_persistent_buffers_set)
        return TensorSpec(full, tuple(value.shape), dtype, buffer, persistent, following.get(full, dtype) == dtype)

    parameters = [tensor(key, value, False) for key, value in module._parameters.items() if value is not None]
    buffers = [tensor(key, value, True) for key, value in module._buffers.items() if value is not None]
    return ModuleSpec(
        name=name,
        class_name=type(module).__name__,
        children=tuple(prefix + child for child, _ in module.named_children()),
        tensors=(*parameters, *buffers),
        linear=type(module) is nn.Linear or isinstance(module, Conv1D),
    )


def _tied(model: torch.nn.Module) -> Iterator[tuple[str, ...]]:
    """Groups of names for one tensor, by object identity: on the meta device every `data_ptr` is 0.

    The kept name is the source of the class's tie rules where it has such (transformers' checkpoints hold that one),
    else the first.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(model):
        groups.setdefault(id(tensor), []).append(name)
    targets = set(getattr(model, "all_tied_weights_keys", None) or ())
    for names in groups.values():
        if len(names) > 1:
            yield tuple(sorted(names, key=lambda name: name in targets))


def _embedding(model: torch.nn.Module, getter: str) -> str | None:
    if not hasattr(model, getter):
        return None
    try:
        embedding = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, module in model.named_modules() if module is embedding), None)


def _complete_config(model: torch.nn.Module, request: Mapping[str, Any]) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or request["library"] != "transformers":
        return dict(request["config"])
    complete: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    complete.pop("dtype", None)
    _add_common_names(config, complete)
    complete[ATTENTION] = getattr(config, "_attn_implementation", None) or "sdpa"
    return complete


def _add_common_names(config: Any, complete: dict[str, Any]) -> None:
    """GPT-2 says `n_layer` where others say `num_hidden_layers`; the class maps the common name to its own."""
    for common, own in getattr(config, "attribute_map", {}).items():
        if own in complete:
            complete.setdefault(common, complete[own])
    for name in getattr(config, "sub_configs", {}):
        if isinstance(complete.get(name), dict):
            _add_common_names(getattr(config, name), complete[name])


def _generates(model: torch.nn.Module) -> bool:
    """Does it produce tokens one by one, and so keep keys and values? BERT could, but is not meant to."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    can_generate: Any = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or (can_generate and can_generate()):
        return True
    text = type(config.get_text_config(decoder=True))
    return text in AutoModelForCausalLM._model_mapping and text not in AutoModelForMaskedLM._model_mapping


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise InvalidCheckpoint("two file names are expected: the question and the answers")
    gc.disable()  # the libraries' imports make a million objects, and none of them is garbage
    main(sys.argv[1], sys.argv[2])
    sys.stderr.flush()
    os._exit(0)  # the answers are on disk; taking torch apart again would take longer than building the model
