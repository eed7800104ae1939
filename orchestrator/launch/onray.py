"""Ray as a cluster: every attempt of a node is a task, with the CPUs, memory and GPUs that it needs.

Ray decides where and when a task runs. It does not run it again: that is done here, where the work folder is known to
be free and what was lost can be told. A task yields what its attempt tells as it goes, see `errands`.

Ray's own interfaces: docs.ray.io, "Ray Core"; token authentication: docs.ray.io, "Ray security".
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from bigpipe.errors import Interrupted, NotAuthorised, StageFailed, Transient, UsageError
from bigpipe.machine import Machine, detect
from bigpipe.orchestrator.contract import LogLine
from bigpipe.sizes import counted, format_size

from .clusters import Cluster, Host, await_end
from .errands import Errand, attend, work
from .executors import Executor
from .jobs import Job, Needs, Outcome
from .schedulers import Standing

RESTARTS = 3
"""How often an attempt is run again whose worker or machine was lost."""
LOOK_SECONDS = 0.1
PATIENCE = 5.0
"""Seconds after which it is told that a task waits for its turn."""
ANSWER_SECONDS = 10.0
PROBE_SECONDS = 60.0
END_SECONDS = 20.0
"""How long a cancelled task may take to end its processes, before its worker is killed."""
NODE = "ray.io/node-id"
"""The label that Ray gives each machine."""
LETS_IN, REFUSES = 0, 3
PROBE = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit({REFUSES})
"""
"""In a process of its own, since Ray reads its variables once."""
CONNECT = "`ray start --head` starts one; bigpipe runs on one of its machines, with --executor ray:HOST:PORT"
GUARD = (
    "make a token with `ray get-auth-token --generate`, copy it to ~/.ray/auth_token on every machine, and set "
    "RAY_AUTH_MODE=token wherever Ray starts and here"
)


class Lost(Exception):
    """A worker or its machine is gone; says how."""


def connect(address: str, root: os.PathLike[str]) -> Cluster:
    """Return the Ray cluster at `HOST:PORT`, or the one that RAY_ADDRESS or this machine has. root: of the store.
    Raise UsageError where there is none, or it is open to everybody; NotAuthorised for a token that is not its own."""
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _join(ray, address)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        at = ray.get_runtime_context().gcs_address
        _require_guard(at, [node["NodeManagerAddress"] for node in nodes])
        hosts = _hosts(ray, nodes, Path(root))
    except BaseException:
        _leave(ray, ours)
        raise
    if not hosts:
        _leave(ray, ours)
        raise UsageError(f"no machine of the Ray cluster at {at} gives out CPUs", "start Ray there with --num-cpus")
    executor = Executor(run=_Tasks(ray).run)
    return Cluster(name=f"Ray at {at}", hosts=hosts, executor=executor, close=lambda: _leave(ray, ours))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed here", "pip install 'bigpipe-ml[ray]'") from error
    return ray


def _join(ray: Any, address: str) -> None:
    address = address or os.environ.get("RAY_ADDRESS", "")
    where = f"at {address}" if address else "on this machine"
    _require_answer(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "auto", log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        if isinstance(error, ray.exceptions.AuthenticationError) or (
            address and _lets_in(address, os.environ) is False
        ):
            cause = f"the Ray cluster {where} refuses: its token is another, or is not here"
            raise NotAuthorised(cause, GUARD) from error
        raise UsageError(f"no Ray cluster answers {where}: {str(error).partition(chr(10))[0]}", CONNECT) from error
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the command without a word
    _quiet()


def _require_answer(address: str) -> None:
    """Raise UsageError where nobody listens at an address: Ray would try for minutes."""
    if address in ("", "auto"):
        return
    name, _, port = address.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), ANSWER_SECONDS):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"no Ray cluster answers at {address}: {error}", CONNECT) from error


def _quiet() -> None:
    """Ray prints on standard output what its daemons say of lost workers, whatever `log_to_driver` says (2.60); it is
    told in our own words, and standard output is for results."""
    from ray._private import worker

    worker.print_to_stdstream = lambda *given, **options: None


def _leave(ray: Any, ours: bool) -> None:
    if ours:
        ray.shutdown()


