"""Asks a model's class what it consists of: no weights, no network, and no code that the caller does not trust.

    read_request             a model's small files → what to build, and whether its code may run
    describe_architecture    known from a snapshot of common families, else built in a child process

The child builds classes on torch's meta device (shapes without bytes), so that the calling process never imports torch;
its answers are kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE, MAX_CONFIG, ModelDescription, read_json
from bigpipe.bigmodel.memo import answered
from bigpipe.bigmodel.sources import Sources
from bigpipe.environment import inherited
from bigpipe.errors import BY_NAME, InvalidCheckpoint, UsageError
from bigpipe.files import read_file, write_file
from bigpipe.modules import code_files, top_level
from bigpipe.names import listed
from bigpipe.programs import busy, limit_memory
from bigpipe.sizes import format_size
from bigpipe.trust import Limits, took_too_long
from bigpipe.versions import package_version, require

from .snapshot import known_architecture
from .structure import Architecture, Head, named_classes

if TYPE_CHECKING:
    import subprocess

ANSWER_VERSION = 7
"""Part of every key; raised when an answer's shape or meaning changes."""
LIBRARIES = ("transformers", "diffusers", "timm")
COUNTS = re.compile(r"(^|_)(n_)?(layers?|experts|labels|classes|blocks|depths?)$")
"""Of a config: how many modules, or names, its class makes."""
LARGEST_NUMBER = 2**63
OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|allocate memory|memory allocation of")
LARGEST = 512 * 2**20
"""Bytes of an answer: 200,000 modules take a fifth."""
DTYPE_KEYS = frozenset({"dtype", "torch_dtype"})
STORAGE_KEYS = DTYPE_KEYS | {"quantization_config"}
"""Of a config: how its weights are stored. `instantiation` leaves out the first and says the dtype itself."""

Source = Path | str | Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the child process; the answer depends on nothing else but library versions."""

    library: str
    config: Mapping[str, Any]
    """transformers, timm: `config.json`. diffusers: its config, or {"model_index": …, "components": {name: config}}.
    custom: what updates the class's default config."""
    head: Head = "auto"
    custom_class: str | None = None
    no_split: tuple[str, ...] = ()
    base: Path | None = None
    code: Path | None = None
    """The directory whose own Python files may run."""
    limits: Limits = field(default_factory=Limits)
    stored: tuple[str, ...] = ()
    """Names of stored tensors: not the architecture is asked for, but what its class calls these."""


def describe_architecture(
    source: Source,
    *,
    library_name: str | None = None,
    head: Head = "auto",
    custom: Mapping[str, Any] | None = None,
    sources: Sources = Sources(),
) -> Architecture:
    """Return the architecture of a checkpoint directory, a `config.json`, or a config already read. Arguments and
    errors are those of `read_request`. An answer in `sources.memo` for the same config, library versions and class
    source is taken as it is. Raise InvalidCheckpoint for a config that no class can be built from."""
    request = read_request(source, library_name=library_name, head=head, custom=custom, sources=sources)
    own_code = request.code is not None and "auto_map" in request.config
    plain = request.library == "transformers" and not own_code
    known = known_architecture(request.config, request.head) if plain else None
    return known or Architecture.from_json(_answer(request, sources.memo))


def architecture_of(described: ModelDescription, sources: Sources) -> Architecture:
    """Return the architecture of a checkpoint: by the code that came with it, where that may run and is here, else by
    its config. Errors as of `describe_architecture`."""
    ran = described.path if sources.trust_remote_code else None
    return describe_architecture(ran or dict(described.config or {}), custom=described.custom, sources=sources)


