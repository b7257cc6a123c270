"""Verifying jobs, on the real core with workers that compute by a table."""

from __future__ import annotations

import pytest

from fallow.assurance import assurance_of
from fallow.comparison import Finding, RowFinding
from fallow.credits import PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.job import JobState
from fallow.roles import Tier
from fallow.session import TaskKind, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.draws import expected_checks_permille
from fallow_coordinator.core.explaining import explain_job, explain_worker
from fallow_coordinator.core.ledger import available, pending
from fallow_coordinator.core.limits import AUDIT_PATIENCE_MS
from fallow_coordinator.core.questions import job_status
from fallow_coordinator.core.references import referenced_blobs
from fallow_coordinator.core.waiting import NO_AUDITOR, NO_REFEREE, waiting_reason
from simulation.verification import Actor, Row, Value, Zoo, after, colluding, honest, junk, withholding


def fleet(seed: int = 1, *, volunteers: int = 2, referee: bool = True, slot_dependent: bool = False) -> Zoo:
    zoo = Zoo(seed)
    zoo.begin(slot_dependent=slot_dependent)
    if referee:
        zoo.referee = zoo.operator_worker(TaskKind.REFEREE)
    for _ in range(volunteers):
        zoo.volunteer()
    return zoo


def drawn(zoo: Zoo) -> int:
    return sum(len(event.drawn) for event in zoo.of_kind(v.AuditsDrawn))


def statuses(zoo: Zoo, job_id: str) -> set[str]:
    return {result.status for result in next(j for j in zoo.state.jobs.values() if j.job_id == job_id).results}


# ------------------------------------------------------------------------------------------------- honest work


def test_honest_fleet_has_every_drawn_row_pass_and_the_job_succeed() -> None:
    zoo = fleet()
    job_id = zoo.submit(300)
    zoo.run()
    assert zoo.succeeded(job_id)
    assert drawn(zoo) == 300
    assert not zoo.distrusted()
    assert zoo.wrong_rows(job_id) == 0
    assert statuses(zoo, job_id) == {"verified"}
    assert {len(zoo.state.verifications), sum(w.rows_unverified for w in zoo.state.workers.values())} == {0}
    assert sum(worker.rows_verified for worker in zoo.state.workers.values()) == 300


def test_job_without_an_assurance_has_none_of_it() -> None:
    zoo = fleet()
    zoo.volunteer(junk)
    job_id = zoo.submit(200, "")
    zoo.run()
    assert zoo.succeeded(job_id)
    assert statuses(zoo, job_id) == {"unverified"}
    assert not [event for _, event in zoo.events if isinstance(event, v.VerificationEvent)]
    assert not any(isinstance(event, e.TaskCreated) and (event.checks or event.corrects) for _, event in zoo.events)


def test_secret_of_the_draws_is_in_the_journal_before_anything_is_committed() -> None:
    zoo = fleet()
    zoo.submit(50)
    zoo.run()
    kinds = [type(event) for _, event in zoo.events]
    last_before = kinds.index(v.DrawSecretSet)
    assert e.CommitmentRecorded not in kinds[:last_before]
    assert len({event.secret for event in zoo.of_kind(v.DrawSecretSet)}) == 1


def test_own_and_operators_workers_are_trusted_and_that_is_recorded() -> None:
    zoo = Zoo(3)
    zoo.begin()
    zoo.operator_worker(TaskKind.MAP)
    job_id = zoo.submit(100)
    zoo.run()
    assert zoo.succeeded(job_id)
    assert {event.trust for event in zoo.of_kind(v.AuditsDrawn)} == {v.Trust.OWN}
    assert statuses(zoo, job_id) == {"trusted"}
    other = zoo.volunteer()
    zoo.register(other.account_id)
    zoo.disconnect(other)
    job_id = zoo.submit(40, account_id=other.account_id)
    zoo.run()
    assert zoo.succeeded(job_id)
    assert zoo.of_kind(v.AuditsDrawn)[-1].trust is v.Trust.OPERATOR


