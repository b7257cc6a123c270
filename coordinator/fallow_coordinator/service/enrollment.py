"""Enrolment: the one service without a client certificate. A token or an enrolled key becomes a fresh certificate."""

from __future__ import annotations

import datetime
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc

from fallow.enrollment import renewal_signature_payload, token_proof
from fallow.envelope import Domain, check_signature
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey, fingerprint_of
from fallow.ids import DIGEST_BYTES, Digest, KeyFingerprint, TokenId
from fallow.v1 import enrollment_service_pb2 as pb
from fallow.wire.enums import ROLES, TIERS
from fallow.wire.moments import moment_to_message
from fallow_coordinator.core.answers import CertificateGranted
from fallow_coordinator.core.commands import Enroll, RenewCertificate
from fallow_coordinator.core.state import State
from fallow_coordinator.engine import Engine
from fallow_coordinator.service.authority import Authority, public_key_of_request
from fallow_coordinator.service.calls import Call, method_name, service_handlers, unary
from fallow_coordinator.service.nonces import Nonces
from fallow_coordinator.service.protocol import check_protocol
from fallow_coordinator.service.rate_limit import RateLimit

CERTIFICATE_VALID_FOR_MS: Final = 24 * 3_600_000
NAME_BYTES_MAX: Final = 128
_NONCE_RANDOM_BYTES: Final = 16

_SERVICE = pb.DESCRIPTOR.services_by_name["EnrollmentService"]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where parties find the coordinator, `host:port` each."""

    enrollment: str
    control: str
    blobs: str


class EnrollmentService:
    """Enroll, Challenge and Renew."""

    def __init__(
        self,
        *,
        engine: Engine,
        authority: Authority,
        key: PrivateKey,
        endpoints: Endpoints,
        now_ms: Callable[[], int],
    ) -> None:
        """`key` is the coordinator's own, which signs leases and grants and to which renewals are addressed."""
        self._engine = engine
        self._authority = authority
        self._key = key
        self._endpoints = endpoints
        self._now_ms = now_ms
        self._nonces = Nonces(secrets.token_bytes(32))

    def handlers(self, limit: RateLimit) -> grpc.GenericRpcHandler:
        """All methods; `limit` counts by address."""
        return service_handlers(
            _SERVICE,
            {
                "Enroll": unary(method_name(_SERVICE, "Enroll"), pb.EnrollRequest, self.enroll, limit),
                "Challenge": unary(method_name(_SERVICE, "Challenge"), pb.ChallengeRequest, self.challenge, limit),
                "Renew": unary(method_name(_SERVICE, "Renew"), pb.RenewRequest, self.renew, limit),
            },
        )

    async def enroll(self, call: Call[pb.EnrollRequest]) -> pb.EnrollResponse:
        """A certificate for a token. The token's use is burnt in the same transaction that makes the party."""
        request = call.request
        check_protocol(request.protocol)
        name, machine = checked_name(request.name, "name"), request.machine_digest
        if machine and len(machine) != DIGEST_BYTES:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"a machine digest of {len(machine)} bytes",
                field="machine_digest",
                limit=f"{DIGEST_BYTES} bytes, or none",
            )
        public_key, public_der = public_key_of_request(request.certificate_request)
        token_id = TokenId(request.token_id)
        known = await self._engine.read(lambda state: _secret_digest(state, token_id))
        # An unknown token takes as long as a known one and is told the same.
        proof = token_proof(known or Digest(secrets.token_bytes(DIGEST_BYTES)), request.certificate_request)
        if not hmac.compare_digest(proof, request.token_proof) or known is None:
            raise FallowError(
                Reason.TOKEN_SECRET_WRONG,
                "this token is not known, or its secret is wrong",
                field="token_proof",
                hint="copy the whole join line again, or ask for a new one",
            )
        granted = await self._engine.submit(
            Enroll(
                token_id=token_id,
                key_fingerprint=fingerprint_of(public_der),
                public_key=public_der,
                name=name,
                certificate_valid_for_ms=CERTIFICATE_VALID_FOR_MS,
                machine_digest=machine,
            ),
        )
        answer = granted.answer
        assert isinstance(answer, CertificateGranted), "enrolling grants a certificate"
        return pb.EnrollResponse(
            party_id=answer.party_id,
            account_id=answer.account_id,
            role=ROLES.number(answer.role),
            tier=TIERS.number(answer.tier),
            pool_id=answer.pool_id,
            certificate=self._authority.party_certificate(public_key, answer, self._now()),
            not_after=moment_to_message(answer.not_after_ms),
            control_endpoint=self._endpoints.control,
            blob_endpoint=self._endpoints.blobs,
            coordinator_public_key=self._key.public_der,
            authority_certificate=self._authority.certificate_der,
        )

    async def challenge(self, call: Call[pb.ChallengeRequest]) -> pb.ChallengeResponse:
        """A nonce for any key; whether it is enrolled is told only to who can sign."""
        fingerprint = call.request.key_fingerprint
        if len(fingerprint) != DIGEST_BYTES:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"a key fingerprint of {len(fingerprint)} bytes",
                field="key_fingerprint",
                limit=f"{DIGEST_BYTES} bytes",
            )
        nonce, expires_at_ms = self._nonces.give(
            KeyFingerprint(fingerprint), now_ms=self._now_ms(), random=secrets.token_bytes(_NONCE_RANDOM_BYTES)
        )
        return pb.ChallengeResponse(nonce=nonce, expires_at=moment_to_message(expires_at_ms))

    async def renew(self, call: Call[pb.RenewRequest]) -> pb.RenewResponse:
        """A fresh certificate for a key that is enrolled, by a signature over a nonce."""
        request = call.request
        check_protocol(request.protocol)
        public_key, public_der = public_key_of_request(request.certificate_request)
        fingerprint = fingerprint_of(public_der)
        self._nonces.check(request.nonce, fingerprint, now_ms=self._now_ms())
        check_signature(
            public_der,
            request.signature,
            Domain.RENEWAL,
            renewal_signature_payload(request.nonce, request.certificate_request),
            peer=self._key.fingerprint,
        )
        self._nonces.use(request.nonce, fingerprint, now_ms=self._now_ms())
        if fingerprint not in self._engine.state.parties_by_key:
            raise FallowError(
                Reason.WORKER_UNKNOWN, "this key was never enrolled here", hint="join again with a new join line"
            )
        decision = await self._engine.submit(
            RenewCertificate(key_fingerprint=fingerprint, certificate_valid_for_ms=CERTIFICATE_VALID_FOR_MS)
        )
        answer = decision.answer
        assert isinstance(answer, CertificateGranted), "renewing grants a certificate"
        return pb.RenewResponse(
            certificate=self._authority.party_certificate(public_key, answer, self._now()),
            not_after=moment_to_message(answer.not_after_ms),
        )

    def _now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._now_ms() / 1000, datetime.UTC)


def _secret_digest(state: State, token_id: TokenId) -> Digest | None:
    token = state.tokens.get(token_id)
    return None if token is None else token.secret_digest


def checked_name(name: str, field: str) -> str:
    """A name for people. Raises LIMIT_EXCEEDED, or FIELD_INVALID for control characters."""
    if len(name.encode()) > NAME_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"a name of {len(name.encode())} bytes", field=field, limit=f"{NAME_BYTES_MAX} bytes"
        )
    if not name.isprintable():
        raise FallowError(Reason.FIELD_INVALID, "a name with characters that cannot be printed", field=field)
    return name
