"""Certificates that are loaded in time: TLS is verified as ever, and plain HTTP waits for none of it."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import LoopbackHub
from support.shells import shell

from bigpipe.bigmodel.hub.session import CertificatesInTime


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that nobody but itself vouches for, and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made, key, both = folder / "made.pem", folder / "key.pem", folder / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(made)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    both.write_bytes(made.read_bytes() + key.read_bytes())
    return both


@pytest.fixture
def model(tmp_path: Path) -> dict[str, bytes]:
    file = shell(tmp_path / "model.safetensors", [("layer.weight", "float16", (64, 32))])
    return {"model.safetensors": file.read_bytes()}


@pytest.fixture
def server(model: dict[str, bytes]) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.create("org/model", model)
        yield hub


@pytest.fixture
def secure(model: dict[str, bytes], certificate: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    hub.server.socket = context.wrap_socket(hub.server.socket, server_side=True)
    hub.url = hub.cdn = f"https://localhost:{hub.port}"
    with hub:
        hub.create("org/model", model)
        yield hub


def estimate(server: LoopbackHub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    command = [sys.executable, "-m", "bigpipe", "estimate", "org/model", "--json", "--store", str(home / "store")]
    env = {**inherited, **server.environment(home), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_hub_whose_certificate_is_known(secure: LoopbackHub, certificate: Path, tmp_path: Path) -> None:
    done = estimate(secure, tmp_path, SSL_CERT_FILE=str(certificate))
    assert done.returncode == 0, done.stderr
    assert '"bytes": 4096' in done.stdout


def test_a_hub_that_nobody_vouches_for_is_refused(secure: LoopbackHub, tmp_path: Path) -> None:
    done = estimate(secure, tmp_path)
    assert done.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
    assert "Traceback" not in done.stderr
    assert not secure.log


def test_a_redirect_to_tls_is_verified(
    server: LoopbackHub, secure: LoopbackHub, certificate: Path, tmp_path: Path
) -> None:
    server.cdn = secure.url
    refused = estimate(server, tmp_path / "refused")
    assert refused.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in refused.stderr
    assert not secure.log
    done = estimate(server, tmp_path / "known", SSL_CERT_FILE=str(certificate))
    assert done.returncode == 0, done.stderr
    assert secure.log


def test_plain_http_waits_for_no_certificates(server: LoopbackHub, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.pem"
    done = estimate(server, tmp_path, SSL_CERT_FILE=str(nowhere))
    assert done.returncode == 0, done.stderr


def test_a_context_is_made_once_and_verifies() -> None:
    context = CertificatesInTime(ssl.PROTOCOL_TLS_CLIENT)
    context.load()
    made = context._whole
    assert made is context._whole
    assert (made.verify_mode, made.check_hostname) == (ssl.CERT_REQUIRED, True)
    # Were the context ever used as it is, it would trust nobody
    assert (context.verify_mode, context.get_ca_certs()) == (ssl.CERT_REQUIRED, [])