def test_managed_fleet_is_audited_at_the_floor_by_its_own_other_machines() -> None:
    zoo = Zoo(4)
    zoo.begin()
    zoo.referee = zoo.operator_worker(TaskKind.REFEREE)
    first = zoo.volunteer(tier=Tier.MANAGED, machine_digest=b"1" * 32)
    zoo.volunteer(tier=Tier.MANAGED, machine_digest=b"2" * 32, account_id=first.account_id)
    job_id = zoo.submit(300, "standard,rate=0.1,referee=0.01")
    zoo.run()
    assert zoo.succeeded(job_id)
    assert 5 < drawn(zoo) < 80
    assert zoo.of_kind(v.AuditCompared)


def test_veterans_are_audited_less_and_paid_while_a_long_job_runs() -> None:
    zoo = fleet(5)
    zoo.checks = False
    for _ in range(3):
        zoo.submit(600, "basic,error=0.2,rate=0.05")
    zoo.run()
    before = len(zoo.events)
    job_id = zoo.submit(1_000, "basic,error=0.2,rate=0.05")
    zoo.run()
    fresh = [event for _, event in zoo.events[before:]]
    last_settled = max(index for index, event in enumerate(fresh) if isinstance(event, e.TaskSettled) and event.cursor)
    early = [event for event in fresh[:last_settled] if isinstance(event, v.EvidenceReleased)]
    count = sum(len(event.drawn) for event in fresh if isinstance(event, v.AuditsDrawn))
    assert zoo.succeeded(job_id) and early
    assert count < 300


def test_other_execution_class_halves_the_record() -> None:
    zoo = fleet(6)
    zoo.submit(200)
    zoo.run()
    actor = next(actor for actor in zoo.actors.values() if zoo.state.workers[actor.worker_id].rows_verified)
    before = zoo.state.workers[actor.worker_id].rows_verified
    actor.execution_class = "gpu"
    job_id = zoo.submit(200)
    zoo.run()
    assert zoo.succeeded(job_id)
    own = sum(
        len(event.drawn) for event in zoo.of_kind(v.AuditsDrawn)
        if event.worker_id == actor.worker_id and event.execution_class == "gpu"
    )  # fmt: skip
    assert zoo.state.workers[actor.worker_id].rows_verified == before // 2 + own


# ------------------------------------------------------------------------------------------------- who may audit


@pytest.mark.parametrize("shared", ["machine", "account", "nobody"])
def test_rows_that_nobody_else_may_audit_go_to_a_referee(shared: str) -> None:
    zoo = fleet(7, volunteers=0)
    first = zoo.volunteer(machine_digest=b"m" * 32)
    if shared == "machine":
        zoo.volunteer(machine_digest=b"m" * 32)
    elif shared == "account":
        zoo.volunteer(account_id=first.account_id)
    job_id = zoo.submit(60)
    zoo.run()
    assert zoo.succeeded(job_id)
    assert not zoo.of_kind(v.AuditCompared)
    tally = zoo.state.jobs[job_id].checks
    assert tally is not None and tally.rows_by_referee == tally.rows_drawn == 60


def test_audit_never_goes_to_whom_it_is_about() -> None:
    zoo = fleet(8, volunteers=4)
    zoo.submit(400)
    zoo.run()
    owner = {event.lease_id: event.worker_id for event in zoo.of_kind(v.AuditsDrawn)}
    created = {event.task_id: event for event in zoo.of_kind(e.TaskCreated)}
    audits = zoo.of_kind(v.AuditCompared)
    assert audits
    for audit in audits:
        assert audit.worker_id not in {owner[row.lease_id] for row in created[audit.task_id].checks}


def test_rows_of_slot_dependent_programs_go_to_a_referee() -> None:
    zoo = fleet(9, slot_dependent=True)
    job_id = zoo.submit(40)
    zoo.run()
    assert zoo.succeeded(job_id) and not zoo.of_kind(v.AuditCompared)