def _require_guard(at: str, addresses: list[str]) -> None:
    """Raise UsageError for a cluster that others can reach and that lets everybody in. Ray listens on all interfaces;
    who may send it a task may run any code there."""
    if all(map(_is_loopback, addresses)):
        return
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    lets_in = _lets_in(at, {**stranger, "RAY_AUTH_MODE": "disabled"})
    if lets_in:
        raise UsageError(f"the Ray cluster at {at} takes tasks from anybody who can reach it", GUARD)
    if lets_in is None:
        raise Transient(f"the Ray cluster at {at} does not say whether it is guarded by a token", "try again")


def _lets_in(address: str, environment: Mapping[str, str]) -> bool | None:
    """Return whether a cluster answers a process with these variables; None where it says neither."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", PROBE, address], env=environment, check=False, capture_output=True,
            timeout=PROBE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return {LETS_IN: True, REFUSES: False}.get(asked.returncode)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name may lead anywhere
        return False


def _hosts(ray: Any, nodes: list[Any], root: Path) -> tuple[Host, ...]:
    """Ask each machine that gives out CPUs what it has."""
    able = [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    asked = [look.options(scheduling_strategy=pinned(node["NodeID"], soft=False)).remote(str(root)) for node in able]
    try:
        found = ray.get(asked, timeout=PROBE_SECONDS)
    except ray.exceptions.RayError as error:
        cause = f"a machine of the Ray cluster does not answer: {_short(error)}"
        raise Transient(
            cause, "see that bigpipe-ml is installed on each, and that they are up: `ray status`"
        ) from error
    return tuple(_host(node, machine) for node, machine in zip(able, found, strict=True))


def _look(root: str) -> Machine:
    """On a machine: what it has. Ray hides the GPUs from tasks that ask for none."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "-"):
        del os.environ["CUDA_VISIBLE_DEVICES"]
    return detect(Path(root))


def _host(node: Any, machine: Machine) -> Host:
    resources = node["Resources"]
    machine = replace(
        machine,
        name=f"{machine.name} ({node['NodeManagerAddress']})",
        cpus=int(resources["CPU"]),
        gpus=machine.gpus[: int(resources.get("GPU", 0))],
    )
    return Host(id=node["NodeID"], machine=machine, ram=int(resources.get("memory", 0)), labels=node["Labels"])


