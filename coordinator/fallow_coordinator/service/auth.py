"""Who is calling: the key of the TLS peer, looked up in committed state; words in certificates count for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, KeyFingerprint, PartyId, PoolId
from fallow.roles import Role, Tier
from fallow_coordinator.core.state import State
from fallow_coordinator.engine import Engine
from fallow_coordinator.service.calls import Peer
from fallow_coordinator.service.live_streams import certificate_expired


@dataclass(frozen=True, slots=True)
class Caller:
    """A party as it stood when it was looked up."""

    party_id: PartyId
    account_id: AccountId
    role: Role
    tier: Tier | None
    pool_id: PoolId
    key_fingerprint: KeyFingerprint
    public_key: bytes
    not_after_ms: int
    """End of its newest certificate."""
    revoked: bool
    quarantined: bool


class Doorkeeper:
    """Tells which party is behind a peer, and whether it may come in."""

    def __init__(self, engine: Engine, now_ms: Callable[[], int]) -> None:
        """Reads parties through `engine`; `now_ms` is the wall clock."""
        self._engine = engine
        self._now_ms = now_ms

    async def admit(self, peer: Peer, *roles: Role) -> Caller:
        """The party behind `peer`, which must have one of `roles`.

        Raises UNAUTHENTICATED, CERTIFICATE_FOREIGN, PARTY_REVOKED, CERTIFICATE_EXPIRED, PARTY_QUARANTINED or
        PERMISSION_DENIED.
        """
        if not peer.key_fingerprint:
            raise FallowError(Reason.UNAUTHENTICATED, "no client certificate was shown", hint="join first")
        caller = await self._engine.read(lambda state: caller_by_key(state, peer.key_fingerprint))
        if caller is None:
            raise FallowError(
                Reason.CERTIFICATE_FOREIGN, "this key is not enrolled here", hint="join again with a new join line"
            )
        if caller.role not in roles:
            raise FallowError(
                Reason.PERMISSION_DENIED,
                f"a party of role {caller.role.value} may not do this",
                limit=", ".join(role.value for role in roles),
            )
        check_caller(caller, now_ms=self._now_ms())
        return caller

    async def not_after_ms(self, party_id: PartyId) -> int | None:
        """When the newest certificate of a party ends; None when it is revoked or unknown."""

        def read(state: State) -> int | None:
            party = state.parties.get(party_id)
            return None if party is None or party.revoked else party.not_after_ms

        return await self._engine.read(read)


def caller_by_key(state: State, key_fingerprint: KeyFingerprint) -> Caller | None:
    """The party that enrolled this key."""
    party_id = state.parties_by_key.get(key_fingerprint)
    if party_id is None:
        return None
    party = state.parties[party_id]
    worker = state.workers.get(party_id)
    return Caller(
        party_id=party_id,
        account_id=party.account_id,
        role=party.role,
        tier=party.tier,
        pool_id=party.pool_id,
        key_fingerprint=key_fingerprint,
        public_key=party.public_key,
        not_after_ms=party.not_after_ms,
        revoked=party.revoked,
        quarantined=worker is not None and worker.quarantined,
    )


def check_caller(caller: Caller, *, now_ms: int) -> None:
    """Returns when a party may talk to us now. Raises PARTY_REVOKED, CERTIFICATE_EXPIRED or PARTY_QUARANTINED."""
    if caller.revoked:
        raise party_revoked()
    if caller.not_after_ms <= now_ms:
        raise certificate_expired()
    if caller.quarantined:
        raise FallowError(
            Reason.PARTY_QUARANTINED, "this worker is quarantined", hint="ask the operator, who can release it"
        )


def party_revoked() -> FallowError:
    """The answer to a revoked party."""
    return FallowError(Reason.PARTY_REVOKED, "this party was revoked", hint="ask the operator for a new join line")
