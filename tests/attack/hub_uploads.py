"""What a hostile Hub says while a model is sent to it, one lie a case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from support.enemy import Asked, Change, Said, Script

from attack.hub_answers import BODIES, BUSY, COMMITS, LATER, PLACES, SHOUT, STATUSES, Case, at, http, told

SMALL = {what: body for what, body in BODIES.items() if len(body) < 1 << 20}
AGAIN = "Cannot create repo: another conflicting operation is in progress"
"""At which the client asks again, at once and for ever."""


def changed(kind: str, change: Callable[[Any], Any]) -> Change:
    """The JSON that is said at one place, changed."""
    return at(kind, lambda said: replace(said, body=json.dumps(change(json.loads(said.body))).encode()))


def each(key: str, **fields: Any) -> Callable[[Any], Any]:
    """`...` takes a field away."""

    def change(data: Any) -> Any:
        several = [{**one, **fields} for one in data[key]]
        return {**data, key: [{name: value for name, value in one.items() if value is not ...} for one in several]}

    return change


def bodies() -> Iterator[Case]:
    for kind in ("whoami", "create", "yaml", "preupload", "batch", "verify", "commit"):
        for what, body in SMALL.items():
            yield Case(f"{kind}: {what}", at(kind, partial(replace, body=body)))
        for status in (*BUSY, *STATUSES):
            yield Case(f"{kind}: status {status}", at(kind, lambda said, status=status: Said(status, said.headers)))
    for status in STATUSES:
        yield Case(f"put: status {status}", at("put", lambda said, status=status: Said(status, said.headers)))
    for text in LATER:
        yield Case(f"put: later, {text[:20]!r}", at("put", lambda said, text=text: Said(503, (("Retry-After", text),))))


def logins() -> Iterator[Case]:
    names = {"a number": 5, "none": None, "a list": ["org"], "escapes": SHOUT, "empty": "", "somebody else": "mallory"}
    for what, name in names.items():
        yield Case(
            f"login: {what}", at("whoami", partial(replace, body=json.dumps({"name": name}).encode())), refused=True
        )
    for what, orgs in {
        "a number": 5,
        "text": "x",
        "numbers": [1],
        "without a name": [{}],
        "odd names": [{"name": 5}],
    }.items():
        said = {"name": "org", "orgs": orgs}
        yield Case(
            f"organisations: {what}", at("whoami", partial(replace, body=json.dumps(said).encode())), refused=True
        )


def making() -> Iterator[Case]:
    yield Case("create: again and again", at("create", lambda said: Said(409, (), AGAIN.encode())), refused=True)
    for url in (5, None, [], SHOUT, "file:///etc", "x" * 100_000):
        yield Case(f"create: at {str(url)[:20]!r}", changed("create", lambda said, url=url: {"url": url}))
    for what, place in PLACES.items():
        yield Case(
            f"create: sends to {what}",
            at("create", lambda said, place=place: Said(307, (("Location", place),))),
            refused=True,
        )


def modes() -> Iterator[Case]:
    odd = ("smoke", "", None, 5, [], {}, SHOUT)
    for mode in odd:
        yield Case(f"mode: {mode!r}", changed("preupload", each("files", uploadMode=mode)), refused=True)
    yield Case("mode: not by LFS", changed("preupload", each("files", uploadMode="regular")))
    yield Case("mode: all by LFS", changed("preupload", each("files", uploadMode="lfs")))
    for field in ("uploadMode", "path", "shouldIgnore"):
        yield Case(f"mode: no {field}", changed("preupload", each("files", **{field: ...})))
    for path in ("../x", "", 5, None, "other.json", SHOUT):
        yield Case(f"mode: of {path!r}", changed("preupload", each("files", path=path)), refused=True)
    yield Case("mode: ignored", changed("preupload", each("files", shouldIgnore=True)), refused=True)
    yield Case("mode: there already", changed("preupload", each("files", oid="a" * 40)))
    for oid in (5, [], SHOUT):
        yield Case(f"mode: there as {oid!r}", changed("preupload", each("files", oid=oid)))
    yield Case("mode: too many", changed("preupload", lambda said: {"files": said["files"] * 5000}))


def places() -> Iterator[Case]:
    """Where the bytes of LFS objects are to go."""
    for what, place in PLACES.items():
        actions = {"upload": {"href": place}}
        yield Case(f"put: to {what}", changed("batch", each("objects", actions=actions)), refused=True)
        yield Case(
            f"verify: at {what}", changed("batch", lambda said, place=place: _verified_at(said, place)), refused=True
        )
    yield Case("verify: on another host", changed("batch", _verified_elsewhere), refused=False)
    for actions in ({}, [], "x", 5, {"upload": {}}, {"upload": 5}, {"upload": {"href": 5}}, {"upload": {"href": None}}):
        yield Case(f"actions: {actions!r}", changed("batch", each("objects", actions=actions)))
    for header in (
        {"chunk_size": "1"},
        {"chunk_size": "0"},
        {"chunk_size": "-1"},
        {"chunk_size": "x"},
        {"chunk_size": "9" * 30},
        {"chunk_size": 5},
        {"chunk_size": "16", "1": "file:///x"},
        {"Authorization": SHOUT},
        "x",
        5,
        [],
    ):
        change: Callable[[Any], Any] = lambda said, header=header: _with_header(said, header)  # noqa: E731
        yield Case(f"headers: {str(header)[:40]}", changed("batch", change))
    for oid in ("a" * 64, "", 5, None, SHOUT, "../x"):
        yield Case(f"object: {oid!r}", changed("batch", each("objects", oid=oid)))
    for size in (-1, 0, 2**70, "x", None):
        yield Case(f"object of {size!r}", changed("batch", each("objects", size=size)))
    for error in ({"code": 422, "message": SHOUT}, 5, "x", {}, [1]):
        yield Case(f"object with the error {error!r}", changed("batch", each("objects", error=error)))
    for objects in ([], None, 5, "x", [[]], [None], [5]):
        yield Case(
            f"objects: {objects!r}", changed("batch", lambda said, objects=objects: {**said, "objects": objects})
        )
    for transfer in ("smoke", 5, None, [], "xet", "multipart", SHOUT):
        yield Case(f"transfer: {transfer!r}", changed("batch", lambda said, to=transfer: {**said, "transfer": to}))


def _verified_at(said: Any, place: str) -> Any:
    for one in said["objects"]:
        one["actions"]["verify"] = {"href": place}
    return said


def _verified_elsewhere(said: Any) -> Any:
    """Where the bytes go, which is another origin than the Hub's."""
    for one in said["objects"]:
        origin = one["actions"]["upload"]["href"].partition("/put/")[0]
        one["actions"]["verify"] = {"href": f"{origin}/verify"}
    return said