def test_job_waits_for_a_referee_and_says_so_and_its_owner_may_accept() -> None:
    zoo = fleet(10, referee=False)
    job_id = zoo.submit(120)
    zoo.run()
    status = job_status(zoo.state, job_id)
    assert status is not None
    assert (status.state, status.reason_code) == (JobState.VERIFYING, NO_REFEREE)
    assert f"fallow job accept {job_id}" in status.reason
    told = explain_job(zoo.state, job_id, zoo.now_ms)
    assert told is not None and told.waits_for[0].code == NO_REFEREE
    zoo.tell(c.AcceptAssurance(zoo.operator_id, job_id))
    assert zoo.succeeded(job_id)
    assert "accepted" in statuses(zoo, job_id)
    before = len(zoo.events)
    zoo.tell(c.AcceptAssurance(zoo.operator_id, job_id))
    assert len(zoo.events) == before


def test_lone_worker_without_a_referee_waits_for_an_auditor() -> None:
    zoo = fleet(11, volunteers=1, referee=False)
    job_id = zoo.submit(20, "standard,referee=0.000001")
    zoo.run()
    status = job_status(zoo.state, job_id)
    assert status is not None and status.reason_code == NO_AUDITOR
    zoo.volunteer()
    zoo.run()
    assert zoo.succeeded(job_id)


def test_only_a_whole_verifying_job_of_the_account_can_be_accepted() -> None:
    zoo = fleet(12, volunteers=0)
    plain, job_id = zoo.submit(20, ""), zoo.submit(20)
    for account_id, job, reason in (
        (zoo.operator_id, plain, Reason.FIELD_INVALID),
        (zoo.operator_id, job_id, Reason.JOB_UNFINISHED),
        (zoo.actors[next(iter(zoo.actors))].account_id, "job-of-nobody", Reason.JOB_UNKNOWN),
    ):
        with pytest.raises(FallowError) as caught:
            zoo.tell(c.AcceptAssurance(account_id, job))  # type: ignore[arg-type]  # any text comes over the wire
        assert caught.value.reason is reason


# ------------------------------------------------------------------------------------------------- cheaters


def test_one_who_cheats_is_caught_and_its_rows_are_done_again() -> None:
    zoo = fleet()
    cheat = zoo.volunteer(junk)
    job_id = zoo.submit(300)
    zoo.run()
    assert zoo.succeeded(job_id)
    assert zoo.distrusted() == {cheat.worker_id}
    assert zoo.wrong_rows(job_id) == 0
    results = {result.cursor: result for result in zoo.state.jobs[job_id].results}
    corrected = {result.corrects for result in results.values()} - {0}
    assert corrected and all(results[cursor].worker_id == cheat.worker_id for cursor in corrected)
    tally = zoo.state.jobs[job_id].checks
    assert tally is not None and tally.rows_wrong > 0 and tally.rows_withdrawn > 0


def test_one_who_cheated_gets_no_more_work_that_is_checked_until_it_begins_anew() -> None:
    zoo = fleet()
    cheat = zoo.volunteer(junk)
    zoo.submit(200)
    zoo.run()
    zoo.submit(100)
    why = explain_worker(zoo.state, cheat.worker_id, zoo.now_ms)
    assert why is not None and why.reasons[0].code == "distrusted" and "proven wrong" in why.reasons[0].words
    zoo.run()
    caught_at = max(i for i, (_, event) in enumerate(zoo.events) if isinstance(event, v.WorkerDistrusted))
    granted = [event for _, event in zoo.events[caught_at:] if isinstance(event, e.LeaseGranted)]
    assert granted and all(event.worker_id != cheat.worker_id for event in granted)
    plain = zoo.submit(100, "")
    zoo.run()
    assert cheat.worker_id in {result.worker_id for result in zoo.state.jobs[plain].results}
    zoo.tell(c.ReleaseWorker(cheat.worker_id))
    assert not zoo.distrusted() and zoo.state.workers[cheat.worker_id].rows_verified == 0


def test_one_who_says_that_rows_fail_is_found_out_and_not_called_a_liar() -> None:
    zoo = fleet(13)
    lazy = zoo.volunteer(withholding)
    job_id = zoo.submit(200, failed_rows_max=0)
    zoo.run(200_000)
    assert not zoo.distrusted()
    delivered = zoo.delivered(job_id)
    by_lazy = {result.cursor for result in zoo.state.jobs[job_id].results if result.worker_id == lazy.worker_id}
    assert by_lazy
    assert sum(value is None for value in delivered.values()) < 200


