"""How long a node's work takes, whatever comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from bigpipe.orchestrator.planning import NodeState
from bigpipe.orchestrator.store import KeyRecord


def timed(state: NodeState, work: Callable[[], KeyRecord | None]) -> KeyRecord | None:
    """Do the work and note its seconds. A disk or memory that ran out is told as such."""
    from bigpipe.orchestrator.launch import ran_out

    started = time.monotonic()
    try:
        return work()
    except Exception as error:
        if (told := ran_out(error)) is None:
            raise
        raise told from error
    finally:
        state.seconds = time.monotonic() - started
