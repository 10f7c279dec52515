"""Signatures: ECDSA P-256 with SHA-256 over DSSE envelopes that carry in-toto statements.

Source: DSSE v1 (secure-systems-lab) and in-toto Statement v1. The only module that touches private keys.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from imaging.errors import TrustError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
ALGORITHM = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class Signer:
    """A person or process that can sign.

    Attributes:
        identity: whose key it is, e.g. author@demo.
        private: the key itself; never leaves this module's functions.
        speaks_for: who acts, where the key's owner read a token that names them; else empty.
    """

    identity: str
    private: ec.EllipticCurvePrivateKey
    speaks_for: str = ""

    @property
    def actor(self) -> str:
        """Who acts."""
        return self.speaks_for or self.identity

    @property
    def public_pem(self) -> str:
        """The public half, as PEM."""
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.private.public_key().public_bytes(encoding, form).decode()

    @property
    def key_id(self) -> str:
        """Name of the key: the first 16 hexadecimal digits of sha256 of the public PEM."""
        return name_key(self.public_pem)

    def sign(self, message: bytes) -> str:
        """Signature of a message, base64."""
        return base64.b64encode(self.private.sign(message, ALGORITHM)).decode()


def name_key(public_pem: str) -> str:
    """Key id of a public key."""
    return hashlib.sha256(public_pem.encode()).hexdigest()[:16]


def key_path(var: Path, identity: str) -> Path:
    """Where the private key of an identity lies."""
    return var / "keys" / f"{identity}.pem"


def create_signer(var: Path, identity: str) -> Signer:
    """Make a key for an identity, mode 0600; an existing one is kept and returned."""
    path = key_path(var, identity)
    if path.exists():
        return load_signer(var, identity)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    signer = Signer(identity, ec.generate_private_key(ec.SECP256R1()))
    pem = signer.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(pem)
    return signer


def load_signer(var: Path, identity: str) -> Signer:
    """Open the key of an identity.

    Raises:
        TrustError: there is no such key, or it is not an EC key.
    """
    path = key_path(var, identity)
    fix = f"Make one: formulary registry keys create --identity {identity}"
    if not path.exists():
        raise TrustError(f"{identity} has no key at {path}.", fix)
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise TrustError(f"{path} is not a private key.", f"Remove it. {fix}") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path} is not an elliptic-curve key.", f"Remove it. {fix}")
    return Signer(identity, private)


@lru_cache(maxsize=2**14)
def check_signature(public_pem: str, message: bytes, signature: str) -> bool:
    """Whether a base64 signature of a message was made by this key; what was seen once is remembered."""
    key = _read_public(public_pem)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        raw = base64.b64decode(signature, validate=True)
        key.verify(raw, message, ALGORITHM)
    except (InvalidSignature, ValueError):
        return False
    return base64.b64encode(raw).decode() == signature  # one spelling: base64 ignores its last bits


@lru_cache(maxsize=256)
def _read_public(pem: str) -> object:
    return serialization.load_pem_public_key(pem.encode())


def state(files: dict[str, str], kind: str, predicate: dict[str, Any]) -> dict[str, Any]:
    """An in-toto statement of a kind about files (name -> sha256)."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)],
        "predicateType": f"formulary/{kind}/v1",
        "predicate": predicate,
    }


def seal(statement: dict[str, Any], signer: Signer) -> dict[str, Any]:
    """A statement in a signed DSSE envelope."""
    body = json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(body).decode(),
        "signatures": [{"keyid": signer.key_id, "sig": signer.sign(_encode(PAYLOAD_TYPE, body))}],
    }


def unseal(envelope: dict[str, Any], trusted: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Verify an envelope and open it.

    Args:
        envelope: as `seal` makes it.
        trusted: key id -> public PEM.

    Returns:
        The statement, and the id of the key that signed it.

    Raises:
        TrustError: not an envelope, an unknown key, or a signature that does not hold.
    """
    try:
        kind, body = str(envelope["payloadType"]), base64.b64decode(envelope["payload"], validate=True)
        signatures = [(str(item["keyid"]), str(item["sig"])) for item in envelope["signatures"]]
    except (KeyError, TypeError, ValueError) as error:
        raise TrustError("A statement is not a signed envelope.", "Register the version again.") from error
    for key, signature in signatures:
        if (
            kind == PAYLOAD_TYPE
            and key in trusted
            and check_signature(trusted[key], _encode(kind, body), signature)
        ):
            return json.loads(body), key
    raise TrustError(
        "No trusted key signed this statement.",
        "See `formulary registry keys list`; register the version again.",
    )


def _encode(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(body), body)


def read_secret(path: Path) -> bytes:
    """32 random bytes of a file that is made where there is none, mode 0600; whoever makes it first wins.

    Read once as long as the file stays what it is.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    told = path.stat()
    return _read_again(path, told.st_ino, told.st_mtime_ns)


@lru_cache(1024)
def _read_again(path: Path, _inode: int, _changed: int) -> bytes:
    return path.read_bytes()