def test_lying_auditor_is_proven_wrong_and_whom_it_accused_is_not() -> None:
    zoo = fleet(14, volunteers=1)
    worker = next(actor for actor in zoo.actors.values() if actor.behaviour is honest and actor is not zoo.referee)
    auditor = zoo.volunteer(junk)
    job_id = zoo.submit(300, "standard,referee=0.05")
    zoo.run()
    assert zoo.succeeded(job_id)
    assert zoo.distrusted() == {auditor.worker_id}
    assert worker.worker_id not in zoo.distrusted()
    assert zoo.wrong_rows(job_id) == 0


def test_colluders_who_give_the_same_lie_are_caught_by_the_referees_share() -> None:
    zoo = fleet(15, volunteers=0)
    pair = {zoo.volunteer(colluding).worker_id for _ in range(2)}
    zoo.submit(300, "standard")
    zoo.run()
    assert zoo.distrusted() == pair


def test_sleeper_is_caught_and_rows_that_were_checked_themselves_are_kept() -> None:
    zoo = fleet(16)
    sleeper = zoo.volunteer(after(40, junk))
    job_id = zoo.submit(400)
    zoo.run()
    assert zoo.distrusted() == {sleeper.worker_id}
    assert zoo.succeeded(job_id) and zoo.wrong_rows(job_id) == 0


def test_other_machines_within_tolerance_are_upheld() -> None:
    zoo = fleet(17)
    zoo.volunteer(execution_class="gpu")
    job_id = zoo.submit(300)
    zoo.run()
    assert zoo.succeeded(job_id) and not zoo.distrusted()
    assert any(False in event.equal for event in zoo.of_kind(v.AuditCompared))


def unexplained_in_other_classes(zoo: Zoo) -> None:
    """A referee without a profile: what lies far away in another class is no proof."""

    def finding(actor: Actor, position: int, value: Row) -> Finding:
        found = Zoo.finding(zoo, actor, position, value)
        strange = value is not None and value.execution_class != actor.execution_class
        return Finding.UNEXPLAINED if strange and found is Finding.WRONG else found

    zoo.finding = finding  # type: ignore[method-assign]  # as above


def test_nobody_hides_behind_a_class_that_only_he_has() -> None:
    zoo = fleet(31)
    hidden = zoo.volunteer(junk, execution_class="a class of one")
    unexplained_in_other_classes(zoo)
    job_id = zoo.submit(300)
    zoo.run()
    assert zoo.succeeded(job_id) and zoo.wrong_rows(job_id) == 0
    assert not zoo.distrusted(), "nothing is proven"
    assert zoo.state.workers[hidden.worker_id].rows_verified == 0
    done = {result.cursor for result in zoo.state.jobs[job_id].results if result.worker_id == hidden.worker_id}
    assert done and done <= {event.cursor for event in zoo.of_kind(v.RowsCorrected)}
    unexplained = [event for event in zoo.of_kind(v.VerdictReached) if event.verdict is v.Verdict.UNEXPLAINED]
    assert unexplained and {event.worker_id for event in unexplained} == {hidden.worker_id}
    # It is a stranger to this job alone.
    found_at = max(i for i, (_, event) in enumerate(zoo.events) if event is unexplained[0])
    later = [event for _, event in zoo.events[found_at:] if isinstance(event, e.LeaseGranted)]
    assert later and all(event.worker_id != hidden.worker_id for event in later)
    plain = zoo.submit(200, "")
    zoo.run()
    assert hidden.worker_id in {result.worker_id for result in zoo.state.jobs[plain].results}


def test_rows_that_nothing_explains_are_not_paid_for() -> None:
    zoo, actors = market(32, lie=False)
    hidden = zoo.volunteer(junk, execution_class="a class of one", ask=900)
    zoo.measure_all()
    unexplained_in_other_classes(zoo)
    job_id = zoo.submit(200, budget_microcredits=10**8)
    zoo.run()
    assert zoo.succeeded(job_id) and zoo.wrong_rows(job_id) == 0 and not zoo.distrusted()
    assert any(event.worker_id == hidden.worker_id for event in zoo.of_kind(v.PayVoided))
    assert zoo.state.ledger.balance(available(hidden.account_id)) == 0
    earned = sum(zoo.state.ledger.balance(available(actor.account_id)) for actor in actors)
    assert earned == zoo.state.jobs[job_id].microcredits


