"""What went wrong with the Hub, in words with a cure.

`huggingface_hub` raises some thirty classes, wraps them in one another, and calls a refused connection, a full disk and
a missing login by the same name. Here each becomes one of ours:

    cannot be reached            Offline
    401                          NotAuthorised
    401/403 of a gated model     GatedRepository
    403                          NotAuthorised
    404 (model, revision, file)  UsageError, with what is there instead
    412                          StageFailed: a commit of somebody else's came first
    408, 429, 5xx, cut, garbled  Transient
    disk full                    DoesNotFit
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from traceback import walk_tb

from bigpipe.environment import ONLINE
from bigpipe.errors import (
    BigpipeError,
    DoesNotFit,
    GatedRepository,
    NotAuthorised,
    Offline,
    StageFailed,
    Transient,
    UsageError,
    chain_of,
    first_few,
)
from bigpipe.files import explained
from bigpipe.filesystems import is_address
from bigpipe.sizes import format_duration

from .responses import asked_pause, shown

LOGIN = "run `hf auth login`, or set HF_TOKEN (in a manifest: under `secrets`)"


CURE_OFFLINE = f"run once with a network ({ONLINE}); what it brings stays in the Hub cache"
WHOLE_STAY = "files that are whole stay in the Hub cache"
CLIENT = {"huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "h11", "json"}
TOLD_IN_WORDS = {"ProxyError": "407 "}
"""Class → how its text begins where a proxy wants a password: httpx (httpcore) keeps that status nowhere else."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked for when it went wrong."""

    endpoint: str
    repo: str
    revision: str | None
    file: str | None
    refs: Callable[[], Sequence[str]]

    @property
    def what(self) -> str:
        return f"{self.repo}{f' at {self.revision}' if self.revision else ''}"


@contextmanager
def hub_errors(
    endpoint: str,
    repo: str,
    revision: str | None = None,
    file: str | None = None,
    *,
    refs: Callable[[], Sequence[str]] = tuple,
) -> Iterator[None]:
    """Raise whatever the block raises as an error of the tree in `bigpipe.errors`; bugs pass through.
    refs: gives the names of the repository's branches and tags, asked only where a revision is missing."""
    try:
        yield
    except BigpipeError:
        raise
    except Exception as error:
        translated = _translate(error, _Asked(endpoint, repo, revision, file, refs))
        if translated is None:
            raise
        raise translated from error


@contextmanager
def of_cache(path: Path) -> Iterator[None]:
    """Raise every OSError within as what is wrong with a file of the Hub cache, which others may share."""
    with explained(path, owner="the Hub cache", other="use one of your own (HF_HOME)"):
        yield


def _translate(error: BaseException, asked: _Asked) -> BigpipeError | None:
    """None for what no rule knows. The innermost link that a rule knows decides: wrappers hide the cause."""
    links = list(chain_of(error))[::-1]
    for rule in (_of_response, _of_disk, _of_transport, _of_answer, _of_client):
        for link in links:
            if (found := rule(link, asked)) is not None:
                return found
    return None


def _names(error: BaseException) -> set[str]:
    """Class names, because httpx and its successor httpx2 spell them alike and only one is installed."""
    return {base.__name__ for base in type(error).__mro__}


def _of_response(error: BaseException, asked: _Asked) -> BigpipeError | None:
    """An answer with a status that is an error."""
    response = getattr(error, "response", None)
    if "HfHubHTTPError" not in _names(error) or response is None:
        return None
    names, status = _names(error), int(response.status_code)
    if "RevisionNotFoundError" in names:
        return UsageError(f"{asked.repo} has no revision {asked.revision!r}", _revisions(asked))
    if "EntryNotFoundError" in names:
        return UsageError(f"{asked.what} has no file {asked.file!r}", "look at its files, or name another revision")
    message = getattr(error, "server_message", None)
    if "GatedRepoError" in names or status in (401, 403, 404):
        return _of_access(names, status, "authorization" in response.request.headers, message, asked)
    if status == 407:
        return _no_passage(asked)
    if status == 412:
        cause = f"somebody has committed to {asked.what} meanwhile (412), and that would be lost"
        return StageFailed(cause, "look at what they wrote, and run again")
    if status == 429:
        after = asked_pause(response.headers)
        wait = f"wait {format_duration(after, whole=True)}" if after else "wait a few minutes"
        return Transient(f"the Hub takes no more requests from here for now (429), asked for {asked.what}",
                         f"{wait} and run again; with a token the limit is higher: {LOGIN}")  # fmt: skip
    if status == 408 or status >= 500:
        cause = f"{asked.endpoint} is out of order ({status}), asked for {asked.what}"
        return Transient(cause, f"run again later; {WHOLE_STAY}")
    message = shown(message or str(error).strip().splitlines()[-1])
    return StageFailed(f"{asked.endpoint} refused the request for {asked.what} ({status}): {message}",
                       "the request may be wrong for this Hub; check HF_ENDPOINT")  # fmt: skip


