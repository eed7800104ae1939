"""The names that transformers gives to stored tensors, where they are not the model's own: asked of a child process.

Many families were renamed since their checkpoints were made (ViT's `encoder.layer.0.attention.attention.query` is
`layers.0.attention.q_proj` now), and are saved under the old names still. transformers knows the rules; they need its
classes, so a process with torch answers, once per config and set of names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.memo import recall, remember

from .asking import ask, request_key
from .inquiry import read_request, request_as_json


def ask_names(config: Mapping[str, Any], stored: Iterable[str], memo: Path | None = None) -> dict[str, str]:
    """Stored name → parameter or buffer of the class that `config` names; several may become parts of one.

    Names that become none, or one that is changed on the way, are not in it. Errors as of `describe_architecture`.
    """
    request = read_request(config)
    names = sorted(stored)
    key = hashlib.sha256(json.dumps([request_key(request), names]).encode()).hexdigest()
    file = memo / "names" / f"{key}.json" if memo else None
    found = recall(file) if file else None
    if not isinstance(found, dict):
        found = ask([{**request_as_json(request), "names": names}])[0]["names"]
        if file:
            remember(file, found)
    return {str(name): str(target) for name, target in found.items()}
