"""Keys: P-256, made on the machine that uses them, never leaving it."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fallow.errors import FallowError, Reason
from fallow.ids import KeyFingerprint, digest_of

AUTHORITY_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.61000.7.1")
"""On the enrolment endpoint's certificate: the authority's own certificate, DER, so that a joiner can pin it."""
PARTY_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.61000.7.2")
"""On a party's certificate: account, role, tier and pool as UTF-8 lines, for people only."""

CONTROL_NAME = "control.fallow"
BLOBS_NAME = "blobs.fallow"
ENROLLMENT_NAME = "enrollment.fallow"
POOL_CACHE_NAME = "pool-cache.fallow"

_ALGORITHM = ec.ECDSA(hashes.SHA256())


class PrivateKey:
    """A P-256 private key."""

    __slots__ = ("_key", "fingerprint", "public_der")

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public_der = public_der_of(key.public_key())
        """DER SubjectPublicKeyInfo."""
        self.fingerprint = fingerprint_of(self.public_der)

    @classmethod
    def generate(cls) -> PrivateKey:
        """A fresh key."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """The key in a PEM file. Raises FIELD_INVALID when it is none, or is open to other users."""
        if path.stat().st_mode & 0o077:
            raise FallowError(
                Reason.FIELD_INVALID, f"{path} can be read by other users", field=str(path), hint=f"chmod 600 {path}"
            )
        return cls.from_pem(path.read_bytes(), str(path))

    @classmethod
    def from_pem(cls, pem: bytes, name: str = "key") -> PrivateKey:
        """The key in PEM bytes. Raises FIELD_INVALID when it is not P-256."""
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except ValueError:
            raise FallowError(Reason.FIELD_INVALID, f"{name} holds no private key", field=name) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise FallowError(Reason.FIELD_INVALID, f"{name} is not a P-256 key", field=name, limit="P-256")
        return cls(key)

    def save(self, path: Path) -> None:
        """Writes the key as PEM with mode 0600, whole or not at all."""
        write_private(path, self.pem)

    @property
    def pem(self) -> bytes:
        """PKCS#8 PEM, unencrypted."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def raw(self) -> ec.EllipticCurvePrivateKey:
        """For certificates only."""
        return self._key

    def sign(self, message: bytes) -> bytes:
        """A DER ECDSA signature with SHA-256."""
        return self._key.sign(message, _ALGORITHM)

    def certificate_request(self, name: str) -> bytes:
        """A DER PKCS#10 request for this key, signed by it."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64] or "fallow")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self._key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.DER)


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that only its owner can read, whole or not at all, and durable."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def public_der_of(key: ec.EllipticCurvePublicKey) -> bytes:
    """DER SubjectPublicKeyInfo of a public key."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint_of(public_der: bytes) -> KeyFingerprint:
    """SHA-256 of a public key's DER SubjectPublicKeyInfo."""
    return KeyFingerprint(digest_of(public_der))


def load_certificate(data: bytes) -> x509.Certificate:
    """A certificate from PEM or DER. Raises FIELD_INVALID."""
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_certificate(data)
        return x509.load_der_x509_certificate(data)
    except ValueError:
        raise FallowError(Reason.FIELD_INVALID, "this is no certificate", field="certificate") from None


def public_der_of_certificate(certificate: x509.Certificate) -> bytes:
    """DER SubjectPublicKeyInfo of a certificate's key. Raises FIELD_INVALID when it is not P-256."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FallowError(
            Reason.FIELD_INVALID, "the certificate's key is not P-256", field="certificate", limit="P-256"
        )
    return public_der_of(key)


def verify(public_der: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is `public_der`'s over `message`; False for anything malformed."""
    key = _public_key(public_der)
    if key is None:
        return False
    try:
        key.verify(signature, message, _ALGORITHM)
    except (InvalidSignature, ValueError):
        return False
    return True


_KEYS_REMEMBERED_MAX = 4096
_keys: dict[bytes, ec.EllipticCurvePublicKey] = {}


def _public_key(public_der: bytes) -> ec.EllipticCurvePublicKey | None:
    """Parsing costs as much as half a verification, and the same keys come again and again."""
    key = _keys.get(public_der)
    if key is None:
        try:
            parsed = serialization.load_der_public_key(public_der)
        except ValueError:
            return None
        if not isinstance(parsed, ec.EllipticCurvePublicKey) or not isinstance(parsed.curve, ec.SECP256R1):
            return None
        if len(_keys) >= _KEYS_REMEMBERED_MAX:
            _keys.clear()
        key = _keys[public_der] = parsed
    return key
