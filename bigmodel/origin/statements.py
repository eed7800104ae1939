"""What is said of a published model in the words of others: in-toto, SLSA, OpenSSF's model signing, CycloneDX.

Formats: in-toto Statement v1 (https://in-toto.io/Statement/v1), SLSA provenance v1 (https://slsa.dev/provenance/v1),
`https://model_signing/signature/v1.0` as `model_signing` 1.1 has it, CycloneDX 1.6 (ECMA-424).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bigpipe.bigmodel.publishing import Published, Stored
from bigpipe.redaction import redact_fields
from bigpipe.versions import package_version

from .listing import package_url, root_digest

STATEMENT = "https://in-toto.io/Statement/v1"
SIGNATURE = "https://model_signing/signature/v1.0"
PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:bigpipe:recipe:v1"
"""A run of a recipe: `externalParameters` are the recipe and its parameters, `internalParameters` its steps."""
BUILDER = "pkg:pypi/bigpipe-ml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A published model, and what is known of it."""

    name: str
    files: Mapping[str, Stored]
    published: Published | None
    """Its provenance; None: it has none."""
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    """Metadata of its card."""
    base: tuple[str, str | None] | None
    """The repository and commit that it was made from."""
    scheme: str | None
    """What it was quantized to."""


def signature_statement(subject: Subject) -> dict[str, Any]:
    """Return the digest of every file as OpenSSF's model signing has it."""
    resources = [{"name": name, "algorithm": "sha256", "digest": file.sha256} for name, file in subject.files.items()]
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
    return {
        "_type": STATEMENT,
        "subject": [{"name": subject.name, "digest": {"sha256": root_digest(subject.files)}}],
        "predicateType": SIGNATURE,
        "predicate": {"serialization": serialization, "resources": resources},
    }


def provenance_statement(subject: Subject, published: Published) -> dict[str, Any]:
    """Return how a model was built, in the words of SLSA: from which commits, by which recipe and steps."""
    known = published.provenance
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "recipe": known.recipe, "node": known.node, "text": known.text, "parameters": known.params,
        },
        "internalParameters": {"steps": [asdict(step) for step in known.steps]},
        "resolvedDependencies": list(_dependencies(subject, published)),
    }  # fmt: skip
    builder = {"id": f"{BUILDER}@{published.version}", "version": {"bigpipe-ml": published.version}}
    stated = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": file.sha256}} for name, file in subject.files.items()],
        "predicateType": PROVENANCE,
        "predicate": {"buildDefinition": definition, "runDetails": {"builder": builder}},
    }
    redacted: dict[str, Any] = redact_fields(stated)
    return redacted


def _dependencies(subject: Subject, published: Published) -> Iterator[dict[str, Any]]:
    if subject.base is not None:
        repo, commit = subject.base
        yield {"uri": package_url(repo, commit), **({"digest": {"gitCommit": commit}} if commit else {})}
    if (git := published.provenance.git) is not None:
        yield {"name": "recipe", "digest": {"gitCommit": git.get("commit")}, "annotations": {"dirty": git.get("dirty")}}


def bill_of_materials(subject: Subject) -> dict[str, Any]:
    """Return the model, what it was made from and its files as a machine-learning BOM of CycloneDX."""
    root = root_digest(subject.files)
    source = list(_source(subject))
    files = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_hash(file.sha256)]}
        for name, file in subject.files.items()
    ]
    model = {
        "type": "machine-learning-model", "bom-ref": "model", "name": subject.name, "version": root[:12],
        "hashes": [_hash(root)], **_licensed(subject.card), "modelCard": _card(subject),
        **({"pedigree": {"ancestors": source}} if source else {}),
    }  # fmt: skip
    tool = {"type": "application", "name": "bigpipe-ml", "version": package_version("bigpipe-ml") or "0"}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{root}')}",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}, "component": model},
        "components": files,
        "dependencies": [{"ref": "model", "dependsOn": [file["bom-ref"] for file in files]}],
    }


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}


def _licensed(card: Mapping[str, Any]) -> dict[str, Any]:
    license = card.get("license")
    return {"licenses": [{"license": {"name": license}}]} if isinstance(license, str) and license else {}


def _source(subject: Subject) -> Iterator[dict[str, Any]]:
    if subject.base is not None:
        repo, commit = subject.base
        version = {"version": commit} if commit else {}
        yield {"type": "machine-learning-model", "name": repo, **version, "purl": package_url(repo, commit)}


def _card(subject: Subject) -> dict[str, Any]:
    classes = subject.config.get("architectures") or [None]
    told = {
        "task": subject.card.get("pipeline_tag"),
        "architectureFamily": subject.config.get("model_type"),
        "modelArchitecture": classes[0] if isinstance(classes, list) else None,
    }
    card: dict[str, Any] = {"modelParameters": {key: value for key, value in told.items() if isinstance(value, str)}}
    if measured := list(_measured(subject.published)):
        card["quantitativeAnalysis"] = {"performanceMetrics": measured}
    if subject.scheme is not None:
        card["properties"] = [{"name": "bigpipe:quantization", "value": subject.scheme}]
    return card


def _measured(published: Published | None) -> Iterator[dict[str, str]]:
    """What `evaluate` measured, of steps that were not left."""
    steps = published.provenance.steps if published is not None else ()
    for step in (step for step in steps if step.kind == "evaluate" and not step.left):
        for name, value in step.metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield {"type": name, "value": str(value), "slice": step.node}
