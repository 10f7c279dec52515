"""Where the gateway may listen: on loopback as it is; elsewhere with credentials, and TLS or a word."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from imaging.config import Places
from imaging.errors import ConfigError
from registry.access import read_roles
from services.keys import read_keys

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # uvicorn's own default goes back to TLS 1.0's


@dataclass(frozen=True)
class Listening:
    """How to start.

    Attributes:
        options: for `bentoml serve`.
        guarded: whether a credential has to be asked for, keys or not.
        warning: what whoever starts it has to know; else empty.
    """

    options: list[str]
    guarded: bool
    warning: str = ""


def decide_listening(
    places: Places, host: str, certificate: Path | None, key: Path | None, plain: bool
) -> Listening:
    """Whether and how the gateway may listen on an address.

    Args:
        places: where keys and roles.yaml lie.
        host: an IP address.
        certificate: PEM, the server's own first; with the key it turns TLS on.
        key: PEM, without a password.
        plain: whether an address that others reach may go without TLS.

    Raises:
        ConfigError: not an address; nobody has a credential, or nothing encrypts, where others reach it; the
            certificate or key is missing, cannot be read, does not match or is out of date.
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(f"{host[:60]!r} is not an IP address.", "E.g. 0.0.0.0, or 127.0.0.1.") from None
    tls = _check_certificate(certificate, key)
    if not loopback:
        _check_somebody_may_enter(places, host)
    if not loopback and not tls and not plain:
        raise ConfigError(
            f"{host} is reached by others, and nothing encrypts.",
            "Give --certificate and --key; or --plain-http, where a proxy in front does it.",
        )
    warning = f"Keys, tokens and images go to {host} unencrypted." if not loopback and not tls else ""
    return Listening(["--host", host, *tls], not loopback, warning)


def _check_somebody_may_enter(places: Places, host: str) -> None:
    roles = read_roles(places)
    if not any(key.holds for key in read_keys(places.var)) and not (roles and roles.issuers):
        raise ConfigError(
            f"{host} is reached by others, and nobody has a credential.",
            "Make a key: `formulary services keys create --site SITE`; or name an issuer in roles.yaml.",
        )


def _check_certificate(certificate: Path | None, key: Path | None) -> list[str]:
    if certificate is None and key is None:
        return []
    if certificate is None or key is None:
        raise ConfigError("TLS needs a certificate and its key.", "Give both --certificate and --key.")
    try:
        _check_dates(certificate.read_bytes(), certificate)
        key.read_bytes()  # here, since ssl does not say which of the two is missing
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        reason = (error.reason or "not PEM").replace("_", " ").lower()
        raise ConfigError(
            f"{certificate} and {key} make no TLS ({reason}).", "Both are PEM, match, and have no password."
        ) from error
    except OSError as error:
        fact = f"{error.filename}: {error.strerror}."
        raise ConfigError(fact, "See --certificate and --key.") from error
    files = {"--ssl-certfile": str(certificate.resolve()), "--ssl-keyfile": str(key.resolve())}
    return [part for pair in (files | {"--ssl-ciphers": CIPHERS}).items() for part in pair]


def _check_dates(pem: bytes, path: Path) -> None:
    from cryptography import x509

    try:
        ends = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    except ValueError as error:
        raise ConfigError(f"{path} is not a certificate.", "Give a PEM file.") from error
    if ends < datetime.now(UTC):
        raise ConfigError(f"{path} ended on {ends:%Y-%m-%d}.", "Give one that is valid.")
