"""Joining and renewing against a real coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from fallow.channel import control_channel, enrollment_channel
from fallow.credentials import Credentials
from fallow.enrollment import join, renew, renewal_signature_payload, token_key, token_proof
from fallow.envelope import Domain, sign_payload
from fallow.errors import FallowError, Reason
from fallow.identity import PARTY_EXTENSION, PrivateKey, load_certificate
from fallow.ids import Digest, TokenId, digest_of
from fallow.join_line import JoinLine, parse_join_line
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.roles import Role, Tier
from fallow.v1 import (
    enrollment_service_pb2,
    enrollment_service_pb2_grpc,
    identity_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
)
from fallow.wire.errors import error_from_rpc
from integration.harness import CoordinatorService, coordinator
from integration.raw_session import joined, raw_session

pytestmark = pytest.mark.processes

USES = 100
PROTOCOL = identity_pb2.ProtocolVersion(version=PROTOCOL_VERSION, min_supported=PROTOCOL_VERSION_MIN_SUPPORTED)


@contextlib.asynccontextmanager
async def enrollment(
    service: CoordinatorService,
) -> AsyncIterator[enrollment_service_pb2_grpc.EnrollmentServiceAsyncStub]:
    async with enrollment_channel(service.facts["enrollment_endpoint"], service.operator.authority_pem) as channel:
        yield enrollment_service_pb2_grpc.EnrollmentServiceStub(channel)


def enroll_request(line: JoinLine, csr: bytes, **changes: object) -> enrollment_service_pb2.EnrollRequest:
    request = enrollment_service_pb2.EnrollRequest(
        protocol=PROTOCOL,
        token_id=line.token_id,
        token_proof=token_proof(token_key(line.token_secret), csr),
        certificate_request=csr,
        name="somebody",
    )
    request.MergeFrom(enrollment_service_pb2.EnrollRequest(**changes))  # type: ignore[arg-type]
    return request


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, FallowError]:
    """The status and the detail with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), error_from_rpc(caught.value)


