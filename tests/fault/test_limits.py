"""Disks that fill by bytes or by inodes, calls that fail, limits of the system: an error that says what to free or to
raise, and a run that goes on once there is room."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from support.commanding import BIGPIPE, left_of, start
from support.forking import BUG, TOLD, forked, turns
from support.workshop import Workshop, environment

import bigpipe

RECIPE = """version: 1
name: several
params: {{letter: a}}
stages:
  text: {{uses: write, with: {{text: "${{params.letter}}"}}}}
  pour: {{uses: pour, with: {{count: {count}, letter: "${{params.letter}}"}}}}
  sip: {{uses: sip, inputs: {{first: pour}}}}
  join: {{uses: join, inputs: {{first: text}}}}
"""
ONE = "version: 1\nname: one\nparams: {letter: a}\nstages:\n  a: {uses: write, with: {text: '${params.letter}'}}\n"
SAYS = re.compile(
    r"the disk( of \S+( \S+)?)? (is full|has no inodes left for further files): (?P<path>/\S+)"
    r"|are to be written, and the disk has|cannot be read or written: (?P<broken>/\S+): "
)


@pytest.fixture
def several(in_memory, monkeypatch) -> Workshop:
    for name in ("PYTHONPATH", "BIGPIPE_HOME"):
        monkeypatch.setenv(name, environment(in_memory)[name])
    made = Workshop(in_memory)
    made.manifest.write_text(RECIPE.format(count=3))
    return made


IN_SMALL_DISKS = """
import json, os, subprocess, sys
from pathlib import Path
folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
store = folder / "store"
store.mkdir()
def run(*arguments):
    command = [sys.executable, "-m", "bigpipe", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "none", str(store)], check=True)
told = []
for size in sizes:
    mount(size)
    first = run("run", "recipe.yaml")
    log = "".join(path.read_text() for path in store.rglob("log.txt"))
    mount("remount,size=100m,nr_inodes=10000")
    again, verify = run("run", "recipe.yaml"), run("verify")
    told.append([size, first.returncode, first.stderr + log, again.returncode, again.stderr, verify.returncode])
    subprocess.run(["umount", str(store)], check=True)
print(json.dumps(told))
"""


def in_small_disks(workshop: Workshop, sizes: list[str]) -> list[list]:
    """(Size, exit code, what was said, both with room, exit code of verify) for each."""
    inner = [sys.executable, "-c", IN_SMALL_DISKS, str(workshop.folder), json.dumps(sizes)]
    command = ["unshare", *([] if os.geteuid() == 0 else ["-Ur"]), "-m", "--propagation", "private", *inner]
    try:
        done = subprocess.run(command, env=environment(workshop.folder), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"needs a mount namespace and tmpfs (root, or user namespaces): {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "sizes",
    [
        ["size=120k", "nr_inodes=70"],
        pytest.param(
            [*(f"size={size}k" for size in range(4, 400, 8)), *(f"nr_inodes={most}" for most in range(2, 200, 4))],
            marks=[pytest.mark.fault, pytest.mark.timeout(3600)],
        ),
    ],
    ids=["short", "full"],
)
def test_a_store_that_is_full_says_so_and_a_run_goes_on_once_there_is_room(several, sizes):
    codes = []
    for size, code, said, again, said_again, verified in in_small_disks(several, sizes):
        codes.append(code)
        assert code in (0, 4, 6), (size, code, said)
        assert "this is a bug" not in said, (size, said)
        if code == 4:  # before anything ran
            assert "of disk; " in said, (size, said)
        elif code:
            assert SAYS.search(said), (size, said)
            assert "inodes" in said or size.startswith("size="), (size, said)
            assert "bigpipe gc" in said or "free " in said, (size, said)
        assert again == 0, (size, said, said_again)
        assert verified == 0, size
    assert 6 in codes
    if len(sizes) > 10:
        assert 0 in codes


CALLS = ("write", "fsync", "rename", "mkdir", "symlink", "link", "unlink", "chmod", "utimensat", "ftruncate")


@pytest.mark.parametrize(
    ("fault", "every"),
    [("ENOSPC", 20), *(pytest.param(fault, 1, marks=[pytest.mark.fault, pytest.mark.timeout(7200)])
                       for fault in ("ENOSPC", "EIO"))],
)  # fmt: skip
def test_a_call_that_fails_anywhere_in_a_run_is_an_error_with_its_place(several, fault, every):
    """In the command's process and in each worker, at the n-th call of its kind."""
    several.manifest.write_text(RECIPE.format(count=2) if every == 1 else ONE)

    def run(letter: str) -> None:
        bigpipe.run(several.manifest, params={"letter": letter}, jobs=2)

    several.run(params={"letter": "z"}, jobs=2)  # everything is imported
    counted = turns(lambda: run("y"), CALLS, several.folder / "calls")
    all_of_them = [point for point, shown in counted.items() if shown]
    wrong = []
    for number, (call, turn) in enumerate(all_of_them[::every]):
        store = several.folder / "store"
        shutil.rmtree(store)
        watch = ["-o", os.devnull, "-e", f"inject={call}:error={fault}:when={turn}"]
        ended = forked(lambda letter=f"l{number}": run(letter), watch=watch)
        told = f"{call} {turn}: {ended}"
        hushed = ended.code == BUG and not ended.said  # the call was the one that tells of an error in a worker
        if not (ended.in_order or hushed) or (ended.code == TOLD and not SAYS.search(ended.said)):
            wrong.append(told)
        assert left_of(store) == [], told
        assert several.run(params={"letter": f"l{number}"}).exit_code == 0, told
        assert several.command("verify").returncode == 0 if every == 1 else True, told
    print(f"{len(all_of_them[::every])} turns with {fault}")  # noqa: T201
    assert not wrong, "\n".join([f"{len(wrong)} of {len(all_of_them)}", *wrong[:20]])


