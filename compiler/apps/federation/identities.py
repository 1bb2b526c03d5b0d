"""Certificates and keys of a deployment: a CA of its own, the server's certificate for loopback, a P-384 key a node.

Made anew for every deployment and ended with it; nothing here is for a server that others reach.
"""

import datetime
import ipaddress
import os
import secrets
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import reject_on_error

DAYS = 30  # that a certificate is good for

bad_certificate = Fault(
    "bad-deployment-certificate",
    "The certificate of a deployment is missing, or its days are over.",
    exit="environment",
)


def write_keys_and_certificates(folder: Path, n_nodes: int) -> None:
    """`ca.crt`, `server.crt`, `server.key`, `secret`, `node0`, `node0.pub` ... where only their owner reads."""
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(mode=0o700)
    ca, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    _write_private_file(folder / "ca.crt", _pem(_signed_certificate("effc federation CA", ca, ca, None)))
    _write_private_file(folder / "server.crt", _pem(_signed_certificate("localhost", server, ca, "effc federation CA")))
    _write_private_file(folder / "server.key", _private_key_pem(server, "PKCS8"))
    _write_private_file(folder / "secret", secrets.token_hex(32).encode())
    for number in range(n_nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private_file(folder / f"node{number}", _private_key_pem(key, "OpenSSH"))
        _write_private_file(folder / f"node{number}.pub", _public_key_openssh(key))


def check_certificates(folder: Path, at_time: datetime.datetime | None = None) -> None:
    """Raises Reject (bad-deployment-certificate) where one is missing, can't be read, or is out of its days."""
    from cryptography import x509

    at_time = at_time or datetime.datetime.now(datetime.UTC)
    for name in ("ca.crt", "server.crt"):
        file = folder / name
        with reject_on_error(
            bad_certificate, f"{file} is missing or is no certificate", "`effc federate down`, then `up` again"
        ):
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
        if not certificate.not_valid_before_utc <= at_time <= certificate.not_valid_after_utc:
            raise bad_certificate(
                f"{file} is good from {certificate.not_valid_before_utc:%Y-%m-%d} "
                f"to {certificate.not_valid_after_utc:%Y-%m-%d}",
                help="`effc federate down`, then `up` again: it makes new ones",
            ).rejection()


def _signed_certificate(name: str, subject_key: Any, signer_key: Any, issuer: str | None) -> Any:
    """Signed by `signer_key`; of the CA itself where there is no issuer."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA384
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer or name))
        .public_key(subject_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        # Python verifies strictly from 3.13 on: RFC 5280 wants these of an authority and of what it signs.
        .add_extension(_key_usage(is_ca=issuer is None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(subject_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer_key.public_key()), critical=False)
    )
    if issuer:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer_key, SHA384())


def _key_usage(is_ca: bool) -> Any:
    from cryptography.x509 import KeyUsage

    return KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _private_key_pem(key: Any, format_name: str) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, getattr(PrivateFormat, format_name), NoEncryption())


def _public_key_openssh(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def _write_private_file(file: Path, content: bytes) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(content)
