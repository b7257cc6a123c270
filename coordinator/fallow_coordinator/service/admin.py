"""The operator's controls: tokens, accounts, pools, workers, revocation, numbers."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from typing import Final

import grpc

from fallow.enrollment import token_key
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, Digest, PartyId, PoolId, TokenId
from fallow.join_line import SECRET_BYTES, JoinLine
from fallow.limits import TOKEN_USES_MAX
from fallow.roles import Role, Tier
from fallow.v1 import admin_service_pb2 as pb
from fallow.wire.capability import capability_to_message
from fallow.wire.challenge import standing_to_message
from fallow.wire.enums import ROLES, TIERS
from fallow.wire.moments import duration_from_message, moment_to_message
from fallow_coordinator.core.answers import AccountMade, PoolMade, TokenMade
from fallow_coordinator.core.blobs import blob_quota_of
from fallow_coordinator.core.commands import (
    AdmitAccount,
    CreateAccount,
    CreatePool,
    ExpelAccount,
    IssueToken,
    QuarantineWorker,
    ReleaseBundle,
    ReleaseWorker,
    RevokeParty,
    RevokeToken,
    SetBlobQuota,
)
from fallow_coordinator.core.questions import device_standing
from fallow_coordinator.core.state import State, Worker
from fallow_coordinator.engine import Engine
from fallow_coordinator.ports import Views
from fallow_coordinator.service.auth import Doorkeeper
from fallow_coordinator.service.calls import Answer, Call, RequestT, ResponseT, method_name, service_handlers, unary
from fallow_coordinator.service.enrollment import checked_name
from fallow_coordinator.service.protocol import spoken
from fallow_coordinator.service.rate_limit import RateLimit

TOKEN_VALID_FOR_MS_DEFAULT: Final = 3_600_000
TOKEN_VALID_FOR_MS_MAX: Final = 365 * 24 * 3_600_000
TAGS_MAX: Final = 32
REASON_BYTES_MAX: Final = 256
_DIGEST_BEGINS: Final = re.compile(r"[0-9a-f]{8,64}")

_SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"]


class AdminService:
    """All of AdminService, for parties of role operator."""

    def __init__(
        self,
        *,
        engine: Engine,
        views: Views,
        doorkeeper: Doorkeeper,
        enrollment_endpoint: str,
        authority_fingerprint: Digest,
        started_at_ms: int,
        resident_bytes: Callable[[], int],
        now_ms: Callable[[], int],
    ) -> None:
        """Join lines name `enrollment_endpoint` and pin `authority_fingerprint`."""
        self._engine = engine
        self._views = views
        self._doorkeeper = doorkeeper
        self._enrollment_endpoint = enrollment_endpoint
        self._authority_fingerprint = authority_fingerprint
        self._started_at_ms = started_at_ms
        self._resident_bytes = resident_bytes
        self._now_ms = now_ms

    def handlers(self, limit: RateLimit) -> grpc.GenericRpcHandler:
        """All methods; `limit` counts by key."""

        def handler(
            method: str, request_type: type[RequestT], answer: Answer[RequestT, ResponseT]
        ) -> tuple[str, grpc.RpcMethodHandler[bytes, bytes]]:
            return method, unary(method_name(_SERVICE, method), request_type, self._for_operators(answer), limit)

        return service_handlers(
            _SERVICE,
            dict(
                (
                    handler("CreateToken", pb.CreateTokenRequest, self.create_token),
                    handler("ListTokens", pb.ListTokensRequest, self.list_tokens),
                    handler("RevokeToken", pb.RevokeTokenRequest, self.revoke_token),
                    handler("CreateAccount", pb.CreateAccountRequest, self.create_account),
                    handler("SetBlobQuota", pb.SetBlobQuotaRequest, self.set_blob_quota),
                    handler("CreatePool", pb.CreatePoolRequest, self.create_pool),
                    handler("AdmitAccount", pb.AdmitAccountRequest, self.admit_account),
                    handler("ExpelAccount", pb.ExpelAccountRequest, self.expel_account),
                    handler("ReleaseBundle", pb.ReleaseBundleRequest, self.release_bundle),
                    handler("ListWorkers", pb.ListWorkersRequest, self.list_workers),
                    handler("QuarantineWorker", pb.QuarantineWorkerRequest, self.quarantine_worker),
                    handler("ReleaseWorker", pb.ReleaseWorkerRequest, self.release_worker),
                    handler("RevokeParty", pb.RevokePartyRequest, self.revoke_party),
                    handler("GetStatus", pb.GetStatusRequest, self.get_status),
                )
            ),
        )

    def _for_operators(self, answer: Answer[RequestT, ResponseT]) -> Answer[RequestT, ResponseT]:
        async def guarded(call: Call[RequestT]) -> ResponseT:
            await self._doorkeeper.admit(call.peer, Role.OPERATOR)
            return await answer(call)

        return guarded

    async def create_token(self, call: Call[pb.CreateTokenRequest]) -> pb.CreateTokenResponse:
        """A token and the one join line that carries its secret."""
        request = call.request
        role = ROLES.member(request.role, "role")
        tier = TIERS.optional(request.tier, "tier")
        if tier is not None and role is not Role.WORKER:
            raise FallowError(Reason.FIELD_INVALID, "only workers have a tier", field="tier", limit="unset")
        if role is Role.WORKER and tier is None:
            tier = Tier.VOLUNTEER
        if len(request.tags) > TAGS_MAX:
            raise FallowError(Reason.LIMIT_EXCEEDED, "too many tags", field="tags", limit=f"{TAGS_MAX} tags")
        account_id = AccountId(request.account_id) if request.account_id else None
        if account_id is None and role is Role.OPERATOR:
            account_id = self._engine.state.operator_account_id
        return await self.issue_token(
            account_id=account_id,
            role=role,
            tier=tier,
            pool_id=PoolId(request.pool_id) if request.pool_id else None,
            uses_max=request.uses_max or 1,
            valid_for_ms=(
                duration_from_message(request.valid_for)
                if request.HasField("valid_for")
                else TOKEN_VALID_FOR_MS_DEFAULT
            ),
            tags=tuple(checked_name(tag, f"tags[{index}]") for index, tag in enumerate(request.tags)),
        )

    async def issue_token(
        self,
        *,
        account_id: AccountId | None,
        role: Role,
        tier: Tier | None,
        pool_id: PoolId | None,
        uses_max: int,
        valid_for_ms: int,
        tags: tuple[str, ...] = (),
    ) -> pb.CreateTokenResponse:
        """As `create_token`, for this process itself. Raises FIELD_INVALID, ACCOUNT_UNKNOWN or POOL_UNKNOWN."""
        if not 1 <= uses_max <= TOKEN_USES_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED, f"{uses_max} uses", field="uses_max", limit=f"1 to {TOKEN_USES_MAX} uses"
            )
        if not 1_000 <= valid_for_ms <= TOKEN_VALID_FOR_MS_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED,
                f"valid for {valid_for_ms / 1000:g} s",
                field="valid_for",
                limit="1 second to 365 days",
            )
        secret = secrets.token_bytes(SECRET_BYTES)
        decision = await self._engine.submit(
            IssueToken(
                secret_digest=token_key(secret),
                account_id=account_id,
                role=role,
                tier=tier,
                pool_id=pool_id,
                uses_max=uses_max,
                valid_for_ms=valid_for_ms,
                tags=tags,
            )
        )
        made = decision.answer
        assert isinstance(made, TokenMade), "issuing makes a token"
        line = JoinLine(self._enrollment_endpoint, self._authority_fingerprint, made.token_id, secret)
        return pb.CreateTokenResponse(
            token_id=made.token_id, join_line=line.encode(), expires_at=moment_to_message(made.expires_at_ms)
        )

    async def list_tokens(self, call: Call[pb.ListTokensRequest]) -> pb.ListTokensResponse:
        """Tokens that still let somebody in."""
        now_ms = self._now_ms()

        def read(state: State) -> list[pb.Token]:
            return [
                pb.Token(
                    token_id=token.token_id,
                    account_id=token.account_id or "",
                    role=ROLES.number(token.role),
                    tier=TIERS.number(token.tier),
                    pool_id=token.pool_id,
                    uses_max=token.uses_max,
                    uses=token.uses,
                    expires_at=moment_to_message(token.expires_at_ms),
                    tags=token.tags,
                )
                for token in state.tokens.values()
                if not token.revoked and token.uses < token.uses_max and token.expires_at_ms > now_ms
            ]

        return pb.ListTokensResponse(tokens=await self._engine.read(read))

    async def revoke_token(self, call: Call[pb.RevokeTokenRequest]) -> pb.RevokeTokenResponse:
        """Nobody joins with it any more."""
        await self._engine.submit(RevokeToken(TokenId(call.request.token_id)))
        return pb.RevokeTokenResponse()

    async def create_account(self, call: Call[pb.CreateAccountRequest]) -> pb.CreateAccountResponse:
        """A new account."""
        decision = await self._engine.submit(CreateAccount(_required_name(call.request.name)))
        made = decision.answer
        assert isinstance(made, AccountMade), "creating an account makes one"
        return pb.CreateAccountResponse(account_id=made.account_id)

    async def set_blob_quota(self, call: Call[pb.SetBlobQuotaRequest]) -> pb.SetBlobQuotaResponse:
        """The account's bound, and what it has."""
        account_id = AccountId(call.request.account_id)
        await self._engine.submit(SetBlobQuota(account_id, call.request.bytes_max))

        def read(state: State) -> pb.SetBlobQuotaResponse:
            account = state.accounts[account_id]
            return pb.SetBlobQuotaResponse(bytes_recorded=account.blob_bytes, bytes_max=blob_quota_of(account))

        return await self._engine.read(read)

    async def create_pool(self, call: Call[pb.CreatePoolRequest]) -> pb.CreatePoolResponse:
        """A new pool."""
        name = _required_name(call.request.name)
        account_id = AccountId(call.request.account_id)
        if not account_id:
            account_id = await self._engine.read(lambda state: state.operator_account_id)
        decision = await self._engine.submit(CreatePool(name, account_id, closed=not call.request.open))
        made = decision.answer
        assert isinstance(made, PoolMade), "creating a pool makes one"
        return pb.CreatePoolResponse(pool_id=made.pool_id)

    async def admit_account(self, call: Call[pb.AdmitAccountRequest]) -> pb.AdmitAccountResponse:
        """The account may submit to the pool."""
        await self._engine.submit(AdmitAccount(PoolId(call.request.pool_id), AccountId(call.request.account_id)))
        return pb.AdmitAccountResponse()

    async def expel_account(self, call: Call[pb.ExpelAccountRequest]) -> pb.ExpelAccountResponse:
        """The account submits no more to the pool."""
        await self._engine.submit(ExpelAccount(PoolId(call.request.pool_id), AccountId(call.request.account_id)))
        return pb.ExpelAccountResponse()

    async def release_bundle(self, call: Call[pb.ReleaseBundleRequest]) -> pb.ReleaseBundleResponse:
        """Jobs may use the bundle again."""
        begins = call.request.bundle_digest
        if not _DIGEST_BEGINS.fullmatch(begins):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{begins[:80]!r} is no bundle's digest",
                field="bundle_digest",
                limit="8 to 64 digits 0 to 9 and a to f",
            )
        found = await self._engine.read(lambda state: [each for each in state.bundles if each.hex().startswith(begins)])
        if len(found) != 1:
            raise FallowError(
                Reason.FIELD_INVALID if found else Reason.BUNDLE_UNKNOWN,
                f"{len(found)} bundles begin with {begins}",
                field="bundle_digest",
                hint="give more digits" if found else "`fallow bundle inspect` shows a bundle's digest",
            )
        await self._engine.submit(ReleaseBundle(found[0]))
        return pb.ReleaseBundleResponse(bundle_digest=found[0])

    async def list_workers(self, call: Call[pb.ListWorkersRequest]) -> pb.ListWorkersResponse:
        """All workers that are not revoked."""

        def read(state: State) -> list[pb.Worker]:
            return [_worker(state, worker) for worker in state.workers.values()]

        return pb.ListWorkersResponse(workers=await self._engine.read(read))

    async def quarantine_worker(self, call: Call[pb.QuarantineWorkerRequest]) -> pb.QuarantineWorkerResponse:
        """It gets no work until it is released."""
        await self._engine.submit(
            QuarantineWorker(PartyId(call.request.worker_id), _reason(call.request.reason, "quarantined"))
        )
        return pb.QuarantineWorkerResponse()

    async def release_worker(self, call: Call[pb.ReleaseWorkerRequest]) -> pb.ReleaseWorkerResponse:
        """It may work again."""
        await self._engine.submit(ReleaseWorker(PartyId(call.request.worker_id)))
        return pb.ReleaseWorkerResponse()

    async def revoke_party(self, call: Call[pb.RevokePartyRequest]) -> pb.RevokePartyResponse:
        """Its certificate counts no more, now and on live streams."""
        await self._engine.submit(RevokeParty(PartyId(call.request.party_id), _reason(call.request.reason, "revoked")))
        return pb.RevokePartyResponse()

    async def get_status(self, call: Call[pb.GetStatusRequest]) -> pb.GetStatusResponse:
        """Numbers of this process and its journal."""

        def read(state: State) -> pb.GetStatusResponse:
            return pb.GetStatusResponse(
                journal_sequence=state.sequence,
                epoch=self._engine.epoch,
                workers_connected=len(state.sessions),
                jobs_unfinished=len(state.jobs) - len(state.finished),
                leases=len(state.leases),
                tasks=len(state.tasks),
            )

        status = await self._engine.read(read)
        counts = self._engine.counters
        status.protocol.CopyFrom(spoken())
        status.view_sequence = await asyncio.to_thread(self._views.view_sequence)
        status.resident_bytes = self._resident_bytes()
        status.started_at.CopyFrom(moment_to_message(self._started_at_ms))
        status.commitments = counts.commitments
        status.commits = counts.commits
        status.signatures_checked = counts.signatures_checked
        status.assign_buckets.extend(counts.assigns.counts)
        return status


def _worker(state: State, worker: Worker) -> pb.Worker:
    party = state.parties[worker.worker_id]
    return pb.Worker(
        worker_id=worker.worker_id,
        account_id=worker.account_id,
        pool_id=worker.pool_id,
        tier=TIERS.number(worker.tier),
        name=party.name,
        connected=worker.session_id is not None,
        quarantined=worker.quarantined,
        capability=capability_to_message(worker.capability),
        leases=len(worker.leases),
        rows_settled=worker.rows_settled,
        certificate_not_after=moment_to_message(party.not_after_ms),
        device_standings=[
            standing_to_message(device_standing(state, worker.worker_id, device_id))
            for device_id in dict.fromkeys((*worker.certificates, *worker.challenged))
        ],
        distrusted_reason=worker.distrusted_reason,
        rows_verified=worker.rows_verified,
        rows_unverified=worker.rows_unverified,
    )


def _required_name(name: str) -> str:
    if not name.strip():
        raise FallowError(Reason.FIELD_MISSING, "a name is wanted", field="name")
    return checked_name(name, "name")


def _reason(text: str, default: str) -> str:
    if len(text.encode()) > REASON_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, "the reason is too long", field="reason", limit=f"{REASON_BYTES_MAX} bytes"
        )
    return text or default
