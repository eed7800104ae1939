"""Eight small stage kinds of a third party, found through a real entry point: what the engine's own tests run."""

from __future__ import annotations

import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from bigpipe.orchestrator.stage import (
    File,
    FileOrLiteral,
    Forecast,
    ForecastContext,
    Metrics,
    Misfit,
    Params,
    Passing,
    Port,
    Size,
    Stage,
    StageContext,
    StageFailed,
    StageResult,
    Transient,
)
from bigpipe.passing import OpenOutlet, Outlet


class WriteParams(Params):
    """Write a text; every run leaves a mark in the file `journal` beside the manifest."""

    text: str = "hello"
    source: File | None = None
    lines: Annotated[str | tuple[str, ...], FileOrLiteral] = ()
    forgets: Literal["nothing", "all"] = "nothing"
    """all: its forecast knows neither what RAM it needs nor what it will measure."""
    needs_ram: Size = 1000
    misfit: bool = False
    stamp: bool = False
    """Other bytes each time."""


class WriteMetrics(Metrics):
    characters: int
    detail: dict[str, int]


def mark(context: StageContext) -> None:
    with (context.base / "journal").open("a") as journal:
        journal.write(f"{context.node}\n")


def write(params: WriteParams, context: StageContext) -> StageResult:
    mark(context)
    text = params.text + ((context.base / params.source).read_text() if params.source else "")
    (context.out / "text").write_text(text + (f" {time.time_ns()}" if params.stamp else ""))
    return StageResult(WriteMetrics(characters=len(text), detail={"upper": sum(c.isupper() for c in text)}))


def write_forecast(params: WriteParams, context: ForecastContext) -> Forecast:
    misfits = (Misfit("there is no GPU 7", "-p device=cpu"),) if params.misfit else ()
    unknown = ("RAM",) if params.forgets == "all" else ()
    known = {} if params.source or unknown else {"characters": len(params.text)}
    ram = None if unknown else params.needs_ram
    return Forecast(write_bytes=len(params.text), ram=ram, unknown=unknown, metrics=known, misfits=misfits)


class JoinParams(Params):
    """Join texts."""

    separator: str = " "
    squeeze: bool = False


class JoinMetrics(Metrics):
    characters: int
    parts: int


def join(params: JoinParams, context: StageContext) -> StageResult:
    mark(context)
    sources = [path for port in ("first", "second", "rest") for path in context.inputs.get(port, ())]
    texts = [(path / "text").read_text() for path in sources]
    text = params.separator.join(texts)
    (context.out / "text").write_text(text.upper() if params.squeeze else text)
    return StageResult(JoinMetrics(characters=len(text), parts=len(texts)))


def join_forecast(params: JoinParams, context: ForecastContext) -> Forecast:
    return Forecast(write_bytes=100, ram=1000)


class FlakyParams(Params):
    """Fail `times` times, then succeed; `fatal` fails for good."""

    times: int = 0
    fatal: bool = False
    bug: bool = False


class FlakyMetrics(Metrics):
    attempts: int


def flaky(params: FlakyParams, context: StageContext) -> StageResult:
    mark(context)
    counter = context.scratch / "attempts"
    attempts = int(counter.read_text()) + 1 if counter.exists() else 1
    counter.write_text(str(attempts))
    if params.bug:
        raise KeyError("nobody thought of this")
    if params.fatal:
        raise StageFailed("the toy is broken", "buy another toy")
    if attempts <= params.times:
        raise Transient("the toy is tired", "try again")
    (context.out / "text").write_text("at last")
    return StageResult(FlakyMetrics(attempts=attempts))


def flaky_forecast(params: FlakyParams, context: ForecastContext) -> Forecast:
    return Forecast()


class SleepParams(Params):
    """Take some seconds; say when it began and ended."""

    seconds: float = 1.0
    tag: str = ""


class SleepMetrics(Metrics):
    began: float
    ended: float
    pid: int


def sleep(params: SleepParams, context: StageContext) -> StageResult:
    mark(context)
    began = time.time()
    Path(context.base / f"pid-{context.node}").write_text(str(os.getpid()))
    time.sleep(params.seconds)
    (context.out / "text").write_text(params.tag)
    return StageResult(SleepMetrics(began=began, ended=time.time(), pid=os.getpid()))


class PourParams(Params):
    """Write `count` files of 1000 bytes, each taking `pace` seconds; if somebody is to follow, once they do."""

    count: int = 5
    pace: float = 0.0
    letter: str = "a"
    break_at: int | None = None
    """Fail for good before this file."""
    tire_at: int | None = None
    """Fail before this file, but not the second time."""
    afterthought: bool = False
    """Write one more file at the end, of which nobody was told."""


class PourMetrics(Metrics):
    began: float
    ended: float


def await_a_follower(outlet: Outlet) -> None:
    if not isinstance(outlet, OpenOutlet):
        return
    deadline = time.monotonic() + 20
    while not list(outlet.handover.folder.glob("wanted/*")) and time.monotonic() < deadline:
        time.sleep(0.01)


def pour(params: PourParams, context: StageContext) -> StageResult:
    mark(context)
    began = time.time()
    content = params.letter[0] * 1000
    known = sha256(content.encode()).hexdigest(), len(content)
    (context.out / "note").write_text("poured")
    names = [f"file-{number}" for number in range(params.count)]
    outlet = context.outlet
    outlet.announce(dict.fromkeys(names, (b"", len(content))))
    await_a_follower(outlet)
    for number, name in enumerate(names):
        outlet.begin(name)
        time.sleep(params.pace)
        if number == params.break_at:
            raise StageFailed("the can is broken", "buy another can")
        if number == params.tire_at and not (context.scratch / "tired").exists():
            (context.scratch / "tired").touch()
            raise Transient("the arm is tired", "try again")
        if not (context.out / name).exists():
            (context.out / name).write_text(content)
        outlet.finished(name, *known)
    if params.afterthought:
        (context.out / "afterthought").write_text("this too")
    return StageResult(PourMetrics(began=began, ended=time.time()))


