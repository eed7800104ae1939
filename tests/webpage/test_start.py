"""What starting the page costs, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.commanding import left_of
from support.hub import LoopbackHub
from support.paging import QUICKSTART, until, visiting
from support.workshop import Workshop, environment

from bigpipe.errors import ENDED_BY

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
CPU_SECONDS, MEGABYTES = 0.5, 60
HEAVY = {
    "asgiref", "fsspec", "huggingface_hub", "networkx", "numpy", "pydantic", "rich", "safetensors", "torch", "yaml",
}  # fmt: skip
STARTED = """
import sys
from bigpipe.webpage.serving import serve
def leave(address):
    print(*sys.modules)
    raise SystemExit
serve(port=0, announce=leave)
"""


def test_a_start_imports_only_what_listens(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    imported = set(done.stdout.split())
    assert {name.partition(".")[0] for name in imported} & HEAVY == set()
    inner = {name for name in imported if name.startswith(("bigpipe.bigmodel.", "bigpipe.plugins."))}
    assert inner == set()
    assert {name for name in imported if name.startswith("bigpipe.orchestrator.")} <= {
        "bigpipe.orchestrator.report", "bigpipe.orchestrator.report.shown", "bigpipe.orchestrator.report.templates",
    }  # fmt: skip
    assert {"starlette.applications", "uvicorn.server", "jinja2"} <= imported


def test_no_other_command_pays_for_the_page(tmp_path):
    code = "import sys, bigpipe.cli; print([n for n in sys.modules if 'webpage' in n or n in ('starlette', 'uvicorn')])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_start_is_light(tmp_path):
    with visiting(Workshop(tmp_path)) as visit:
        folder = Path(f"/proc/{visit.process.pid}")
        user, system = map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13])
        peak = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
        assert (user + system) / os.sysconf("SC_CLK_TCK") <= CPU_SECONDS
        assert int(peak.split()[1]) / 1000 <= MEGABYTES
        assert visit.get().status == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_with_all_that_works_for_it(tmp_path, number):
    """While a browser waits for an estimate, and another watches nothing in particular."""
    shutil.copytree(QUICKSTART, tmp_path / "model")
    with LoopbackHub() as hub:
        hub.create("org/model", {"config.json": b"{}"})
        hub.fail("hang", "/api/models", times=100, seconds=30)
        with visiting(Workshop(tmp_path), **hub.environment(tmp_path / "hf")) as visit:
            asking = threading.Thread(target=lambda: visit.get("/?model=org/model"), daemon=True)
            asking.start()
            until(lambda: hub.requests("/api/models") or len(left_of(tmp_path / "store", 0)) > 1)
            began = time.monotonic()
            visit.process.send_signal(number)
            told = visit.process.communicate(timeout=20)[1].decode()
            assert visit.process.returncode == 128 + number
            assert [line for line in told.splitlines() if line] == [
                f"error: {ENDED_BY[number]}",
                "  the same command goes on from there",
            ]
            assert time.monotonic() - began < 10  # a moment, on a machine with nothing else to do
            assert left_of(tmp_path / "store") == []


def test_a_port_that_is_taken_is_said(tmp_path):
    workshop = Workshop(tmp_path)
    with visiting(workshop) as visit:
        told = workshop.command("ui", "--port", visit.place.rpartition(":")[2])
        assert told.returncode == 2
        assert "cannot be listened on" in told.stderr
        assert "--port" in told.stderr
    assert workshop.command("ui", "nothing").returncode == 2
    assert "--port" in workshop.command("ui", "--port", "65536").stderr


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1", ""])
def test_a_host_that_is_not_this_machine_is_said(tmp_path, host):
    """192.0.2.1 is nobody's: https://datatracker.ietf.org/doc/html/rfc5737"""
    told = Workshop(tmp_path).command("ui", "--host", host, "--port", "0")
    assert told.returncode == 2
    assert "--host" in told.stderr
    assert "--port" not in told.stderr
