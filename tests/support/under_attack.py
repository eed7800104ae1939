"""A process that asks servers what a job says, each job in a child of its own, forked once everything is imported.

    with Victims(folder) as victims:
        outcome = victims.ask({"act": "fetch", "url": …, "home": …})

The client's own time limits are set low, and its pauses are not waited for, but counted.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

LIMIT = 0.5
"""Seconds: of one step of the client, in downloads."""
METADATA_LIMIT = 1.0
MEMORY = 3 << 30
TESTS = Path(__file__).parent.parent


def moves(sign: str) -> bool:
    """Is it a control character, the end of a line, half a pair, or what turns the direction of writing?"""
    turns = unicodedata.bidirectional(sign) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return turns or unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")


class Victims:
    """Runs one job after the other."""

    def __init__(self, folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "VIRTUAL_ENV") if name in os.environ}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
        env = {**kept, **quiet, "HOME": str(folder / "user"), "HF_HOME": str(folder / "hf"), "PYTHONPATH": paths}
        self._environment, self._folder = {**env, **environment}, folder
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "support.under_attack"]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        return subprocess.Popen(command, **pipes, env=self._environment, cwd=self._folder, start_new_session=True)

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def ask(self, job: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
        """Return what came of it: `ok`, or `error`, `cause`, `cure`, `exit_code`; `seconds`, `slept`, `rss` in bytes,
        and `said`, all that was printed. An outcome `hangs` after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            self.__exit__()
            self._process = self._start()
            return {"error": "hangs", "cause": f"after {seconds} s", "cure": "", "exit_code": -1}
        return json.loads(self._process.stdout.readline() or b'{"error": "died"}')


def main() -> None:
    _warm()
    out = os.dup(1)
    for line in sys.stdin:
        job, pid = json.loads(line), os.fork()
        if pid == 0:
            os.write(out, json.dumps(_act(job)).encode() + b"\n")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            os.write(
                out, json.dumps({"error": "died", "cause": str(status), "cure": "", "exit_code": 1}).encode() + b"\n"
            )


def _warm() -> None:
    import huggingface_hub  # noqa: F401
    from huggingface_hub import constants, file_download, hf_api  # noqa: F401

    import bigpipe.bigmodel.hub.bringing
    import bigpipe.bigmodel.publishing.upload  # noqa: F401

    constants.HF_HUB_DOWNLOAD_TIMEOUT = LIMIT
    file_download._ETAG_RETRY_TIMEOUT = LIMIT


def _act(job: dict[str, Any]) -> dict[str, Any]:
    home = Path(job["home"])
    said = os.open(home / "said", os.O_RDWR | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    slept: list[float] = []
    sleep = time.sleep
    time.sleep = lambda seconds: (slept.append(seconds), sleep(min(seconds, 0.01)))[1]  # type: ignore[assignment]
    begun = time.monotonic()
    outcome = _outcome(job, home)
    outcome |= {
        "seconds": time.monotonic() - begun,
        "slept": sum(slept),
        "said": (home / "said").read_text("utf-8", "replace"),
    }
    return outcome | {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _outcome(job: dict[str, Any], home: Path) -> dict[str, Any]:
    import traceback

    from bigpipe.errors import BigpipeError

    try:
        return {"ok": True, **ACTS[job["act"]](job, home)}
    except BigpipeError as error:
        cause, cure = error.cause, error.cure
        return {"error": type(error).__name__, "cause": cause, "cure": cure, "exit_code": error.exit_code}
    except BaseException as error:
        where = traceback.format_exc()[-3000:]
        return {"error": f"a bug: {type(error).__name__}", "cause": where, "cure": "", "exit_code": 1}


def _hub(job: dict[str, Any], home: Path) -> Any:
    from bigpipe.bigmodel.hub import Hub

    environment = {"HF_ENDPOINT": job["url"], "HF_HOME": str(home / "cache"), "HF_TOKEN": job.get("token", "")}
    return replace(Hub.from_environment(environment), memo=home / "memo", timeout=METADATA_LIMIT)


def fetch(job: dict[str, Any], home: Path) -> dict[str, Any]:
    """Everything that a stage `download` asks: may it be read, what will come, and then the files."""
    from bigpipe.bigmodel.hub import Choice, HubSource, Watch

    choice = Choice(include=tuple(job.get("include", ())))
    source = HubSource(repo="org/model", revision=job.get("revision", "main"), choice=choice, hub=_hub(job, home))
    source.check()
    source.expect()
    brought = source.bring(home / "out", Watch())
    return {"commit": brought.commit}


def upload(job: dict[str, Any], home: Path) -> dict[str, Any]:
    """Everything that a stage `save` asks of a repository."""
    from bigpipe.bigmodel.publishing.upload import HubRepository

    target = HubRepository(repo="org/model", hub=_hub(job, home), revision=job.get("revision", "main"))
    target.check()
    target.listing()
    files = {path.relative_to(job["source"]).as_posix(): path for path in sorted(Path(job["source"]).rglob("*"))}
    with target.replacing(home / "scratch") as new:
        stored = {name: target.put(new, name, path, lambda size: None) for name, path in files.items()}
        receipt = target.finish(new, stored)
    (home / "receipt.json").write_text(receipt.text())
    return {"commit": receipt.commit, "listing": sorted(target.listing() or {})}


ACTS = {"fetch": fetch, "upload": upload}

if __name__ == "__main__":
    main()
