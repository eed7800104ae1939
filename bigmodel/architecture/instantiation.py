"""The child process of `architecture`: builds a model on the meta device and says what it consists of.

    python -m bigpipe.bigmodel.architecture.instantiation QUESTION.json ANSWER.json

It is built twice, as float32 and as bfloat16: a tensor whose dtype did not follow keeps it in every dtype.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.errors import BigpipeError, InvalidCheckpoint, UsageError
from bigpipe.files import write_file
from bigpipe.modules import foreign
from bigpipe.names import refuse_unknown
from bigpipe.trust import Limits

from .asking import Request
from .building import instantiate
from .caching import observe
from .structure import ATTENTION, PLAIN_TORCH, Architecture, ModuleSpec, TensorSpec
from .wrapping import require_module

if TYPE_CHECKING:
    import torch


def main(question: str, answer: str) -> None:
    warnings.simplefilter("ignore")
    asked = json.loads(Path(question).read_bytes())
    places = {name: Path(asked[name]) for name in ("base", "code") if asked[name]}
    request = Request(**{**asked, **places, "limits": Limits(**asked["limits"])})
    write_file(Path(answer), json.dumps(_answer(request)), durable=False)


def _answer(request: Request) -> dict[str, Any]:
    try:
        with _building(request):
            return _matching(request) if request.stored else describe(request).as_json()
    except BigpipeError as error:
        return {"error": type(error).__name__, "cause": error.cause, "cure": error.cure}


@contextlib.contextmanager
def _building(request: Request) -> Iterator[None]:
    """Inside, a class is built: a foreign config or class may raise anything, and the error must name it."""
    what, where = "the model's class cannot be built from its config", "config.json against the model's class"
    try:
        with foreign(what, f"check {'`architecture`' if request.custom_class else where}", InvalidCheckpoint):
            yield
    except InvalidCheckpoint as error:
        if isinstance(error.__cause__, ImportError):
            cure = f"install what it needs, for example: pip install {error.__cause__.name or 'the library'}"
            raise UsageError(f"building the model needs a library: {error.__cause__}", cure) from error
        raise


def _matching(request: Request) -> dict[str, Any]:
    """The fields of a `Matching`."""
    import torch

    from bigpipe.bigmodel.checkpoint import TensorInfo, exempt, match

    model = _on_meta(request, torch.float32)
    tensors = {name: TensorInfo(name, "float32", (), Path(), 0) for name in request.stored}
    matches = match(model, tensors, dict[str, None]())
    made = set(matches.plain)
    for names in tied_groups(model):
        made.update(names if made.intersection(names) else ())
    parameters, spared = [name for name, _ in model.named_parameters(remove_duplicate=False)], exempt(model, "missing")
    return {
        "made": {name: [source.name for source in recipe.sources] for name, recipe in matches.plain.items()},
        "changed": [name for name, recipe in matches.plain.items() if recipe.fuse],
        "unused": matches.unused,
        "missing": [name for name in parameters if name not in made and not spared.search(name)],
    }


def describe(request: Request, *, with_cache: bool = True) -> Architecture:
    """Return what the model that is asked for consists of and, if it generates, caches. Its class runs here."""
    import torch

    model = _on_meta(request, torch.float32)
    if (count := sum(1 for _ in model.modules())) > request.limits.modules:
        raise request.limits.exceeded("modules", f"the model's class has {count} modules")
    other = _on_meta(request, torch.bfloat16)
    found = report(model, _dtypes(other), request)
    return replace(found, cache=observe(other)) if found.generates and with_cache else found


def with_empty_parameters(request: Request, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model built as `dtype`, with parameters on the meta device and true values in its buffers."""
    from accelerate import init_empty_weights
    from transformers.modeling_utils import local_torch_dtype

    with _building(request), local_torch_dtype(dtype), init_empty_weights(include_buffers=False):
        return instantiate(request)


def _on_meta(request: Request, dtype: torch.dtype) -> torch.nn.Module:
    import torch
    from transformers.modeling_utils import local_torch_dtype

    try:
        with local_torch_dtype(dtype), torch.device("meta"), _linspace_on_cpu():
            return instantiate(request)
    except (NotImplementedError, RuntimeError):
        # Mostly the class computes with values while it is built: only its parameters can live on the meta device
        return with_empty_parameters(request, dtype)


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


