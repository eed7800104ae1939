"""What a plan foresees, taken for some seconds on the real devices: `plan --probe`.

probe(plan)
    groups()     nodes that take each other's files as they are made are tried together, all others one at a time
    take()       a process per process of a node takes its share of RAM and GPU memory, and holds it
    set_aside()  a file without a name takes the disk

Nothing of it outlives the command: processes die with it, and the file has no name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

from bigpipe.errors import DoesNotFit, Transient, UsageError
from bigpipe.files import existing, free_space, room_held
from bigpipe.machine import Machine, detect
from bigpipe.orchestrator.contract import LogLine, OneAtATime, Reporter
from bigpipe.orchestrator.launch import DEVICE_ORDER, RAM, gpu_name
from bigpipe.orchestrator.planning import Plan, PlannedNode, make_plan, with_parameters
from bigpipe.sizes import format_size

from . import records

DISK = "disk"
WHOLE = "the run"
"""What the disk is held for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a node is foreseen to take of a device, and what could be had."""

    node: str
    device: str
    """RAM, GPU 0, disk."""
    predicted: int
    """Bytes."""
    held: int | None
    """Bytes that could be had; None: it was not tried."""
    why: str = ""
    """Why that is not all of it."""

    @property
    def short(self) -> bool:
        return bool(self.why)


def probe(plan: Plan, reporter: Reporter | None = None, *, seconds: float = 2.0) -> list[Held]:
    """Take what a plan foresees on this machine, node after node, each for so many seconds. Return a row per node and
    device, in the order of the plan, the disk last. Raise Transient while another run goes on over the store, whose
    memory it would take, UsageError where the plan is for another machine."""
    refuse_elsewhere(plan.session.given_machine, plan.session.cluster)
    _refuse_beside_others(plan)
    reporter = reporter or OneAtATime()
    found = [row for group in groups(plan) for row in _try(plan, group, reporter, seconds)]
    order = {name: number for number, name in enumerate(plan.nodes)}
    return [*sorted(found, key=lambda row: order[row.node]), *_try_disk(plan)]


def refuse_elsewhere(*elsewhere: object) -> None:
    """Raise UsageError where a plan is, or is to be, for another machine or a cluster."""
    if any(each is not None for each in elsewhere):
        raise UsageError("other machines cannot be probed from here", "probe there, without --machine and --executor")


def _refuse_beside_others(plan: Plan) -> None:
    others = [record for record in records.list_runs(plan.session.store.runs) if record.status == "running"]
    if others:
        cause = f"run {others[0].run} of {others[0].recipe} goes on, and needs its memory"
        raise Transient(cause, "probe once it has ended: `bigpipe ps` tells")


def groups(plan: Plan) -> Iterator[list[PlannedNode]]:
    """Give the nodes that will work: those that take each other's files as they are made together."""
    leaders: dict[str, list[PlannedNode]] = {}
    for node in plan.to_run:
        leader = node.node.name
        while leader in plan.followed:
            leader = plan.followed[leader]
        leaders.setdefault(leader, []).append(node)
    yield from leaders.values()


def _needs(node: PlannedNode) -> dict[str, int]:
    """Device → bytes, of a node's processes together."""
    if node.forecast is None:
        return {}
    gpus = {gpu_name(index): size for index, size in sorted((node.forecast.vram or {}).items()) if size}
    return {**({RAM: node.forecast.ram} if node.forecast.ram else {}), **gpus}


