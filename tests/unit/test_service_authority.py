"""Certificates of the coordinator's authority."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fallow.errors import FallowError, Reason
from fallow.identity import AUTHORITY_EXTENSION, PrivateKey, load_certificate
from fallow.ids import AccountId, PartyId, PoolId, digest_of
from fallow.roles import Role, Tier
from fallow_coordinator.core.answers import CertificateGranted
from fallow_coordinator.service.authority import Authority, public_key_of_request

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def granted(not_after: datetime.datetime, serial: bytes = b"\x41" * 16) -> CertificateGranted:
    return CertificateGranted(
        party_id=PartyId("worker-abc"),
        account_id=AccountId("account-abc"),
        role=Role.WORKER,
        tier=Tier.VOLUNTEER,
        pool_id=PoolId("pool-abc"),
        serial=serial,
        not_after_ms=int(not_after.timestamp() * 1000),
    )


def test_authority_is_made_once_and_found_again(tmp_path: Path) -> None:
    first = Authority.open(tmp_path / "authority", NOW)
    second = Authority.open(tmp_path / "authority", NOW + datetime.timedelta(days=300))
    assert first.certificate_der == second.certificate_der
    assert first.fingerprint == digest_of(first.certificate_der)
    for path in (tmp_path / "authority").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    certificate = load_certificate(first.certificate_pem)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    years = (certificate.not_valid_after_utc - NOW).days / 365
    assert 9.9 < years < 10.1


def test_half_made_authority_is_finished_and_a_robbed_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    Authority.open(folder, NOW)
    (folder / "certificate.pem").unlink()
    Authority.open(folder, NOW)
    (folder / "key.pem").unlink()
    with pytest.raises(FallowError) as robbed:
        Authority.open(folder, NOW)
    assert "key.pem" in robbed.value.message
    PrivateKey.generate().save(folder / "key.pem")
    with pytest.raises(FallowError) as foreign:
        Authority.open(folder, NOW)
    assert "belong together" in foreign.value.message


def test_server_certificate_carries_its_authority_and_its_fixed_names(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path, NOW)
    pem = authority.server_certificate(PrivateKey.generate().raw.public_key(), ("control.fallow", "127.0.0.1"), NOW)
    leaf = load_certificate(pem)
    leaf.verify_directly_issued_by(load_certificate(authority.certificate_pem))
    carried = leaf.extensions.get_extension_for_oid(AUTHORITY_EXTENSION).value
    assert isinstance(carried, x509.UnrecognizedExtension)
    assert carried.value == authority.certificate_der
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["control.fallow"]


def test_party_certificate_says_what_was_granted_and_signs_no_others(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path, NOW)
    key = PrivateKey.generate()
    until = NOW + datetime.timedelta(days=1)
    leaf = load_certificate(authority.party_certificate(key.raw.public_key(), granted(until), NOW))
    leaf.verify_directly_issued_by(load_certificate(authority.certificate_pem))
    assert leaf.serial_number == int.from_bytes(b"\x41" * 16, "big")
    assert leaf.not_valid_after_utc == until
    assert leaf.not_valid_before_utc == NOW - datetime.timedelta(minutes=5)
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_request_gives_the_key_that_signed_it(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    _, public_der = public_key_of_request(key.certificate_request("x"))
    assert public_der == key.public_der
    with pytest.raises(FallowError) as caught:
        public_key_of_request(b"")
    assert caught.value.reason is Reason.FIELD_INVALID
