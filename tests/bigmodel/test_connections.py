"""How the Hub is reached: TLS is verified, and proxies are gone through."""

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
from support.proxy import LoopbackProxy
from support.shells import shell


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that nobody but itself vouches for, and its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made, key, both = folder / "made.pem", folder / "key.pem", folder / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,DNS:cdn.invalid", "-keyout", str(key), "-out", str(made)]
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


def command(server: LoopbackHub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {"SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
    inherited = {name: value for name, value in os.environ.items() if name.upper() not in ours}
    words = [sys.executable, "-m", "bigpipe", *arguments, "--json", "--store", str(home / "store")]
    env = {**inherited, **server.environment(home), **environment}
    return subprocess.run(words, env=env, cwd=home, capture_output=True, text=True, check=False)


def estimate(server: LoopbackHub, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home.mkdir(exist_ok=True)
    return command(server, home, "estimate", "org/model", **environment)


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


def test_a_redirect_away_from_tls_is_refused(
    server: LoopbackHub, secure: LoopbackHub, certificate: Path, tmp_path: Path
) -> None:
    secure.cdn = server.url
    done = estimate(secure, tmp_path, SSL_CERT_FILE=str(certificate))
    assert done.returncode == 75, done.stderr
    assert "away from TLS" in done.stderr
    assert not server.log


RECIPE = """\
version: 1
name: fetching
stages:
  download: {uses: download, with: {repo: org/model}}
"""


def behind(proxy: LoopbackProxy, login: str = "", **environment: str) -> dict[str, str]:
    """A network whose only way out is the proxy: `hub.invalid` is a name that nobody else knows."""
    address = f"http://{login}{proxy.address}"
    plain = {"HF_ENDPOINT": "http://hub.invalid", "NO_PROXY": "", "HTTP_PROXY": address, "HTTPS_PROXY": address}
    return {**plain, **environment}


def test_a_hub_behind_a_proxy(server: LoopbackHub, tmp_path: Path) -> None:
    server.cdn = "http://cdn.invalid"
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with LoopbackProxy(server.port) as proxy:
        done = estimate(server, tmp_path, **behind(proxy))
        assert done.returncode == 0, done.stderr
        assert '"bytes": 4096' in done.stdout
        run = command(server, tmp_path, "run", "recipe.yaml", **behind(proxy))
        assert run.returncode == 0, run.stderr
    hosts = {entry.split("/")[2] for entry in proxy.log}
    assert hosts == {"hub.invalid", "cdn.invalid"}
    assert len(proxy.log) == len(server.log)


def test_tls_through_a_proxy(secure: LoopbackHub, certificate: Path, tmp_path: Path) -> None:
    secure.cdn = f"https://cdn.invalid:{secure.port}"
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with LoopbackProxy(secure.port) as proxy:
        network = behind(proxy, HF_ENDPOINT=secure.url, SSL_CERT_FILE=str(certificate))
        done = estimate(secure, tmp_path, **network)
        assert done.returncode == 0, done.stderr
        run = command(secure, tmp_path, "run", "recipe.yaml", **network)
        assert run.returncode == 0, run.stderr
    assert set(proxy.log) == {f"CONNECT {host}:{secure.port}" for host in ("localhost", "cdn.invalid")}


def test_hosts_that_need_no_proxy(server: LoopbackHub, tmp_path: Path) -> None:
    with LoopbackProxy(server.port) as proxy:
        network = behind(proxy, HF_ENDPOINT=server.url, NO_PROXY="127.0.0.1,localhost")
        done = estimate(server, tmp_path, **network)
    assert done.returncode == 0, done.stderr
    assert server.log
    assert not proxy.log


def test_a_proxy_that_asks_for_a_password(server: LoopbackHub, tmp_path: Path) -> None:
    with LoopbackProxy(server.port, "somebody:s3cret-word") as proxy:
        done = estimate(server, tmp_path / "known", **behind(proxy, "somebody:s3cret-word@"))
        assert done.returncode == 0, done.stderr
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        for refused in (
            estimate(server, tmp_path / "wrong", **behind(proxy, "somebody:wr0ng-word@")),
            command(server, tmp_path, "run", "recipe.yaml", **behind(proxy, "somebody:wr0ng-word@")),
        ):
            assert refused.returncode == 5
            assert "the proxy on the way to http://hub.invalid asks for another name or password" in refused.stderr
            assert "Traceback" not in refused.stderr
            assert "wr0ng-word" not in refused.stdout + refused.stderr


def test_a_proxy_that_opens_no_tunnel(secure: LoopbackHub, tmp_path: Path) -> None:
    with LoopbackProxy(secure.port, "somebody:s3cret-word") as proxy:
        done = estimate(secure, tmp_path, **behind(proxy, HF_ENDPOINT=secure.url))
    assert done.returncode != 0
    assert "asks for another name or password (407)" in done.stderr


def test_a_proxy_that_is_not_there(server: LoopbackHub, tmp_path: Path) -> None:
    with LoopbackProxy(server.port) as proxy:
        network = behind(proxy)
    done = estimate(server, tmp_path, **network)
    assert done.returncode != 0
    assert "the proxy" in done.stderr
    assert "Traceback" not in done.stderr
