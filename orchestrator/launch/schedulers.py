"""Where this process stands among the machines that a scheduler started, as its variables tell.

    torchrun            TORCHELASTIC_RUN_ID, GROUP_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR (torchrun's manual)
    SLURM               SLURM_NNODES, SLURM_NODEID, SLURM_JOB_NODELIST and, within `srun`, those of the step (srun(1))
    training operator   PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR (Kubeflow Trainer)
    Kubernetes          JOB_COMPLETION_INDEX, HOSTNAME: an indexed Job, whose pods are NAME-INDEX (Kubernetes, "Job")

The first of these whose variables are there counts: what was started last knows best.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bigpipe.errors import UsageError

MOST_NAMES = 2**16
_RANGE = re.compile(r"([0-9]+)-([0-9]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Standing:
    """One of several machines that were started together."""

    scheduler: str
    job: str
    """The same on all of them, and other than that of any other job."""
    rank: int
    count: int | None
    """None: the scheduler does not tell."""
    address: str | None
    """Of machine 0."""
    names: tuple[str, ...] = ()
    """Of all machines in their order, as far as they are known."""

    def name(self, rank: int) -> str:
        """Return what a machine is called in errors."""
        return f"machine {rank}" + (f" ({self.names[rank]})" if rank < len(self.names) else "")


def standing(environment: Mapping[str, str]) -> Standing | None:
    """Return where this process stands; None where no scheduler started it. Raise UsageError for variables that are
    not what the scheduler sets, and for several processes on one machine."""
    for mark, read in _SCHEDULERS.items():
        if mark in environment:
            found = read(_Variables(environment))
            if found.count is not None and not 0 <= found.rank < found.count:
                cause = f"{found.scheduler} says that this is machine {found.rank} of {found.count}"
                raise UsageError(cause, "ranks of machines count from 0: look at its variables")
            return found
    return None


def may_attend(environment: Mapping[str, str]) -> bool:
    """Return whether a scheduler says that this is not the first of its machines."""
    try:
        place = standing(environment)
    except UsageError:  # told where several machines are asked for
        return False
    return place is not None and place.rank != 0


class _Variables:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def text(self, *names: str) -> str | None:
        """The first of these that is set."""
        return next((self._environment[name] for name in names if self._environment.get(name)), None)

    def number(self, *names: str) -> int | None:
        name = next((name for name in names if self._environment.get(name)), None)
        if name is None:
            return None
        text = self._environment[name]
        if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII):
            raise UsageError(f"{name} is {text!r:.40}, and no number", "set it as the scheduler does, or unset it")
        return int(text)

    def one_a_machine(self, name: str, how: str) -> None:
        """Raise UsageError where this is not the first process on its machine."""
        if self.number(name):
            cause = f"this is process {self.number(name)} on its machine, and bigpipe starts the ranks there itself"
            raise UsageError(cause, f"start it once on each machine: {how}")


def _torchrun(given: _Variables) -> Standing:
    given.one_a_machine("LOCAL_RANK", "torchrun --nproc-per-node=1")
    world, local = given.number("WORLD_SIZE"), given.number("LOCAL_WORLD_SIZE") or 1
    rank = given.number("GROUP_RANK")
    address = given.text("MASTER_ADDR")
    job = f"{given.text('TORCHELASTIC_RUN_ID')} {address}:{given.text('MASTER_PORT')}"
    return Standing("torchrun", job, rank or 0, world // local if world else None, address)


def _slurm(given: _Variables) -> Standing:
    given.one_a_machine("SLURM_LOCALID", "srun --ntasks-per-node=1")
    names = tuple(node_names(given.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") or ""))
    job = f"{given.text('SLURM_JOB_ID', 'SLURM_JOBID')}.{given.text('SLURM_STEP_ID')}"
    count = given.number("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    return Standing("SLURM", job, given.number("SLURM_NODEID") or 0, count, names[0] if names else None, names)


def _operator(given: _Variables) -> Standing:
    given.one_a_machine("LOCAL_RANK", "PET_NPROC_PER_NODE=1")
    address = given.text("PET_MASTER_ADDR") or (given.text("PET_RDZV_ENDPOINT") or "").rpartition(":")[0] or None
    rank = given.number("PET_NODE_RANK", "JOB_COMPLETION_INDEX")
    job = given.text("PET_RDZV_ID") or str(address)
    return Standing("the training operator", job, rank or 0, given.number("PET_NNODES"), address)


def _indexed_job(given: _Variables) -> Standing:
    rank, own = given.number("JOB_COMPLETION_INDEX") or 0, given.text("HOSTNAME") or ""
    host, dot, domain = own.partition(".")
    name = host.removesuffix(f"-{rank}")
    address = f"{name}-0{dot}{domain}" if name != host else None
    return Standing("Kubernetes", name, rank, None, address)


_SCHEDULERS: Mapping[str, Callable[[_Variables], Standing]] = {
    "TORCHELASTIC_RUN_ID": _torchrun,
    "SLURM_JOB_ID": _slurm,
    "PET_NNODES": _operator,
    "JOB_COMPLETION_INDEX": _indexed_job,
}


def node_names(text: str) -> Iterator[str]:
    """Yield the names in a list of SLURM's: `gpu[01-03,7],login` are gpu01, gpu02, gpu03, gpu7 and login. Raise
    UsageError for what is no such list."""
    count = 0
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        for name in _spelled_out(part):
            count += 1
            if count > MOST_NAMES or not name.isprintable() or set(name) & set("[] "):
                raise UsageError(f"a list of nodes is {text!r:.80}", "write it as `scontrol show hostnames` takes it")
            yield name


def _spelled_out(part: str) -> Iterator[str]:
    """One part of a list, whose brackets may be several."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inner, _, tail = rest.partition("]")
    for one in inner.split(","):
        bounds = _RANGE.fullmatch(one)
        numbers = range(int(bounds[1]), min(int(bounds[2]), int(bounds[1]) + MOST_NAMES) + 1) if bounds else ()
        for middle in (f"{number:0{len(bounds[1])}}" for number in numbers) if bounds else (one,):
            for end in _spelled_out(tail) if tail else ("",):
                yield f"{head}{middle}{end}"
