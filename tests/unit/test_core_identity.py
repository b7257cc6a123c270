"""Accounts, tokens, enrolment, revocation and quarantine, as decisions of the core."""

from __future__ import annotations

import pytest

from fallow.errors import FallowError, Reason
from fallow.roles import Role, Tier
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import CertificateGranted, Decision
from fallow_coordinator.core.decide import decide
from fallow_coordinator.core.state import State
from simulation.core_world import START_MS, World, digest, fingerprint, of_kind


def refused(world: World, command: c.Command) -> FallowError:
    """The refusal of a command; the state is as it was."""
    before = repr(world.state)
    with pytest.raises(FallowError) as caught:
        world.take(command)
    assert repr(world.state) == before, "a refusal changes nothing"
    return caught.value


def enrollment(world: World, name: str, **changes: object) -> c.Enroll:
    token = world.token(uses_max=1)
    fields: dict[str, object] = {
        "token_id": token.token_id,
        "key_fingerprint": fingerprint(name),
        "public_key": name.encode(),
        "name": name,
        "certificate_valid_for_ms": 86_400_000,
    }
    return c.Enroll(**(fields | changes))  # type: ignore[arg-type]


def test_a_new_journal_has_the_operators_account_and_a_donation_pool_without_checks() -> None:
    decision = decide(State(), c.StartJournal("operator", "default"), START_MS, bytes(32))
    started, account, pool = decision.events
    assert isinstance(started, e.JournalStarted) and len(started.journal_id) == 16
    assert isinstance(account, e.AccountCreated) and account.name == "operator"
    assert pool == e.PoolCreated(
        pool_id=pool.pool_id,  # type: ignore[union-attr]
        account_id=account.account_id,
        name="default",
        mode="donation",
        policy="unverified",
    )


def test_equal_entropy_gives_equal_decisions_and_other_entropy_other_names() -> None:
    command = c.StartJournal("operator", "default")
    first, again, other = (decide(State(), command, START_MS, bytes([n]) * 32) for n in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_key_renews_its_certificate_for_90_days_after_its_end_and_no_longer() -> None:
    world = World().start()
    granted = world.enroll("v", valid_for_ms=86_400_000)
    renewal = c.RenewCertificate(fingerprint("v"), 86_400_000)
    world.now_ms = granted.not_after_ms + 90 * 86_400_000 - 1
    again = world.ask(renewal)
    assert isinstance(again, CertificateGranted) and again.party_id == granted.party_id
    world.now_ms = again.not_after_ms + 90 * 86_400_000
    error = refused(world, renewal)
    assert error.reason is Reason.CERTIFICATE_EXPIRED
    assert "ended 90 days ago" in error.message and "new join line" in error.hint
    # The operator's own keys lie beside the journal.
    world.enroll_local("own", Role.CLIENT)
    world.now_ms += 400 * 86_400_000
    world.ask(c.RenewCertificate(fingerprint("own"), 86_400_000))


def test_a_token_makes_an_account_for_each_joiner_unless_it_names_one() -> None:
    world = World().start()
    alone = world.enroll("alone")
    token = world.token(account_id=world.account_id)
    together = world.enroll("together", token)
    assert alone.account_id not in (world.account_id, together.account_id)
    assert together.account_id == world.account_id
    assert (alone.role, alone.tier) == (Role.WORKER, Tier.VOLUNTEER)


def test_enrolment_burns_one_use_in_the_very_event() -> None:
    world = World().start()
    command = enrollment(world, "w")
    turn = world.take(command)
    assert [type(event) for event in turn.events] == [e.AccountCreated, e.PartyEnrolled, e.CertificateIssued]
    assert world.state.tokens[command.token_id].uses == 1


def test_the_same_key_with_the_same_token_gets_a_certificate_without_burning_a_use() -> None:
    world = World().start()
    command = enrollment(world, "w")
    first = world.ask(command)
    again = world.take(command)
    assert isinstance(first, CertificateGranted) and isinstance(again.answer, CertificateGranted)
    assert again.answer.party_id == first.party_id
    assert again.answer.serial != first.serial
    assert [type(event) for event in again.events] == [e.CertificateIssued]
    assert world.state.tokens[command.token_id].uses == 1


def test_a_used_up_token_names_its_limit() -> None:
    world = World().start()
    command = enrollment(world, "w")
    world.take(command)
    other = c.Enroll(command.token_id, fingerprint("other"), b"other", "other", 86_400_000)
    error = refused(world, other)
    assert (error.reason, error.limit) == (Reason.TOKEN_USED_UP, "1 uses")


def test_an_expired_a_revoked_and_an_unknown_token_are_told_apart() -> None:
    world = World().start()
    command = enrollment(world, "w")
    revoked = world.token()
    world.take(c.RevokeToken(revoked.token_id))
    assert world.take(c.RevokeToken(revoked.token_id)).events == ()
    by_revoked = c.Enroll(revoked.token_id, fingerprint("w"), b"w", "w", 86_400_000)
    error = refused(world, by_revoked)
    assert error.reason is Reason.TOKEN_UNKNOWN and "revoked" in error.message
    world.now_ms += 3_600_000
    assert refused(world, command).reason is Reason.TOKEN_EXPIRED
    unknown = enrollment(world, "w", token_id="token-none")
    assert refused(world, unknown).reason is Reason.TOKEN_UNKNOWN


def test_a_key_that_is_somebody_else_already_is_refused() -> None:
    world = World().start()
    world.enroll("w")
    assert refused(world, enrollment(world, "w")).reason is Reason.KEY_IN_USE
    local = c.EnrollLocal(fingerprint("w"), b"w", "w", Role.CLIENT, None, 86_400_000)
    assert refused(world, local).reason is Reason.KEY_IN_USE


def test_a_local_party_may_enrol_again_and_keeps_its_name() -> None:
    world = World().start()
    assert world.enroll_local("inspector", Role.WORKER, Tier.OPERATOR) == world.enroll_local(
        "inspector", Role.WORKER, Tier.OPERATOR
    )


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"uses_max": 0}, Reason.LIMIT_EXCEEDED, "uses_max"),
        ({"uses_max": 10_001}, Reason.LIMIT_EXCEEDED, "uses_max"),
        ({"valid_for_ms": 0}, Reason.LIMIT_EXCEEDED, "valid_for_ms"),
        ({"role": Role.SERVICE}, Reason.FIELD_INVALID, "role"),
        ({"role": Role.CLIENT, "tier": Tier.MANAGED}, Reason.FIELD_INVALID, "tier"),
        ({"pool_id": "pool-none"}, Reason.POOL_UNKNOWN, "pool_id"),
        ({"account_id": "account-none"}, Reason.ACCOUNT_UNKNOWN, "account_id"),
        ({"tags": ("x",) * 33}, Reason.LIMIT_EXCEEDED, "tags"),
        ({"tags": ("two\nlines",)}, Reason.FIELD_INVALID, "tags[0]"),
    ],
)
def test_a_wrong_token_request_names_its_field(changes: dict[str, object], reason: Reason, field: str) -> None:
    fields: dict[str, object] = {
        "secret_digest": digest("secret"),
        "account_id": None,
        "role": Role.WORKER,
        "tier": None,
        "pool_id": None,
        "uses_max": 1,
        "valid_for_ms": 1_000,
    }
    error = refused(World().start(), c.IssueToken(**(fields | changes)))  # type: ignore[arg-type]
    assert (error.reason, error.field) == (reason, field)


