"""A process that runs inference over ranks as a command would, so that a test can kill it.

python -m support.inferring FOLDER MODEL RANKS FIELDS
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract.events import Event
from bigpipe.orchestrator.launch.launcher import Outcome, launch
from bigpipe.orchestrator.stage import Launch, Trust
from bigpipe.plugins.distributed_infer import STAGE
from support.launching import TESTS, make_job


def start(folder: Path, model: Path, ranks: int, report: Callable[[Event], object] = bool, **fields: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    job = make_job(
        folder, kind="distributed-infer", module="bigpipe.plugins.distributed_infer:STAGE", params=fields,
        inputs={"model": (str(model),)}, launch=Launch(num_processes=ranks), trust=Trust(modules=("mytasks",)),
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"}
    return launch(
        job, STAGE, timeout=150, cancelled=threading.Event(), report=report, secrets={}, parent_environment=environment
    )


def main(folder: str, model: str, ranks: str, fields: str) -> None:
    def tell(event: Event) -> None:
        sys.stdout.write(json.dumps(event.as_json()) + "\n")
        sys.stdout.flush()

    start(Path(folder), Path(model), int(ranks), tell, **json.loads(Path(fields).read_bytes()))


if __name__ == "__main__":
    main(*sys.argv[1:])