def shares(node: PlannedNode) -> list[dict[str, int]]:
    """Return what each of its processes takes, device → bytes: as much RAM, and GPUs of its own."""
    needs, count = _needs(node), max(node.processes, 1)
    gpus = [device for device in needs if device != RAM]
    each = -(-len(gpus) // count)
    shares = [{device: needs[device] for device in gpus[rank * each : (rank + 1) * each]} for rank in range(count)]
    return [{**({RAM: needs[RAM] // count} if RAM in needs else {}), **share} for share in shares]


def _try(plan: Plan, group: Sequence[PlannedNode], reporter: Reporter, seconds: float) -> list[Held]:
    needs = {node.node.name: _needs(node) for node in group}
    needs = {name: of_node for name, of_node in needs.items() if of_node}
    if not needs:
        return []
    there = _room(detect(plan.session.store.root))
    lacking = {
        device: f"{format_size(there.get(device, 0))} are free now"
        for device in dict.fromkeys(device for of_node in needs.values() for device in of_node)
        if sum(of_node.get(device, 0) for of_node in needs.values()) > there.get(device, 0)
    }
    if lacking:  # to take all that is free would hurt everybody else here
        return [
            Held(node=name, device=device, predicted=size, held=None, why=lacking.get(device, ""))
            for name, of_node in needs.items()
            for device, size in of_node.items()
        ]
    for name, of_node in needs.items():
        told = ", ".join(f"{format_size(size)} of {device}" for device, size in of_node.items())
        reporter.report(LogLine(name, f"probing: takes {told} for {seconds:g} s"))
    holders = [(node.node.name, share) for node in group for share in shares(node) if share]
    return _summed(needs, take(holders, seconds))


def _room(machine: Machine) -> dict[str, int]:
    return {RAM: machine.memory_available, **{gpu_name(gpu.index): gpu.free for gpu in machine.gpus}}


def _summed(needs: Mapping[str, Mapping[str, int]], taken: Iterable[tuple[str, str, int, str]]) -> list[Held]:
    """taken: node, device, bytes and what went wrong, of each process."""
    held: dict[tuple[str, str], int] = {}
    why: dict[tuple[str, str], str] = {}
    for name, device, size, failed in taken:
        held[name, device] = held.get((name, device), 0) + size
        if failed:
            why[name, device] = failed
    return [
        Held(
            node=name, device=device, predicted=size, held=held.get((name, device), 0), why=why.get((name, device), "")
        )
        for name, of_node in needs.items()
        for device, size in of_node.items()
    ]


def take(holders: Sequence[tuple[str, Mapping[str, int]]], seconds: float) -> list[tuple[str, str, int, str]]:
    """Let a process for each of these take its share, all at a time. Return (node, device, bytes that it had, why not
    all) of each process and device."""
    with ExitStack() as running:
        processes = [running.enter_context(_Holder.started(share)) for _, share in holders]
        for process in processes:
            process.fill()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.holds for process in processes):
            time.sleep(0.05)
        return [
            (name, device, process.held.get(device, 0), process.failed(device, size))
            for (name, share), process in zip(holders, processes, strict=True)
            for device, size in share.items()
        ]


class _Holder:
    """A process of `launch.holding`."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self.held: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._done = False
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def started(cls, share: Mapping[str, int]) -> _Holder:
        command = [sys.executable, "-m", "bigpipe.orchestrator.launch.holding", json.dumps(share)]
        return cls(
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, start_new_session=True, env={**os.environ, **DEVICE_ORDER},
            )
        )  # fmt: skip

    def __enter__(self) -> _Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._reader.join()
        with self._child:  # closes its pipes
            pass

    def _read(self) -> None:
        for line in self._child.stdout or ():
            self._lines.put(line)
        self._lines.put(None)

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def holds(self) -> bool:
        """Has it all that it was to take?"""
        return self.alive and not self._refused

    def fill(self) -> None:
        """Wait until it has all, or has said that there is no more, or is gone."""
        while not self._done and (line := self._lines.get()) is not None:
            told: dict[str, Any] = json.loads(line)
            self._done = told.get("done", False)
            if "held" in told:
                self.held[told["device"]] = told["held"]
            elif "failed" in told:
                self._refused[told["device"]] = told["failed"]

    def failed(self, device: str, size: int) -> str:
        """Why it has not all of a device; "" where it has."""
        if device in self._refused:
            return self._refused[device]
        if not self.alive:
            code = self._child.returncode
            killed = code == -signal.SIGKILL
            return "the system killed the process that took it: memory ran out" if killed else f"it ended ({code})"
        return "" if self.held.get(device, 0) >= size else "no more could be had"


def _try_disk(plan: Plan) -> list[Held]:
    size, folder = plan.peak.known, existing(plan.session.store.root)
    if not size:
        return []
    try:
        with room_held(folder, size) as held:
            return [Held(node=WHOLE, device=DISK, predicted=size, held=size if held else None)]
    except OSError as error:
        free = free_space(folder)
        return [Held(node=WHOLE, device=DISK, predicted=size, held=min(free, size), why=error.strerror or str(error))]


def shortages(plan: Plan, rows: Sequence[Held]) -> list[DoesNotFit]:
    """Return an error for each row that is short, with the change under which a machine of no more would do."""
    short = [row for row in rows if row.short]
    cures = _cures(plan, short) if short else {}
    errors = []
    for row in short:
        had = "not tried" if row.held is None else f"{format_size(row.held)} could be had"
        cause = f"{row.node}: {format_size(row.predicted)} of {row.device} are foreseen, {had}: {row.why}"
        error = DoesNotFit(cause, cures.get(row.node) or "free some, or take a larger machine")
        error.node = row.node if row.node in plan.nodes else ""
        errors.append(error)
    return errors


def _cures(plan: Plan, short: Sequence[Held]) -> dict[str, str]:
    """Node → the usual cure of a plan for a machine that has what could be had."""
    session, machine = plan.session, plan.session.machine
    room = {row.device: row.held for row in short if row.held is not None}
    machine = replace(
        machine,
        memory=room.get(RAM, machine.memory),
        memory_available=room.get(RAM, machine.memory_available),
        disk_free=room.get(DISK, machine.disk_free),
        gpus=tuple(
            replace(gpu, memory=size, free=size) if (size := room.get(gpu_name(gpu.index))) is not None else gpu
            for gpu in machine.gpus
        ),
    )
    smaller = replace(session, given_machine=machine, _surroundings={}, _identities={})
    found = with_parameters(make_plan(smaller, preflight=False))
    return {name: str(misfit.cure) for name, misfit in found.misfits if misfit.cure}