def test_names_have_a_limit_and_are_printable() -> None:
    world = World().start()
    assert refused(world, c.CreateAccount("x" * 201)).reason is Reason.LIMIT_EXCEEDED
    assert refused(world, c.CreateAccount(" ")).reason is Reason.FIELD_INVALID
    assert refused(world, c.CreatePool("p", digest("no")))  # type: ignore[arg-type]


def test_renewal_is_refused_to_the_unknown_the_revoked_and_the_quarantined() -> None:
    world = World().start()
    worker = world.enroll("w")
    renewal = c.RenewCertificate(fingerprint("w"), 86_400_000)
    renewed = world.ask(renewal)
    assert isinstance(renewed, CertificateGranted) and renewed.party_id == worker.party_id
    assert refused(world, c.RenewCertificate(fingerprint("x"), 1)).reason is Reason.UNAUTHENTICATED
    world.take(c.QuarantineWorker(worker.party_id, "odd answers"))
    error = refused(world, renewal)
    assert error.reason is Reason.PARTY_QUARANTINED and "odd answers" in error.message
    world.take(c.ReleaseWorker(worker.party_id))
    world.take(renewal)
    world.take(c.RevokeParty(worker.party_id, "stolen"))
    error = refused(world, renewal)
    assert error.reason is Reason.PARTY_REVOKED and "stolen" in error.message


@pytest.mark.parametrize("ending", ["revoke", "quarantine"])
def test_a_barred_worker_loses_its_session_and_its_leases_at_once(ending: str) -> None:
    world = World().start().ready_bundle()
    worker_id, other_id = world.volunteer("bad"), None
    job_id = world.submit(200)
    world.pack_all()
    session_id = world.state.workers[worker_id].session_id
    assert len(world.leases_of(worker_id)) == 2
    command = c.RevokeParty(worker_id, "bad") if ending == "revoke" else c.QuarantineWorker(worker_id, "bad")
    turn = world.take(command)
    assert world.leases_of(worker_id) == []
    code = "PARTY_REVOKED" if ending == "revoke" else "PARTY_QUARANTINED"
    (ended,) = of_kind(turn.effects, f.EndSession)
    assert (ended.session_id, ended.reason_code) == (session_id, code)
    assert of_kind(turn.effects, f.EndParty) == ([f.EndParty(worker_id)] if ending == "revoke" else [])
    assert world.take(command).events == (), "once is enough"
    other_id = world.volunteer("good", window=64)
    world.work_off()
    assert {result.worker_id for result in world.state.jobs[job_id].results} == {other_id}


def test_unknown_workers_and_parties_are_refused() -> None:
    world = World().start()
    for command in (
        c.RevokeParty("worker-none", ""),  # type: ignore[arg-type]
        c.QuarantineWorker("worker-none", ""),  # type: ignore[arg-type]
        c.ReleaseWorker("worker-none"),  # type: ignore[arg-type]
        c.QuarantineWorker(world.client_id, ""),
    ):
        assert refused(world, command).reason is Reason.WORKER_UNKNOWN


def test_releasing_a_free_worker_changes_nothing() -> None:
    world = World().start()
    worker = world.enroll("w")
    assert decide(world.state, c.ReleaseWorker(worker.party_id), world.now_ms, bytes(32)) == Decision()
