"""What to instantiate, read from a model's own small files, and whether its code may run.

A `Request` is all that the instantiating child process is told, and all that its answer depends on besides the
versions of libraries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bigpipe.bigmodel.checkpoint import ARCHITECTURE_FILE, MAX_CONFIG, read_json
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import UsageError

Head = Literal["auto", "none"]
"""auto: the class the config names, with its head. none: the bare `AutoModel`, which is accelerate's view."""

ATTENTION = "attention_implementation"
"""Key of a complete config: `eager` or `sdpa`, whichever the class takes by itself."""

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


def request_as_json(request: Request) -> dict[str, Any]:
    """What `instantiation` takes: plain JSON."""
    data = asdict(request)
    return {**data, **{name: str(data[name]) for name in ("base", "code") if data[name]}}


def read_request(
    source: Source,
    *,
    library_name: str | None = None,
    head: Head = "auto",
    custom: Mapping[str, Any] | None = None,
    sources: Sources = Sources(),
) -> Request:
    """Looks at the files and says what to instantiate. See `describe_architecture`."""
    if head not in ("auto", "none"):
        raise UsageError(f"head is {head!r}", "use 'auto' (with its head) or 'none' (the bare AutoModel)")
    directory = None if isinstance(source, Mapping) else Path(source)
    if directory is not None and directory.is_file():
        source, directory = _read(directory), directory.parent
    if custom is None and directory is not None and (directory / ARCHITECTURE_FILE).is_file():
        custom = _read(directory / ARCHITECTURE_FILE)
    if custom is not None:
        return _custom_request(custom, sources)
    config = dict(source) if isinstance(source, Mapping) else _read_config(Path(source))
    library = library_name or detect_library(config)
    if library not in ("transformers", "diffusers", "timm"):
        raise UsageError(f"library {library!r} is not known", "use transformers, diffusers or timm")
    code = directory.resolve() if directory is not None and sources.trust_remote_code else None
    return Request(library=library, config=config, head=head, code=code)


def _custom_request(custom: Mapping[str, Any], sources: Sources) -> Request:
    reference = custom.get("class")
    if not isinstance(reference, str) or not re.fullmatch(r"[\w.]+:[\w.]+", reference):
        raise UsageError(
            f"architecture class {reference!r} is not written module:Class", "for example mingpt.model:GPT"
        )
    sources.trust.require_module(reference, f"the model's class {reference}")
    return Request(
        library="custom",
        config=custom.get("config") or {},
        custom_class=reference,
        no_split=tuple(custom.get("no_split_module_classes") or ()),
        base=sources.base.resolve() if sources.base else None,
    )


def detect_library(config: Mapping[str, Any]) -> str:
    """transformers, diffusers or timm, by the keys that each writes into its config file."""
    if "model_index" in config or "_class_name" in config or "_diffusers_version" in config:
        return "diffusers"
    if "model_type" not in config and "architectures" not in config and isinstance(config.get("architecture"), str):
        return "timm"
    return "transformers"


def _read_config(directory: Path) -> dict[str, Any]:
    if (directory / "model_index.json").is_file():
        index = _read(directory / "model_index.json")
        names = [name for name in index if re.fullmatch(r"[A-Za-z0-9]\w*", name)]
        components = {name: directory / name / "config.json" for name in names}
        return {
            "model_index": index,
            "components": {name: _read(file) for name, file in components.items() if file.is_file()},
        }
    if (directory / "config.json").is_file():
        return _read(directory / "config.json")
    raise UsageError(
        f"{directory} has no config.json, model_index.json or {ARCHITECTURE_FILE}",
        "give the directory of a model, or describe its class under `architecture`",
    )


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, file.parent, MAX_CONFIG)
