"""One attempt of a node: in this process, in a child, or as ranks; nobody is left behind."""

from typing import TYPE_CHECKING

from bigpipe.faces import face

if TYPE_CHECKING:
    from .acceleration import effective_launch as effective_launch
    from .alone import run_alone as run_alone
    from .environment import visible_secrets as visible_secrets
    from .executors import executor as executor
    from .jobs import AttemptFolder as AttemptFolder, Job as Job, Outcome as Outcome
    from .redaction import Redactor as Redactor
    from .warm import MEMORY as MEMORY, WarmWorker as WarmWorker, start_warm as start_warm
else:
    __getattr__ = face(
        __name__,
        acceleration="effective_launch",
        alone="run_alone",
        environment="visible_secrets",
        executors="executor",
        jobs="AttemptFolder Job Outcome",
        redaction="Redactor",
        warm="MEMORY WarmWorker start_warm",
    )