def ask_names(config: Mapping[str, Any], stored: Iterable[str], memo: Path | None = None) -> dict[str, str]:
    """Return stored name → parameter or buffer of the class that `config` names; several may become parts of one.

    Many families were renamed since their checkpoints were made (ViT's `encoder.layer.0.attention.attention.query` is
    `layers.0.attention.q_proj` now). transformers knows the rules, which need its classes. Names that become none, or
    one that is changed on the way, are not in it. Errors as of `describe_architecture`.
    """
    found = ask_matching(config, stored, memo)
    told = {name: sources for name, sources in found.made.items() if name not in found.changed or len(sources) > 1}
    return {source: name for name, sources in told.items() for source in sources}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Which stored tensors make which parameters of a class, as transformers would load them."""

    made: Mapping[str, Sequence[str]]
    """Parameter or buffer → the stored names that it is made from."""
    changed: Sequence[str]
    """Those that are not one stored tensor as it is: put together, cut or turned on the way."""
    unused: Sequence[str]
    """Stored names that make nothing, and that the class does not say it ignores."""
    missing: Sequence[str]
    """Parameters that nothing is stored for, and that the class does not say may be missing."""


def ask_matching(config: Mapping[str, Any], stored: Iterable[str], memo: Path | None) -> Matching:
    """Return what stored tensors are to the class that `config` names. Errors as of `describe_architecture`."""
    return Matching(**_answer(replace(read_request(config), stored=tuple(sorted(stored))), memo))


def read_request(
    source: Source,
    *,
    library_name: str | None = None,
    head: Head = "auto",
    custom: Mapping[str, Any] | None = None,
    sources: Sources = Sources(),
) -> Request:
    """Return what to build for a checkpoint directory, a `config.json`, or a config already read.

    library_name: transformers, diffusers or timm; by default told by the files. custom: the contents of
    `bigpipe_architecture.json`, where it does not lie in the directory. sources: what may run.

    Raise UsageError for a directory without a config, an unknown library, and untrusted code.
    """
    if head not in ("auto", "none"):
        raise UsageError(f"head is {head!r}", "use 'auto' (with its head) or 'none' (the bare AutoModel)")
    directory = None if isinstance(source, Mapping) else Path(source)
    if directory is not None and directory.is_file():
        source, directory = _read(directory), directory.parent
    if custom is None and directory is not None and (directory / ARCHITECTURE_FILE).is_file():
        custom = _read(directory / ARCHITECTURE_FILE)
    if custom is not None:
        return _custom_request(custom, sources, directory)
    config = _with_plain_dtypes(source if isinstance(source, Mapping) else _read_config(Path(source)))
    refuse_counts(config, sources.trust.limits)
    library = library_name or library_of(config)
    if library not in LIBRARIES:
        raise UsageError(f"library {library!r} is not known", f"use {listed(LIBRARIES, 'or')}")
    code = directory.resolve() if directory is not None and sources.trust_remote_code else None
    return Request(library=library, config=config, head=head, code=code, limits=sources.trust.limits)


def refuse_counts(config: Mapping[str, Any], limits: Limits) -> None:
    """Raise InvalidCheckpoint for a config, or one inside it, that asks for more layers than any model has, or whose
    numbers are none that torch takes."""
    for name, value in config.items():
        counts = value if isinstance(value, list) else [value]
        if COUNTS.search(str(name)) and any(isinstance(count, int) and count > limits.modules for count in counts):
            raise limits.exceeded("modules", f"the config says {name}: {str(value)[:80]}")
        if any(isinstance(count, int) and abs(count) > LARGEST_NUMBER for count in counts):
            cure = "check it against where it came from: no tensor has such a size"
            raise InvalidCheckpoint(f"the config says {name}: {str(value)[:80]}", cure)
        for inner in counts:
            if isinstance(inner, Mapping):
                refuse_counts(inner, limits)


def _with_plain_dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dtypes as torch's classes take them: `torch.float16` is float16, and `auto` says nothing."""
    plain = {name: _with_plain_dtypes(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    named = {name: value.removeprefix("torch.") for name, value in plain.items() if isinstance(value, str)}
    dtypes = {name: value for name, value in named.items() if name in DTYPE_KEYS}
    return {name: dtypes.get(name, value) for name, value in plain.items() if dtypes.get(name) != "auto"}


def _custom_request(custom: Mapping[str, Any], sources: Sources, directory: Path | None) -> Request:
    """A description that names no class says how the weights are packed of a module that was given from Python."""
    reference = custom.get("class")
    if not isinstance(reference, str) or not re.fullmatch(r"[\w.]+:[\w.]+", reference):
        file = directory / ARCHITECTURE_FILE if directory is not None else None
        if reference is None:
            cause = f"{file if file and file.is_file() else 'architecture'} names no class"
        else:
            cause = f"architecture class {reference!r} is not written module:Class"
        raise UsageError(cause, "name it (architecture: {class: mingpt.model:GPT}), or give model= from Python")
    sources.trust.require_module(reference, f"the model's class {reference}")
    return Request(
        library="custom",
        config=custom.get("config") or {},
        custom_class=reference,
        no_split=tuple(custom.get("no_split_module_classes") or ()),
        base=sources.base.resolve() if sources.base else None,
        limits=sources.trust.limits,
    )


def library_of(config: Mapping[str, Any]) -> str:
    """Return transformers, diffusers or timm, by the keys that each library writes into its config file."""
    if "model_index" in config or "_class_name" in config or "_diffusers_version" in config:
        return "diffusers"
    if "model_type" not in config and "architectures" not in config and isinstance(config.get("architecture"), str):
        return "timm"
    return "transformers"


def _read_config(directory: Path) -> dict[str, Any]:
    if (directory / "model_index.json").is_file():
        index = _read(directory / "model_index.json")
        files = {name: directory / name / "config.json" for name in index if re.fullmatch(r"[A-Za-z0-9]\w*", name)}
        return {"model_index": index, "components": {name: _read(f) for name, f in files.items() if f.is_file()}}
    if (directory / "config.json").is_file():
        return _read(directory / "config.json")
    cause = f"{directory} has no config.json, model_index.json or {ARCHITECTURE_FILE}"
    raise UsageError(cause, "give the directory of a model, or describe its class under `architecture`")


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, file.parent, MAX_CONFIG)


def _answer(request: Request, memo: Path | None) -> dict[str, Any]:
    """What the child process says or has said. Raise the error that it names."""
    key, what = request_key(request), "building the model's class"

    def ask() -> dict[str, Any]:
        require(f"{what} {class_of(request)}", "torch", "transformers", "accelerate")
        asked = json.dumps(asdict(request), default=str)
        answer = ask_child("bigpipe.bigmodel.architecture.instantiation", asked, what, request.limits)
        if "error" in answer:
            raise BY_NAME.get(answer["error"], UsageError)(answer["cause"], answer["cure"])
        return answer

    return answered(memo / "architectures" / f"{key}.json" if memo else None, key, ask)


def class_of(request: Request) -> str:
    """Return what a request asks for, in a word: a class of its own, those that the config names, or its type."""
    return (
        request.custom_class or ", ".join(named_classes(request.config)) or str(request.config.get("model_type") or "")
    )


def request_key(request: Request) -> str:
    """Return a digest of everything an answer depends on: the request, library versions, the source of a class."""
    packages = ["torch", "transformers", "accelerate"]
    packages += [request.library] if request.library in ("timm", "diffusers") else []
    # No class of transformers is built from how weights are stored: a cast or quantized model is no other class
    left_out = STORAGE_KEYS if request.library == "transformers" and request.code is None else ()
    config = {name: value for name, value in request.config.items() if name not in left_out}
    facts = {
        **asdict(replace(request, config=config, base=None, code=None, limits=Limits())),
        "answer": ANSWER_VERSION,
        "source": _source_digest(request),
        "versions": {name: package_version(name) for name in packages},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def class_source(reference: str, base: Path | None) -> str:
    """Return the sha256, in hex, of every Python file that may decide what the class `module:Class` is: of its package,
    and of what that imports from beside it. base: the directory that is looked at first. Raise UsageError where there
    is none."""
    top = top_level(reference)
    files = [file for _, file in code_files(top, base)]
    if not files:
        raise UsageError(
            f"module {top!r} of {reference} is not in {f'{base} and ' if base else ''}sys.path", "install it"
        )
    return _digest(files)


def _source_digest(request: Request) -> str | None:
    """Of every Python file that may decide what is built: the custom class's, or the repository's code."""
    if request.custom_class:
        return class_source(request.custom_class, request.base)
    return _digest(sorted(request.code.rglob("*.py"))) if request.code else None


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def ask_child(module: str, question: str, what: str, limits: Limits) -> dict[str, Any]:
    """Return what `python -m module QUESTION ANSWER`, two JSON files, answers. It goes by files: what foreign code
    prints must not reach our output. what: the work it does, for errors. Raise InvalidCheckpoint where it gives no
    answer, or takes more than the limits allow."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="bigpipe-") as name:
        asked, answer = Path(name) / "question.json", Path(name) / "answer.json"
        write_file(asked, question, durable=False)
        command = [sys.executable, "-P", "-m", module, str(asked), str(answer)]
        child = subprocess.Popen(
            command, env=_child_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        with child:
            try:
                limit_memory(child.pid, limits.memory)
                said = _outlive(child, limits.seconds)
            except subprocess.TimeoutExpired as error:
                raise limits.exceeded("seconds", f"{what} takes more than {limits.seconds:g} s") from error
            finally:
                child.kill()
        if child.returncode != 0 and OUT_OF_MEMORY.search(said):
            raise limits.exceeded("memory", f"{what} takes more than {format_size(limits.memory)}")
        try:
            answered: dict[str, Any] = json.loads(read_file(answer, LARGEST))
        except (OSError, ValueError) as error:
            tail = " | ".join(said.splitlines()[-5:])
            raise InvalidCheckpoint(
                f"{what} failed (exit {child.returncode}): {tail}",
                "check its config, and that torch and transformers import: python -c 'import transformers'",
            ) from error
    return answered


def _outlive(child: subprocess.Popen[bytes], seconds: float) -> str:
    """Return what a process wrote to standard error until it ended. Raise TimeoutExpired where it takes longer."""
    import subprocess

    began = time.monotonic()
    while True:
        try:
            return child.communicate(timeout=seconds)[1].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            if took_too_long(time.monotonic() - began, busy(child.pid), seconds):
                raise


def _child_environment() -> dict[str, str]:
    package = Path(__file__).parents[3]
    environment = inherited(os.environ)
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