def _short(error: BaseException) -> str:
    """What an error of Ray's says, without tracebacks and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if hasattr(error, "traceback_str") else lines[0].partition(". ")[0]


def _work(errand: Errand) -> Iterator[Any]:
    import ray

    yield from work(errand, str(ray.util.get_node_ip_address()))


def _attend(errand: Errand, rank: int) -> Iterator[Any]:
    yield from attend(errand, rank)


@dataclass(frozen=True, slots=True)
class _Tasks:
    """Attempts as tasks. Used by a thread for each."""

    ray: Any

    def run(self, job: Job) -> Outcome:
        """Run an attempt as a task; again, where its worker was lost. Raise what `Executor.start` does."""
        for time_number in count(1):
            try:
                return self._once(job, time_number)
            except Lost as error:
                if time_number > RESTARTS:
                    cause = f"{job.node}: its worker was lost {time_number} times; the last time: {error}"
                    raise StageFailed(cause, "look at Ray's own logs there, and whether memory ran out") from error
                line = f"its worker was lost: {error}; it is run again ({time_number} of {RESTARTS})"
                job.report(LogLine(job.node, line))
                await_end(job.out.parent, job.cancelled)
                job.folder.clear()
        raise AssertionError  # `count` has no end

    def _once(self, job: Job, time_number: int) -> Outcome:
        outcome = self._on_several(job, time_number) if job.launch.num_machines > 1 else self._on_one(job)
        if outcome.failure is not None:
            raise outcome.failure.error(job.node, job.folder.log)
        return outcome

    def _on_one(self, job: Job) -> Outcome:
        # Where any machine may do it, none is named, and those that join later may too.
        selector = _selector(job.needs)
        options = {"label_selector": selector} if selector else {}
        return self._follow(job, [self._task(_work, job.needs, **options).remote(Errand.of(job))])

    def _on_several(self, job: Job, time_number: int) -> Outcome:
        """Ranks on several machines, a bundle of what each needs on each: the first calls the others."""
        needs, util = job.needs, self.ray.util
        ranks = range(job.launch.num_machines)
        selector = _selector(needs)
        bundle = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.ram}
        group = util.placement_group(
            [{name: size for name, size in bundle.items() if size} for _ in ranks],
            strategy="STRICT_SPREAD",
            bundle_label_selector=[selector for _ in ranks] if selector else None,
        )
        pinned = util.scheduling_strategies.PlacementGroupSchedulingStrategy
        places = [pinned(placement_group=group, placement_group_bundle_index=rank) for rank in ranks]
        try:
            self._await(job, group)
            standing = Standing("Ray", f"{group.id.hex()} {time_number}", 0, len(ranks), None)
            errand = replace(Errand.of(job), standing=standing)
            others = [
                self._task(_attend, needs, scheduling_strategy=places[rank]).remote(errand, rank) for rank in ranks[1:]
            ]
            return self._follow(job, [self._task(_work, needs, scheduling_strategy=places[0]).remote(errand), *others])
        finally:
            util.remove_placement_group(group)

    def _task(self, function: Callable[..., Any], needs: Needs, **options: Any) -> Any:
        return self.ray.remote(
            max_retries=0,
            num_returns="streaming",
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=needs.ram,
            **options,
        )(function)

    def _await(self, job: Job, group: Any) -> None:
        waits, ready = _Waits(job), group.ready()
        with self._told():
            while not self.ray.wait([ready], timeout=LOOK_SECONDS)[0]:
                waits.look()

    def _follow(self, job: Job, streams: list[Any]) -> Outcome:
        """Pass on what tasks tell, and return what the first came to, or the failure of another; end all of them where
        the run is interrupted. Raise Lost where one is gone."""
        waits, going = _Waits(job), [*streams]
        try:
            while True:
                ready, _ = self.ray.wait(going, num_returns=1, timeout=LOOK_SECONDS, fetch_local=False)
                waits.look()
                for stream in ready:
                    waits.over = True
                    with self._told():
                        told = self.ray.get(next(stream))
                    if isinstance(told, list):
                        for event in told:
                            job.report(event)
                        continue
                    outcome = Outcome.model_validate_json(told)
                    if stream is streams[0] or outcome.failure is not None:
                        return outcome
                    going.remove(stream)
        finally:
            self._end(streams)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise in our own words what Ray says of a task that gave nothing."""
        errors = self.ray.exceptions
        try:
            yield
        except StopIteration:
            raise Lost("it ended without a word") from None
        except errors.TaskCancelledError as error:
            raise Lost("somebody cancelled its task") from error
        except errors.RayTaskError as error:
            cure = "see that the same bigpipe-ml is installed on every machine of the cluster"
            raise StageFailed(f"a task could not run: {_short(error)}", cure) from error
        except errors.RayError as error:
            raise Lost(_short(error)) from error

    def _end(self, streams: list[Any]) -> None:
        """Cancel what still goes on, and wait until no process of it is left; kill workers that take too long."""
        ends = {stream.completed(): stream for stream in streams}
        for stream in streams:
            with suppress(Exception):  # it has ended, or its machine is gone
                self.ray.cancel(stream)
        _, left = self.ray.wait([*ends], num_returns=len(ends), timeout=END_SECONDS, fetch_local=False)
        for end in left:
            with suppress(Exception):
                self.ray.cancel(ends[end], force=True)


@dataclass(slots=True)
class _Waits:
    """The time before a task begins."""

    job: Job
    since: float = field(default_factory=time.monotonic)
    over: bool = False

    def look(self) -> None:
        """Tell once that it waits. Raise Interrupted."""
        job = self.job
        if job.cancelled.is_set():
            raise Interrupted("interrupted", "the same command continues where it stopped")
        if not self.over and time.monotonic() - self.since > PATIENCE:
            self.over = True
            what = ", ".join(filter(None, [
                counted(job.needs.cpus, "CPU"), counted(job.needs.gpus, "GPU") if job.needs.gpus else "",
                f"{format_size(job.needs.ram)} of RAM" if job.needs.ram else "",
            ]))  # fmt: skip
            machines = job.launch.num_machines
            where = f"each of {machines} machines" if machines > 1 else "one machine"
            job.report(LogLine(job.node, f"waits until {where} of the cluster has {what} free"))


def _selector(needs: Needs) -> dict[str, str]:
    return {NODE: f"in({','.join(needs.hosts)})"} if needs.hosts else {}
