"""Asks a model's class what it consists of: no weights, no network, and no code that the caller does not trust.

A common family is known from a snapshot. Any other class is built on torch's meta device (shapes without bytes) in a
child process, so that the calling process never imports torch, and its answer is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.bigmodel.sources import Sources
from bigpipe.errors import BY_NAME, InvalidCheckpoint, UsageError
from bigpipe.files import write_file
from bigpipe.modules import source_files, top_level
from bigpipe.versions import package_version

from .inquiry import Head, Request, Source, read_request, request_as_json
from .snapshot import known_architecture
from .structure import Architecture

if TYPE_CHECKING:
    import torch


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
    """Return an architecture per request. One child process answers all that no snapshot and no `memo` knows."""
    known = [_from_snapshot(request) for request in requests]
    keys = ["" if found else request_key(request) for request, found in zip(requests, known, strict=True)]
    questions = {key: request_as_json(request) for key, request in zip(keys, requests, strict=True) if key}
    answers = _answers(questions, memo)
    return [found or Architecture.from_json(answers[key]) for found, key in zip(known, keys, strict=True)]


def _from_snapshot(request: Request) -> Architecture | None:
    own_code = request.code is not None and "auto_map" in request.config
    plain = request.library == "transformers" and not own_code
    return known_architecture(request.config, request.head) if plain else None


def _answers(questions: Mapping[str, Mapping[str, Any]], memo: Path | None) -> dict[str, dict[str, Any]]:
    """Key → what the child process says or has said."""
    answers = {key: found for key in questions if (found := _recall(memo, key)) is not None}
    asked = {key: question for key, question in questions.items() if key not in answers}
    for key, answer in zip(asked, ask(list(asked.values())) if asked else (), strict=True):
        if memo is not None:
            remember(memo / "architectures" / f"{key}.json", {"key": key, "answer": answer})
        answers[key] = answer
    return answers


def build_here(request: Request) -> torch.nn.Module:
    """Return the model itself, built in this process on the device and in the dtype that rule here."""
    from .instantiation import instantiate

    return instantiate(request_as_json(request))


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
        top = top_level(request.custom_class)
        files = [file for _, file in source_files(top, request.base)]
        if not files:
            where = f"{request.base} and " if request.base else ""
            raise UsageError(f"module {top!r} of {request.custom_class} is not in {where}sys.path", "install it")
    elif request.code:
        files = sorted(request.code.rglob("*.py"))
    else:
        return None
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
        module = "bigpipe.bigmodel.architecture.instantiation"
        command = [sys.executable, "-P", "-m", module, str(question), str(answers)]
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


def ask_names(config: Mapping[str, Any], stored: Iterable[str], memo: Path | None = None) -> dict[str, str]:
    """Stored name → parameter or buffer of the class that `config` names; several may become parts of one.

    Many families were renamed since their checkpoints were made (ViT's `encoder.layer.0.attention.attention.query` is
    `layers.0.attention.q_proj` now), and are saved under the old names still. transformers knows the rules; they need
    its classes, so the child process answers, once per config and set of names.

    Names that become none, or one that is changed on the way, are not in it. Errors as of `describe_architecture`.
    """
    request, names = read_request(config), sorted(stored)
    key = hashlib.sha256(json.dumps([request_key(request), names]).encode()).hexdigest()
    found: dict[str, str] = _answers({key: {**request_as_json(request), "names": names}}, memo)[key]["names"]
    return found


def _child_environment() -> dict[str, str]:
    package = Path(__file__).parents[3]
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
