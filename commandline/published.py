"""Commands about models that are published, and about whether what is stored is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import bigpipe
from bigpipe.errors import UsageError
from bigpipe.names import listed
from bigpipe.orchestrator import report

from .completing import MODELS
from .options import JSON, OFFLINE, PATH, STORE
from .printing import own_stderr, show

BELONGS = {
    "repair": ("mends the store", ("the store",)),
    "source": ("says what a model was made from", ("--reproduce",)),
    "trust": ("says whose class a model may have", ("--reproduce",)),
    "attestations": ("says where those of a directory lie", ("a directory",)),
    "key": ("is what those of a directory are signed with", ("a directory",)),
    "offline": ("keeps a model from being asked for", ("--reproduce", "a directory")),
}
"""Option of `verify` → what it does, and what it belongs to."""


@click.command()
@click.argument("directory", type=PATH)
@click.option("-o", "--out", type=PATH, metavar="DIR", help="Where they go; else NAME.attestations beside it.")
@click.option("--key", type=PATH, metavar="PEM", help="The private key to sign with; else nothing is signed.")
@JSON
def attest(directory: Path, out: Path | None, key: Path | None, as_json: bool) -> None:
    """Write what other tools check the model in DIRECTORY by: digests, how it was built, what it consists of.

    An OpenSSF model signature, SLSA provenance v1 as an in-toto statement, and a CycloneDX ML-BOM.

    Example: bigpipe attest dist/model --key key.pem
    """
    with report.following(own_stderr(), str(directory)) as progress:
        found = bigpipe.attest(directory, out, key=key, progress=lambda done, total: progress(done, total, "hash"))
    show(as_json, found.as_json, found.render)


@click.command()
@click.argument("directory", type=PATH, required=False)
@click.option("--repair", is_flag=True, help="Quarantine what is damaged, so that it is made again.")
@click.option(
    "--reproduce", metavar="MODEL", shell_complete=MODELS, help="Recompute a quantized model: OWNER/NAME[@REVISION]."
)
@click.option("--source", metavar="MODEL", help="What it was made from, where it does not say: OWNER/NAME@COMMIT.")
@click.option("--trust", multiple=True, metavar="MODULE", help="A module of yours that its class may come from.")
@click.option("--attestations", type=PATH, metavar="DIR", help="Of DIRECTORY; else NAME.attestations beside it.")
@click.option("--key", type=PATH, metavar="PEM", help="The public key that the attestations must be signed with.")
@OFFLINE
@JSON
@STORE
def verify(directory: Path | None, reproduce: str | None, as_json: bool, store: Path | None, **options: Any) -> None:
    """Hash every object in the store and compare. Exit 6 where something is damaged.

    With DIRECTORY: hash a published model, and compare with its provenance.json and what `attest` wrote; nothing is
    asked of a network. With --reproduce: recompute a published quantized model (a repository or a directory), by
    bigpipe or by transformers and bitsandbytes, from its source, tensor by tensor. Exit 6 where a byte is not what it
    should be.

    Example: bigpipe verify --reproduce dist/model --source facebook/opt-125m
    """
    if directory is not None and reproduce is not None:
        raise UsageError("a directory is hashed, and --reproduce recomputes a model", "ask for one at a time")
    what = "--reproduce" if reproduce is not None else "a directory" if directory is not None else "the store"
    for name in (name for name, given in options.items() if given and what not in BELONGS[name][1]):
        does, wanted = BELONGS[name]
        raise UsageError(f"--{name} {does}, and {what} is verified", f"leave it out, or give {listed(wanted, 'or')}")
    if reproduce is not None:
        asked = {name: options[name] for name in ("source", "trust", "offline")}
        _reproduce(reproduce, as_json, store, **asked)
    elif directory is not None:
        _check(directory, options["attestations"], options["key"], as_json)
    else:
        found = report.verify_store(options["repair"], store=store)
        show(as_json, lambda: found.data, lambda: found.text, [found.error] if found.error else [])


def _reproduce(published: str, as_json: bool, store: Path | None, **options: Any) -> None:
    from bigpipe.orchestrator.store import memo_directory

    with report.following(own_stderr(), published) as progress:
        found = bigpipe.reproduce(published, memo=memo_directory(store), progress=progress, **options)
    show(as_json, found.as_json, found.render, [found.error] if found.error else [])


def _check(directory: Path, attestations: Path | None, key: Path | None, as_json: bool) -> None:
    with report.following(own_stderr(), str(directory)) as progress:
        found = bigpipe.check_directory(
            directory, attestations, key=key, progress=lambda done, total: progress(done, total, "hash")
        )
    show(as_json, found.as_json, found.render, [found.error] if found.error else [])


COMMANDS = (verify, attest)
