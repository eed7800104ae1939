"""The how-to of the page: its commands as they are written, on ports that are free."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.commanding import end, start
from support.hub import LoopbackHub
from support.paging import QUICKSTART
from support.workshop import Workshop

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
PAGE = (Path(__file__).parents[2] / "docs/how-to/the-page.md").read_text()
STARTS = re.findall(r"^\$ bigpipe (ui.*)\n(http.*)$", PAGE, re.MULTILINE)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(("command", "address"), STARTS)
def test_it_starts_as_it_is_written(tmp_path, command, address):
    port = free_port()
    written = [*shlex.split(re.sub(r" --port \d+", "", command)), "--port", port]
    with start(Workshop(tmp_path), *written) as process:
        assert process.stdout is not None
        told = process.stdout.readline().decode().strip()
        wanted = re.escape(re.sub(r":\d+/", f":{port}/", address)).replace("…", r"[\w-]{43}")
        assert re.fullmatch(wanted, told)
        assert end(process, 2) == 130


def test_programs_ask_as_it_is_written(tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not on the PATH")
    (asked,) = re.findall(r"^\$ (curl .*)$", PAGE, re.MULTILINE)
    port, workshop = free_port(), Workshop(tmp_path)
    files = {path.name: path for path in QUICKSTART.iterdir() if path.suffix in (".json", ".safetensors")}
    with LoopbackHub() as hub:
        hub.create("facebook/opt-13b", files)
        around = hub.environment(tmp_path / "hf")
        with start(workshop, "ui", "--port", port, environ=around) as process:
            assert process.stdout is not None
            process.stdout.readline()
            done = subprocess.run(
                shlex.split(asked.replace(":8765/", f":{port}/")), capture_output=True, text=True, check=True
            )
            end(process, 2)
        options = ("--dtypes", "int8", "--batch-size", "4", "--memory", "16GiB", "--json")
        told = json.loads(workshop.command("estimate", "facebook/opt-13b", *options, **around).stdout)
        assert json.loads(done.stdout) == {**told, "fetched_bytes": json.loads(done.stdout)["fetched_bytes"]}


AT_ONCE = """
import os, signal, sys
from bigpipe.webpage import serve
try:
    serve(sys.argv[1], port=0, announce=lambda address: os.kill(os.getpid(), int(sys.argv[2])))
except KeyboardInterrupt as interrupted:
    print("ended by", *map(int, interrupted.args))
"""


@pytest.mark.parametrize("number", [2, 15, 1])
def test_who_interrupts_as_soon_as_the_address_is_told_is_heard(tmp_path, number):
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"ended by {number}\n"


def test_there_is_something_to_start():
    assert [command for command, _ in STARTS] == ["ui", "ui --host 0.0.0.0 --port 9000"]
