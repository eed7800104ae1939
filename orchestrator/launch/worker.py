"""The entry of every worker: `python -m bigpipe.orchestrator.launch.worker JOBFILE MODE [MACHINE | --warm MODULE…]`.

    run       a process stage
    prepare   a rank stage's plan, before the launch
    launch    accelerate's launcher, which starts this module again for each rank, in mode `rank`
    rank      one rank
    finish    a rank stage's merge, after all ranks ended

With `--warm` it imports modules and waits until it is told on its input that the job file is there; see
`WarmWorker`.

The first statements of `begin` tie the process to its parent and its work folder, before anything heavy is imported.
A worker ends by `os._exit` once its result is written: libraries that crash in their own teardown change nothing. What
the kind itself left open or under way is finished before (`leaving`).

On further machines (`num_machines` over 1) whoever attends the meeting there, or a person, starts mode `launch` with
that machine's rank on the job file of the first machine, which must lie on a file system that all share.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .lifeline import ORPHANED, PARENT_VARIABLE, UNTOLD, hold_work_folder, sign_in, stand_in_for_parent, tie_to_parent

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract import Reporter, Stage, StageResult

    from .jobs import AttemptFolder, JobFile, Mode, Outcome


def main(arguments: list[str]) -> None:
    """Never returns."""
    path, mode, more = Path(arguments[0]), cast("Mode", arguments[1]), arguments[2:]
    try:
        status = begin(path, mode, more)
    except Exception as error:
        from .jobs import ran_out

        if (told := ran_out(error)) is None:
            raise
        sys.stderr.write(f"{told}\n")
        status = UNTOLD
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def begin(path: Path, mode: Mode, more: list[str]) -> int:
    """Sign in, wait for the word where it is told to, and work; return the exit status. Raise OSError where nothing can
    be written to or read from the attempt's folder."""
    tie_to_parent(signal.SIGTERM if mode == "rank" else signal.SIGKILL)
    stand_in_for_parent()
    rank = int(os.environ.get("RANK", "0")) if mode == "rank" else None  # torchrun's; a single one is started without
    sign_in(path.parent / "processes", rank)
    if mode != "launch":
        if more:
            warm_up(more[1:])
        hold_work_folder(Path(json.loads(path.read_bytes())["assignment"]["out"]).parent)
    return work(path, mode, rank if rank is not None else int(more[0]) if mode == "launch" and more else 0)


def warm_up(modules: list[str]) -> None:
    """Import what will be needed, then wait for the word to begin. Ends this process where it never comes."""
    from importlib import import_module

    for name in ("bigpipe.orchestrator.launch.jobs", "bigpipe.orchestrator.launch.output", *modules):
        with suppress(Exception):  # whoever needs it will fail with it, and be heard
            import_module(name)
    if not sys.stdin.buffer.readline():
        os._exit(ORPHANED)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def work(path: Path, mode: Mode, rank: int) -> int:
    """Do what this mode asks for and write what came of it; return the exit status. Of ranks, each tells for itself.
    rank: of a launcher, that of its machine."""
    from bigpipe.errors import BigpipeError
    from bigpipe.redaction import conceal_environment, redact

    from .jobs import AttemptFolder, Failure, JobFile, Outcome, require_inputs
    from .processes import own_peak

    file, folder = JobFile.read(path, os.environ), AttemptFolder(path.parent)
    conceal_environment(os.environ, file.secrets)
    try:
        if mode == "launch":
            if rank:  # on the first machine the inputs were made, or brought
                require_inputs(file.assignment)
            _launch(folder, rank)
            return 0
        outcome = _call_stage(file, folder, mode, rank)
    except BaseException as error:
        told = f"{error}\n" if isinstance(error, BigpipeError) else traceback.format_exc()
        sys.stderr.write(redact(told))  # into the log
        outcome = Outcome(failure=Failure.of(error), codes=_exit_codes(error))
    outcome.model_copy(update={"peak_rss": own_peak()}).write(folder.outcome(mode, rank))
    return 1 if outcome.failure else 0


