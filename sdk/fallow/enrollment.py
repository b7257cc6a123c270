"""Joining and renewing: a key made here, a token or an old enrolment, and a fresh certificate."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
from dataclasses import replace
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fallow.channel import enrollment_channel
from fallow.credentials import Credentials, key_of_folder, pem_of
from fallow.diagnosis import explained, fault_of_server, foreign_server, server_certificate
from fallow.envelope import Domain, sign_payload, transcript
from fallow.errors import FallowError, Reason
from fallow.identity import AUTHORITY_EXTENSION, ENROLLMENT_NAME, load_certificate
from fallow.ids import AccountId, Digest, KeyFingerprint, PartyId, PoolId, digest_of
from fallow.join_line import JoinLine
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.machine_identity import machine_digest
from fallow.v1 import enrollment_service_pb2, enrollment_service_pb2_grpc, identity_pb2
from fallow.wire.enums import ROLES, TIERS
from fallow.wire.errors import error_from_rpc

CALL_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 10.0


def token_key(secret: bytes) -> Digest:
    """What the coordinator keeps of a token's secret, and the key of its proofs: SHA-256 of the secret."""
    return digest_of(secret)


def token_proof(key: Digest, certificate_request: bytes) -> bytes:
    """Proof of holding a token, bound to the very certificate request: HMAC-SHA-256 over the ENROLLMENT transcript."""
    return hmac.new(key, transcript(Domain.ENROLLMENT, certificate_request), hashlib.sha256).digest()


def renewal_signature_payload(nonce: bytes, certificate_request: bytes) -> bytes:
    """What the enrolled key signs to renew: the nonce, then the request."""
    return nonce + certificate_request


async def join(line: JoinLine, folder: Path, name: str) -> Credentials:
    """Enrols the folder's key under a join line and saves the credentials.

    Raises CERTIFICATE_FOREIGN when the server is not the one the line names, COORDINATOR_UNREACHABLE, and what the
    coordinator answers: TOKEN_SECRET_WRONG, TOKEN_EXPIRED, TOKEN_USED_UP, KEY_IN_USE.
    """
    authority_pem = await asyncio.to_thread(_pinned_authority, line.enrollment_endpoint, line.authority_fingerprint)
    key = key_of_folder(folder)
    request = key.certificate_request(name)
    async with enrollment_channel(line.enrollment_endpoint, authority_pem) as channel:
        stub = enrollment_service_pb2_grpc.EnrollmentServiceStub(channel)
        try:
            answer = await stub.Enroll(
                enrollment_service_pb2.EnrollRequest(
                    protocol=_protocol(),
                    token_id=line.token_id,
                    token_proof=token_proof(token_key(line.token_secret), request),
                    certificate_request=request,
                    name=name,
                    machine_digest=machine_digest(),
                ),
                timeout=CALL_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
            raise await _explained(error, line.enrollment_endpoint, authority_pem) from None
    _check_clock(answer.certificate)
    credentials = Credentials(
        folder=folder,
        key=key,
        certificate_pem=pem_of(answer.certificate),
        authority_pem=authority_pem,
        party_id=PartyId(answer.party_id),
        account_id=AccountId(answer.account_id),
        role=ROLES.member(answer.role, "role"),
        tier=TIERS.optional(answer.tier, "tier"),
        pool_id=PoolId(answer.pool_id),
        enrollment_endpoint=line.enrollment_endpoint,
        control_endpoint=answer.control_endpoint,
        blob_endpoint=answer.blob_endpoint,
        coordinator_public_key=answer.coordinator_public_key,
    )
    credentials.save()
    return credentials


async def renew(credentials: Credentials) -> Credentials:
    """A fresh certificate for the same key, by a signed nonce; the old certificate is not needed. Saves and returns it.

    An expired certificate is renewed for 90 days after its end. Raises WORKER_UNKNOWN when the key was never enrolled
    there, CERTIFICATE_EXPIRED when those are over or a clock is wrong, CERTIFICATE_FOREIGN, PARTY_REVOKED,
    COORDINATOR_UNREACHABLE.
    """
    key = credentials.key
    request = key.certificate_request(credentials.party_id)
    async with enrollment_channel(credentials.enrollment_endpoint, credentials.authority_pem) as channel:
        stub = enrollment_service_pb2_grpc.EnrollmentServiceStub(channel)
        try:
            challenge = await stub.Challenge(
                enrollment_service_pb2.ChallengeRequest(key_fingerprint=key.fingerprint), timeout=CALL_TIMEOUT_S
            )
            answer = await stub.Renew(
                enrollment_service_pb2.RenewRequest(
                    protocol=_protocol(),
                    certificate_request=request,
                    nonce=challenge.nonce,
                    signature=sign_payload(
                        key,
                        Domain.RENEWAL,
                        renewal_signature_payload(challenge.nonce, request),
                        peer=KeyFingerprint(digest_of(credentials.coordinator_public_key)),
                    ),
                ),
                timeout=CALL_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
            raise await _explained(error, credentials.enrollment_endpoint, credentials.authority_pem) from None
    _check_clock(answer.certificate)
    renewed = replace(credentials, certificate_pem=pem_of(answer.certificate))
    renewed.save()
    return renewed


async def _explained(error: FallowError, endpoint: str, authority_pem: bytes) -> FallowError:
    return await explained(error, endpoint=endpoint, server_name=ENROLLMENT_NAME, authority_pem=authority_pem)


def _protocol() -> identity_pb2.ProtocolVersion:
    return identity_pb2.ProtocolVersion(version=PROTOCOL_VERSION, min_supported=PROTOCOL_VERSION_MIN_SUPPORTED)


def _pinned_authority(endpoint: str, fingerprint: Digest) -> bytes:
    """PEM of the authority, taken from the server's certificate and compared with the join line's fingerprint."""
    leaf = server_certificate(endpoint, ENROLLMENT_NAME, timeout_s=CONNECT_TIMEOUT_S)
    try:
        extension = leaf.extensions.get_extension_for_oid(AUTHORITY_EXTENSION).value
    except (x509.ExtensionNotFound, ValueError):
        raise foreign_server(leaf, endpoint) from None
    if not isinstance(extension, x509.UnrecognizedExtension) or digest_of(extension.value) != fingerprint:
        raise FallowError(
            Reason.CERTIFICATE_FOREIGN,
            f"the server at {endpoint} is not under the authority that the join line names",
            hint="another coordinator listens there, or this one was set up anew: ask its operator for a new join line",
        )
    authority = load_certificate(extension.value)
    fault = fault_of_server(leaf, authority, endpoint, ENROLLMENT_NAME, datetime.datetime.now(datetime.UTC))
    if fault is not None:
        raise fault
    return authority.public_bytes(Encoding.PEM)


def _check_clock(certificate_der: bytes) -> None:
    """Returns when a certificate issued just now is valid by this machine's clock. Raises CERTIFICATE_EXPIRED."""
    certificate = load_certificate(certificate_der)
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        return
    theirs = certificate.not_valid_before_utc
    direction = "behind" if now < theirs else "ahead of"
    raise FallowError(
        Reason.CERTIFICATE_EXPIRED,
        f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC and is {direction} the coordinator's, which is about"
        f" {theirs:%Y-%m-%d %H:%M}: the certificate that it has just issued does not count here",
        hint="set this machine's clock, for instance with `timedatectl set-ntp true`",
    )
