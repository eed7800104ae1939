"""Statements in bundles, signed or not: in-toto's Statement in a DSSE envelope in Sigstore's bundle.

Formats: https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md, and Sigstore's bundle v0.3 with a public
key in place of a certificate, as OpenSSF's `model_signing` 1.1 reads and writes it (ECDSA over the curves P-256, P-384
and P-521, each with the hash of its size).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import invalid, read_json
from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import explained, read_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
LARGEST = 100_000_000
"""Bytes of a bundle that is read."""
LARGEST_KEY = 100_000
MAKE_KEY = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
OTHER_KEY = "give the public half of the key that it was signed with: openssl ec -in key.pem -pubout -out key.pub"


@dataclass(frozen=True, slots=True)
class Opened:
    """What a bundle holds."""

    statement: Mapping[str, Any]
    signed: bool
    checked: bool
    """The signature is that of the key which was given."""


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key in a PEM file. Raise UsageError where there is none that a bundle can be signed with."""
    require_cryptography("signing")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a private key that can be read: {error}", MAKE_KEY) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _hashes():
        raise UsageError(f"{path} is not a key on the curve P-256, P-384 or P-521", MAKE_KEY)
    return key


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Return the public key in a PEM file. Raise UsageError as `read_private_key`."""
    require_cryptography("checking a signature")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a public key that can be read: {error}", OTHER_KEY) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _hashes():
        raise UsageError(f"{path} is not a public key on the curve P-256, P-384 or P-521", OTHER_KEY)
    return key


def require_cryptography(what: str) -> None:
    """Raise UsageError where what signs is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UsageError(f"{what} needs cryptography, not installed here", "pip install 'bigpipe-ml[sign]'") from None


def _read(path: Path) -> bytes:
    with explained(path, other="name another file"):
        return read_file(path, LARGEST_KEY)


def _hashes() -> dict[str, Any]:
    from cryptography.hazmat.primitives import hashes

    return {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}


def bundle(statement: Mapping[str, Any], key: ec.EllipticCurvePrivateKey | None) -> str:
    """Return the text of a bundle that holds a statement; key: what it is signed with, None: it is not."""
    payload = json.dumps(statement, indent=2).encode()
    signatures, hint = [], ""
    if key is not None:
        from cryptography.hazmat.primitives.asymmetric import ec

        made = key.sign(_encoded(payload), ec.ECDSA(_hashes()[key.curve.name]))
        signatures, hint = [{"sig": base64.b64encode(made).decode(), "keyid": ""}], _hint(key.public_key())
    envelope = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signatures}
    material = {"publicKey": {"hint": hint}, "tlogEntries": []}
    whole = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return json.dumps(whole, indent=2) + "\n"


def open_bundle(file: Path, key: ec.EllipticCurvePublicKey | None) -> Opened:
    """Return what the bundle in a file holds; key: what it must be signed with. Raise InvalidCheckpoint where it is
    damaged, StageFailed where it is not signed with that key."""
    told = read_json(file, file.parent, LARGEST)
    try:
        envelope = told["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(each["sig"], validate=True) for each in envelope["signatures"]]
        statement = json.loads(payload)
        if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(statement, dict):
            raise ValueError("it holds no statement of in-toto")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise invalid(file, f"is not a bundle that can be read: {error}", "take it as it was published") from None
    if key is not None and not any(_is_signed(payload, signature, key) for signature in signatures):
        cause = f"{file} is {'not signed with this key' if signatures else 'not signed'}"
        raise StageFailed(cause, OTHER_KEY if signatures else "ask who published it for one that is")
    return Opened(statement, bool(signatures), key is not None)


def _is_signed(payload: bytes, signature: bytes, key: ec.EllipticCurvePublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.verify(signature, _encoded(payload), ec.ECDSA(_hashes()[key.curve.name]))
    except InvalidSignature:
        return False
    return True


def _encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    """By which `model_signing` knows a key: the sha256 of its PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
