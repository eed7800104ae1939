"""Who a Ray cluster takes tasks from. Ray listens on all interfaces; who may send it a task may run any code there.

Token authentication: docs.ray.io, "Ray security".
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from collections.abc import Mapping

from bigpipe.errors import Transient, UsageError

PROBE_SECONDS = 60.0
LETS_IN, REFUSES = 0, 3
PROBE = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit({REFUSES})
"""
"""In a process of its own, since Ray reads its variables once."""
GUARD = (
    "make a token with `ray get-auth-token --generate`, copy it to ~/.ray/auth_token on every machine, and set "
    "RAY_AUTH_MODE=token wherever Ray starts and here"
)


def require_guard(at: str, addresses: list[str]) -> None:
    """Raise UsageError for a cluster that others can reach and that lets everybody in. Ray listens on all interfaces;
    who may send it a task may run any code there."""
    if all(map(_is_loopback, addresses)):
        return
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    open_to_all = lets_in(at, {**stranger, "RAY_AUTH_MODE": "disabled"})
    if open_to_all:
        raise UsageError(f"the Ray cluster at {at} takes tasks from anybody who can reach it", GUARD)
    if open_to_all is None:
        raise Transient(f"the Ray cluster at {at} does not say whether it is guarded by a token", "try again")


def lets_in(address: str, environment: Mapping[str, str]) -> bool | None:
    """Return whether a cluster answers a process with these variables; None where it says neither."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", PROBE, address], env=environment, check=False, capture_output=True,
            timeout=PROBE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    return {LETS_IN: True, REFUSES: False}.get(asked.returncode)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name may lead anywhere
        return False
