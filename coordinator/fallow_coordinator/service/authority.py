"""The certificate authority of one coordinator: its own key, its servers' certificates, its parties' certificates."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fallow.errors import FallowError, Reason
from fallow.identity import (
    AUTHORITY_EXTENSION,
    PARTY_EXTENSION,
    PrivateKey,
    load_certificate,
    public_der_of,
    public_der_of_certificate,
    write_private,
)
from fallow.ids import Digest, digest_of
from fallow_coordinator.core.answers import CertificateGranted

AUTHORITY_VALID_FOR: Final = datetime.timedelta(days=3650)
CLOCK_ALLOWANCE: Final = datetime.timedelta(minutes=5)
"""How far a party's clock may run behind ours before a fresh certificate looks premature to it."""
CERTIFICATE_REQUEST_BYTES_MAX: Final = 4096
_SERIAL_BYTES_MAX: Final = 19
"""X.509 allows 20 bytes with the sign."""


class Authority:
    """A P-256 authority whose key never leaves its folder (0700, files 0600)."""

    def __init__(self, key: PrivateKey, certificate: x509.Certificate) -> None:
        """An authority as `open` finds or makes it; call `open`."""
        self._key = key
        self._certificate = certificate
        self.certificate_der = certificate.public_bytes(Encoding.DER)
        """The authority's own certificate."""
        self.certificate_pem = certificate.public_bytes(Encoding.PEM)
        """The same, as channels take it."""
        self.fingerprint: Digest = digest_of(self.certificate_der)
        """What join lines pin."""

    @classmethod
    def open(cls, folder: Path, now: datetime.datetime) -> Authority:
        """The authority in `folder`, made on first use. Raises FIELD_INVALID when the folder is damaged."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key_path, certificate_path = folder / "key.pem", folder / "certificate.pem"
        if certificate_path.exists() and not key_path.exists():
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{key_path} is missing although the authority was made",
                field=str(key_path),
                hint="restore it from a backup, or start with a fresh state folder and join all parties again",
            )
        if not key_path.exists():
            PrivateKey.generate().save(key_path)
        key = PrivateKey.load(key_path)
        if not certificate_path.exists():
            made = _authority_certificate(key, now)
            write_private(certificate_path, made.public_bytes(Encoding.PEM))
        certificate = load_certificate(certificate_path.read_bytes())
        if public_der_of_certificate(certificate) != key.public_der:
            raise FallowError(
                Reason.FIELD_INVALID, f"key and certificate in {folder} do not belong together", field=str(folder)
            )
        return cls(key, certificate)

    def server_certificate(
        self, public_key: ec.EllipticCurvePublicKey, names: Sequence[str], now: datetime.datetime
    ) -> bytes:
        """PEM of a server certificate for fixed names (SANs); it carries the authority so that joiners can pin it."""
        authority = x509.UnrecognizedExtension(AUTHORITY_EXTENSION, self.certificate_der)
        # The coordinator shows the same certificate when it calls the blob service.
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            self._builder(names[0], public_key, now, self._certificate.not_valid_after_utc, x509.random_serial_number())
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key.raw, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM)

    def party_certificate(
        self, public_key: ec.EllipticCurvePublicKey, granted: CertificateGranted, now: datetime.datetime
    ) -> bytes:
        """DER of a party's certificate with exactly the facts that the core granted, valid from a little before now."""
        assert 1 <= len(granted.serial) <= _SERIAL_BYTES_MAX and any(granted.serial), "a serial is positive"
        not_after = datetime.datetime.fromtimestamp(granted.not_after_ms / 1000, datetime.UTC)
        facts = "\n".join(
            (granted.account_id, granted.role.value, granted.tier.value if granted.tier else "", granted.pool_id)
        )
        uri = x509.UniformResourceIdentifier(f"fallow://party/{granted.party_id}")
        serial = int.from_bytes(granted.serial, "big")
        certificate = (
            self._builder(granted.party_id, public_key, now, not_after, serial)
            .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.UnrecognizedExtension(PARTY_EXTENSION, facts.encode()), critical=False)
            .sign(self._key.raw, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.DER)

    def _builder(
        self,
        name: str,
        public_key: ec.EllipticCurvePublicKey,
        now: datetime.datetime,
        not_after: datetime.datetime,
        serial: int,
    ) -> x509.CertificateBuilder:
        not_before = min(now - CLOCK_ALLOWANCE, not_after - datetime.timedelta(seconds=1))
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(serial)
            .not_valid_before(not_before)
            .not_valid_after(min(not_after, self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_certificates=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.raw.public_key()), critical=False
            )
        )


def public_key_of_request(der: bytes) -> tuple[ec.EllipticCurvePublicKey, bytes]:
    """The P-256 key that signed a PKCS#10 request, and its DER SubjectPublicKeyInfo.

    Nothing else of the request counts: names and extensions in it are not looked at. Raises FIELD_INVALID when it is
    malformed, too long or for another kind of key, SIGNATURE_INVALID when the key did not sign it.
    """
    field = "certificate_request"
    if not 1 <= len(der) <= CERTIFICATE_REQUEST_BYTES_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a certificate request of {len(der)} bytes",
            field=field,
            limit=f"1 to {CERTIFICATE_REQUEST_BYTES_MAX} bytes, DER PKCS#10",
        )
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        valid = isinstance(key, ec.EllipticCurvePublicKey) and request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        raise FallowError(
            Reason.FIELD_INVALID, "this is no certificate request", field=field, limit="DER PKCS#10"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FallowError(Reason.FIELD_INVALID, "the request's key is not P-256", field=field, limit="P-256")
    if not valid:
        raise FallowError(Reason.SIGNATURE_INVALID, "the request is not signed by its own key", field=field)
    return key, public_der_of(key)


def _authority_certificate(key: PrivateKey, now: datetime.datetime) -> x509.Certificate:
    name = _name("Fallow coordinator authority")
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.raw.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_ALLOWANCE)
        .not_valid_after(now + AUTHORITY_VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.raw.public_key()), critical=False)
        .sign(key.raw, hashes.SHA256())
    )


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
