"""`python -m support.command FOLDER STAGE PARAMS RANKS`: a command that launches one job, to be killed by a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bigpipe.orchestrator.contract.types import Launch
from support.launching import Launched, make_job


def main(folder: str, attribute: str, params: str, ranks: str) -> None:
    launch = Launch(num_processes=int(ranks))
    job = make_job(Path(folder), attribute, params=json.loads(params), launch=launch)
    print(Launched(job).run().metrics["pid"])  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
