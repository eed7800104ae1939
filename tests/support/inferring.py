"""A process that runs inference over ranks as a command would, so that a test can kill it.

python -m support.inferring FOLDER MODEL RANKS FIELDS
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract.events import Event
from bigpipe.orchestrator.launch.executors import executor
from bigpipe.orchestrator.launch.jobs import Outcome
from bigpipe.orchestrator.stage import Launch, Trust
from bigpipe.plugins.distributed_infer import STAGE
from support.launching import TESTS, make_job


def start(folder: Path, model: Path, ranks: int, report: Callable[[Event], object] = bool, **fields: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    job = make_job(
        folder, stage=STAGE, module="bigpipe.plugins.distributed_infer:STAGE", params=fields, timeout=150,
        report=report, inputs={"model": (model,)}, launch=Launch(num_processes=ranks),
        trust=Trust(modules=("mytasks",)),
        parent_environment={**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"},
    )  # fmt: skip
    return executor("ranks").start(job)


def main(folder: str, model: str, ranks: str, fields: str) -> None:
    def tell(event: Event) -> None:
        sys.stdout.write(json.dumps(event.as_json()) + "\n")
        sys.stdout.flush()

    start(Path(folder), Path(model), int(ranks), tell, **json.loads(Path(fields).read_bytes()))


if __name__ == "__main__":
    main(*sys.argv[1:])
