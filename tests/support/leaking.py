"""Kinds that give a secret away in every way they can think of; copied beside a recipe, which trusts it."""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from pydantic import Field

from bigpipe.errors import DoesNotFit, StageFailed, Transient
from bigpipe.orchestrator.stage import (
    CheckContext,
    Forecast,
    ForecastContext,
    Metrics,
    Params,
    Pinned,
    Planning,
    Stage,
    StageContext,
    StageResult,
)


class Way(Params):
    how: str


class Said(Metrics):
    text: str = ""
    more: Mapping[str, Any] = Field(default_factory=dict)


def _secret(context: Any) -> str:
    return context.environment.get("S3_KEY", "nothing")


def spelled(value: str) -> Iterator[str]:
    """A value as other programs write it."""
    yield from (value, value.strip(), quote(value), quote(value, safe=""), quote_plus(value), html.escape(value))
    yield from (json.dumps(value), json.dumps(json.dumps(value)), repr(value), shlex.quote(value), repr({"k": value}))
    once, ascii_less = json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]
    yield from (once, ascii_less, repr(value)[1:-1], json.dumps(once)[1:-1], repr(once)[1:-1])
    for before in ("", "x", "xy"):
        data = (before + value + "z").encode()
        yield base64.b64encode(data).decode()
        yield base64.urlsafe_b64encode(data).decode()


def _raise(error: BaseException) -> None:
    raise error


def _chain(secret: str) -> None:
    try:
        raise ValueError(f"inner {secret}")
    except ValueError as error:
        raise RuntimeError(f"outer {secret}") from error


def _note(secret: str) -> None:
    error = KeyError(secret)
    error.add_note(f"the key was {secret}")
    raise error


def _in_two_writes(secret: str) -> None:
    data = f"key {secret} end\n".encode()
    for start in range(len(data)):
        os.write(1, data[start : start + 1])
        if start % 8 == 0:
            time.sleep(0.01)


def _far_out(secret: str) -> None:
    os.write(1, b"x" * (64 * 1024 - 7) + secret.encode() + b"y" * 100_000 + b"\n")


def _coloured(secret: str) -> None:
    half = len(secret) // 2
    sys.stdout.write(f"\x1b[31m{secret[:half]}\x1b[0m{secret[half:]}\n{secret} 50%\r{secret} 100%\r")


def _hang(secret: str) -> None:
    sys.stdout.write(secret + "\n")
    sys.stdout.flush()
    time.sleep(60)


def _crash(number: int, secret: str) -> None:
    sys.stderr.write(f"last words {secret}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), number)
    time.sleep(10)


PRINTED: dict[str, Callable[[str], None]] = {
    "exception": lambda secret: _raise(RuntimeError(f"403 for key {secret}")),
    "chained": _chain,
    "group": lambda secret: _raise(ExceptionGroup(secret, [ValueError(secret), OSError(5, secret, secret)])),
    "note": _note,
    "cause": lambda secret: _raise(StageFailed(f"refused {secret}", f"use another than {secret}")),
    "misfit": lambda secret: _raise(DoesNotFit(f"no room for {secret}")),
    "retried": lambda secret: _raise(Transient(f"busy with {secret}")),
    "exit": lambda secret: sys.exit(secret),
    "interrupt": lambda secret: _raise(KeyboardInterrupt(secret)),
    "unicode": lambda secret: secret.encode("ascii").decode(secret),
    "no_file": lambda secret: Path(f"/nowhere/{secret}").read_text(),
    "memory": lambda secret: _raise(MemoryError(secret)),
    "no_space": lambda secret: _raise(OSError(28, "No space left on device", f"/disk/{secret}")),
    "segmentation": lambda secret: _crash(signal.SIGSEGV, secret),
    "killed": lambda secret: _crash(signal.SIGKILL, secret),
    "hang": _hang,
    "spelled": lambda secret: _raise(RuntimeError("\n".join(spelled(secret)))),
    "printed": lambda secret: sys.stdout.write("\n".join(spelled(secret)) + "\n") and _raise(ValueError("after")),
    "two_writes": _in_two_writes,
    "far_out": _far_out,
    "coloured": _coloured,
    "warned": lambda secret: warnings.warn(secret, stacklevel=1),
    "environment": lambda secret: sys.stderr.write(f"{os.environ!r}\n{dict(os.environ)}\n") and None,
    "child": lambda secret: subprocess.run(["env"], check=True) and None,
    "address": lambda secret: _raise(ConnectionError(f"https://me:{quote(secret, safe='')}@host/x?sig={secret}")),
    "header": lambda secret: _raise(ConnectionError(f"{{'Authorization': 'Bearer {secret}'}}")),
}
TOLD: dict[str, Callable[[StageContext, str], None]] = {
    "log": lambda context, secret: context.log(f"first {secret}\nsecond {secret}"),
    "detail": lambda context, secret: context.log(secret, detail=True),
    "progress": lambda context, secret: context.progress(1, 2, secret, f"sending {secret}"),
}


def run(params: Way, context: StageContext) -> StageResult:
    secret = _secret(context)
    (context.out / "made").write_text("yes")
    if params.how in PRINTED:
        PRINTED[params.how](secret)
    elif params.how in TOLD:
        TOLD[params.how](context, secret)
    if params.how == "metrics":
        return StageResult(Said(text=f"made with {secret}", more={secret: [secret, {"k": json.dumps(secret)}]}))
    if params.how == "result":
        return f"not a result but {secret}"  # type: ignore[return-value]
    if params.how == "look":  # what a process that needs no secret finds around itself
        places = ["self/environ", "self/cmdline", "self/limits", f"{os.getppid()}/cmdline", f"{os.getppid()}/limits"]
        (context.out / "around").write_text("\n".join(Path("/proc", place).read_text() for place in places))
    return StageResult(Said())


def forecast(params: Way, context: ForecastContext) -> Forecast:
    secret = _secret(context)
    if params.how == "forecast":
        raise RuntimeError(f"cannot tell without {secret}")
    told: Mapping[str, Any] = {"text": secret} if params.how == "foreseen" else {}
    return Forecast(metrics=told, summary=secret, details=(secret,), unknown=(secret,)) if told else Forecast()


def check(params: Way, context: CheckContext) -> None:
    if params.how == "check":
        raise DoesNotFit(f"the server said {_secret(context)}", f"ask for less than {_secret(context)}")
    if params.how == "check_bug":
        raise ValueError(_secret(context))


def pin(params: Way, context: CheckContext) -> Pinned | None:
    if params.how == "pin":
        raise ConnectionError(f"nobody at https://me:{_secret(context)}@example.org")
    return None


def _stage(kind: str, **more: Any) -> Stage[Way]:
    planning = Planning(check=check, pin=pin)
    return Stage(
        kind=kind, version=1, params=Way, metrics=Said, inputs={}, output="report", run=run, forecast=forecast,
        planning=planning, **more,
    )  # fmt: skip


STAGE = _stage("leaking")
INLINE = _stage("leaking-inline", runs_in="inline")
