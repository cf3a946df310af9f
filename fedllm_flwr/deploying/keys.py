"""Certificates and keys of a network: an authority, the SuperLink's certificate, and a key pair for each node.

They are what ``openssl`` and ``ssh-keygen`` would make, and are good for trials on one machine. A real federation has
its own authority, and a node's private key is made on the node and never leaves it.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID_DAYS = 30
_HOUR = datetime.timedelta(hours=1)  # clocks differ, and runs last


@dataclass(frozen=True)
class ServerFiles:
    """Files that a SuperLink with TLS needs: its authority's certificate, its own, and its private key."""

    authority: Path
    certificate: Path
    key: Path


def make_server_files(folder: Path, hosts: Sequence[str]) -> ServerFiles:
    """Make an authority and a server certificate that it signed, unless the folder has some that are still valid.

    Args:
        folder: Where to write; created if absent. Private keys are for the owner alone (mode 0600).
        hosts: Names and addresses under which nodes reach the SuperLink.

    Returns:
        The files. The authority's own key is not kept: to add a server, make a new authority.
    """
    files = ServerFiles(folder / "ca.crt", folder / "server.pem", folder / "server.key")
    if all(path.exists() for path in (files.authority, files.certificate, files.key)) and _is_valid(
        files.certificate
    ):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    authority_key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedllm trial authority")
    authority = (
        _certificate(name, name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA384())
    )
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _certificate(_name(hosts[0]), name, key.public_key())
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    files.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    _write_private(
        files.key,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    return files


def make_node_key(path: Path) -> Path:
    """Make a node's key pair (NIST P-384, OpenSSH format), unless it is there.

    Args:
        path: Of the private key; the public one goes beside it as ``.pub``.

    Returns:
        The public key's path, for ``flwr supernode register``.
    """
    public = path.with_name(f"{path.name}.pub")
    if path.exists() and public.exists():
        return public
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    public.write_bytes(key.public_key().public_bytes(encoding, form) + b"\n")
    return public


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _HOUR)
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _is_valid(certificate: Path) -> bool:
    """Whether a certificate will not run out within the next hour."""
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    return found.not_valid_after_utc > datetime.datetime.now(datetime.UTC) + _HOUR


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else could read at any time."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)