class SipParams(Params):
    """Turn each file to upper case, one by one, each taking `pace` seconds."""

    pace: float = 0.0
    choke_at: str = ""
    """Fail at this file."""
    skim: bool = False
    """Read the first file alone, and take none."""


class SipMetrics(Metrics):
    began: float
    most: int
    """The most files that were there at a time."""
    done: int
    """Files that no earlier attempt had done."""


def sip(params: SipParams, context: StageContext) -> StageResult:
    mark(context)
    began, inlet, most, done = time.time(), context.open("first"), 0, 0
    folder = inlet.folder
    Path(context.base / f"pid-{context.node}").write_text(str(os.getpid()))
    for name in sorted(inlet.heads or (path.name for path in folder.glob("file-*"))):
        inlet.wait(name)
        if params.skim:
            break
        most = max(most, len(list(folder.glob("file-*"))))
        if name == params.choke_at:
            raise StageFailed("it went down the wrong way", "sit up")
        if not (context.out / name).exists():
            time.sleep(params.pace)
            (context.out / name).write_text((folder / name).read_text().upper())
            done += 1
        inlet.taken(name)
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("file-"))
    (context.out / "others").write_text(" ".join(others))
    return StageResult(SipMetrics(began=began, most=most, done=done))


class StrainParams(Params):
    """Pass each file on as it is, one by one."""


class StrainMetrics(Metrics):
    began: float
    ended: float


def strain(params: StrainParams, context: StageContext) -> StageResult:
    mark(context)
    began, inlet, outlet = time.time(), context.open("first"), context.outlet
    folder = inlet.folder
    heads = inlet.heads or {path.name: (b"", path.stat().st_size) for path in folder.glob("file-*")}
    outlet.announce(heads)
    await_a_follower(outlet)
    for name in sorted(heads):
        inlet.wait(name)
        outlet.begin(name)
        content = (folder / name).read_bytes()
        (context.out / name).write_bytes(content)
        outlet.finished(name, sha256(content).hexdigest(), len(content))
        inlet.taken(name)
    return StageResult(StrainMetrics(began=began, ended=time.time()))


class BroodParams(Params):
    """Tell when and where `bigpipe_ballast` was imported, which takes this kind's worker some time."""

    tires: bool = False
    """Fail the first time, but not the second."""
    idle: bool = False
    """Need no such module."""


class BroodMetrics(Metrics):
    imported: float
    pid: int
    word: str
    secret: int
    """Its characters; the secret itself would be masked."""


def brood(params: BroodParams, context: StageContext) -> StageResult:
    import bigpipe_ballast

    mark(context)
    if params.tires and not (context.scratch / "tired").exists():
        (context.scratch / "tired").touch()
        raise Transient("the hen is tired", "try again")
    (context.out / "text").write_text("an egg")
    found = os.environ.get("WORD", ""), len(os.environ.get("SECRET", ""))
    return StageResult(BroodMetrics(imported=bigpipe_ballast.IMPORTED, pid=os.getpid(), word=found[0], secret=found[1]))


WRITE = Stage(
    kind="write", version=1, params=WriteParams, metrics=WriteMetrics, inputs={"after": Port("text", optional=True)},
    output="text", run=write, forecast=write_forecast,
)  # fmt: skip
JOIN = Stage(
    kind="join", version=1, params=JoinParams, metrics=JoinMetrics,
    inputs={
        "first": Port("text"),
        "second": Port("text", optional=True),
        "rest": Port("text", optional=True, many=True),
    },
    output="text", run=join, forecast=join_forecast,
)  # fmt: skip
FLAKY = Stage(
    kind="flaky", version=1, params=FlakyParams, metrics=FlakyMetrics, inputs={"after": Port("text", optional=True)},
    output="text", run=flaky, forecast=flaky_forecast,
)  # fmt: skip
SLEEP = Stage(
    kind="sleep", version=1, params=SleepParams, metrics=SleepMetrics, inputs={"after": Port("text", optional=True)},
    output="text", run=sleep, forecast=lambda params, context: Forecast(),
)  # fmt: skip
POUR = Stage(
    kind="pour", version=1, params=PourParams, metrics=PourMetrics, inputs={}, output="text",
    passing=Passing(streams=True), run=pour,
    forecast=lambda params, context: Forecast(),
)  # fmt: skip
SIP = Stage(
    kind="sip", version=1, params=SipParams, metrics=SipMetrics, inputs={"first": Port("text")}, output="text",
    passing=Passing(follows="first"), run=sip, forecast=lambda params, context: Forecast(),
)  # fmt: skip
STRAIN = Stage(
    kind="strain", version=1, params=StrainParams, metrics=StrainMetrics, inputs={"first": Port("text")}, output="text",
    passing=Passing(follows="first", streams=True), run=strain, forecast=lambda params, context: Forecast(),
)  # fmt: skip
BROOD = Stage(
    kind="brood", version=1, params=BroodParams, metrics=BroodMetrics, inputs={"after": Port("text", optional=True)},
    output="text", run=brood, forecast=lambda params, context: Forecast(),
    warms=lambda params: () if params.idle else ("no_such_module", "bigpipe_ballast"),
)  # fmt: skip
