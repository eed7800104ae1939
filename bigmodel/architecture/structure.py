"""What a model consists of: modules, tensors, ties and no-split classes, learnt from its config alone.

`describe_architecture` builds the model's class on torch's meta device (shapes without bytes) in a child process, so
that the calling process never imports torch, and remembers the answer on disk. No weights, no network, no code from
a repository unless the caller trusts it.

The answer is a value: an `Architecture` holds everything that sizes, quantization and placement ask of a model.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import bigpipe
from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import BY_NAME, InvalidCheckpoint, UsageError
from bigpipe.files import write_file
from bigpipe.versions import package_version

from .inquiry import Head, Request, Source, read_request

ITEM_BITS: Mapping[str, int] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8, "float8_e8m0fnu": 8,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64,
    "bool": 8, "complex64": 64, "complex128": 128,
}  # fmt: skip
"""Bits per element of torch's dtypes, by torch's names."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter or buffer. `dtype` is torch's name for it in a model built as float32."""

    name: str
    """Full name, as in a state dict."""
    shape: tuple[int, ...]
    dtype: str
    buffer: bool = False
    persistent: bool = True
    """Saved in checkpoints. Not so: buffers the class makes itself, and what its `_keys_to_ignore_on_save` names."""
    fixed: bool = False
    """Keeps `dtype` when the model is built in another one: integers, and floats whose code names their dtype."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        return "float" in self.dtype


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    name: str
    """Full name; "" is the root."""
    class_name: str
    children: tuple[str, ...] = ()
    """Full names."""
    tensors: tuple[TensorSpec, ...] = ()
    """The direct ones, parameters first."""
    linear: bool = False
    """Exactly `torch.nn.Linear`, or transformers' `Conv1D`: what bitsandbytes converts."""


