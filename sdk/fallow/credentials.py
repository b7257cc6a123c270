"""Credentials: a folder with a key, a certificate, the authority, and who their holder is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey, load_certificate, write_private
from fallow.ids import AccountId, PartyId, PoolId
from fallow.roles import Role, Tier

_KEY, _CERTIFICATE, _AUTHORITY, _FACTS = "key.pem", "certificate.pem", "authority.pem", "identity.json"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who somebody is and how to reach the coordinator. The folder is for its owner alone (0700, files 0600)."""

    folder: Path
    key: PrivateKey
    certificate_pem: bytes
    authority_pem: bytes
    party_id: PartyId
    account_id: AccountId
    role: Role
    tier: Tier | None
    pool_id: PoolId
    enrollment_endpoint: str
    control_endpoint: str
    blob_endpoint: str
    coordinator_public_key: bytes
    """DER SubjectPublicKeyInfo of the key that signs leases, grants and settlements."""

    @property
    def not_before_ms(self) -> int:
        """When the certificate began, milliseconds since 1970."""
        return int(load_certificate(self.certificate_pem).not_valid_before_utc.timestamp() * 1000)

    @property
    def not_after_ms(self) -> int:
        """When the certificate ends, milliseconds since 1970."""
        return int(load_certificate(self.certificate_pem).not_valid_after_utc.timestamp() * 1000)

    def save(self) -> None:
        """Writes the folder; the certificate last, so that a half-written folder is seen as not joined."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = {
            "party_id": self.party_id,
            "account_id": self.account_id,
            "role": self.role.value,
            "tier": self.tier.value if self.tier else None,
            "pool_id": self.pool_id,
            "enrollment_endpoint": self.enrollment_endpoint,
            "control_endpoint": self.control_endpoint,
            "blob_endpoint": self.blob_endpoint,
            "coordinator_public_key": self.coordinator_public_key.hex(),
        }
        self.key.save(self.folder / _KEY)
        write_private(self.folder / _AUTHORITY, self.authority_pem)
        write_private(self.folder / _FACTS, json.dumps(facts, indent=1).encode())
        write_private(self.folder / _CERTIFICATE, self.certificate_pem)

    @classmethod
    def load(cls, folder: Path) -> Credentials:
        """The credentials in a folder. Raises UNAUTHENTICATED when nobody joined there, FIELD_INVALID when damaged."""
        if not (folder / _CERTIFICATE).is_file():
            raise FallowError(
                Reason.UNAUTHENTICATED,
                f"{folder} holds no credentials",
                field=str(folder),
                hint="join with a join line first",
            )
        try:
            facts = json.loads((folder / _FACTS).read_text())
            return cls(
                folder=folder,
                key=PrivateKey.load(folder / _KEY),
                certificate_pem=_pem(folder / _CERTIFICATE),
                authority_pem=_pem(folder / _AUTHORITY),
                party_id=PartyId(facts["party_id"]),
                account_id=AccountId(facts["account_id"]),
                role=Role(facts["role"]),
                tier=Tier(facts["tier"]) if facts["tier"] else None,
                pool_id=PoolId(facts["pool_id"]),
                enrollment_endpoint=facts["enrollment_endpoint"],
                control_endpoint=facts["control_endpoint"],
                blob_endpoint=facts["blob_endpoint"],
                coordinator_public_key=bytes.fromhex(facts["coordinator_public_key"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"the credentials in {folder} are damaged: {error}",
                field=str(folder),
                hint="remove the folder and join again",
            ) from None


def key_of_folder(folder: Path) -> PrivateKey:
    """The key of a folder, made on first use: joining again keeps the identity."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / _KEY
    if not path.exists():
        PrivateKey.generate().save(path)
    return PrivateKey.load(path)


def pem_of(certificate_der: bytes) -> bytes:
    """A DER certificate as PEM. Raises FIELD_INVALID."""
    return load_certificate(certificate_der).public_bytes(Encoding.PEM)


def _pem(path: Path) -> bytes:
    data = path.read_bytes()
    load_certificate(data)
    return data