def _with_header(said: Any, header: Any) -> Any:
    for one in said["objects"]:
        one["actions"]["upload"]["header"] = header
    return said


def commits() -> Iterator[Case]:
    for what, value in COMMITS.items():
        yield Case(
            f"commit: {what}", changed("commit", lambda said, value=value: {**said, "commitOid": value}), refused=True
        )
    for url in (5, None, "", SHOUT, "file:///x"):
        yield Case(f"commit: at {url!r}", changed("commit", lambda said, url=url: {**said, "commitUrl": url}))
    for field in ("commitOid", "commitUrl"):
        yield Case(
            f"commit: no {field}",
            changed("commit", lambda said, f=field: {k: v for k, v in said.items() if k != f}),
            refused=True,
        )
    yield Case("commit: another", changed("commit", lambda said: {**said, "commitOid": "b" * 40}), refused=True)
    for what, value in COMMITS.items():
        yield Case(f"listing afterwards, commit: {what}", _afterwards(told(sha=value)), refused=True)
    lost: Callable[[Any], Any] = lambda listing: {**listing, "siblings": listing["siblings"][1:]}  # noqa: E731
    yield Case("listing afterwards: without a file", _afterwards(lost), refused=True)
    for what, fields in {"size": {"size": 1}, "digest": {"blobId": "a" * 40}, "name": {"rfilename": "../x"}}.items():
        odd: Callable[[Any], Any] = lambda listing, fields=fields: {  # noqa: E731
            **listing,
            "siblings": [{**one, "lfs": None, **fields} for one in listing["siblings"]],
        }
        yield Case(f"listing afterwards: another {what}", _afterwards(odd), refused=True)


def _afterwards(change: Callable[[Any], Any]) -> Change:
    """Changes the listing of the commit that was made."""
    there: list[bool] = []

    def answer(asked: Asked, said: Said) -> Said | Script:
        if asked.kind == "create":
            there.clear()
        if asked.kind == "commit":
            there.append(True)
        if asked.kind == "info" and there and said.status == 200:
            return replace(said, body=json.dumps(change(json.loads(said.body))).encode())
        return said

    return answer


def uploads() -> list[Case]:
    """Return all of them; each name once."""
    sent = (replace(case, refused=None) for case in http("put"))  # what arrived is looked at, not what is said of it
    groups = (bodies(), logins(), making(), modes(), places(), commits(), http("batch"), http("commit"), sent)
    return list({case.name: case for group in groups for case in group}.values())
