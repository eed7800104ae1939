"""Who asks the Hub, and what they may do there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from bigpipe.errors import BigpipeError, NotAuthorised, StageFailed, Transient, UsageError

from .connection import asking, guard_answers
from .errors import LOGIN, hub_errors
from .exchange import exchanging
from .repository import Hub, describe, get_json, unknown_here, why
from .responses import NOT_A_HUB, shown

WRITING = "repo.write"
"""The permission of a fine-grained token, https://huggingface.co/docs/hub/security-tokens."""


@dataclass(frozen=True, slots=True)
class Login:
    """A user of the Hub, and what the token is for."""

    names: tuple[str, ...]
    """The user, then the organisations."""
    reads_only: bool = False
    written: frozenset[str] | None = None
    """The users, organisations and repositories, in small letters, that a fine-grained token may write to; None: all
    that its user may write to, or it is not told."""

    @property
    def user(self) -> str:
        return self.names[0]

    def may_write(self, repo: str) -> bool:
        """Return whether the token is for writing to a repository, or to those of its owner."""
        names = {repo.lower(), repo.lower().split("/")[0]}
        return not self.reads_only and (self.written is None or not names.isdisjoint(self.written))


def check_access(repo: str, *, hub: Hub, write: bool = False) -> None:
    """Ask whether this login may read (or write) the repository's files, without reading any.
    Raise GatedRepository, NotAuthorised, UsageError (no such repository), Offline, Transient."""
    if hub.offline:
        raise unknown_here(hub, repo, None)
    try:
        get_json(hub, f"/api/models/{quote(repo)}/auth-check{'/write' if write else ''}", repo, None, {})
    except (UsageError, StageFailed):
        if write:
            raise
        describe(repo, hub=hub)  # a mirror may not know this question, and tell of the repository nonetheless


def whoami(hub: Hub) -> Login:
    """Return who asks. Raise NotAuthorised, Offline, Transient."""
    try:
        data = get_json(hub, "/api/whoami-v2", "whoami", None, {})
    except NotAuthorised as error:
        raise NotAuthorised(f"{hub.endpoint} knows no user for this login, or there is none (401)", LOGIN) from error
    try:
        names = [data["name"], *[organisation["name"] for organisation in data.get("orgs", [])]]
        if not all(isinstance(name, str) and name.isprintable() for name in names):
            raise TypeError(f"names are {names!r}")
    except (AttributeError, KeyError, TypeError) as error:
        raise Transient(f"{hub.endpoint} does not tell who this login is ({why(error)})", NOT_A_HUB) from error
    token = _inside(data, "auth", "accessToken")
    return Login(tuple(names), token.get("role") == "read", _written(_inside(token, "fineGrained").get("scoped")))


def faults_of_card(text: str, *, hub: Hub) -> list[str]:
    """Return what the Hub has against the metadata of a model card, with which it would refuse whatever comes beside
    it. Nothing where it does not say: a mirror may not know this question."""
    from huggingface_hub.utils import build_hf_headers, get_session

    guard_answers(hub.endpoint)
    found, asked = None, {"content": text, "repoType": "model"}
    headers = build_hf_headers(token=hub.token, library_name="bigpipe")
    with suppress(BigpipeError), hub_errors(hub.endpoint, "validate-yaml"), exchanging(asking(hub.timeout)):
        address = f"{hub.endpoint}/api/validate-yaml"
        answer = get_session().post(address, json=asked, headers=headers, timeout=hub.timeout)
        found = answer.json() if answer.status_code == 400 else None
    told = found.get("errors") if isinstance(found, Mapping) else None
    faults = (each.get("message") for each in told if isinstance(each, Mapping)) if isinstance(told, list) else ()
    return [shown(fault) for fault in faults if isinstance(fault, str)]


def _inside(found: Any, *names: str) -> Mapping[str, Any]:
    """A mapping in a mapping; empty where there is none."""
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _written(scopes: Any) -> frozenset[str] | None:
    """Only what is told in full counts: the Hub itself refuses what the token is not for."""
    try:
        return frozenset(str(scope["entity"]["name"]).lower() for scope in scopes if WRITING in scope["permissions"])
    except (KeyError, TypeError):
        return None