async def test_join_line_makes_a_worker_with_a_certificate_of_a_day(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    credentials = await joined(shared_coordinator.worker_join_line, tmp_path / "worker", "my machine")
    assert (credentials.role, credentials.tier) == (Role.WORKER, Tier.VOLUNTEER)
    left_s = credentials.not_after_ms / 1000 - time.time()
    assert 23.9 * 3600 < left_s <= 24 * 3600
    assert credentials.not_before_ms / 1000 < time.time() - 240, "clocks may differ a little"
    certificate = load_certificate(credentials.certificate_pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"fallow://party/{credentials.party_id}"]
    facts = certificate.extensions.get_extension_for_oid(PARTY_EXTENSION).value
    assert isinstance(facts, x509.UnrecognizedExtension)
    assert facts.value.decode().split("\n") == [credentials.account_id, "worker", "volunteer", credentials.pool_id]
    async with raw_session(credentials) as session:
        welcome = await session.open()
    assert welcome.blob_endpoint == shared_coordinator.facts["blob_endpoint"]


async def test_single_use_token_used_a_hundred_times_at_once_lets_one_in(
    shared_coordinator: CoordinatorService,
) -> None:
    line = parse_join_line(shared_coordinator.new_token("--role", "worker"))
    requests = [PrivateKey.generate().certificate_request("one of many") for _ in range(USES)]
    async with enrollment(shared_coordinator) as stub:
        answers = await asyncio.gather(
            *(stub.Enroll(enroll_request(line, request), timeout=30) for request in requests), return_exceptions=True
        )
    failures = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(answers) - len(failures) == 1
    assert {error_from_rpc(failure).reason for failure in failures} == {Reason.TOKEN_USED_UP}
    assert {failure.code() for failure in failures} == {grpc.StatusCode.PERMISSION_DENIED}


async def test_wrong_secret_unknown_token_and_foreign_proof_are_told_the_same(
    shared_coordinator: CoordinatorService,
) -> None:
    line = parse_join_line(shared_coordinator.new_token("--role", "worker"))
    request = PrivateKey.generate().certificate_request("a")
    other = PrivateKey.generate().certificate_request("b")
    guesses = (
        enroll_request(replace(line, token_secret=secrets.token_bytes(32)), request),
        enroll_request(
            JoinLine(line.enrollment_endpoint, line.authority_fingerprint, TokenId("token-nobody"), b"s" * 32), request
        ),
        enroll_request(line, request, certificate_request=other),
        enroll_request(line, request, token_proof=b"short"),
    )
    async with enrollment(shared_coordinator) as stub:
        told = [await refusal(stub.Enroll(guess, timeout=10)) for guess in guesses]
        assert {(status, str(error)) for status, error in told} == {
            (grpc.StatusCode.PERMISSION_DENIED, str(told[0][1]))
        }
        assert told[0][1].reason is Reason.TOKEN_SECRET_WRONG
        await stub.Enroll(enroll_request(line, request), timeout=10)


async def test_expired_and_revoked_tokens_let_nobody_in(shared_coordinator: CoordinatorService, tmp_path: Path) -> None:
    short = shared_coordinator.new_token("--role", "worker", "--valid-for", "1s", "--uses", "10000")
    made = shared_coordinator.cli("token", "new", "--role", "worker")
    shared_coordinator.cli("token", "revoke", made["token_id"])
    with pytest.raises(FallowError) as revoked:
        await joined(made["join_line"], tmp_path / "revoked")
    assert revoked.value.reason in (Reason.TOKEN_EXPIRED, Reason.TOKEN_UNKNOWN)
    deadline = time.monotonic() + 10
    while True:
        try:
            await joined(short, tmp_path / f"late-{time.monotonic_ns()}")
        except FallowError as error:
            assert error.reason is Reason.TOKEN_EXPIRED
            break
        assert time.monotonic() < deadline


async def test_key_of_another_party_is_refused(shared_coordinator: CoordinatorService, tmp_path: Path) -> None:
    first = await joined(shared_coordinator.worker_join_line, tmp_path / "a")
    line = parse_join_line(shared_coordinator.client_join_line)
    async with enrollment(shared_coordinator) as stub:
        request = enroll_request(line, first.key.certificate_request("again"))
        status, error = await refusal(stub.Enroll(request, timeout=10))
    assert (status, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.KEY_IN_USE)


def _other_requests() -> dict[str, bytes]:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    good = PrivateKey.generate().certificate_request("x")
    return {
        "empty": b"",
        "noise": secrets.token_bytes(300),
        "broken signature": good[:-1] + bytes((good[-1] ^ 1,)),
        "P-384": builder.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()).public_bytes(Encoding.DER),
        "RSA": builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(Encoding.DER),
        "huge": good + b"\0" * 20_000,
    }


async def test_requests_that_prove_no_p256_key_are_invalid(shared_coordinator: CoordinatorService) -> None:
    line = parse_join_line(shared_coordinator.new_token("--role", "worker"))
    async with enrollment(shared_coordinator) as stub:
        for what, request in _other_requests().items():
            status, error = await refusal(stub.Enroll(enroll_request(line, request), timeout=10))
            assert status is grpc.StatusCode.INVALID_ARGUMENT, what
            assert error.field == "certificate_request", what


async def test_old_and_too_new_protocols_are_told_who_must_upgrade(shared_coordinator: CoordinatorService) -> None:
    line = parse_join_line(shared_coordinator.new_token("--role", "worker"))
    request = enroll_request(line, PrivateKey.generate().certificate_request("x"))
    async with enrollment(shared_coordinator) as stub:
        request.protocol.CopyFrom(identity_pb2.ProtocolVersion(version=99, min_supported=98))
        status, error = await refusal(stub.Enroll(request, timeout=10))
        assert (status, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.PROTOCOL_TOO_NEW)
        assert error.hint
        request.protocol.CopyFrom(identity_pb2.ProtocolVersion())
        status, error = await refusal(stub.Enroll(request, timeout=10))
        assert (status, error.reason, error.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.FIELD_MISSING,
            "protocol",
        )