@dataclass(frozen=True, slots=True)
class CachedTensor:
    """Tensors alike that a generating model keeps of a sequence: `elements` + `per_token` · tokens elements each."""

    count: int
    elements: int
    """Of a state, which does not grow."""
    per_token: float
    """No whole number where several tokens are compressed into one; sizes are then upper bounds."""
    window: int | None
    """Tokens after which it grows no more."""
    itemsize: int
    """Bytes per element; 0: as the keys, in whatever dtype these are kept."""
    viewed_per_token: float
    """Elements per token of the prompt that it is a view into until the first step; 0 where it stands by itself."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    class_name: str
    modules: tuple[ModuleSpec, ...]
    """In `named_modules()` order: a parent before its children."""
    no_split: tuple[str, ...] = ()
    """Class names of modules that must stay on one device."""
    tied: tuple[tuple[str, ...], ...] = ()
    """Groups of tensor names with one storage, the one that a checkpoint keeps first."""
    output_embedding: str | None = None
    """Module name of the head, `lm_head` or the like."""
    input_embedding: str | None = None
    keep_in_fp32: tuple[str, ...] = ()
    """Patterns of tensors that transformers loads as float32 when float16 is asked for."""
    keep_in_fp32_strict: tuple[str, ...] = ()
    """The same, for float16 and bfloat16."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Complete: what the model's config class adds to `config.json` is filled in, and common names such as
    `num_hidden_layers` stand beside the type's own."""
    library: str = "transformers"
    generates: bool = False
    """Produces tokens one by one and caches keys and values (or states) while it does."""
    cache: tuple[CachedTensor, ...] | None = None
    """What it caches, as observed; None where that is left to formulas (`footprint.kvcache`)."""

    @cached_property
    def by_name(self) -> Mapping[str, ModuleSpec]:
        return {module.name: module for module in self.modules}

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What others worked out from it and want to keep: a search for what fits asks for many budgets."""
        return {}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Tied tensor name → the name whose bytes it shares."""
        return {alias: kept for kept, *aliases in self.tied for alias in aliases}

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor once: a tied one under its kept name. Order of `named_modules()`."""
        for module in self.modules:
            yield from (tensor for tensor in module.tensors if tensor.name not in self.aliases)

    def dtype_of(self, tensor: TensorSpec, dtype: str) -> str:
        """The dtype a tensor has once the model is loaded as `dtype` by `from_pretrained`."""
        if tensor.fixed or not tensor.floating:
            return tensor.dtype
        if tensor.persistent and any(pattern.search(tensor.name) for pattern in self._kept_patterns(dtype)):
            return "float32"
        return dtype

    def _kept_patterns(self, dtype: str) -> tuple[re.Pattern[str], ...]:
        patterns = {"float16": self._kept[0] + self._kept[1], "bfloat16": self._kept[1]}
        return patterns.get(dtype, ())

    @cached_property
    def _kept(self) -> tuple[tuple[re.Pattern[str], ...], tuple[re.Pattern[str], ...]]:
        # transformers turns each entry into a regular expression in which * stands for anything, and searches for it
        compiled = [
            tuple(re.compile(entry.replace("*", ".*")) for entry in entries)
            for entries in (self.keep_in_fp32, self.keep_in_fp32_strict)
        ]
        return compiled[0], compiled[1]

    def as_json(self) -> dict[str, Any]:
        return {
            "class_name": self.class_name,
            "modules": [_module_as_json(module) for module in self.modules],
            "no_split": list(self.no_split),
            "tied": [list(group) for group in self.tied],
            "output_embedding": self.output_embedding,
            "input_embedding": self.input_embedding,
            "keep_in_fp32": list(self.keep_in_fp32),
            "keep_in_fp32_strict": list(self.keep_in_fp32_strict),
            "config": dict(self.config),
            "library": self.library,
            "generates": self.generates,
            "cache": None if self.cache is None else [list(astuple(tensor)) for tensor in self.cache],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        return cls(
            class_name=data["class_name"],
            modules=tuple(_module_from_json(module) for module in data["modules"]),
            no_split=tuple(data["no_split"]),
            tied=tuple(tuple(group) for group in data["tied"]),
            output_embedding=data["output_embedding"],
            input_embedding=data["input_embedding"],
            keep_in_fp32=tuple(data["keep_in_fp32"]),
            keep_in_fp32_strict=tuple(data["keep_in_fp32_strict"]),
            config=data["config"],
            library=data["library"],
            generates=data["generates"],
            cache=None if data["cache"] is None else tuple(CachedTensor(*tensor) for tensor in data["cache"]),
        )


def _module_as_json(module: ModuleSpec) -> dict[str, Any]:
    tensors = [[t.name, list(t.shape), t.dtype, t.buffer, t.persistent, t.fixed] for t in module.tensors]
    return {
        "name": module.name,
        "class": module.class_name,
        "children": list(module.children),
        "tensors": tensors,
        "linear": module.linear,
    }


def _module_from_json(data: Mapping[str, Any]) -> ModuleSpec:
    tensors = tuple(TensorSpec(name, tuple(shape), *rest) for name, shape, *rest in data["tensors"])
    return ModuleSpec(data["name"], data["class"], tuple(data["children"]), tensors, data["linear"])


def describe_architecture(
    source: Source,
    *,
    library_name: str | None = None,
    head: Head = "auto",
    custom: Mapping[str, Any] | None = None,
    sources: Sources = Sources(),
) -> Architecture:
    """The architecture of a checkpoint directory, a `config.json`, or a config already read.

    library_name: transformers, diffusers or timm; by default told by the files.
    custom: the contents of `bigpipe_architecture.json`, where it does not lie in the directory.
    sources: what may run; an answer in `memo` for the same config, library versions and class source is taken as is.

    Raises UsageError: unknown model type, missing library, untrusted code. InvalidCheckpoint: a config that is none.
    """
    request = read_request(source, library_name=library_name, head=head, custom=custom, sources=sources)
    return describe_many([request], memo=sources.memo)[0]


def describe_many(requests: Sequence[Request], *, memo: Path | None = None) -> list[Architecture]:
    """Answers many requests with one child process: importing the libraries is most of what an answer costs."""
    keys = [request_key(request) for request in requests]
    known = {key: found for key in keys if (found := _recall(memo, key)) is not None}
    wanted = {key: request for key, request in zip(keys, requests, strict=True) if key not in known}
    if wanted:
        for key, answer in zip(wanted, ask(list(map(request_as_json, wanted.values()))), strict=True):
            if memo is not None:
                remember(memo / "architectures" / f"{key}.json", {"key": key, "answer": answer})
            known[key] = answer
    return [Architecture.from_json(known[key]) for key in keys]


ANSWER_VERSION = 4
"""Part of every key; raised when an answer's shape or meaning changes."""

