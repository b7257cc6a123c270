"""Decisions about accounts, pools, tokens and parties."""

from __future__ import annotations

from fallow.credits import PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import AccountId, KeyFingerprint, PartyId, PoolId, TokenId
from fallow.limits import TOKEN_USES_MAX
from fallow.roles import Role, Tier
from fallow.session import Cause
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.admission import admitted_by_token
from fallow_coordinator.core.answers import AccountMade, CertificateGranted, Decision, PoolMade, TokenMade
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.limits import (
    ACCOUNTS_MAX,
    CERTIFICATE_VALID_MS_MAX,
    DAY_MS,
    NAME_BYTES_MAX,
    PARTIES_MAX,
    POOLS_MAX,
    RENEWAL_GRACE_MS,
    TAGS_MAX,
    TOKEN_VALID_MS_MAX,
    TOKENS_MAX,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Party, State, Token, Worker

POLICY_UNVERIFIED = "unverified"


def start_journal(state: State, command: c.StartJournal, names: Names) -> Decision:
    """The operator's account and the default pool. The journal must be empty."""
    assert not state.journal_id, "a journal is started once"
    account_id, pool_id = AccountId(names.new("account")), PoolId(names.new("pool"))
    return Decision(
        (
            e.JournalStarted(journal_id=names.draw()[:16]),
            e.AccountCreated(account_id=account_id, name=_name(command.account_name, "account_name")),
            e.PoolCreated(
                pool_id=pool_id,
                account_id=account_id,
                name=_name(command.pool_name, "pool_name"),
                mode=PoolMode.DONATION.value,
                policy=POLICY_UNVERIFIED,
            ),
        ),
        AccountMade(account_id),
    )


def create_account(state: State, command: c.CreateAccount, names: Names) -> Decision:
    """A new account. Raises FIELD_INVALID, LIMIT_EXCEEDED, NAME_TAKEN."""
    _room(len(state.accounts), ACCOUNTS_MAX, "accounts")
    name = _name(command.name, "name")
    if any(account.name == name for account in state.accounts.values()):
        raise _name_taken("an account", name)
    account_id = AccountId(names.new("account"))
    return Decision((e.AccountCreated(account_id=account_id, name=name),), AccountMade(account_id))


def create_pool(state: State, command: c.CreatePool, names: Names) -> Decision:
    """A new pool in donation mode. Raises FIELD_INVALID, LIMIT_EXCEEDED, NAME_TAKEN, ACCOUNT_UNKNOWN."""
    _room(len(state.pools), POOLS_MAX, "pools")
    name = _name(command.name, "name")
    if any(pool.name == name for pool in state.pools.values()):
        raise _name_taken("a pool", name)
    if command.account_id not in state.accounts:
        raise FallowError(Reason.ACCOUNT_UNKNOWN, f"there is no account {command.account_id}", field="account_id")
    pool_id = PoolId(names.new("pool"))
    event = e.PoolCreated(
        pool_id=pool_id,
        account_id=command.account_id,
        name=name,
        mode=PoolMode.DONATION.value,
        policy=POLICY_UNVERIFIED,
        closed=command.closed,
    )
    return Decision((event,), PoolMade(pool_id))


def _name_taken(what: str, name: str) -> FallowError:
    return FallowError(Reason.NAME_TAKEN, f"there is {what} called {name!r} already", field="name")


def issue_token(state: State, command: c.IssueToken, now_ms: int, names: Names) -> Decision:
    """A join token. Raises FIELD_INVALID, LIMIT_EXCEEDED, ACCOUNT_UNKNOWN, POOL_UNKNOWN."""
    _room(len(state.tokens), TOKENS_MAX, "tokens")
    _within(command.uses_max, 1, TOKEN_USES_MAX, "uses_max", "uses")
    _within(command.valid_for_ms, 1, TOKEN_VALID_MS_MAX, "valid_for_ms", "ms")
    if len(command.tags) > TAGS_MAX:
        raise FallowError(Reason.LIMIT_EXCEEDED, "too many tags", field="tags", limit=f"{TAGS_MAX} tags")
    tags = tuple(_name(tag, f"tags[{index}]") for index, tag in enumerate(command.tags))
    if command.account_id is not None and command.account_id not in state.accounts:
        raise FallowError(Reason.ACCOUNT_UNKNOWN, f"there is no account {command.account_id}", field="account_id")
    pool_id = state.default_pool_id if command.pool_id is None else command.pool_id
    if pool_id not in state.pools:
        raise FallowError(Reason.POOL_UNKNOWN, f"there is no pool {pool_id}", field="pool_id")
    if command.role is Role.SERVICE:
        raise FallowError(
            Reason.FIELD_INVALID,
            "a token lets in workers, clients and operators; services belong to the coordinator's own machine",
            field="role",
            limit="worker, client, operator",
        )
    tier = _tier_of(command.role, command.tier)
    token_id = TokenId(names.new("token"))
    expires_at_ms = now_ms + command.valid_for_ms
    event = e.TokenIssued(
        token_id=token_id,
        secret_digest=command.secret_digest,
        account_id=command.account_id,
        role=command.role,
        tier=tier,
        pool_id=pool_id,
        uses_max=command.uses_max,
        expires_at_ms=expires_at_ms,
        tags=tags,
    )
    answer = TokenMade(
        token_id=token_id,
        role=command.role,
        tier=tier,
        pool_id=pool_id,
        account_id=command.account_id,
        expires_at_ms=expires_at_ms,
    )
    return Decision((event,), answer)


def revoke_token(state: State, command: c.RevokeToken) -> Decision:
    """The token lets nobody in any more. Raises TOKEN_UNKNOWN."""
    token = state.tokens.get(command.token_id)
    if token is None:
        raise FallowError(Reason.TOKEN_UNKNOWN, f"there is no token {command.token_id}", field="token_id")
    return Decision() if token.revoked else Decision((e.TokenRevoked(token_id=command.token_id),))


def enroll(state: State, command: c.Enroll, now_ms: int, names: Names) -> Decision:
    """A key becomes a party by a token; the same key with the same token again just gets a certificate.

    Raises TOKEN_UNKNOWN, TOKEN_EXPIRED, TOKEN_USED_UP, KEY_IN_USE, PARTY_REVOKED, FIELD_INVALID, LIMIT_EXCEEDED.
    """
    token = _open_token(state, command.token_id, now_ms)
    _check_validity(command.certificate_valid_for_ms)
    known = _party_of_key(state, command.key_fingerprint)
    if known is not None:
        if known.token_id != token.token_id:
            raise FallowError(
                Reason.KEY_IN_USE,
                f"this key is enrolled already, as {known.party_id}",
                field="public_key",
                hint="renew its certificate, or join with a fresh folder to make another key",
            )
        return _certificate(known, command.certificate_valid_for_ms, now_ms, names)
    if token.uses >= token.uses_max:
        raise FallowError(
            Reason.TOKEN_USED_UP,
            "the join token has been used as often as it may be",
            field="token",
            limit=f"{token.uses_max} uses",
            hint="ask the operator for a new join line",
        )
    _room(len(state.parties), PARTIES_MAX, "parties")
    name = _name(command.name, "name")
    events: list[e.Event] = []
    account_id = token.account_id
    if account_id is None:
        _room(len(state.accounts), ACCOUNTS_MAX, "accounts")
        account_id = AccountId(names.new("account"))
        events.append(e.AccountCreated(account_id=account_id, name=name))
    events.extend(admitted_by_token(state, account_id, token.pool_id))
    event = e.PartyEnrolled(
        party_id=PartyId(names.new(token.role.value)),
        key_fingerprint=command.key_fingerprint,
        public_key=command.public_key,
        account_id=account_id,
        role=token.role,
        tier=token.tier,
        pool_id=token.pool_id,
        token_id=token.token_id,
        name=name,
        machine_digest=command.machine_digest,
    )
    return _enrolled(event, events, command.certificate_valid_for_ms, now_ms, names)


def enroll_local(state: State, command: c.EnrollLocal, now_ms: int, names: Names) -> Decision:
    """One of the operator's own parties; the same key again gets a certificate. Raises KEY_IN_USE, PARTY_REVOKED."""
    _check_validity(command.certificate_valid_for_ms)
    tier = _tier_of(command.role, command.tier)
    known = _party_of_key(state, command.key_fingerprint)
    if known is not None:
        if known.token_id is not None or known.role is not command.role or known.tier is not tier:
            raise FallowError(
                Reason.KEY_IN_USE, f"this key is enrolled already, as {known.party_id}", field="public_key"
            )
        return _certificate(known, command.certificate_valid_for_ms, now_ms, names)
    event = e.PartyEnrolled(
        party_id=PartyId(names.new(command.role.value)),
        key_fingerprint=command.key_fingerprint,
        public_key=command.public_key,
        account_id=state.operator_account_id,
        role=command.role,
        tier=tier,
        pool_id=state.default_pool_id,
        token_id=None,
        name=_name(command.name, "name"),
        machine_digest=b"",
    )
    return _enrolled(event, [], command.certificate_valid_for_ms, now_ms, names)


def renew_certificate(state: State, command: c.RenewCertificate, now_ms: int, names: Names) -> Decision:
    """A fresh certificate for a known key, until 90 days after the end of its last.

    Raises UNAUTHENTICATED, PARTY_REVOKED, PARTY_QUARANTINED, CERTIFICATE_EXPIRED.
    """
    _check_validity(command.certificate_valid_for_ms)
    party = _party_of_key(state, command.key_fingerprint)
    if party is None:
        raise FallowError(
            Reason.UNAUTHENTICATED, "this key is not enrolled here", field="public_key", hint="join with a join line"
        )
    worker = state.workers.get(party.party_id)
    if worker is not None and worker.quarantined:
        raise quarantined(worker)
    # The operator's own parties are on the coordinator's machine, which may have been off for a year.
    if party.token_id is not None and party.not_after_ms + RENEWAL_GRACE_MS <= now_ms:
        days = (now_ms - party.not_after_ms) // DAY_MS
        raise FallowError(
            Reason.CERTIFICATE_EXPIRED,
            f"the certificate of {party.party_id} ended {days} days ago, too long for its key to renew it",
            field="public_key",
            limit=f"{RENEWAL_GRACE_MS // DAY_MS} days after its end",
            hint="ask the operator for a new join line, and join in a fresh folder, which makes a new key",
        )
    return _certificate(party, command.certificate_valid_for_ms, now_ms, names)


def revoke_party(state: State, command: c.RevokeParty) -> Decision:
    """The party's certificates count no more; its session and leases end. Raises WORKER_UNKNOWN."""
    party = state.parties.get(command.party_id)
    if party is None:
        raise FallowError(Reason.WORKER_UNKNOWN, f"there is no party {command.party_id}", field="party_id")
    if party.revoked:
        return Decision()
    draft = Draft(state)
    draft.events.append(e.PartyRevoked(party_id=party.party_id, reason=shortened(command.reason)))
    worker = state.workers.get(party.party_id)
    if worker is not None:
        _put_out(state, draft, worker, "revoked")
    return Decision(tuple(draft.events))


def quarantine_worker(state: State, command: c.QuarantineWorker) -> Decision:
    """The worker gets nothing until it is released; its session and leases end. Raises WORKER_UNKNOWN."""
    worker = _worker(state, command.worker_id)
    if worker.quarantined:
        return Decision()
    draft = Draft(state)
    draft.events.append(e.WorkerQuarantined(worker_id=worker.worker_id, reason=shortened(command.reason)))
    _put_out(state, draft, worker, "quarantined")
    return Decision(tuple(draft.events))


def release_worker(state: State, command: c.ReleaseWorker) -> Decision:
    """The worker may come back; one that was proven wrong begins anew, without a record. Raises WORKER_UNKNOWN."""
    worker = _worker(state, command.worker_id)
    events: list[e.Event] = [e.WorkerReleased(worker_id=worker.worker_id)] if worker.quarantined else []
    if worker.distrusted_reason:
        events.append(v.WorkerTrusted(worker_id=worker.worker_id))
    return Decision(tuple(events))


def quarantined(worker: Worker) -> FallowError:
    """What a quarantined worker is told."""
    return FallowError(
        Reason.PARTY_QUARANTINED,
        f"this worker is in quarantine: {worker.quarantine_reason}",
        hint="ask the operator to release it",
    )


def revoked(party: Party) -> FallowError:
    """What a revoked party is told."""
    return FallowError(
        Reason.PARTY_REVOKED,
        f"this party is revoked: {party.revoked_reason}",
        hint="ask the operator for a new join line",
    )


def _put_out(state: State, draft: Draft, worker: Worker, why: str) -> None:
    if worker.session_id is not None:
        draft.events.append(e.SessionClosed(session_id=worker.session_id, reason=why))
    for lease_id in worker.leases:
        draft.end_lease(state.leases[lease_id], e.LeaseOutcome.REVOKED, Cause.PLATFORM, f"its worker is {why}")


def _open_token(state: State, token_id: TokenId, now_ms: int) -> Token:
    token = state.tokens.get(token_id)
    if token is None or token.revoked:
        raise FallowError(
            Reason.TOKEN_UNKNOWN,
            "there is no such join token" if token is None else "the join token is revoked",
            field="token",
            hint="ask the operator for a new join line",
        )
    if token.expires_at_ms <= now_ms:
        raise FallowError(
            Reason.TOKEN_EXPIRED,
            "the join token has expired",
            field="token",
            hint="ask the operator for a new join line",
        )
    return token


def _party_of_key(state: State, key_fingerprint: KeyFingerprint) -> Party | None:
    party_id = state.parties_by_key.get(key_fingerprint)
    if party_id is None:
        return None
    party = state.parties[party_id]
    if party.revoked:
        raise revoked(party)
    return party


def _enrolled(event: e.PartyEnrolled, before: list[e.Event], valid_for_ms: int, now_ms: int, names: Names) -> Decision:
    serial, not_after_ms = names.serial(), now_ms + valid_for_ms
    issued = e.CertificateIssued(party_id=event.party_id, serial=serial, not_after_ms=not_after_ms)
    answer = CertificateGranted(
        party_id=event.party_id,
        account_id=event.account_id,
        role=event.role,
        tier=event.tier,
        pool_id=event.pool_id,
        serial=serial,
        not_after_ms=not_after_ms,
    )
    return Decision((*before, event, issued), answer)


def _certificate(party: Party, valid_for_ms: int, now_ms: int, names: Names) -> Decision:
    serial, not_after_ms = names.serial(), now_ms + valid_for_ms
    answer = CertificateGranted(
        party_id=party.party_id,
        account_id=party.account_id,
        role=party.role,
        tier=party.tier,
        pool_id=party.pool_id,
        serial=serial,
        not_after_ms=not_after_ms,
    )
    return Decision((e.CertificateIssued(party_id=party.party_id, serial=serial, not_after_ms=not_after_ms),), answer)


def _worker(state: State, worker_id: PartyId) -> Worker:
    worker = state.workers.get(worker_id)
    if worker is None:
        raise FallowError(Reason.WORKER_UNKNOWN, f"there is no worker {worker_id}", field="worker_id")
    return worker


def _tier_of(role: Role, tier: Tier | None) -> Tier | None:
    if role is Role.WORKER:
        return Tier.VOLUNTEER if tier is None else tier
    if tier is not None:
        raise FallowError(Reason.FIELD_INVALID, "only workers have a tier", field="tier", limit="unset")
    return None


def _name(text: str, field: str) -> str:
    size = len(text.encode("utf-8", errors="replace"))
    if not text.strip() or not text.isprintable():
        raise FallowError(
            Reason.FIELD_INVALID, f"{field} is empty or not printable", field=field, limit="printable text"
        )
    if size > NAME_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"{field} has {size} bytes", field=field, limit=f"{NAME_BYTES_MAX} bytes of UTF-8"
        )
    return text


def _check_validity(valid_for_ms: int) -> None:
    _within(valid_for_ms, 1, CERTIFICATE_VALID_MS_MAX, "certificate_valid_for_ms", "ms")


def _within(value: int, low: int, high: int, field: str, unit: str) -> None:
    if not low <= value <= high:
        raise FallowError(Reason.LIMIT_EXCEEDED, f"{field} is {value}", field=field, limit=f"{low} to {high} {unit}")


def _room(count: int, limit: int, what: str) -> None:
    if count >= limit:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"there are {count} {what} already", field=what, limit=f"{limit} {what}"
        )
