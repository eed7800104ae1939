"""engine: openai: an endpoint that is there already, whoever runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from bigpipe.bigmodel.tasks import Arguments
from bigpipe.environment import ONLINE
from bigpipe.errors import NotAuthorised, Offline, UsageError
from bigpipe.filesystems import is_address

from .asked_tasks import asked_tasks
from .endpoint import LOOPBACK, Endpoint, connecting
from .engine import Engine, Wanted


def _address(url: str) -> str:
    if not is_address(url) or urlsplit(url).query or urlsplit(url).fragment or not url.isprintable() or " " in url:
        raise ValueError("an address is http://… or https://…, without a login, `?` and `#`")
    return url


class Asked(Arguments):
    """How a server is asked."""

    concurrency: int = Field(8, ge=1, le=1024)
    """Questions that are under way at once."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that an answer may take."""
    retries: int = Field(5, ge=0)
    """How often a question is repeated, where the server is busy, out of order or gone."""
    longest_wait: float = Field(60.0, ge=0)
    """Seconds: the longest `Retry-After` that is waited for; a longer one ends the stage, and another run goes on."""
    chat: bool = False
    """Texts are asked as the message of a user; else the model goes on with them, which servers of chats alone
    refuse."""


class OpenAI(Asked):
    url: Annotated[str, AfterValidator(_address)]
    """The server's address, up to where the API's own paths begin: `https://host/v1`."""
    model: str = Field(min_length=1)
    """The model, as the server calls it."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What a question calls `max_new_tokens`. OpenAI's own newer models know the longer name alone, and take no
    temperature either: `generation: {do_sample: true}` sends none."""
    secret: str | None = Field(None, min_length=1)
    """The variable that holds the key; the stage lists it under its `secrets`. null: the server asks for none."""


APART = ("concurrency", "timeout", "retries", "longest_wait")
"""Settings of `Asked` that change nothing of the answers."""


def _key(settings: OpenAI, wanted: Wanted) -> str | None:
    """Raise NotAuthorised where there is none, and UsageError for one that no header can hold."""
    if settings.secret is None:
        return None
    key = wanted.environment.get(settings.secret, "")
    if not key:
        cause = f"the variable {settings.secret}, which holds the key for {urlsplit(settings.url).netloc}, is not there"
        cure = f"set it, and list it: `secrets: [{settings.secret}]` at the top of the recipe and in the stage"
        raise NotAuthorised(cause, cure, field="serving.secret")
    if not (key.isascii() and key.isprintable()) or " " in key:
        cause = f"the key in {settings.secret} holds what no header of HTTP can: a space, a line's end, or no ASCII"
        raise UsageError(cause, "set it to the key alone", field="serving.secret")
    return key


def _check(settings: OpenAI, wanted: Wanted) -> None:
    _key(settings, wanted)
    host = urlsplit(settings.url).hostname
    if wanted.offline and host not in LOOPBACK:
        raise Offline(f"{host} is another machine, and nothing may be asked of the network", f"run {ONLINE}")


@contextmanager
def _serve(settings: OpenAI, wanted: Wanted) -> Iterator[Endpoint]:
    _check(settings, wanted)
    with connecting(
        settings.url, settings.concurrency, model=settings.model, key=_key(settings, wanted), chat=settings.chat,
        length_field=settings.length_field, timeout=settings.timeout, retries=settings.retries,
        longest_wait=settings.longest_wait,
    ) as endpoint:  # fmt: skip
        yield endpoint


ENGINE = Engine(
    name="openai", settings=OpenAI, serve=_serve, takes_model=False, tasks=asked_tasks, apart=APART, check=_check
)
