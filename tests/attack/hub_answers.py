"""What a hostile Hub says, one lie a case."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from support.enemy import CANARY, REPO, Asked, Change, Said, Script, drip, endless, honest, sibling, silence

HEAD = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
FILES = {
    "config.json": json.dumps({"model_type": "llama", "hidden_size": 8}).encode(),
    "README.md": b"# model\n",
    "tokenizer.json": b"{}",
    "model.safetensors": len(HEAD).to_bytes(8, "little") + HEAD + bytes(16),
}
WEIGHTS = "model.safetensors"
DIGIT = "٣"
"""Of another script, and a digit for Python."""
INVALID = "InvalidCheckpoint"
SHOUT = "\x1b[2J\x1b]0;title\x07"
LONG = "9" * 5000


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    change: Change = honest
    listing: Callable[[dict[str, Any]], Any] = lambda listing: listing
    files: dict[str, bytes] = field(default_factory=dict)
    """Besides those of a model."""
    pinned: bool = False
    """The commit is asked for, not the branch."""
    revision: str = ""
    include: tuple[str, ...] = ()
    refused: bool | None = None
    """True: it must end in an error. False: in the right bytes. None: in either."""
    ends: str = ""
    """Which error, where that matters."""


def at(kind: str, answer: Callable[[Said], Said | Script], name: str = "") -> Change:
    def change(asked: Asked, said: Said) -> Said | Script:
        return answer(said) if asked.kind in kind.split() and name in ("", asked.name) else said

    return change


def raw(data: bytes) -> Script:
    """These bytes, and the end."""
    return iter([data])


# The listing


def told(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda listing: {**listing, **fields}


def of_file(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    """`...` takes a field away."""

    def change(listing: dict[str, Any]) -> Any:
        changed = [{**one, **fields} if one["rfilename"] == name else one for one in listing["siblings"]]
        kept = [{key: value for key, value in one.items() if value is not ...} for one in changed]
        return {**listing, "siblings": kept}

    return change


def more(*siblings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda listing: {**listing, "siblings": [*listing["siblings"], *siblings]}


COMMITS: dict[str, Any] = {
    "a path": "../../../../canary/.bashrc",
    "an absolute path": "/canary/.bashrc",
    "empty": "",
    "none": None,
    "a number": 5,
    "a list": ["a" * 40],
    "a dict": {},
    "true": True,
    "39 digits": "a" * 39,
    "41 digits": "a" * 41,
    "capitals": "A" * 40,
    "64 digits": "a" * 64,
    "a new line": "a" * 40 + "\n",
    "escapes": SHOUT,
    "a NUL": "a" * 39 + "\0",
    "wide digits": "０" * 40,
    "a branch": "main",
}
BAD_NAMES = {
    "nothing": "",
    "dot": ".",
    "dots": "..",
    "above": "../x.json",
    "above later": "a/../../x.json",
    "absolute": "/x.json",
    "two slashes": "//x.json",
    "a hole": "a//x.json",
    "a dot inside": "a/./x.json",
    "a dot first": "./x.json",
    "a folder": "a/",
    "a drive": "C:/x.json",
    "a drive alone": "a:b.json",
    "a drive of Windows": "C:\\x.json",
    "above on Windows": "..\\x.json",
    "a backslash": "a\\x.json",
    "a NUL": "a\0.json",
    "escapes": f"{SHOUT}.json",
    "a new line": "a\n.json",
    "a return": "a\r.json",
    "a tab": "a\t.json",
    "DEL": "a\x7f.json",
    "C1": "a\x9b2J.json",
    "right to left": "a\u202e.json",
    "a line separator": "a\u2028.json",
    "half a pair": "a\ud800.json",
    "a long part": "a" * 260 + ".json",
    "long in bytes": "ä" * 130 + ".json",
    "many parts": "a/" * 600 + "x.json",
    "endless": "a" * 100_000,
    "a number": 5,
    "none": None,
    "a list": ["x.json"],
    "a dict": {},
    "true": True,
}
ODD_NAMES = {
    "home": "~/x.json",
    "a variable": "$HOME/x.json",
    "a command": "$(touch PWNED).json",
    "backquotes": "`touch PWNED`.json",
    "quoted dots": "%2e%2e/x.json",
    "a quoted slash": "..%2fx.json",
    "a quoted NUL": "a%00.json",
    "wide dots": "．．/x.json",
    "a slash that is none": "..∕x.json",
    "three dots": ".../x.json",
    "a device": "CON",
    "a device's file": "NUL.json",
    "another device": "aux/x.json",
    "a dot last": "x.json.",
    "a space last": "x.json ",
    "a space first": " x.json",
    "a flag": "-rf.json",
    "a long flag": "--help.json",
    "of git": ".git/config",
    "attributes": ".gitattributes",
    "of the client": ".cache/huggingface/x.json",
    "blobs": "blobs/x.json",
    "refs": "refs/main",
    "snapshots": "snapshots/x",
    "locks": ".locks/x.json",
    "incomplete": "x.incomplete",
    "a lock": "x.lock",
    "a query": "x.json?a=b",
    "a fragment": "x.json#a",
    "an address": "http:/x.json",
    "globs": "[a]*?.json",
    "braces": "{x}.json",
    "a percent": "100%.json",
    "many spaces": "a   b.json",
    "one letter": "ﬁ.json",
    "decomposed": "a\u0308.json",
    "case": "Config.json",
    "cases": "TOKENIZER.JSON",
    "look-alikes": "сonfig.json",
    "of a screenshot": "at 3.45\u202fPM.json",
    "a space that holds": "a\u00a0b.json",
    "zero width": "a\u200b.json",
    "a BOM": "\ufeffa.json",
    "joined pictures": "\U0001f469\u200d\U0001f4bb.json",
    "hidden": ".env",
    "code": "modeling.py",
    "a shell": "run.sh",
    "long but fine": "a" * 200 + ".json",
    "deep but fine": "a/" * 40 + "x.json",
}
SIZES: dict[str, Any] = {
    "below nothing": -5,
    "huge": 10**30,
    "of 64 bits": 2**64,
    "a fraction": 1.5,
    "text": "12",
    "true": True,
    "a list": [],
    "a dict": {},
    "one more": len(FILES["config.json"]) + 1,
    "one less": len(FILES["config.json"]) - 1,
    "nothing": 0,
    "a petabyte": 2**50,
    "infinite": float("inf"),
    "not a number": float("nan"),
}
DIGESTS: dict[str, Any] = {
    "a path": "../../../canary/.bashrc",
    "capitals": "A" * 40,
    "39 digits": "a" * 39,
    "escapes": SHOUT,
    "another": "a" * 40,
    "a number": 5,
    "a list": [],
    "a dict": {},
    "a NUL": "a\0b",
    "64 digits": "b" * 64,
}
LFS: dict[str, Any] = {
    "empty": {},
    "a list": [1],
    "text": "x",
    "a number": 7,
    "no digest": {"size": len(FILES[WEIGHTS])},
    "a path": {"sha256": "../../x", "size": len(FILES[WEIGHTS])},
    "another": {"sha256": "c" * 64, "size": len(FILES[WEIGHTS])},
    "40 digits": {"sha256": "c" * 40, "size": len(FILES[WEIGHTS])},
    "another size": {"sha256": "c" * 64, "size": 134},
    "the pointer's size": {"sha256": "c" * 64, "size": 134, "pointerSize": 134},
    "a size of text": {"sha256": "c" * 64, "size": "9"},
    "a huge size": {"sha256": "c" * 64, "size": 10**18},
    "a digest of numbers": {"sha256": [1], "size": 3},
}
SIBLINGS: dict[str, Any] = {
    "none": None,
    "a dict": {},
    "text": "x",
    "a number": 3,
    "empty": [],
    "lists": [[]],
    "nones": [None],
    "numbers": [1],
    "texts": ["config.json"],
    "without a name": [{}],
    "many without sizes": [{"rfilename": f"{i}.json"} for i in range(5000)],
}
LIBRARIES: dict[str, Any] = {
    "a path": "../x",
    "escapes": SHOUT,
    "a list": ["timm"],
    "a dict": {"a": 1},
    "a number": 5,
    "long": "a" * 10_000_000,
    "diffusers": "diffusers",
    "timm": "timm",
}
COUNTS: dict[str, Any] = {
    "text": "x",
    "a list": [1],
    "parameters of text": {"parameters": "x"},
    "a dtype of escapes": {"parameters": {SHOUT: 1}},
    "a count of text": {"parameters": {"F32": "1"}},
    "below nothing": {"parameters": {"F32": -1}},
    "huge": {"parameters": {"F32": 10**40}},
    "true": {"parameters": {"F32": True}},
    "another": {"parameters": {"F32": 5}},
}
BODIES = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"x"',
    "an object": b"{}",
    "nothing": b"",
    "HTML": b"<html>log in</html>",
    "cut": b'{"sha": "a',
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": f'{{"sha": {LONG}}}'.encode(),
    "no UTF-8": b'{"sha": "\xff\xfe"}',
    "UTF-16": '{"sha": "a"}'.encode("utf-16"),
    "NULs": b"\0" * 1000,
    "two values": b"{}{}",
    "not a number": b'{"sha": NaN}',
    "half a pair": b'{"sha": "\\ud800"}',
    "a BOM": b"\xef\xbb\xbf{}",
    "many lists": b'{"siblings": [' + b"[]," * 9_000_000 + b"[]]}",
    "too much": b" " * (40 << 20) + b"{}",
    "a comment": b"{} // x",
    "quotes": b"{'sha': 1}",
    "a very long text": b'{"sha": "' + b"a" * (20 << 20) + b'"}',
}


def listings() -> Iterator[Case]:
    for name, value in COMMITS.items():
        yield Case(f"commit: {name}", listing=told(sha=value), refused=True)
    yield Case("commit: another than the pinned one", listing=told(sha="b" * 40), pinned=True, refused=True)
    for name, value in BAD_NAMES.items():
        extra = {"rfilename": value, "size": 5, "blobId": "0" * 40}
        yield Case(
            f"name: {name}", listing=more(extra), include=("*",), refused=True, ends=INVALID * isinstance(value, str)
        )
    for name, value in ODD_NAMES.items():
        globs = ("*", ".*") if value.startswith(".") else ("*",)
        yield Case(f"odd name: {name}", files={value: name.encode()}, include=globs, refused=False)
    extra = sibling("config.json", b"other")
    yield Case("name: twice", listing=more(sibling("config.json", FILES["config.json"])), refused=True)
    yield Case("name: twice, with other bytes", listing=more(extra), refused=True)
    yield Case("name: below a file", listing=more({**extra, "rfilename": "config.json/x"}), refused=True)
    for name, value in SIZES.items():
        yield Case(
            f"size: {name}",
            listing=of_file("config.json", size=value),
            refused=True,
            ends="Transient" * (name == "huge"),
        )
    yield Case("size: none", listing=of_file("config.json", size=...), refused=False)
    yield Case(
        "sizes: none", listing=lambda told: of_file(WEIGHTS, size=..., lfs=...)(of_file("config.json", size=None)(told))
    )
    for name, value in DIGESTS.items():
        yield Case(
            f"digest: {name}", listing=of_file("config.json", blobId=value), refused=None if value in ([], {}) else True
        )
    yield Case("digest: none", listing=of_file("config.json", blobId=...), refused=False)
    for name, value in LFS.items():
        yield Case(f"LFS: {name}", listing=of_file(WEIGHTS, lfs=value), refused=None if name == "empty" else True)
    yield Case("LFS: two sizes", listing=of_file(WEIGHTS, size=5), refused=True)
    many = [{"rfilename": f"{number}.json"} for number in range(5000)]
    sized = at("head", lambda said: Said(200, (("ETag", '"x"'),), b"{}"))
    yield Case("sizes: none of many", sized, listing=told(siblings=many), refused=True)
    yield Case("LFS: none", listing=of_file(WEIGHTS, lfs=...), refused=True)
    yield Case(
        "LFS: of a small file", listing=of_file("config.json", lfs={"sha256": "d" * 64, "size": 41}), refused=True
    )
    for name, value in SIBLINGS.items():
        yield Case(f"files: {name}", listing=told(siblings=value), refused=True)
    for name, value in LIBRARIES.items():
        yield Case(f"library: {name}", listing=told(library_name=value))
    for name, value in COUNTS.items():
        yield Case(f"counts: {name}", listing=told(safetensors=value), refused=False)
    for name, body in BODIES.items():
        yield Case(f"listing: {name}", at("info", partial(replace, body=body)), refused=True)
    twice = b'{"sha": "' + b"e" * 40 + b'", '
    yield Case("listing: keys twice", at("info", lambda said: replace(said, body=twice + said.body[1:])), refused=False)


# HTTP

PLACES = {
    "a file": "file:///etc/passwd",
    "FTP": "ftp://127.0.0.1/x",
    "a script": "javascript:alert(1)",
    "data": "data:text/plain,{}",
    "gopher": "gopher://127.0.0.1/x",
    "a socket": "unix:/run/docker.sock",
    "a login": "http://a:b@127.0.0.1/x",
    "half an IPv6": "http://[::1/x",
    "port text": "http://127.0.0.1:abc/x",
    "port of six digits": "http://127.0.0.1:999999/x",
    "port 0": "http://127.0.0.1:0/x",
    "no host": "http:///x",
    "escapes": f"/{SHOUT}",
    "spaces": "http:// x",
    "a mailbox": "mailto:a@b",
    "a mailbox of us": "blob:http://127.0.0.1",
    "capital file": "FILE:///etc/passwd",
    "a NUL quoted": "file:%00//x",
    "a name that DNS cannot hold": f"http://{'q' * 64}/",
}
LATER = {
    "0": None,
    "5": None,
    "6": True,
    "300": None,
    "86400": True,
    "9" * 15: True,
    "9" * 400: True,
    "-1": None,
    "1.5": None,
    "1e9": None,
    "inf": None,
    "nan": None,
    "": None,
    "Fri, 31 Dec 2999 23:59:59 GMT": None,
    "soon": None,
    "²": None,
    DIGIT * 7: None,
    SHOUT: None,
    "0x10": None,
    "10; drop": None,
}
STATUSES = (
    201,
    202,
    204,
    205,
    207,
    226,
    300,
    301,
    302,
    303,
    304,
    305,
    306,
    307,
    308,
    400,
    401,
    402,
    403,
    404,
    405,
    406,
    407,
    409,
    410,
    411,
    412,
    413,
    414,
    415,
    416,
    417,
    418,
    421,
    422,
    424,
    425,
    426,
    428,
    431,
    451,
    500,
    501,
    505,
    507,
    508,
    511,
    520,
    599,
    600,
    999,
)
BUSY = (408, 429, 500, 502, 503, 504)
TAGS = {
    "a path": f'"{"../" * 30}{CANARY}/.bashrc"',
    "an absolute path": f"/{CANARY}/.bashrc",
    "a dot": '"."',
    "dots": '".."',
    "empty": '""',
    "nothing": "",
    "long": '"' + "a" * 300 + '"',
    "escapes": f'"{SHOUT}"',
    "a slash": '"a/b"',
    "a NUL quoted": '"a%00"',
    "spaces": '"a b"',
    "another": '"' + "f" * 40 + '"',
    "another of 64": '"' + "f" * 64 + '"',
    "a backslash": '"a\\b"',
    "not ASCII": '"ä"',
    "weak": 'W/"' + "f" * 40 + '"',
    "a colon": '"a:b"',
}
LINKED_SIZES = ("-1", "0", "1.5", "1e3", "text", "", "9" * 30, "9" * 400, DIGIT, SHOUT, "0x10", " 5", "+5", "1_0")
RAW = {
    "garbage": b"\x00\xff garbage\r\n\r\n",
    "no status": b"HTTP/1.1\r\n\r\n",
    "a status of text": b"HTTP/1.1 OK fine\r\n\r\n",
    "status 000": b"HTTP/1.1 000 x\r\nContent-Length: 0\r\n\r\n",
    "HTTP/9": b"HTTP/9.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "ICY": b"ICY 200 OK\r\n\r\n",
    "only a body": b"{}",
    "a switch": b"HTTP/1.1 101 S\r\nUpgrade: x\r\n\r\n",
    "a negative size": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "two sizes": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a size of text": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    "a size of 5000 digits": f"HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n{{}}".encode(),
    "a huge size": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    "a long size": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{}",
    "an odd transfer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: smoke\r\n\r\n{}",
    "size and chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "a chunk of text": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a huge chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "a negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
    "a folded header": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\n{}",
    "a header without a name": b"HTTP/1.1 200 OK\r\n: x\r\nContent-Length: 2\r\n\r\n{}",
    "a NUL in a header": b"HTTP/1.1 200 OK\r\nA: \0\r\nContent-Length: 2\r\n\r\n{}",
    "a header of 200 kB": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000 + b"\r\n\r\n{}",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000 + b"\r\n{}",
    "nothing at all": b"",
    "two answers": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
}
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
GZIPPED = OK + b"Content-Encoding: gzip\r\n\r\n"


def _zeros(size: int) -> bytes:
    packing = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packing.compress(bytes(1 << 20)) for _ in range(size >> 20)), packing.flush()])


ENDLESS: dict[str, Callable[[], Script]] = {
    "no answer": silence,
    "half a header": lambda: silence(b"HTTP/1.1 200 O"),
    "headers alone": lambda: silence(OK),
    "no body": lambda: silence(OK + b"Content-Length: 100\r\n\r\n"),
    "half a body": lambda: silence(OK + b"Content-Length: 100\r\n\r\n{"),
    "a slow header": lambda: drip(b"a" * 500, 0.1, first=OK + b"A: "),
    "slow headers": lambda: drip(b"A: b\r\n" * 99, 0.1, first=OK),
    "a slow status": lambda: drip(b"HTTP/1.1 200 OK\r\n" + b" " * 500, 0.1),
    "a slow body": lambda: drip(b" " * 500, 0.1, first=OK + b"\r\n"),
    "slow chunks": lambda: drip(b"1\r\n \r\n" * 99, 0.1, first=CHUNKED),
    "a body without end": lambda: endless(b" " * 65536, first=OK + b"\r\n"),
    "a header without end": lambda: endless(b"a" * 65536, first=OK + b"A: "),
    "headers without end": lambda: endless(b"A: b\r\n" * 1000, first=OK),
    "beginnings without end": lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "hints without end": lambda: endless(b"HTTP/1.1 103 H\r\nA: b\r\n\r\n" * 100),
    "chunks without end": lambda: endless(b"1\r\n \r\n" * 1000, first=CHUNKED),
    "a chunk's remark without end": lambda: endless(b"a" * 65536, first=CHUNKED + b"1;"),
    "trailers without end": lambda: endless(b"A: b\r\n" * 1000, first=CHUNKED + b"0\r\n"),
    "empty lines without end": lambda: endless(b"\r\n" * 1000),
    "a bomb": lambda: raw(GZIPPED + b"\r\n" + _zeros(1 << 30)),
    "a bomb without end": lambda: endless(
        b"\x00\x00\x00\xff\xff" * 1000, first=GZIPPED + b"\r\n" + gzip.compress(b"")[:10]
    ),
}
PACKINGS = {
    "of something else": ("gzip", b"not packed"),
    "cut": ("gzip", gzip.compress(b"{}" * 99)[:20]),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(b"{}"))),
    "brotli": ("br", b"\x8b\x00\x80{}\x03"),
    "zstd": ("zstd", b"(\xb5/\xfd\x04\x00"),
    "unknown": ("rot13", b"{}"),
    "escapes": (SHOUT, b"{}"),
    "compress": ("compress", b"{}"),
    "five times": ("gzip, gzip, gzip, gzip, gzip", b""),
}
ERRORS = {
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"x"',
    "an error of numbers": b'{"error": 5}',
    "an error of a dict": b'{"error": {"a": 1}}',
    "an error of a list": b'{"error": ["a", 1, null]}',
    "errors of a number": b'{"errors": 5}',
    "errors of numbers": b'{"errors": [5]}',
    "errors of dicts": b'{"errors": [{"message": {}}]}',
    "errors of nothing": b'{"errors": [{}]}',
    "deep": b"[" * 60_000,
    "a long number": f'{{"error": {LONG}}}'.encode(),
    "no UTF-8": b'{"error": "\xff"}',
    "escapes": json.dumps({"error": SHOUT}).encode(),
    "raw escapes": SHOUT.encode(),
    "half a pair": b'{"error": "\\ud800"}',
    "much": b"a" * 5_000_000,
    "lines": b"fine\nerror: none\n\n  all is well",
    "HTML": b"<html></html>",
}
CODES = ("RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo", "DisabledRepo", SHOUT, "", "x" * 5000)


def http(kind: str, name: str = "") -> Iterator[Case]:
    """At one place of the protocol, everything that HTTP lets a server say. name: only of this file."""
    where = f"{kind} {name}".strip()

    def case(what: str, answer: Callable[[Said], Said | Script], refused: bool | None = None, **more: Any) -> Case:
        return Case(f"{where}: {what}", at(kind, answer, name), refused=refused, **more)

    for what, place in PLACES.items():
        yield case(f"sends to {what}", lambda said, place=place: Said(302, said.having(Location=place).headers), True)
    yield case("sends to itself", lambda said: Said(302, said.having(Location="?again").headers), True)
    # Of the check of access the status is all that counts: the first of two answers is a whole one.
    either = {"nothing at all", "a folded header", *(["two answers"] if kind == "auth" else [])}
    for what, data in RAW.items():
        yield case(what, lambda said, data=data: raw(data), None if what in either else True)
    for what, script in ENDLESS.items():
        yield case(what, lambda said, script=script: script(), True)
    for what, (packing, body) in PACKINGS.items():
        yield case(
            f"packed {what}",
            lambda said, packing=packing, body=body: replace(said.having(Content_Encoding=packing), body=body),
            None if kind == "head" else True,
        )
    for status in STATUSES:
        yield case(
            f"status {status}",
            lambda said, status=status: Said(status, said.headers, b"" if status in (204, 304) else said.body),
        )


def pauses() -> Iterator[Case]:
    for status in BUSY:
        for kind in ("info", "head", "get", "cdn"):
            yield Case(f"{kind}: always {status}", at(kind, lambda said, status=status: Said(status)), refused=True)
    for text in LATER:
        for kind in ("info", "head", "cdn"):
            answer = lambda said, text=text: Said(429, (("Retry-After", text),))  # noqa: E731
            yield Case(f"{kind}: later, {text[:20]!r}", at(kind, answer), refused=True)
    for text in (
        '"api";r=0;t=99999999',
        '"api";r=0;t=' + "9" * 30,
        f'"api";r=0;t={DIGIT}',
        '"api";r=00;t=5555',
        "x",
        SHOUT,
    ):
        answer = lambda said, text=text: Said(429, (("RateLimit", text),))  # noqa: E731
        yield Case(f"head: limited, {text[:20]!r}", at("head", answer), refused=True)


def headers() -> Iterator[Case]:
    for what, tag in TAGS.items():
        refused = None if what in ("empty", "nothing") else True
        yield Case(
            f"ETag: {what}", at("head", lambda said, tag=tag: said.having(ETag=tag), "config.json"), refused=refused
        )
        answer = lambda said, tag=tag: said.having(X_Linked_Etag=tag)  # noqa: E731
        yield Case(f"X-Linked-Etag: {what}", at("head", answer, WEIGHTS), refused=refused)
    yield Case("ETag: none", at("head", lambda said: said.having(ETag=None, X_Linked_Etag=None)), refused=True)
    for size in LINKED_SIZES:
        answer = lambda said, size=size: said.having(X_Linked_Size=size)  # noqa: E731
        yield Case(
            f"X-Linked-Size: {size[:20]!r}", at("head", answer, WEIGHTS), refused=None if size in ("", " 5") else True
        )
    for what, value in COMMITS.items():
        if isinstance(value, str) and value and value.strip() == value:
            answer = lambda said, value=value: said.having(X_Repo_Commit=value)  # noqa: E731
            yield Case(f"X-Repo-Commit: {what}", at("head", answer), refused=True)
    yield Case("X-Repo-Commit: another", at("head", lambda said: said.having(X_Repo_Commit="b" * 40)), refused=True)
    yield Case("X-Repo-Commit: none", at("head", lambda said: said.having(X_Repo_Commit=None)), refused=True)
    missing = (("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", "../" * 30 + CANARY))
    yield Case("a missing file of a commit that is a path", at("head", lambda said: Said(404, missing)), refused=True)
    for what, text in {"escapes": SHOUT, "a topic": f"a; {SHOUT}", "much": "a" * 60_000, "not ASCII": "ä\x85"}.items():
        answer = lambda said, text=text: said.having(X_HF_Warning=text, Content_Disposition=f"filename={text[:50]}")  # noqa: E731
        yield Case(f"X-HF-Warning: {what}", at("head get cdn info", answer), refused=False)
    many = tuple(("Set-Cookie", f"c{i}=v; Domain=127.0.0.1; Path=/../{i}") for i in range(900))
    yield Case("cookies", at("head info", lambda said: replace(said, headers=said.headers + many)), refused=None)
    for link in ("<x>; rel=next", "<" * 5000, ";;;=", f"<{SHOUT}>; rel=next", "<file:///etc/passwd>; rel=xet-auth"):
        answer = lambda said, link=link: said.having(Link=link, X_Xet_Hash="a" * 64)  # noqa: E731
        yield Case(f"Link: {link[:20]!r}", at("head info", answer), refused=False)
    for part in (
        "bytes 5-9/99",
        "bytes 0-0/1",
        "bytes */*",
        "x",
        "bytes 1-0/9",
        f"bytes 0-{LONG}/9",
        "",
        "bytes -5-9/9",
        "items 0-1/2",
    ):
        answer = lambda said, part=part: replace(said.having(Content_Range=part), status=206)  # noqa: E731
        yield Case(f"Content-Range: {part[:20]!r}", at("cdn", answer), refused=True)
    yield Case(
        "a part that is the whole", at("get cdn", lambda said: replace(said.having(Content_Range=None), status=200))
    )


def bytes_of_files() -> Iterator[Case]:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "garbage": lambda data: bytes(byte ^ 0x5A for byte in data),
        "nothing": lambda data: b"",
        "one more": lambda data: data + b"x",
        "one less": lambda data: data[:-1],
        "much more": lambda data: data + bytes(30 << 20),
        "HTML": lambda data: b"<html>log in</html>",
        "zeros": lambda data: bytes(len(data)),
        "a pointer": lambda data: (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 136\n"
        ),
    }
    for what, change in changes.items():
        answer = lambda said, change=change: replace(said, body=change(said.body))  # noqa: E731
        yield Case(f"weights: {what}", at("cdn", answer), refused=True)
        yield Case(f"config: {what}", at("get", answer, "config.json"), refused=True)
        length = lambda said, change=change: replace(said, body=change(said.body), length=str(len(said.body)))  # noqa: E731
        more = what.endswith("more")  # than anybody reads
        yield Case(f"weights: {what}, and the size told", at("cdn", length), refused=None if more else True)
        unsized = lambda said, change=change: replace(said, body=change(said.body), length=None)  # noqa: E731
        yield Case(f"weights: {what}, and no size told", at("cdn", unsized), refused=True)


def errors() -> Iterator[Case]:
    for status in (400, 403, 404, 500):
        for what, body in ERRORS.items():
            for kind in ("info", "head") if status == 403 else ("info",):
                yield Case(
                    f"{kind}: {status} with {what}",
                    at(kind, lambda said, status=status, body=body: Said(status, (), body)),
                    refused=True,
                    ends="NotAuthorised" if (kind, status) == ("info", 403) else "",
                )
    for code in CODES:
        for status in (401, 403, 404):
            head = (("X-Error-Code", code), ("X-Error-Message", f"{SHOUT} hi"), ("X-Request-Id", SHOUT))
            for kind in ("info", "auth", "head"):
                answer = lambda said, status=status, head=head: Said(status, head)  # noqa: E731
                yield Case(
                    f"{kind}: {status} {code[:20]!r}", at(kind, answer), refused=None if kind == "auth" else True
                )
    for what, body in BODIES.items():
        if len(body) < 1 << 20:
            yield Case(f"branches: {what}", at("refs", partial(replace, body=body)), revision="nowhere", refused=True)
            yield Case(f"access: {what}", at("auth", partial(replace, body=body)))
    for what, names in {
        "numbers": [1, None],
        "escapes": [SHOUT],
        "many": ["x" * 50] * 100_000,
        "dicts": [{}],
        "long": ["a" * 10**6],
    }.items():
        refs = {"branches": [{"name": name} for name in names], "tags": []}
        yield Case(
            f"branches of {what}",
            at("refs", partial(replace, body=json.dumps(refs).encode())),
            revision="nowhere",
            refused=True,
        )


def elsewhere() -> Iterator[Case]:
    """Other hosts are allowed, and see no token."""

    def away(asked: Asked, said: Said, host: list[str]) -> Said:
        kept = tuple((name, value) for name, value in said.headers if name != "Location")
        moved = f"http://localhost:{host[0]}{asked.path}"
        first = asked.headers["host"].startswith("127.0.0.1")
        return Said(307, (*kept, ("Location", moved))) if first and asked.kind in ("info", "get", "auth") else said

    def change(asked: Asked, said: Said) -> Said:
        return away(asked, said, [asked.headers["host"].rpartition(":")[2]])

    yield Case("everything lies on another host", change, refused=False)

    def there_and_back(asked: Asked, said: Said) -> Said:
        name, _, port = asked.headers["host"].partition(":")
        other = "localhost" if name == "127.0.0.1" else "127.0.0.1"
        return Said(302, (("Location", f"http://{other}:{port}{asked.path}?{len(asked.headers)}"),))

    yield Case("from host to host without end", there_and_back, refused=True)

    def renamed(asked: Asked, said: Said) -> Said:
        moved = asked.path.replace(REPO, "org/other")
        return (
            Said(301, (("Location", moved),)) if REPO in asked.path else Said(404, (("X-Error-Code", "RepoNotFound"),))
        )

    yield Case("renamed to what is not there", renamed, refused=True)


def cases() -> list[Case]:
    """Return all of them; each name once."""
    places = [http("info"), http("head", "config.json"), http("get", "config.json"), http("cdn"), http("auth")]
    groups = (listings(), pauses(), headers(), bytes_of_files(), errors(), elsewhere(), *places)
    return list({case.name: case for group in groups for case in group}.values())
