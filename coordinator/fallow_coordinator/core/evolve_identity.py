"""How events about accounts, pools, tokens and parties change the state."""

from __future__ import annotations

from typing import assert_never

from fallow.credits import PoolMode
from fallow.roles import Role
from fallow_coordinator.core import events as e
from fallow_coordinator.core.groups import place, unplace
from fallow_coordinator.core.state import Account, Party, Pool, State, Token, Worker

IdentityEvent = (
    e.JournalStarted
    | e.AccountCreated
    | e.PoolCreated
    | e.TokenIssued
    | e.TokenRevoked
    | e.PartyEnrolled
    | e.CertificateIssued
    | e.PartyRevoked
    | e.WorkerQuarantined
    | e.WorkerReleased
)


def evolve_identity(state: State, event: IdentityEvent, at_ms: int) -> None:
    """Applies one event about who is who."""
    match event:
        case e.JournalStarted():
            assert not state.journal_id, "a journal starts once"
            state.journal_id = event.journal_id
        case e.AccountCreated():
            assert event.account_id not in state.accounts, "an account is created once"
            state.accounts[event.account_id] = Account(event.account_id, event.name)
            state.operator_account_id = state.operator_account_id or event.account_id
        case e.PoolCreated():
            assert event.pool_id not in state.pools, "a pool is created once"
            assert event.account_id in state.accounts, "a pool belongs to an account"
            state.pools[event.pool_id] = Pool(
                event.pool_id,
                event.account_id,
                event.name,
                mode=PoolMode(event.mode),
                policy=event.policy,
                closed=event.closed,
            )
            state.default_pool_id = state.default_pool_id or event.pool_id
        case e.TokenIssued():
            _issue_token(state, event)
        case e.TokenRevoked():
            state.tokens[event.token_id].revoked = True
        case e.PartyEnrolled():
            _enroll(state, event, at_ms)
        case e.CertificateIssued():
            party = state.parties[event.party_id]
            assert not party.revoked, "a revoked party gets no certificate"
            party.not_after_ms = max(party.not_after_ms, event.not_after_ms)
            party.serial = event.serial
        case e.PartyRevoked():
            party = state.parties[event.party_id]
            assert not party.revoked, "a party is revoked once"
            party.revoked, party.revoked_reason = True, event.reason
        case e.WorkerQuarantined():
            worker = state.workers[event.worker_id]
            unplace(state, worker)
            worker.quarantined, worker.quarantine_reason = True, event.reason
        case e.WorkerReleased():
            worker = state.workers[event.worker_id]
            worker.quarantined, worker.quarantine_reason = False, ""
            place(state, worker)
        case _:
            assert_never(event)


def _issue_token(state: State, event: e.TokenIssued) -> None:
    assert event.token_id not in state.tokens, "a token is issued once"
    state.tokens[event.token_id] = Token(
        token_id=event.token_id,
        secret_digest=event.secret_digest,
        account_id=event.account_id,
        role=event.role,
        tier=event.tier,
        pool_id=event.pool_id,
        uses_max=event.uses_max,
        uses=0,
        expires_at_ms=event.expires_at_ms,
        tags=event.tags,
    )


def _enroll(state: State, event: e.PartyEnrolled, at_ms: int) -> None:
    assert event.party_id not in state.parties, "a party is enrolled once"
    assert event.key_fingerprint not in state.parties_by_key, "a key belongs to one party"
    assert event.account_id in state.accounts, "a party belongs to an account"
    if event.token_id is not None:
        token = state.tokens[event.token_id]
        token.uses += 1
        assert token.uses <= token.uses_max, "a token lets in as many as it says"
    state.parties[event.party_id] = Party(
        party_id=event.party_id,
        key_fingerprint=event.key_fingerprint,
        public_key=event.public_key,
        account_id=event.account_id,
        role=event.role,
        tier=event.tier,
        pool_id=event.pool_id,
        token_id=event.token_id,
        name=event.name,
        machine_digest=event.machine_digest,
        enrolled_at_ms=at_ms,
    )
    state.parties_by_key[event.key_fingerprint] = event.party_id
    if event.role is Role.WORKER:
        assert event.tier is not None, "a worker has a tier"
        state.workers[event.party_id] = Worker(
            worker_id=event.party_id, account_id=event.account_id, pool_id=event.pool_id, tier=event.tier
        )
