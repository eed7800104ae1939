"""What commands say to programs: one JSON object in every outcome, with its exit code and its errors as fields."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bigpipe.errors import BigpipeError, Interrupted

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract import Json


def answered(data: Mapping[str, Json], errors: Sequence[BigpipeError] = ()) -> dict[str, Json]:
    """Return an answer with `exit_code` and `errors` beside its own fields."""
    told = [each for error in errors for each in error.as_json()]
    return {"schema": data["schema"], "exit_code": errors[0].status if errors else 0, "errors": told, **data}


def refused(command: str, error: BaseException, options: Mapping[str, Any]) -> dict[str, Json]:
    """Return what `command`, given `options`, answers where it ended with an error before it had an answer."""
    known = error if isinstance(error, BigpipeError) else as_bigpipe_error(error)
    if command == "run" and "manifest" in options:
        from bigpipe.git import Checkout
        from bigpipe.orchestrator.running import refused_json, run_json  # a quarter of a second, which others need not

        if known.plan is not None:
            return refused_json(known, known.plan)
        git = Checkout(options["manifest"]).state
        return run_json(options["manifest"], options.get("params") or {}, [known], git=git)
    return answered({"schema": "bigpipe.error/1"}, [known])


def as_bigpipe_error(error: BaseException) -> BigpipeError:
    """Return an interruption, or a bug, whose exit code is 1, as an error of the tree."""
    if isinstance(error, KeyboardInterrupt):
        number = next(iter(error.args), signal.SIGINT)
        return Interrupted.by(number, "the same command goes on from there")
    return BigpipeError("".join(traceback.format_exception_only(error)).strip(), "this is a bug in bigpipe")
