"""Certificates as a hospital's own authority would hand them out."""

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_certificate(folder, name="server", days=1, password=None):
    """A certificate for 127.0.0.1 that holds for some days from now, and its key: two PEM files."""
    private, ends = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC) + timedelta(days=days)
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a gateway")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(who, who, private.public_key(), x509.random_serial_number())
    made = made.not_valid_before(ends - timedelta(days=2)).not_valid_after(ends).add_extension(here, False)
    encrypt = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(made.sign(private, hashes.SHA256()).public_bytes(pem))
    files[1].write_bytes(private.private_bytes(pem, form, encrypt))
    return files
