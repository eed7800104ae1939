"""One attempt of a node: in this process, in a child or as ranks; no process is left behind."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .acceleration import effective_launch, require_heeded, runs_on_cpu
    from .clusters import Cluster, Host, open_cluster
    from .environment import DEVICE_ORDER, visible_secrets, worker_environment
    from .executors import Executor, distributions_with, executor, run_alone
    from .holding import RAM, gpu_name
    from .jobs import AttemptFolder, Failure, Job, JobFile, Needs, Outcome, ran_out
    from .meeting import Meeting, attend, meeting_place
    from .processes import MEMORY, WarmWorker, worker_command
    from .ranks import start_here
    from .schedulers import Standing, may_attend, standing

__getattr__, __all__ = face(__name__)