CHILD_SECONDS = 600
"""Real models take under five seconds; a config that asks for a billion layers is stopped."""


STORAGE_KEYS = frozenset({"quantization_config", "dtype", "torch_dtype"})
"""Of a config: how its weights are stored. `instantiation` leaves out the first and says the dtype itself."""


def request_key(request: Request) -> str:
    """Of everything an answer depends on: the request, library versions, the source of a custom class."""
    packages = ["torch", "transformers", "accelerate"]
    packages += [request.library] if request.library in ("timm", "diffusers") else []
    facts = {
        "answer": ANSWER_VERSION,
        "library": request.library,
        "config": _what_is_built(request),
        "head": request.head,
        "class": request.custom_class,
        "no_split": request.no_split,
        "source": _source_digest(request),
        "versions": {name: package_version(name) for name in packages},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _what_is_built(request: Request) -> Mapping[str, Any]:
    """The config without what no class of transformers is built from: a cast or quantized model is no other class."""
    if request.library != "transformers" or request.code is not None:
        return request.config
    return {name: value for name, value in request.config.items() if name not in STORAGE_KEYS}


def _source_digest(request: Request) -> str | None:
    """Of every Python file that may decide what is built: the custom class's package, or the repository's code."""
    if request.custom_class:
        top = request.custom_class.partition(":")[0].partition(".")[0]
        spec = importlib.machinery.PathFinder.find_spec(
            top, [*([str(request.base)] if request.base else []), *sys.path]
        )
        if spec is None:
            where = f"{request.base} and " if request.base else ""
            raise UsageError(f"module {top!r} of {request.custom_class} is not in {where}sys.path", "install it")
        folders = [Path(location) for location in spec.submodule_search_locations or ()]
        files = [Path(spec.origin)] if spec.origin and not folders else []
    elif request.code:
        folders, files = [request.code], []
    else:
        return None
    files += [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def _recall(memo: Path | None, key: str) -> dict[str, Any] | None:
    data = recall(memo / "architectures" / f"{key}.json") if memo else None
    return data["answer"] if isinstance(data, dict) and data.get("key") == key and "answer" in data else None


def ask(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What `instantiation` answers, in one child process. Raises the error that an answer names.

    Questions and answers go by files: what the model's code prints must not reach our output.
    """
    import subprocess

    with tempfile.TemporaryDirectory(prefix="bigpipe-") as name:
        question, answers = Path(name) / "question.json", Path(name) / "answers.json"
        write_file(question, json.dumps(questions), durable=False)
        command = [
            sys.executable,
            "-P",
            "-m",
            "bigpipe.bigmodel.architecture.instantiation",
            str(question),
            str(answers),
        ]
        try:
            child = subprocess.run(
                command, env=_child_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, timeout=CHILD_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise InvalidCheckpoint(
                f"the model's class was not built within {CHILD_SECONDS} s", "check the sizes in its config"
            ) from error
        if child.returncode != 0 or not answers.is_file():
            tail = child.stderr.decode(errors="replace").strip().splitlines()[-5:]
            raise InvalidCheckpoint(
                f"building the model's class failed (exit {child.returncode}): " + " | ".join(tail),
                "check its config, and that torch and transformers import: python -c 'import transformers'",
            )
        data: list[dict[str, Any]] = json.loads(answers.read_bytes())
    for answer in data:
        if "error" in answer:
            raise BY_NAME.get(answer["error"], UsageError)(answer["cause"], answer["cure"])
    return data


def request_as_json(request: Request) -> dict[str, Any]:
    """What `instantiation` takes: plain JSON."""
    data = asdict(request)
    return {**data, **{name: str(data[name]) for name in ("base", "code") if data[name]}}


def _child_environment() -> dict[str, str]:
    package = Path(bigpipe.__file__).parent.parent
    secret = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in secret}
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