def test_job_that_only_strangers_could_do_waits_for_others() -> None:
    zoo = fleet(33, volunteers=0)
    hidden = zoo.volunteer(junk, execution_class="a class of one")
    unexplained_in_other_classes(zoo)
    job_id = zoo.submit(100)
    zoo.run()
    assert not zoo.succeeded(job_id)
    assert zoo.state.verifications[job_id].strangers == {hidden.worker_id: "a class of one"}
    assert "further from a referee's than rounding explains" in waiting_reason(zoo.state, job_id)[0]
    zoo.volunteer()
    zoo.volunteer()
    zoo.run()
    assert zoo.succeeded(job_id) and zoo.wrong_rows(job_id) == 0


def test_row_that_a_referee_cannot_explain_is_done_again_a_few_times_and_then_stands() -> None:
    zoo = fleet(18)

    def unexplained(actor: Actor, position: int, value: Row) -> Finding:
        return Finding.UNEXPLAINED if position == 3 else Zoo.finding(zoo, actor, position, value)

    zoo.finding = unexplained  # type: ignore[method-assign]  # a referee that knows no better
    job_id = zoo.submit(40, "standard,referee=1")
    zoo.run()
    assert zoo.succeeded(job_id) and not zoo.distrusted()
    tally = zoo.state.jobs[job_id].checks
    assert tally is not None and (tally.rows_withdrawn, tally.rows_tied) == (3, 1)


def test_row_of_which_nobody_can_tell_is_looked_at_twice_and_then_stands() -> None:
    zoo = fleet(19)
    zoo.finding = lambda actor, position, value: Finding.TIE  # type: ignore[method-assign]
    job_id = zoo.submit(20, "standard,referee=1")
    zoo.run()
    assert zoo.succeeded(job_id)
    tally = zoo.state.jobs[job_id].checks
    assert tally is not None and tally.rows_tied == 20
    assert sum(worker.rows_verified for worker in zoo.state.workers.values()) == 0


def test_report_that_says_nothing_of_a_row_is_refused_and_the_rows_wait_again() -> None:
    zoo = fleet(20)
    job_id = zoo.submit(30)
    assert zoo.referee is not None
    while not zoo.leases_of(zoo.referee):
        zoo.go_on()
    (lease, *_) = zoo.leases_of(zoo.referee)
    zoo.tell(
        c.ReportReferee(
            zoo.referee.session_id, zoo.referee.worker_id, lease.lease_id, lease.fence, digest_of(b""),
            (RowFinding(0, ()),), "cpu", Usage(), digest_of(b""), b"", 1,
        )
    )  # fmt: skip
    assert zoo.of_kind(e.LeaseEnded)[-1].reason.startswith("the report")
    zoo.run()
    assert zoo.succeeded(job_id)


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_lost_audits_are_made_elsewhere() -> None:
    zoo = fleet(21, volunteers=3)
    job_id = zoo.submit(200)

    def holds_an_audit(actor: Actor) -> bool:
        return any(zoo.state.tasks[lease.task_id].checks for lease in zoo.leases_of(actor))

    while not (holders := [one for one in zoo.actors.values() if one is not zoo.referee and holds_an_audit(one)]):
        zoo.go_on()
    gone = holders[0]
    zoo.disconnect(gone)
    zoo.pass_ms(60_000)
    zoo.run()
    assert zoo.succeeded(job_id)


def test_restart_asks_again_for_what_was_to_be_compared() -> None:
    zoo = fleet(22)
    job_id = zoo.submit(60)
    while not any(isinstance(effect, f.CompareRows) for effect in zoo.pending):
        zoo.go_on()
    zoo.pending.clear()
    zoo.tell(c.Restart(epoch=1, down_time_ms=5_000))
    assert any(isinstance(effect, f.CompareRows) for effect in zoo.pending)
    for actor in zoo.actors.values():
        zoo.reconnect(actor, zoo.state.workers[actor.worker_id].capability.task_kinds)
    zoo.run()
    assert zoo.succeeded(job_id)


