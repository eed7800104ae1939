"""A store that others share, on a real S3 server of this machine."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.sharing import BUCKET, given, opened, s3_server, taken
from support.stores import contents, publish, record
from support.workshop import environment

from bigpipe.orchestrator.store.claims import Wrong
from bigpipe.orchestrator.store.remote import PART, PIECE, Away, Beats
from bigpipe.orchestrator.store.store import Store

SMALL = {"config.json": b"{}", "weights": b"1" * 5000}
FULL = [pytest.mark.fault, pytest.mark.timeout(3600)]
RECIPE = """\
version: 1
name: shared
stages:
  a: {uses: write, with: {source: large.txt}}
  b: {uses: join, inputs: {first: a}}
"""


@pytest.fixture(scope="module")
def s3():
    with pytest.MonkeyPatch.context() as patch, s3_server(patch.setenv) as server:
        yield server


@pytest.fixture
def address(s3, request) -> str:
    """A folder of the test's own."""
    return f"{s3.address}/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


@pytest.fixture
def stores(tmp_path):
    found = [Store(tmp_path / f"store-{number}") for number in range(8)]
    yield found
    for store in found:
        store.close()


def replace_object(s3, address: str, content: bytes, by: bytes) -> str:
    (name,) = [name for name, found in s3.objects(address).items() if found == content]
    s3.client().put_object(Bucket=BUCKET, Key=name, Body=by)
    return name


def test_large_objects_go_and_come_in_parts(stores, address):
    files = {**SMALL, "large": os.urandom(3 * PART + 12345), "empty": b""}
    made = publish(stores[0], "a", files)
    remote, heard = opened(address, stores[0])
    assert given(remote, stores[0], made)
    assert not given(remote, stores[0], made)
    moved: list[int] = []
    got = taken(opened(address, stores[1])[0], stores[1], record("a"), moved)
    assert contents(stores[1], got) == files
    assert stores[1].verify().clean
    assert sum(moved) == sum(map(len, files.values()))
    assert max(moved) == PIECE
    assert heard == []


@pytest.mark.parametrize("by", [b"2" + b"1" * 4999, b"1" * 4999, b""])
def test_a_lying_object_is_refused_and_mended(stores, s3, address, by):
    made = publish(stores[0], "a", SMALL)
    given(opened(address, stores[0])[0], stores[0], made)
    name = replace_object(s3, address, SMALL["weights"], by)
    remote, _ = opened(address, stores[1])
    with pytest.raises(Wrong):
        taken(remote, stores[1], record("a"))
    assert not remote.away
    assert given(remote, stores[1], publish(stores[1], "a", SMALL))
    assert s3.objects(address)[name] == SMALL["weights"]


def test_an_empty_record_is_refused_alone(stores, s3, address):
    made = publish(stores[0], "a", SMALL)
    given(opened(address, stores[0])[0], stores[0], made)
    (name,) = [name for name in s3.objects(address) if made.key[7:] in name]
    s3.client().put_object(Bucket=BUCKET, Key=name, Body=b"")
    remote, heard = opened(address, stores[1])
    assert remote.find(made.key) is None
    assert not remote.away
    assert len(heard) == 1


def test_eight_writers_at_once(stores, address):
    made = [publish(store, "a", {"x": b"%d" % number * 1000}) for number, store in enumerate(stores)]
    remotes = [opened(address, store)[0] for store in stores]
    failed: list[BaseException] = []

    def offer(number: int) -> None:
        try:
            given(remotes[number], stores[number], made[number])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=offer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    got = taken(remotes[0], stores[0], record("a"))
    assert got.digest in {each.digest for each in made}
    assert not any(given(remotes[number], stores[number], made[number]) for number in range(8))
    assert remotes[1].find(got.key).digest == got.digest


def test_who_comes_second_in_spite_of_a_look_is_told(stores, address, tmp_path):
    remote, source = opened(address, stores[0])[0], tmp_path / "source"
    for size in (10, 3 * PART):
        path = remote._path("objects", str(size))
        for content, replaces in ((b"1" * size, False), (b"2" * size, False), (b"3" * size, True)):
            source.write_bytes(content)
            with pytest.raises(FileExistsError) if content[:1] == b"2" else nullcontext():
                remote._send(path, source, Beats(lambda size: None), replaces=replaces)
            assert remote._system.cat_file(path) == content.replace(b"2", b"1")


def test_no_bucket_is_a_miss_for_readers_and_told_to_writers(stores, s3):
    remote, heard = opened("s3://no-such-bucket/x", stores[0])
    assert remote.find(record("a").key) is None
    assert heard == []
    with pytest.raises(Away, match="no such place"):
        given(remote, stores[0], publish(stores[0], "a", SMALL))