def limited(limits: dict[int, int]):
    def apply() -> None:
        for which, most in limits.items():
            resource.setrlimit(which, (most, most))

    return apply


def ended_under(workshop: Workshop, limits: dict[int, int]) -> tuple[int, str]:
    process = start(workshop, "run", "recipe.yaml", preexec_fn=limited(limits))
    said = b"".join(process.communicate(timeout=120)).decode(errors="replace")
    return process.returncode, said


def starts_under(workshop: Workshop, limits: dict[int, int]) -> bool:
    """Can Python, and what the command is made of, be brought up at all?"""
    code = "import bigpipe.cli, bigpipe.orchestrator.commands as c; c.run, c.make_plan"
    around = environment(workshop.folder)
    done = subprocess.run(
        [sys.executable, "-c", code], env=around, capture_output=True, check=False, preexec_fn=limited(limits)
    )
    return done.returncode == 0


def aborted(code: int, said: str) -> bool:
    """Where the address space ends inside of pydantic's core, that ends the process at once: nobody can catch it."""
    return code == -signal.SIGABRT and re.search(r"memory allocation of \d+ bytes failed", said) is not None


MIB = 2**20
LIMITS = {
    "-v": (resource.RLIMIT_AS, [n * MIB for n in (50, 800)], [n * MIB for n in range(40, 800, 10)]),
    "-n": (resource.RLIMIT_NOFILE, [7, 64], list(range(4, 64))),
    "-f": (resource.RLIMIT_FSIZE, [512], [0, 1, 100, 300, *range(512, 16384, 256)]),
}


@pytest.mark.parametrize("option", LIMITS)
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=[pytest.mark.fault, pytest.mark.timeout(3600)])])
def test_a_limit_of_the_system_ends_a_run_in_order(several, option, whole):
    which, few, many = LIMITS[option]
    codes = []
    for most in many if whole else few:
        if not starts_under(several, {which: most}):
            continue
        code, said = ended_under(several, {which: most})
        codes.append(code)
        assert code in (0, 2, 4, 6, 75) or aborted(code, said), (most, code, said)
        assert "Traceback" not in said, (most, said)
        assert left_of(several.folder / "store") == []
        assert several.run().exit_code == 0
        shutil.rmtree(several.folder / "store")
    assert codes
    assert codes[-1] == 0 or option == "-f"
    assert 6 in codes


BOUND = ["setpriv", "--ruid=65534", "--bounding-set=-sys_resource,-sys_admin", "--inh-caps=-sys_resource,-sys_admin"]
"""As root but for the limits: they count, and bind, the processes of this user."""


@pytest.mark.parametrize(
    "limits", [(4,), pytest.param(range(1, 40), marks=[pytest.mark.fault, pytest.mark.timeout(3600)])], ids=["", "all"]
)
def test_a_limit_on_processes_and_threads_ends_a_run_in_order(several, limits):
    """`ulimit -u`, which does not bind root."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to be a user that runs nothing else")
    several.folder.chmod(0o777)
    codes = []
    for most in limits:
        with_limit = limited({resource.RLIMIT_NPROC: most})
        process = start(several, "run", "recipe.yaml", command=[*BOUND, *BIGPIPE], preexec_fn=with_limit)
        said = b"".join(process.communicate(timeout=120)).decode(errors="replace")
        codes.append(process.returncode)
        assert process.returncode in (0, 4, 6, 75), (most, process.returncode, said)
        assert "Traceback" not in said, (most, said)
        assert left_of(several.folder / "store") == []
        assert several.run().exit_code == 0
        shutil.rmtree(several.folder / "store")
    if len(codes) == 1:
        assert codes == [6]
        assert "✗ failed" in said  # the node that could not be started, not the run
    else:
        assert codes[-1] == 0