def test_audit_whose_rows_cannot_be_compared_goes_to_a_referee() -> None:
    zoo = fleet(23)
    job_id = zoo.submit(60)
    while not any(isinstance(effect, f.CompareRows) for effect in zoo.pending):
        zoo.go_on()
    (effect,) = [one for one in zoo.pending if isinstance(one, f.CompareRows)][:1]
    zoo.pending.remove(effect)
    zoo.tell(c.ComparisonFailed(effect.job_id, effect.task_id, "a block is gone"))
    zoo.tell(c.ComparisonFailed(effect.job_id, effect.task_id, "a block is gone"))
    zoo.run()
    assert zoo.succeeded(job_id)
    assert len(zoo.of_kind(v.AuditGivenUp)) == 1


def test_outputs_of_audits_are_kept_as_long_as_they_may_be_needed() -> None:
    zoo = fleet(24)
    zoo.submit(60)
    while not any(isinstance(effect, f.CompareRows) for effect in zoo.pending):
        zoo.go_on()
    (verification,) = zoo.state.verifications.values()
    outputs = frozenset(audit.output.digest for audit in verification.audits.values() if audit.output is not None)
    assert outputs
    assert referenced_blobs(zoo.state, outputs, now_ms=zoo.now_ms, grace_ms=0) == outputs


def test_cancelled_job_ends_its_checks() -> None:
    zoo = fleet(25)
    job_id = zoo.submit(200)
    for _ in range(12):
        zoo.step()
    assert zoo.state.verifications[job_id].evidences
    zoo.tell(c.CancelJob(zoo.operator_id, job_id))
    assert not zoo.state.verifications
    assert {worker.rows_unverified for worker in zoo.state.workers.values()} == {0}
    zoo.run()
    assert not zoo.state.tasks


def test_job_whose_rows_fail_for_everybody_fails_once_that_is_checked() -> None:
    zoo = fleet(26)
    assert zoo.referee is not None
    for actor in zoo.actors.values():
        actor.behaviour = lambda actor, position: None if position < 30 else Value(position, actor.execution_class)
    job_id = zoo.submit(100, failed_rows_max=5)
    zoo.run()
    job = zoo.state.jobs[job_id]
    assert (job.state, job.rows_failed) == (JobState.FAILED, 30)
    assert not zoo.distrusted()


# ------------------------------------------------------------------------------------------------- pay


def market(seed: int, *, lie: bool) -> tuple[Zoo, list[Actor]]:
    zoo = Zoo(seed)
    zoo.begin(mode=PoolMode.MARKET)
    zoo.tell(c.GrantCredits(zoo.operator_id, 10**9, "a start", bytes(16)))
    zoo.referee = zoo.operator_worker(TaskKind.REFEREE)
    actors = [zoo.volunteer(ask=1_000), zoo.volunteer(ask=1_000), zoo.volunteer(junk if lie else honest, ask=900)]
    zoo.measure_all()
    return zoo, actors


def test_pay_is_pending_until_rows_are_verified_and_nobody_can_release_it_before() -> None:
    zoo, actors = market(27, lie=False)
    job_id = zoo.submit(200, budget_microcredits=10**8)
    while not any(zoo.state.ledger.balance(pending(actor.account_id)) for actor in actors):
        zoo.go_on()
    paid = next(actor for actor in actors if zoo.state.ledger.balance(pending(actor.account_id)))
    with pytest.raises(FallowError) as caught:
        zoo.tell(c.ReleaseCredits(paid.account_id, 0, "", b"r" * 16))
    assert caught.value.reason is Reason.INSUFFICIENT_CREDITS
    zoo.run()
    assert zoo.succeeded(job_id)
    assert all(zoo.state.ledger.balance(pending(actor.account_id)) == 0 for actor in actors)
    earned = sum(zoo.state.ledger.balance(available(actor.account_id)) for actor in actors)
    assert earned == zoo.state.jobs[job_id].microcredits > 0