def describe_module(model: torch.nn.Module) -> Architecture:
    """Return what a module consists of, wherever its tensors lie. Its floats follow the dtype that is asked for, but
    those that are in another one than most of its elements. Raise UsageError for what is none."""
    model = require_module(model)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in _named_tensors(model).values():
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    common = next((dtype for dtype, _ in sizes.most_common(1)), None)
    following = {name: None for name, dtype in _dtypes(model).items() if dtype == common}
    config: Any = getattr(model, "config", None)
    written = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    return report(model, following, Request(library="transformers" if written else "custom", config=written))


def _dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in _named_tensors(model).items()}


def report(model: torch.nn.Module, following: Mapping[str, torch.dtype | None], request: Request) -> Architecture:
    """Return what `model` consists of. following: the dtypes of tensors where it is built in another default dtype."""
    unsaved = frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())
    no_split = request.no_split or getattr(model, "_no_split_modules", None) or ()
    classes = {type(module).__name__ for module in model.modules()}
    cure, plain = "name classes of its modules, such as those of its blocks", request.library in PLAIN_TORCH
    refuse_unknown("architecture.no_split_module_classes", request.no_split, classes, "classes", cure)
    return Architecture(
        class_name=type(model).__name__,
        modules=tuple(_module(name, module, following, unsaved, plain) for name, module in model.named_modules()),
        no_split=tuple(sorted(no_split)),
        tied=tuple(map(tuple, tied_groups(model))),
        output_embedding=_embedding(model, "get_output_embeddings"),
        input_embedding=_embedding(model, "get_input_embeddings"),
        keep_in_fp32=tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ())),
        keep_in_fp32_strict=tuple(sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())),
        config=_complete_config(model, request),
        library=request.library,
        generates=_generates(model),
    )


def _module(
    name: str,
    module: torch.nn.Module,
    following: Mapping[str, torch.dtype | None],
    unsaved: frozenset[str],
    plain: bool,
) -> ModuleSpec:
    """plain: by the rules for classes of plain torch, as accelerate reads them; else by those of transformers."""
    from torch import nn

    prefix = f"{name}." if name else ""

    def tensors(found: Mapping[str, torch.Tensor | None], buffer: bool) -> Iterator[TensorSpec]:
        for local, value in found.items():
            if value is not None:
                full, dtype = prefix + local, str(value.dtype).removeprefix("torch.")
                persistent = full not in unsaved and not (buffer and local in module._non_persistent_buffers_set)
                fixed = following.get(full, value.dtype) == value.dtype
                yield TensorSpec(full, tuple(value.shape), dtype, buffer, persistent, fixed)

    return ModuleSpec(
        name=name,
        class_name=type(module).__name__,
        children=tuple(prefix + child for child, _ in module.named_children()),
        tensors=(*tensors(module._parameters, False), *tensors(module._buffers, True)),
        linear=(linear := _is_linear(module, plain)),
        akin=plain and not linear and isinstance(module, nn.Linear),
    )


def _is_linear(module: torch.nn.Module, plain: bool) -> bool:
    """Whether a module is its weight, its bias and their product, so that a packed one can take its place."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return True
    alike = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    whole = "weight" in module._parameters and module._parameters.keys() <= {"weight", "bias"} and not module._buffers
    used_by_parent = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # of MultiheadAttention
    return plain and alike and whole and not used_by_parent


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def tied_groups(model: torch.nn.Module) -> list[list[str]]:
    """Return the names of tensors that are one, by storage or by the rules of a transformers class. The source of such
    a rule comes first: transformers' checkpoints hold that one."""
    tensors = _named_tensors(model)
    group = {name: storage_of(tensor) for name, tensor in tensors.items()}
    rules: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in rules.items():
        if target in tensors and source in tensors:
            group = {name: group[source] if key == group[target] else key for name, key in group.items()}
    groups: dict[object, list[str]] = {}
    for name in tensors:
        groups.setdefault(group[name], []).append(name)
    return [sorted(names, key=lambda name: name in rules) for names in groups.values() if len(names) > 1]


def storage_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what is equal for tensors that are one and the same memory, on meta too, where every `data_ptr` is 0."""
    return tensor.device.type, tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _embedding(model: torch.nn.Module, getter: str) -> str | None:
    try:
        embedding = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, module in model.named_modules() if module is embedding), None)


def _complete_config(model: torch.nn.Module, request: Request) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string") or request.library != "transformers":
        return dict(request.config)
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
    gc.disable()  # the libraries' imports make a million objects, and none of them is garbage
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # the answer is on disk; taking torch apart again would take longer than building the model
