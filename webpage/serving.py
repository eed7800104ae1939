"""Listens, and answers until it is interrupted."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.redaction import conceal_environment

LOOPBACK = "127.0.0.1"
PORT = 8765
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CONNECTIONS = 64
"""At once; more are refused."""


def serve(
    directory: str | Path = ".",
    *,
    host: str | None = None,
    port: int = PORT,
    also: Sequence[str | Path] = (),
    store: str | Path | None = None,
    offline: bool = False,
    allow_cancel: bool = False,
    announce: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page of a directory, in the main thread, until it is interrupted: it ends with KeyboardInterrupt.

    host: where to listen; None: on loopback, where no token is asked for. port: 0 takes any that is free. also: more
    directories whose models may be looked at. allow_cancel: may the page interrupt runs? announce: is told the address,
    with its token, once it is listened on. Raise UsageError for a directory or an address that cannot be used.
    """
    if host == "":
        raise UsageError("--host is empty", "name an address of this machine, or leave it out for loopback")
    _require_libraries()
    import uvicorn

    from .application import Page, application, templates
    from .asking import Children
    from .safety import Rules

    conceal_environment(os.environ)
    root, more = _folder(directory), tuple(_folder(each) for each in also)
    rules = Rules(_names(host), None if host is None else secrets.token_urlsafe(32))
    page = Page(
        directory=root, rules=rules, children=Children(root), templates=templates(), also=more,
        store=Path(store).absolute() if store else None, offline=offline, allow_cancel=allow_cancel,
    )  # fmt: skip

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave them to `_until_interrupted`, which waits for no request."""
            yield

    config = uvicorn.Config(
        application(page), http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=5,
    )  # fmt: skip
    with _listening(host or LOOPBACK, port) as listener:
        address = _address(host, listener.getsockname()[1], rules.token)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until they have the handlers below

        def ready() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            announce(address)

        number = asyncio.run(_until_interrupted(Server(config).serve(sockets=[listener]), ready))
    raise KeyboardInterrupt(number)


async def _until_interrupted(serving: Coroutine[Any, Any, None], ready: Callable[[], None]) -> int:
    """Serve until a signal comes, and return it; where it comes again, end at once. An exception that a handler raises,
    as other commands do it, could come up in a request, which would take it for its own, or in the loop, which would
    lose a step of a task and wait for it without end. ready: called once signals may come."""
    loop = asyncio.get_running_loop()
    signalled: asyncio.Future[int] = loop.create_future()

    def end(number: int) -> None:
        if signalled.done():
            os._exit(128 + number)
        for name in ("asyncio", "uvicorn.error"):  # requests and children that are cut off are no news
            logging.getLogger(name).disabled = True
        signalled.set_result(number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, end, number)
    ready()
    task = asyncio.ensure_future(serving)
    waiting: list[asyncio.Future[Any]] = [task, signalled]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not signalled.done():
        await task  # it ends by itself only where it fails
    return await signalled


def _require_libraries() -> None:
    missing = [name for name in ("starlette", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the page needs {', '.join(missing)}", "pip install 'bigpipe-ml[ui]'")


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{path} is no directory", "name one whose recipes and models the page shows")
    return folder.resolve()


def _names(host: str | None) -> frozenset[str]:
    """Names that the page answers to; addresses in digits need none."""
    own = {socket.gethostname(), socket.getfqdn(), host} if host else set()
    return frozenset({"localhost", *(name.lower() for name in own if name)})


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        cause = f"{host}, port {port} cannot be listened on: {getattr(error, 'strerror', None) or error}"
        raise UsageError(cause, _cure(error)) from error


def _cure(error: Exception) -> str:
    of_port = isinstance(error, OverflowError) or getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
    return (
        "name another with --port, 0 for any that is free" if of_port else "name an address of this machine with --host"
    )


def _address(host: str | None, port: int, token: str | None) -> str:
    name = LOOPBACK if host in (None, "0.0.0.0", "::") else str(host)  # noqa: S104  that means all of them
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