async def test_renewal_gives_a_later_certificate_for_the_same_party(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    old = await joined(shared_coordinator.worker_join_line, tmp_path / "worker")
    new = await renew(old)
    assert new.party_id == old.party_id
    serials = {load_certificate(each.certificate_pem).serial_number for each in (old, new)}
    assert len(serials) == 2
    assert new.not_after_ms >= old.not_after_ms
    async with raw_session(Credentials.load(tmp_path / "worker")) as session:
        await session.open()


async def test_renewal_nonce_is_good_once_and_for_its_key_alone(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    mine = await joined(shared_coordinator.worker_join_line, tmp_path / "mine")
    theirs = await joined(shared_coordinator.worker_join_line, tmp_path / "theirs")

    def request(nonce: bytes, party: Credentials, signer: Credentials) -> enrollment_service_pb2.RenewRequest:
        certificate_request = party.key.certificate_request("x")
        signature = sign_payload(
            signer.key,
            Domain.RENEWAL,
            renewal_signature_payload(nonce, certificate_request),
            peer=digest_of(party.coordinator_public_key),  # type: ignore[arg-type]
        )
        return enrollment_service_pb2.RenewRequest(
            protocol=PROTOCOL, certificate_request=certificate_request, nonce=nonce, signature=signature
        )

    async with enrollment(shared_coordinator) as stub:
        challenge = enrollment_service_pb2.ChallengeRequest(key_fingerprint=mine.key.fingerprint)
        nonce = (await stub.Challenge(challenge, timeout=10)).nonce
        for renewal, reason in (
            (request(nonce, theirs, theirs), Reason.NONCE_INVALID),
            (request(nonce, mine, theirs), Reason.SIGNATURE_INVALID),
            (request(secrets.token_bytes(len(nonce)), mine, mine), Reason.NONCE_INVALID),
            (request(b"", mine, mine), Reason.NONCE_INVALID),
        ):
            assert (await refusal(stub.Renew(renewal, timeout=10)))[1].reason is reason
        good = request(nonce, mine, mine)
        await stub.Renew(good, timeout=10)
        status, error = await refusal(stub.Renew(good, timeout=10))
        assert (status, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.NONCE_INVALID)


async def test_key_that_never_enrolled_cannot_renew(shared_coordinator: CoordinatorService, tmp_path: Path) -> None:
    known = await joined(shared_coordinator.worker_join_line, tmp_path / "known")
    stranger = replace(known, key=PrivateKey.generate(), folder=tmp_path / "stranger")
    with pytest.raises(FallowError) as caught:
        await renew(stranger)
    assert caught.value.reason is Reason.WORKER_UNKNOWN


async def test_join_line_of_another_authority_is_noticed_by_the_joiner(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    line = parse_join_line(shared_coordinator.worker_join_line)
    with pytest.raises(FallowError) as caught:
        await join(replace(line, authority_fingerprint=Digest(b"\1" * 32)), tmp_path / "worker", "x")
    assert caught.value.reason is Reason.CERTIFICATE_FOREIGN


async def test_certificate_of_a_foreign_authority_gets_no_connection(
    shared_coordinator: CoordinatorService, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with coordinator(tmp_path_factory.mktemp("foreign")) as foreign:
        stranger = await joined(foreign.client_join_line, tmp_path / "stranger")
    credentials = replace(
        stranger,
        authority_pem=shared_coordinator.operator.authority_pem,
        control_endpoint=shared_coordinator.facts["control_endpoint"],
    )
    async with control_channel(credentials) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        request = job_service_pb2.GetSessionRequest(protocol=PROTOCOL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetSession(request, timeout=5)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