def test_lie_forfeits_what_was_not_released_to_the_job() -> None:
    zoo, actors = market(28, lie=True)
    job_id = zoo.submit(200, budget_microcredits=10**8)
    zoo.run()
    liar = actors[2]
    assert zoo.succeeded(job_id) and zoo.distrusted() == {liar.worker_id}
    assert zoo.of_kind(v.PayVoided)
    assert zoo.state.ledger.balance(available(liar.account_id)) == 0
    earned = sum(zoo.state.ledger.balance(available(actor.account_id)) for actor in actors)
    assert earned == zoo.state.jobs[job_id].microcredits
    assert zoo.state.ledger.balance(available(zoo.operator_id)) == 10**9 - earned


def test_job_out_of_budget_while_it_verifies_pauses_and_goes_on_after_a_top_up() -> None:
    zoo, _ = market(29, lie=False)
    # Rows cost 40 micro-credits each at this ask: enough for all of them and not for their audits.
    job_id = zoo.submit(100, budget_microcredits=5_500)
    zoo.run()
    job = zoo.state.jobs[job_id]
    assert (job.state, job.reason_code) == (JobState.PAUSED, "BUDGET_EXHAUSTED")
    zoo.tell(c.TopUpJob(zoo.operator_id, job_id, 10**6, b"t" * 16))
    zoo.run()
    assert zoo.succeeded(job_id)


def test_job_out_of_budget_for_its_checks_can_be_accepted() -> None:
    zoo, _ = market(35, lie=False)
    job_id = zoo.submit(100, budget_microcredits=5_500)
    zoo.run()
    assert zoo.state.jobs[job_id].state is JobState.PAUSED
    zoo.tell(c.AcceptAssurance(zoo.operator_id, job_id))
    assert zoo.succeeded(job_id)


def test_cancelled_jobs_unverified_pay_waits_for_the_operators_word() -> None:
    zoo, actors = market(30, lie=False)
    job_id = zoo.submit(200, budget_microcredits=10**8)
    while not any(zoo.state.ledger.balance(pending(actor.account_id)) for actor in actors):
        zoo.go_on()
    zoo.tell(c.CancelJob(zoo.operator_id, job_id))
    paid = next(actor for actor in actors if zoo.state.ledger.balance(pending(actor.account_id)))
    zoo.tell(c.ReleaseCredits(paid.account_id, 0, "", b"r" * 16))
    assert zoo.state.ledger.balance(pending(paid.account_id)) == 0


# ------------------------------------------------------------------------------------------------- asking for it


def test_unknown_assurance_is_refused_with_what_is_allowed() -> None:
    zoo = fleet(31)
    for text in ("certain", "standard,error=2", "standard,speed=1", "standard,error", "standard," * 40):
        with pytest.raises(FallowError) as caught:
            zoo.submit(10, text)
        assert caught.value.field == "options.assurance"


def test_quote_tells_what_checks_add_and_less_of_it_for_veterans() -> None:
    newcomer, veteran = Zoo(34), Zoo(34)
    added: list[int] = []
    for zoo, verified in ((newcomer, 0), (veteran, 100_000)):
        zoo.begin()
        worker = zoo.state.workers[zoo.volunteer().worker_id]
        worker.rows_verified = verified
        added.append(expected_checks_permille("standard", [(worker, False)], 10_000))
        assert expected_checks_permille("standard", [(worker, True)], 10_000) == 0
    assert 46 <= added[1] < added[0] <= 1_000


def test_assurance_is_a_level_and_what_differs_from_it() -> None:
    asked = assurance_of("strict,error=0.005, rate=0.25,confidence=0.95,referee=1")
    assert (asked.wrong_rows_ppm_max, asked.audit_rate_ppm_min) == (5_000, 250_000)
    assert (asked.confidence_ppm, asked.referee_share_ppm) == (950_000, 1_000_000)


def test_rows_wait_a_while_for_an_auditor_before_a_referee_checks_them() -> None:
    zoo = fleet(32, volunteers=1)
    zoo.submit(20, "standard,referee=0.000001")
    while not zoo.state.verifications or not next(iter(zoo.state.verifications.values())).audit_due:
        zoo.go_on()
    zoo.pass_ms(AUDIT_PATIENCE_MS // 2)
    assert not zoo.of_kind(v.AuditGivenUp)
    zoo.volunteer()
    zoo.run()
    assert not zoo.of_kind(v.AuditGivenUp) and zoo.of_kind(v.AuditCompared)