@pytest.mark.parametrize("moments", [[1], pytest.param(range(1, 6), marks=FULL)])
def test_a_server_that_is_killed_while_it_is_read_leaves_nothing_recorded(stores, tmp_path, monkeypatch, moments):
    content = os.urandom(12 * PIECE)
    made = publish(stores[0], "a", {"large": content})
    for moment in moments:
        with s3_server(monkeypatch.setenv) as server, Store(tmp_path / f"reader-{moment}") as reader:
            given(opened(server.address, stores[0])[0], stores[0], made)
            remote, _ = opened(server.address, reader)
            assert remote.find(made.key) is not None
            remote.patience = 3.0
            seen: list[int] = []

            class Killing(list):
                def append(self, size: int) -> None:
                    seen.append(size)  # noqa: B023
                    if len(seen) == moment + 1:  # noqa: B023  the first says where it begins
                        server.kill()

            with pytest.raises(Away):
                taken(remote, reader, record("a"), Killing())
            assert reader.find(made.key) is None
            assert sum(seen) < len(content)
        with s3_server(monkeypatch.setenv) as server:
            given(opened(server.address, stores[0])[0], stores[0], made)
            moved: list[int] = []
            with Store(tmp_path / f"reader-{moment}") as reader:
                got = taken(opened(server.address, reader)[0], reader, record("a"), moved)
                assert contents(reader, got) == {"large": content}
            assert moved[0] == sum(seen)  # what had come is not asked for again


@pytest.mark.parametrize("kills", [0, pytest.param(40, marks=FULL)])
def test_a_push_that_is_killed_leaves_nothing_half_there(workshop, s3, address, tmp_path, seed, kills):
    """And what is pushed whole, a second store takes whole."""
    choice, to = random.Random(seed), address  # noqa: S311
    (tmp_path / "large.txt").write_text("x" * (5 * PART))
    made = workshop.run(RECIPE, remote="")
    assert made.exit_code == 0
    own = {**environment(tmp_path), **s3.environment}
    for number in range(kills):
        to = f"{address}-killed-{number}"
        process = subprocess.Popen(
            [sys.executable, "-m", "bigpipe", "push", "recipe.yaml", "--remote", to],
            cwd=tmp_path, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(choice.uniform(1.0, 5.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Store(tmp_path / f"reader-{number}") as reader:
            remote, heard = opened(to, reader)
            for state in made.nodes.values():
                if remote.find(state.key) is not None:
                    taken(remote, reader, state.record)
            assert heard == []
            assert reader.verify().clean
    done = workshop.command("push", "recipe.yaml", "--remote", to, **s3.environment)
    assert done.returncode == 0, done.stderr
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    got = workshop.run(store=tmp_path / "second", remote=to)
    assert workshop.ran == []
    assert got.exit_code == 0


def test_a_secret_of_the_bucket_is_in_no_answer(workshop, s3):
    """A server that is not there, and credentials that would be shown if anything showed them."""
    told = workshop.command(
        "push", "recipe.yaml", "--remote", "s3://somebody:pass-of-somebody@bucket/x", "--json", **s3.environment
    )
    assert told.returncode == 2
    workshop.manifest.write_text(RECIPE)
    (workshop.folder / "large.txt").write_text("x")
    dead = {**s3.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    told = workshop.command("plan", "recipe.yaml", "--remote", "s3://somebody:pass-of-somebody@bucket/x", **dead)
    assert told.returncode == 0
    assert "going on without it" in told.stderr
    assert "pass-of-somebody" not in told.stdout + told.stderr
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in told.stdout + told.stderr


def test_the_commands_of_the_page(s3, tmp_path):
    """share-a-cache.md: a CI machine and a laptop, each with a store and a checkout of its own."""
    page = (Path(__file__).parents[2] / "docs/how-to/share-a-cache.md").read_text(encoding="utf-8")
    s3.client().create_bucket(Bucket="team-cache")
    blocks = "\n".join(re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    told: dict[str, str] = {}
    remote: dict[str, str] = {}
    for machine, line in re.findall(r"^(\w+)\$ (.+)$", blocks, re.MULTILINE):
        folder = tmp_path / machine
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text("version: 1\nstages:\n  a: {uses: write}\n")
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            remote[machine] = value
            assert name == "BIGPIPE_REMOTE"
            continue
        written = re.sub(r"^bigpipe\b", f"{sys.executable} -m bigpipe", line)
        own = {**environment(folder), **s3.environment, "BIGPIPE_REMOTE": remote[machine]}
        done = subprocess.run(["bash", "-c", written], cwd=folder, env=own, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told[line.partition("#")[0].strip()] = done.stdout
    assert "5 B to fetch" in told["bigpipe plan recipe.yaml"]
    assert "cached shared" in told["bigpipe status recipe.yaml --remote"]
    assert (tmp_path / "ci/journal").exists()
    assert not (tmp_path / "laptop/journal").exists()
    assert "there" in told["bigpipe push recipe.yaml"]
