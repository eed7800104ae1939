"""Six functions over bytes, each of which may end in a value or a BigpipeError, and in nothing else.

Each takes what an enemy, or a broken disk, may hand to one reader. `drive` runs them under atheris, `test_fuzz` over
the inputs that are kept in `corpus/`.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from support.kinds import KINDS

from bigpipe.bigmodel import hub
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.errors import BigpipeError, ManifestError, Place
from bigpipe.orchestrator.lock import lockfile
from bigpipe.orchestrator.recipe import conditions, interpolation
from bigpipe.orchestrator.recipe.graph import load_recipe
from bigpipe.orchestrator.recipe.problems import Problems
from bigpipe.orchestrator.recipe.yamlsource import read_document
from bigpipe.orchestrator.running import records
from bigpipe.orchestrator.store import Store
from bigpipe.sizes import parse_size

MEMORY_DISK = Path("/dev/shm")
CONTROL = frozenset(map(chr, [*range(9), *range(11, 32), 127]))


@contextmanager
def only_our_errors() -> Iterator[None]:
    """Inside, a BigpipeError is an answer as good as any. It must have a cause, and move nothing on a terminal."""
    try:
        yield
    except BigpipeError as error:
        said = str(error)
        said.encode()
        if not error.cause or CONTROL & set(said):
            raise AssertionError(f"an error without a cause, or with control characters: {said!r}") from error


@cache
def folder() -> Path:
    """Return a directory of this process, in memory where that can be."""
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None))


def read_yaml(data: bytes) -> None:
    """A manifest, from its bytes to a checked graph, or to problems that each stand where they say."""
    path = folder() / "m.yaml"
    path.write_bytes(data)
    with only_our_errors():
        try:
            load_recipe(path, environment={"X": "1", "HF_TOKEN": "canary"}, stages=KINDS)
        except ManifestError as error:
            shown = b"canary" not in data and "canary" in str(error)
            if shown or any(min(problem.place.line, problem.place.column) < 1 for problem in error.problems):
                raise AssertionError(f"a secret, or a place that is none: {error}") from error
            raise


def read_safetensors(data: bytes) -> None:
    _read_checkpoint(folder() / "model.safetensors", data)


def read_torch_zip(data: bytes) -> None:
    """A whole file; or, where the first byte is odd, a pickle in a zip file without fault, whose checksums hold."""
    content = data[1:]
    if data and data[0] % 2:
        filled = io.BytesIO()
        with zipfile.ZipFile(filled, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/byteorder", b"little")
            archive.writestr("archive/data/0", bytes(64))
        content = filled.getvalue()
    _read_checkpoint(folder() / "pytorch_model.bin", content)


def _read_checkpoint(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with only_our_errors():
        checkpoint = open_checkpoint(path)
        for name in list(checkpoint.tensors)[:8]:
            checkpoint.read(name)


METRICS: Mapping[str, Any] = {
    "bytes": 20 * 2**30,
    "ratio": 0.5,
    "int8": {"inference_high": 3},
    "text": "a",
    "none": None,
}


def read_expressions(data: bytes) -> None:
    """References, conditions, picks of variants, sizes and times, from one text."""
    text = data.decode("utf-8", "replace")
    scope = interpolation.Scope(params={"a": 1, "b": [1], "c": {"d": "x"}}, matrix={"m": "v"}, environment={"X": "1"})
    problems = Problems(read_document("m.yaml", b"a: 1").place_at)
    with only_our_errors():
        interpolation.interpolate([text, {text: text}], scope, problems)
    with only_our_errors():
        found = conditions.parse_condition(text, Place("m.yaml", 1, 1, text.partition("\n")[0]))
        found.evaluate(lambda node, path: conditions.metric(METRICS, path))
        found.odd_units(lambda node, path: "size" if path == "bytes" else None)
        found.bind({"a": "b"})
    with only_our_errors(), suppress(ValueError):
        parse_size(text)
    with only_our_errors():
        read_document("-p", data[:4000])


KEY = "a" * 64
LOCATIONS = (
    f"keys/{KEY}.json",
    f"artifacts/{KEY}.json",
    f"roots/{KEY}.json",
    f"released/{KEY}.json",
    f"work/{KEY}/publish.json",
    "runs/20260103-174500-1f43f9a2c/run.json",
    "memo/files.jsonl",
    "memo/hub/a.json",
    "r.yaml.lock",
    "r.yaml.lock.answers.gz",
)
"""What the first byte chooses among: the place of a file in a store, or beside a recipe."""


def read_record(data: bytes) -> None:
    """One file of a store, or beside a recipe, is not what it was."""
    if not data:
        return
    place, root = LOCATIONS[data[0] % len(LOCATIONS)], folder() / "store"
    content = data[1:]
    shutil.rmtree(root, ignore_errors=True)
    (root / place).parent.mkdir(parents=True)
    (root / place).write_bytes(content)
    for act in (_read_lock, _list, _look_up, _repair, _collect):
        with only_our_errors():
            act(root)


def _read_lock(root: Path) -> None:
    lockfile.read_lock(root / "r.yaml.lock")
    lockfile.read_answers(root / "r.yaml.lock")


def _list(root: Path) -> None:
    with Store(root) as store:
        store.ls()
        records.list_runs(store.runs)
        if records.run_ids(store.runs):
            records.load_run(store.runs)


def _look_up(root: Path) -> None:
    with Store(root) as store:
        record = store.find(f"sha256:{KEY}")
        if record is not None:
            store.intact(record)
        store.last_keys(root / "r.yaml", "r")
        store.history(root / "r.yaml", "r", "n")


def _repair(root: Path) -> None:
    with Store(root) as store:
        store.verify(repair=True)


def _collect(root: Path) -> None:
    with Store(root) as store:
        store.gc(lockfile.locked_digests)


class Server:
    """Answers each request on a loopback port with the bytes that are set, whatever was asked."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = "http://{}:{}".format(*self._socket.getsockname()[:2])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, suppress(OSError):
                connection.settimeout(1)
                asked = b""
                while b"\r\n\r\n" not in asked and (more := connection.recv(65536)):
                    asked += more
                connection.sendall(self.answer)


@cache
def server() -> Server:
    return Server()


COMMIT = hashlib.sha1(b"commit", usedforsecurity=False).hexdigest()


def read_hub_answer(data: bytes) -> None:
    """A Hub's answer to the first question about a model: a whole response, or a body below right headers."""
    if not data:
        return
    body = data[1:]
    if data[0] % 4 == 0:
        if body[9:12] in (b"429", b"500", b"502", b"503", b"504"):
            return  # each is waited for, which takes half a second
        answer = body
    else:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        answer = f"{head}X-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n".encode() + body
    server().answer = answer
    asked = hub.Hub(endpoint=server().address, cache=folder() / "cache", timeout=0.2)
    with only_our_errors():
        hub.describe("org/model", "main" if data[0] % 2 else COMMIT, hub=asked)
    assert not (folder() / "cache").exists()


Target = Callable[[bytes], None]
TARGETS: Mapping[str, Target] = {
    "yaml": read_yaml,
    "safetensors": read_safetensors,
    "torch_zip": read_torch_zip,
    "expressions": read_expressions,
    "records": read_record,
    "hub": read_hub_answer,
}