def _launch(folder: AttemptFolder, machine_rank: int) -> None:
    """Run accelerate's launcher in this process."""
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistNetworkError

    from bigpipe.errors import Transient

    machine = ["--machine_rank", str(machine_rank)] if machine_rank else []
    command = ["--config_file", str(folder.acceleration), *machine, "-m", __spec__.name, str(folder.job), "rank"]
    try:
        launch_command(launch_command_parser().parse_args(command))
    except (ConnectionError, DistNetworkError) as error:  # accelerate's for a port that is taken, and torch's
        raise Transient(f"the ranks could not be brought together: {error}", "try again") from error


def _exit_codes(error: BaseException) -> dict[int, int]:
    """Rank → how it ended, as torchrun or accelerate tells it."""
    from subprocess import CalledProcessError

    if isinstance(error, CalledProcessError):  # one rank was started directly
        return {0: error.returncode}
    failures = getattr(error, "failures", {})  # torch.distributed.elastic's ChildFailedError
    return {int(rank): int(failure.exitcode) for rank, failure in failures.items()}


def _call_stage(file: JobFile, folder: AttemptFolder, mode: Mode, rank: int) -> Outcome:
    from bigpipe.modules import import_attribute
    from bigpipe.orchestrator.contract import RankHello, StageContext

    from .jobs import Outcome
    from .leaving import await_threads, write_out
    from .output import EventWriter

    job, rank_dir = file.assignment, None
    if mode == "rank":
        _redirect_output(folder.output_pipe(rank))
    with closing(EventWriter(folder.events / f"{mode}-{rank}.jsonl")) as events:
        if mode == "rank":
            _join_ranks(file, folder, rank, events)
            rank_dir = job.scratch / f"rank-{rank}"
            rank_dir.mkdir(parents=True, exist_ok=True)
        world_size = job.launch.num_processes
        context = StageContext.of(
            job, reporter=events, rank=rank, world_size=world_size, rank_dir=rank_dir, lost=folder.lost()
        )
        kind: Stage[Any] = import_attribute(file.module, job.trust.home(file.module, job.base))
        params = kind.params.model_validate(file.params)
        stage = kind.with_params(params)
        if mode == "run":  # ranks have said so when all were there
            events.report(RankHello(job.node, 0, 1, os.getpid()))
        functions = {"prepare": stage.ranks.prepare, "finish": stage.ranks.finish}
        function: Callable[..., StageResult | None] | None = functions.get(mode, stage.run)
        assert function is not None  # noqa: S101 (the executor asks for what there is)
        given = function(params, context)
        await_threads(kind.kind, job.out, job.scratch)
        write_out(job.out, job.scratch)
    return Outcome() if mode == "prepare" else Outcome.of(given, stage)


def _redirect_output(pipe: Path) -> None:
    """Print into the pipe that the command reads for this rank; where nobody does, the launcher's own output stays."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    os.set_blocking(descriptor, True)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _join_ranks(file: JobFile, folder: AttemptFolder, rank: int, events: Reporter) -> None:
    """Bring up the process group and say hello. Raise StageFailed where not as many ranks came up as were asked for:
    `accelerate launch` may start fewer without a word, and each would then do, or leave out, the work of another."""
    if file.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch would offer what is there, and kinds would take it
    from accelerate import PartialState

    from bigpipe.errors import StageFailed
    from bigpipe.orchestrator.contract import RankHello

    state = PartialState(cpu=file.cpu)
    came, asked = int(state.num_processes), file.assignment.launch.num_processes
    events.report(RankHello(file.assignment.node, state.process_index, came, os.getpid()))
    if (state.process_index, came) != (rank, asked):
        raise StageFailed(
            f"{asked} ranks were asked for, but rank {state.process_index} of {came} came up as rank {rank}",
            f"look at what the launcher was told, {folder.acceleration}, and at `launch.config_file`",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
