"""Stages for tests of the launcher: each does one thing that a real one may do, or suffer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigpipe.errors import DoesNotFit, Transient
from bigpipe.orchestrator.stage import (
    Forecast,
    ForecastContext,
    Metrics,
    Params,
    Port,
    Ranks,
    Stage,
    StageContext,
    StageResult,
)


class Action(Params):
    do: str = "succeed"
    rank: int | None = None
    """Only this rank does it."""
    seconds: float = 60.0
    text: str = ""


class Seen(Metrics):
    pid: int
    rank: int = 0
    world_size: int = 1
    environment: Mapping[str, str]
    modules: tuple[str, ...]
    shown: str = ""


def _forecast(params: Action, context: ForecastContext) -> Forecast:
    return Forecast()


def _succeed(params: Action, context: StageContext) -> None:
    (context.out / "made").write_text(params.text or "yes")


def _talk(params: Action, context: StageContext) -> None:
    sys.stdout.write("plain line\n")
    sys.stderr.write("10%\r50%\r100%\n")
    sys.stdout.write(f"token {params.text or context.environment.get('HF_TOKEN', '')}\n")
    context.log(f"said {context.environment.get('HF_TOKEN', 'nothing')}")
    for done in range(1000):
        context.progress(done + 1, 1000, "item", "counting")


def _fail_expected(params: Action, context: StageContext) -> None:
    token = context.environment.get("HF_TOKEN", "")
    raise DoesNotFit(f"20 GiB do not fit into 16 {token}", "use --batch-size 1")


def _fail_transient(params: Action, context: StageContext) -> None:
    raise Transient("the server is busy", "try again")


def _fail_unexpected(params: Action, context: StageContext) -> None:
    raise KeyError(context.environment.get("HF_TOKEN", "lost"))


def _run_out_of_memory(params: Action, context: StageContext) -> None:
    raise MemoryError


def _die(params: Action, context: StageContext) -> None:
    sys.stdout.write(f"last words {context.environment.get('HF_TOKEN', '')}\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.Signals[params.text or "SIGKILL"])


def _flood(params: Action, context: StageContext) -> None:
    """More than a pipe holds."""
    for _ in range(3000):
        sys.stdout.write("x" * 100 + "\n")


def _choke(params: Action, context: StageContext) -> None:
    """Nothing more can be written."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _die_once(params: Action, context: StageContext) -> None:
    """Rank 0 is killed the first time, while rank 1 is at work."""
    died = context.scratch / "died"
    if died.exists():
        return
    if context.rank == 1:
        _sleep(params, context)
    while not (context.scratch / "asleep-1").exists():
        time.sleep(0.05)
    died.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _vanish(params: Action, context: StageContext) -> None:
    os._exit(0)


def _desert(params: Action, context: StageContext) -> None:
    """Rank 1 leaves as if it were done while the others wait for it."""
    import torch.distributed

    if context.rank == 1:
        os._exit(0)
    torch.distributed.barrier()


def _sleep(params: Action, context: StageContext) -> None:
    Path(context.scratch / f"asleep-{context.rank}").write_text(str(os.getpid()))
    time.sleep(params.seconds)


def _ignore_sigterm(params: Action, context: StageContext) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _sleep(params, context)


def _leave_a_child(params: Action, context: StageContext) -> None:
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({params.seconds})"])
    Path(context.scratch / "child").write_text(str(child.pid))


class _Rows:
    """A writer in a cycle, as those of many libraries are."""

    def __init__(self, path: Path) -> None:
        self.file, self.itself = path.open("w"), self
        self.file.write("rows")


_open: list[Any] = []


def _leave_open(params: Action, context: StageContext) -> None:
    """Nothing here is closed, or waited for: Python would do that at the end of a program."""

    def late() -> None:
        time.sleep(0.2)
        (context.out / "late").write_text("rows")

    _Rows(context.out / "cycle")
    _open.extend([_Rows(context.out / "global"), ThreadPoolExecutor(1)])
    if params.text != "inline":
        _open[-1].submit(late)


def close_all() -> None:
    for rows in _open[::2]:
        rows.file.close()
    _open.clear()


def _swell(params: Action, context: StageContext) -> None:
    block = bytearray(int(params.text))
    block[::4096] = b"x" * len(block[::4096])


def _import_torch(params: Action, context: StageContext) -> None:
    import torch  # noqa: F401


def _barrier(params: Action, context: StageContext) -> None:
    import torch.distributed

    Path(context.scratch / f"asleep-{context.rank}").write_text(str(os.getpid()))
    if context.rank == 1:
        time.sleep(params.seconds)
    torch.distributed.barrier()


ACTIONS = {
    "succeed": _succeed, "talk": _talk, "fail": _fail_expected, "transient": _fail_transient, "crash": _fail_unexpected,
    "memory": _run_out_of_memory, "die": _die, "vanish": _vanish, "desert": _desert, "choke": _choke, "flood": _flood,
    "sleep": _sleep, "ignore": _ignore_sigterm, "child": _leave_a_child, "swell": _swell, "torch": _import_torch,
    "open": _leave_open,
    "barrier": _barrier, "once": _die_once,
}  # fmt: skip


def act(params: Action, context: StageContext) -> StageResult:
    """Do what the params say and tell what this process sees."""
    context.out.mkdir(exist_ok=True)
    if params.rank in (None, context.rank):
        ACTIONS[params.do](params, context)
    if context.rank_dir is not None:
        (context.rank_dir / "share").write_text(f"{context.rank}/{context.world_size}")
    seen = Seen(
        pid=os.getpid(),
        rank=context.rank,
        world_size=context.world_size,
        environment=dict(os.environ),
        modules=tuple(name for name in ("accelerate", "torch", "transformers") if name in sys.modules),
        shown=context.environment.get("SHOWN", ""),
    )
    return StageResult(seen, {"made": ("0" * 64, 3)} if (context.out / "made").exists() else {})


def plan(params: Action, context: StageContext) -> None:
    (context.scratch / "plan").write_text(params.do)
    if params.do == "fail-prepare":
        raise DoesNotFit("the plan does not fit")


def merge(params: Action, context: StageContext) -> StageResult:
    shares = sorted(path.read_text() for path in context.scratch.glob("rank-*/share"))
    (context.out / "merged").write_text(" ".join(shares))
    return act(params.model_copy(update={"do": "succeed"}), context)


def _stage(kind: str, **more: Any) -> Stage[Action]:
    return Stage(
        kind=kind,
        version=1,
        params=Action,
        metrics=Seen,
        inputs={},
        output="report",
        run=act,
        forecast=_forecast,
        **more,
    )


INLINE = _stage("inline", runs_in="inline")
PROCESS = _stage("process", runs_in="process")
HUB = _stage("hub", runs_in="process", secrets=("HF_TOKEN",))
RANKS = _stage("ranks", runs_in="ranks", ranks=Ranks(prepare=plan, finish=merge))


def _settle(params: Action) -> Stage[Action]:
    here = {"runs_in": "inline", "inputs": {"model": Port("model")}, "forecast": lambda *given: Forecast(seconds=7.0)}
    return replace(SETTLED, **here) if params.text == "here" else SETTLED


SETTLED = _stage("settled", runs_in="process", settled=_settle)
"""With the text `here` it runs inline, has a port and foresees 7 seconds."""
REPLACED = _stage("replaced", runs_in="ranks", ranks=Ranks(prepare=plan, finish=merge, replaced=True, mixes=False))
