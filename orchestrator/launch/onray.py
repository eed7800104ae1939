"""Ray as a cluster: every attempt of a node is a task, with the CPUs, memory and GPUs that it needs.

Ray decides where and when a task runs. It does not run it again: that is done here, where the work folder is known to
be free and what was lost can be told. A task yields what its attempt tells as it goes, see `errands`.

Ray's own interfaces: docs.ray.io, "Ray Core".
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from .rayguard import GUARD, PROBE_SECONDS, lets_in, require_guard
from .rayhead import ANSWER_SECONDS, CONNECT, NONE_NAMED, Head, is_same, require_answer, stay_with_it
from .schedulers import Standing

RESTARTS = 3
"""How often an attempt is run again whose worker or machine was lost."""
LOOK_SECONDS = 0.1
PATIENCE = 5.0
"""Seconds after which it is told that a task waits for its turn."""
END_SECONDS = 20.0
"""How long a cancelled task may take to end its processes, before its worker is killed."""
NODE = "ray.io/node-id"
"""The label that Ray gives each machine."""
OTHER_VERSIONS = "Version mismatch:"
"""How Ray begins its error for another Python, or another Ray (2.60, `check_version_info`)."""


class Lost(Exception):
    """A worker or its machine is gone; says how."""


def connect(address: str, root: os.PathLike[str]) -> Cluster:
    """Return the Ray cluster at `HOST:PORT`, or the one that RAY_ADDRESS or this machine has. root: of the store.
    Raise UsageError where there is none, or it is open to everybody; NotAuthorised for a token that is not its own."""
    ray = _ray()
    ours = not ray.is_initialized()
    leave = _join(ray, address) if ours else lambda: None
    try:
        at = ray.get_runtime_context().gcs_address
        if not ours and address not in NONE_NAMED and not is_same(address, at):
            cause = f"this process is connected to the Ray cluster at {at}, and not to the one at {address}"
            raise UsageError(cause, "call ray.shutdown() before, or leave out the address")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        require_guard(at, [node["NodeManagerAddress"] for node in nodes])
        hosts = _hosts(ray, nodes, Path(root))
        if not hosts:
            cause = f"no machine of the Ray cluster at {at} gives out CPUs"
            raise UsageError(cause, "start Ray there with --num-cpus")
    except BaseException:
        leave()
        raise
    head = Head(at)

    def close() -> None:
        head.close()
        leave()

    return Cluster(name=f"Ray at {at}", hosts=hosts, executor=Executor(run=_Tasks(ray, head).run), close=close)


def _ray() -> Any:
    stay_with_it()
    try:
        import ray
    except ImportError as error:
        raise UsageError("Ray is not installed here", "pip install 'bigpipe-ml[ray]'") from error
    return ray


def _join(ray: Any, address: str) -> Callable[[], None]:
    """Return what leaves it again."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    where = f"at {address}" if address else "on this machine"
    require_answer(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "auto", log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise _refusal(ray, address, where, error) from error
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own would end the command without a word
    speak = _quiet()

    def leave() -> None:
        if not _in_time(ray.shutdown):
            atexit.unregister(ray.shutdown)  # or the end of this process would wait for the same again
        speak()

    return leave


def _refusal(ray: Any, address: str, where: str, error: Exception) -> UsageError | NotAuthorised:
    """What it means that one cannot join."""
    if isinstance(error, ray.exceptions.AuthenticationError) or (address and lets_in(address, os.environ) is False):
        return NotAuthorised(f"the Ray cluster {where} refuses: its token is another, or is not here", GUARD)
    told = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if told[0].startswith(OTHER_VERSIONS):
        cause = f"the Ray cluster {where} is of other versions: {' '.join(told).removeprefix(OTHER_VERSIONS).strip()}"
        return UsageError(cause, "install the same Python and the same ray on all machines, and here")
    return UsageError(f"no Ray cluster answers {where}: {told[0]}", CONNECT)


def _quiet() -> Callable[[], None]:
    """Ray prints on standard output what its daemons say of lost workers, whatever `log_to_driver` says (2.60); it is
    told in our own words, and standard output is for results. Return what lets it print again."""
    from ray._private import worker

    before = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *given, **options: None
    return lambda: setattr(worker, "print_to_stdstream", before)


def _in_time(work: Callable[[], object]) -> bool:
    """Do what a head is asked for, which may be gone: nobody waits for it longer. Return whether it came to an end."""

    def run() -> None:
        with suppress(Exception):  # what it says then helps nobody
            work()

    thread = threading.Thread(target=run, name="cluster", daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return not thread.is_alive()


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

    yield from work(errand, str(ray.util.get_node_ip_address()), _given_here(ray))


def _attend(errand: Errand, rank: int) -> Iterator[Any]:
    import ray

    yield from attend(errand, rank, _given_here(ray))


def _given_here(ray: Any) -> int | None:
    """In a task: the CPUs that its machine gives out, as `_host` has them. None where nobody knows."""
    with suppress(ray.exceptions.RayError, KeyError):
        own = ray.get_runtime_context().get_node_id()
        return next((int(node["Resources"]["CPU"]) for node in ray.nodes() if node["NodeID"] == own), None)
    return None


@dataclass(frozen=True, slots=True)
class _Tasks:
    """Attempts as tasks. Used by a thread for each."""

    ray: Any
    head: Head

    def run(self, job: Job) -> Outcome:
        """Run an attempt as a task; again, where its worker was lost. Raise what `Executor.start` does, and Transient
        where the head is gone."""
        self.head.begin()
        for time_number in count(1):
            try:
                return self._once(job, time_number)
            except Lost as error:
                self._await_head(job)
                if time_number > RESTARTS:
                    cause = f"{job.node}: its worker was lost {time_number} times; the last time: {error}"
                    raise StageFailed(cause, "look at Ray's own logs there, and whether memory ran out") from error
                line = f"its worker was lost: {error}; it is run again ({time_number} of {RESTARTS})"
                job.report(LogLine(job.node, line))
                await_end(job.out.parent, job.cancelled)
                job.folder.clear()
        raise AssertionError  # `count` has no end

    def _once(self, job: Job, time_number: int) -> Outcome:
        self._await_head(job)
        outcome = self._on_several(job, time_number) if job.launch.num_machines > 1 else self._on_one(job)
        if outcome.failure is not None:
            raise outcome.failure.error(job.node, job.folder.log)
        return outcome

    def _on_one(self, job: Job) -> Outcome:
        # Where any machine may do it, none is named, and those that join later may too.
        selector = _selector(job.needs)
        options = {"label_selector": selector} if selector else {}
        with self._told():
            stream = self._task(_work, job.needs, **options).remote(Errand.of(job))
        return self._follow(job, [stream])

    def _on_several(self, job: Job, time_number: int) -> Outcome:
        """Ranks on several machines, a bundle of what each needs on each: the first calls the others."""
        needs, util = job.needs, self.ray.util
        ranks = range(job.launch.num_machines)
        selector = _selector(needs)
        bundle = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.ram}
        with self._told():
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
            streams: list[Any] = []
            try:
                with self._told():
                    streams.append(self._task(_work, needs, scheduling_strategy=places[0]).remote(errand))
                    for rank in ranks[1:]:
                        task = self._task(_attend, needs, scheduling_strategy=places[rank])
                        streams.append(task.remote(errand, rank))
            except BaseException:
                self._end(streams)
                raise
            return self._follow(job, streams)
        finally:
            _in_time(lambda: util.remove_placement_group(group))

    def _task(self, function: Callable[..., Any], needs: Needs, **options: Any) -> Any:
        return self.ray.remote(
            max_retries=0,
            num_returns="streaming",
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=needs.ram,
            **options,
        )(function)

    def _await_head(self, job: Job) -> None:
        """Of a head that is gone its machines are lost first, and again, wherever they are sought."""
        while not self.head.ask():
            self._waits(job).look()
            time.sleep(LOOK_SECONDS)

    def _waits(self, job: Job) -> _Waits:
        return _Waits(job, self.head, self.ray)

    def _await(self, job: Job, group: Any) -> None:
        waits = self._waits(job)
        with self._told():
            ready = group.ready()
            while not self.ray.wait([ready], timeout=LOOK_SECONDS)[0]:
                waits.look()

    def _follow(self, job: Job, streams: list[Any]) -> Outcome:
        """Pass on what tasks tell, and return what the first came to, or the failure of another; end all of them where
        the run is interrupted. Raise Lost where one is gone."""
        waits, going = self._waits(job), [*streams]
        try:
            while True:
                with self._told():
                    ready, _ = self.ray.wait(going, num_returns=1, timeout=LOOK_SECONDS, fetch_local=False)
                waits.look()
                for stream in ready:
                    waits.over = True
                    told = self._next(stream, waits)
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

    def _next(self, stream: Any, waits: _Waits) -> Any:
        """Return what a task has told. Bytes of a machine that is gone may never come."""
        with self._told():
            item = next(stream)
            while True:
                try:
                    return self.ray.get(item, timeout=PATIENCE)
                except self.ray.exceptions.GetTimeoutError:
                    waits.look()

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
        left = [*ends]
        with suppress(self.ray.exceptions.RayError):  # its own machine is gone
            _, left = self.ray.wait(left, num_returns=len(left), timeout=END_SECONDS, fetch_local=False)
        for end in left:
            with suppress(Exception):
                self.ray.cancel(ends[end], force=True)


@dataclass(slots=True)
class _Waits:
    """The time before a task begins."""

    job: Job
    head: Head
    ray: Any
    since: float = field(default_factory=time.monotonic)
    over: bool = False
    _told: bool = False

    def look(self) -> None:
        """Tell once that it waits. Raise Interrupted, and Transient where it would wait in vain."""
        job = self.job
        if job.cancelled.is_set():
            raise Interrupted("interrupted", "the same command continues where it stopped")
        self.head.check()
        if self.over or time.monotonic() - self.since <= PATIENCE:
            return
        self.since = time.monotonic()
        self._require_machines()
        if not self._told:
            self._told = True
            what = ", ".join(filter(None, [
                counted(job.needs.cpus, "CPU"), counted(job.needs.gpus, "GPU") if job.needs.gpus else "",
                f"{format_size(job.needs.ram)} of RAM" if job.needs.ram else "",
            ]))  # fmt: skip
            machines = job.launch.num_machines
            where = f"each of {machines} machines" if machines > 1 else "one machine"
            job.report(LogLine(job.node, f"waits until {where} of the cluster has {what} free"))

    def _require_machines(self) -> None:
        """A machine that comes again is another one to Ray."""
        named, asked = self.job.needs.hosts, self.job.launch.num_machines
        if not named or not self.head.answers:
            return
        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        if len(alive & {*named}) < asked:
            cause = f"{self.job.node}: of the machines that may run it, too few are left in the cluster"
            raise Transient(cause, "run it again: a plan counts with the machines that are there then")


def _selector(needs: Needs) -> dict[str, str]:
    return {**needs.labels, **({NODE: f"in({','.join(needs.hosts)})"} if needs.hosts else {})}
