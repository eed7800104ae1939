"""Two stores and what they share: a remote store in a directory, or on an S3 server of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bigpipe.orchestrator.store.claims import Claim
from bigpipe.orchestrator.store.remote import Remote, open_remote
from bigpipe.orchestrator.store.store import KeyRecord, Store

SERVER = """
import logging, sys
logging.getLogger("werkzeug").setLevel("ERROR")
from werkzeug.serving import make_server
from moto.server import DomainDispatcherApplication, create_backend_app
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.port, flush=True)
server.serve_forever()
"""
BUCKET = "shared-cache"


class S3:
    """A real S3 server (moto's) in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.address = f"s3://{BUCKET}/team"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "an-id-of-nobody",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-nobody",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
        }

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def client(self):
        import boto3

        return boto3.client("s3")

    def objects(self, address: str) -> dict[str, bytes]:
        """Name → bytes of all that lies below an address."""
        client, below = self.client(), address.removeprefix(f"s3://{BUCKET}/")
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{below}/").get("Contents", [])
        return {each["Key"]: client.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read() for each in found}


@contextmanager
def s3_server(environ) -> Iterator[S3]:
    """environ: a function that sets a variable of this process."""
    server = S3()
    try:
        for name, value in server.environment.items():
            environ(name, value)
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.kill()
        assert server.process.stdout is not None
        server.process.stdout.close()


class Heard(list[str]):
    """Lines that somebody told."""


def opened(address: str | Path, store: Store, patience: float = 20.0) -> tuple[Remote, Heard]:
    remote, heard = open_remote(str(address), Path.cwd(), store.root, os.environ), Heard()
    remote.tell, remote.patience = heard.append, patience
    return remote, heard


def given(remote: Remote, store: Store, record: KeyRecord, *, kept: bool = True) -> bool:
    """Offer what a store has under a key."""
    tree = store.artifact_path(record.digest or "")
    files = {str(file["sha256"]): tree / name for name, file in record.files.items()}
    return remote.offer(Claim.of(record, kept=kept), files if kept else {}, store.temporary())


def taken(remote: Remote, store: Store, record: KeyRecord, moved: list[int] | None = None) -> KeyRecord:
    """Receive what is under the key of `record`, which was asked for."""
    claim = remote.find(record.key)
    assert claim is not None
    counts = [] if moved is None else moved
    with store.hold(record.key):
        return store.receive(
            claim.recorded(record), remote, kept=claim.kept, cancelled=threading.Event(), moved=counts.append
        )


def tree(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