def _of_access(names: set[str], status: int, with_token: bool, message: str | None, asked: _Asked) -> BigpipeError:
    """An answer that depends on who asks. The Hub says 401 for what does not exist to those it does not know."""
    endpoint, repo = asked.endpoint, asked.repo
    if "GatedRepoError" in names:
        who = "this token's user has not been let in" if with_token else "no token was sent"
        then = "wait until its authors let you in" if with_token else f"then {LOGIN}"
        return GatedRepository(
            f"{repo} is gated, and {who}", f"accept its conditions at {endpoint}/{repo}, {then}", field="repo"
        )
    spelling = "check the spelling, owner/name; for a private model"
    if status == 404:
        hidden = ", or this token may not see it" if with_token else ""
        return UsageError(
            f"{endpoint} has no model {repo!r}{hidden}", f"{spelling}, check what the token may read", field="repo"
        )
    if status == 403:
        cause = f"the token may not do this with {repo} (403: {message or 'no reason given'})"
        return NotAuthorised(
            cause, f"give it the permission at {endpoint}/settings/tokens, or use another", field="repo"
        )
    if with_token:
        cure = f"it may have expired; make a new one at {endpoint}/settings/tokens, and {LOGIN}"
        return NotAuthorised(f"{endpoint} does not accept the token (401), asked for {repo}", cure)
    cause = f"{repo} is private or does not exist: {endpoint} answers 401, and no token was sent"
    return NotAuthorised(cause, f"{spelling} {LOGIN}", field="repo")


def _no_passage(asked: _Asked) -> NotAuthorised:
    cause = f"the proxy on the way to {asked.endpoint} asks for another name or password (407)"
    cure = "set HTTP_PROXY and HTTPS_PROXY to http://NAME:PASSWORD@HOST:PORT, or name the host in NO_PROXY"
    return NotAuthorised(f"{cause}, asked for {asked.what}", cure)


def _revisions(asked: _Asked) -> str:
    try:
        known = list(asked.refs())[:1000]
    except Exception:  # the listing is a courtesy: without it the message is still right
        known = []
    from difflib import get_close_matches

    close = get_close_matches(asked.revision or "", known, 1, 0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return guess + (f"it has {first_few(known, 8)}" if known else "look at its branches and tags")


def _of_disk(error: BaseException, asked: _Asked) -> BigpipeError | None:
    """The Hub cache cannot be written."""
    if not isinstance(error, OSError) or (error.filename is None and error.errno != errno.ENOSPC):
        return None
    if error.errno == errno.ENOSPC:
        cure = f"free space there, or set HF_HOME to another disk; {WHOLE_STAY}"
        return DoesNotFit(f"the disk of the Hub cache is full, while {asked.what} was written", cure)
    return StageFailed(f"{asked.what}: {error}", "the Hub cache must be readable and writable: see HF_HOME")


def _of_transport(error: BaseException, asked: _Asked) -> BigpipeError | None:
    """No answer, or only a part of one."""
    names, text = _names(error), str(error)
    if any(name in names and text.startswith(beginning) for name, beginning in TOLD_IN_WORDS.items()):
        return _no_passage(asked)
    if "OfflineModeIsEnabled" in names:
        return Offline(f"{asked.what} is not known here, and asking the Hub is switched off", CURE_OFFLINE)
    if names & {"ConnectError", "ConnectTimeout", "ProxyError"}:
        reason = text or type(error).__name__
        cause = f"the Hub at {asked.endpoint} cannot be reached ({reason}), asked for {asked.what}"
        cure = "check the network, the proxy and HF_ENDPOINT; --offline or HF_HUB_OFFLINE=1 goes on with what is cached"
        return Offline(cause, cure)
    if names & {"UnsupportedProtocol", "InvalidURL"} and is_address(asked.endpoint, login=True):
        return _no_answer_of_a_hub(error, asked)
    unread = names & {"UnsupportedProtocol", "InvalidURL"} or type(error) is ValueError  # of the client's own import
    if unread and not is_address(asked.endpoint, login=True):
        return UsageError(f"HF_ENDPOINT is not an address: {asked.endpoint}", "write it as https://huggingface.co")
    if names & {"TransportError", "DecodingError"}:
        told = f"{type(error).__name__}: {text}"
        cause = f"the connection to {asked.endpoint} broke while {asked.what} was read ({told})"
        return Transient(cause, f"run again; {WHOLE_STAY}")
    if "TooManyRedirects" in names:
        return Transient(f"{asked.endpoint} sends requests for {asked.what} in a circle",
                         "run again later, or check HF_ENDPOINT and the proxy")  # fmt: skip
    return None


def _of_answer(error: BaseException, asked: _Asked) -> BigpipeError | None:
    """An answer that is not what a Hub says, or has no place here."""
    names = _names(error)
    if "HFValidationError" in names:
        return UsageError(f"{asked.repo!r} is not the name of a model: {error}", "write it as owner/name")
    if "LocalEntryNotFoundError" in names and error.__cause__ is None:
        cause = f"{asked.what} is not whole in the Hub cache, and asking the Hub is switched off"
        return Offline(cause, CURE_OFFLINE)
    if isinstance(error, OSError | JSONDecodeError | UnicodeDecodeError | RecursionError):
        return _no_answer_of_a_hub(error, asked)
    return None


def _no_answer_of_a_hub(error: BaseException, asked: _Asked) -> Transient:
    told = f"{type(error).__name__}: {shown(str(error)) or '-'}"
    cause = f"{asked.endpoint} did not answer as a Hub does when asked for {asked.what} ({told})"
    cure = "a login page or proxy may be in between: check the network and HF_ENDPOINT, and run again"
    return Transient(cause, cure)


def _of_client(error: BaseException, asked: _Asked) -> BigpipeError | None:
    """Whatever else was raised by the client's own code, or while JSON was read: an answer that it cannot take."""
    if error.__traceback__ is None:
        return None
    *_, (frame, _) = walk_tb(error.__traceback__)
    room = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return _no_answer_of_a_hub(error, asked) if isinstance(error, Exception) and room in CLIENT else None
