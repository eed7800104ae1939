"""What a child process would be asked about classes, answered in the process of a test that tests no child."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

from bigpipe.bigmodel import memo
from bigpipe.bigmodel.architecture import instantiation, read_request, request_key
from bigpipe.bigmodel.checkpoint import describe_checkpoint
from bigpipe.bigmodel.formats import format_of, set_apart
from bigpipe.bigmodel.sources import Sources


def answer_here(model: Path, sources: Sources = Sources()) -> Path:
    """Let this process know what a child would say of a model's class, and of the names that are stored for it. What a
    child would refuse it still is asked, and refuses."""
    request, described = read_request(model, sources=sources), describe_checkpoint(model)
    plain, packed = set_apart(described.tensors or {}, format_of(described))
    stored = sorted([*plain, *described.tied, *(f"{module}.weight" for module in packed)])
    for question in (request, replace(request, stored=tuple(stored))):
        with warnings.catch_warnings(action="ignore"):
            answer = instantiation._answer(question)
        if "error" not in answer:
            memo._said[request_key(question)] = json.dumps(answer)
    return model
