"""Certificates of verified jobs: what the core journals is what they tell; evidence that contradicts itself is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from certificate_world import CertificateWorld
from fallow.certificate import compose
from fallow.certificate_check import Checked, check_certificate
from fallow.errors import FallowError, Reason
from fallow.ids import JobId
from fallow.session import TaskKind
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.events import Event
from simulation.verification import Behaviour, Zoo, honest, junk


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> CertificateWorld:
    return CertificateWorld(tmp_path_factory.mktemp("authority"))


def told(behaviour: Behaviour, *, seed: int = 5, rows: int = 300) -> tuple[Zoo, JobId]:
    """A verified job that one worker of four did by `behaviour`."""
    zoo = Zoo(seed=seed, checks=False)
    zoo.begin()
    zoo.operator_worker(TaskKind.REFEREE)
    for number in range(4):
        zoo.volunteer(behaviour if number == 0 else honest)
    job_id = zoo.submit(rows, "standard")
    zoo.run()
    assert zoo.succeeded(job_id)
    return zoo, job_id


def certificate_of(world: CertificateWorld, job_id: JobId, events: list[tuple[int, Event]]) -> dict[str, Any]:
    return dict(compose(world.evidence(job_id, events), manifest=b"", outputs={}).facts)


def checked(world: CertificateWorld, zoo: Zoo, job_id: JobId) -> tuple[dict[str, Any], Checked]:
    facts = certificate_of(world, job_id, zoo.events)
    return facts, check_certificate(facts, world.fingerprint)


def test_honest_job_tells_its_draws_audits_and_bounds(world: CertificateWorld) -> None:
    zoo, job_id = told(honest)
    facts, found = checked(world, zoo, job_id)
    verification = facts["verification"]
    assert found.rows_checked == sum(sum(audit["equal"]) for audit in verification["audits"]) + len(
        verification["verdicts"]
    )
    assert found.rows_withdrawn == 0
    assert 0 < found.rows_by_referee < found.rows_checked
    assert found.wrong_ppm_max <= found.wrong_ppm_max_of_colluders <= 1_000_000
    assert {one["worker_id"] for one in verification["bounds"]["workers"]} <= set(zoo.actors)
    assert sum(one["rows"] for one in verification["bounds"]["workers"]) == 300


def test_cheater_stands_in_the_certificate_with_the_evidence(world: CertificateWorld) -> None:
    zoo, job_id = told(junk)
    (cheater,) = zoo.distrusted()
    facts, found = checked(world, zoo, job_id)
    verification = facts["verification"]
    assert "proven-wrong" in {verdict["verdict"] for verdict in verification["verdicts"]}
    assert {one["worker_id"] for one in verification["distrusted"]} == {cheater}
    assert found.rows_withdrawn > 0
    assert zoo.wrong_rows(job_id) == 0
    assert facts["job"]["rows_delivered"] == 300


def changed(events: list[tuple[int, Event]], change: Callable[[Event], Event | None]) -> list[tuple[int, Event]]:
    """The same journal with the first event for which `change` gives another."""
    for at, (at_ms, event) in enumerate(events):
        other = change(event)
        if other is not None:
            return [*events[:at], (at_ms, other), *events[at + 1 :]]
    raise AssertionError("there is no such event")


def other_draw(event: Event) -> Event | None:
    if isinstance(event, v.AuditsDrawn) and len(event.drawn) < event.rows and event.drawn:
        free = next(row for row in range(event.rows) if row not in event.drawn)
        return replace(event, drawn=(*event.drawn[1:], free), refereed=())
    return None


def upheld_lie(event: Event) -> Event | None:
    if isinstance(event, v.VerdictReached) and event.verdict is v.Verdict.PROVEN_WRONG:
        return replace(event, verdict=v.Verdict.UPHELD)
    return None


def framed(event: Event) -> Event | None:
    if isinstance(event, v.VerdictReached) and event.verdict is v.Verdict.UPHELD:
        return replace(event, verdict=v.Verdict.PROVEN_WRONG)
    return None


@pytest.mark.parametrize(
    ("change", "place"),
    [(other_draw, "verification.draws"), (upheld_lie, "record "), (framed, "record ")],
)
def test_lying_coordinator_is_told_by_its_own_records(
    world: CertificateWorld, change: Callable[[Event], Event | None], place: str
) -> None:
    """The records are signed as they are: what they contradict is each other."""
    zoo, job_id = told(junk)
    # What is changed is told, not decided upon: the state that follows stays as it was.
    honest_evidence = world.evidence(job_id, zoo.events)
    told_events = changed(zoo.events, change)
    records = [
        replace(record, event=encoded)
        for record, encoded in zip(
            honest_evidence.records, world.encoded(told_events, honest_evidence.records), strict=True
        )
    ]
    evidence = world.resigned(job_id, records, zoo.state)
    with pytest.raises(FallowError) as caught:
        compose(evidence, manifest=b"", outputs={})
    assert caught.value.reason is Reason.EVIDENCE_WRONG
    assert caught.value.field.startswith(place), caught.value.field


def test_undecided_draws_and_audits_of_ones_own_are_told(world: CertificateWorld) -> None:
    zoo, job_id = told(honest)
    evidence = world.evidence(job_id, zoo.events)
    compared = [at for at, (_, event) in enumerate(zoo.events, 1) if isinstance(event, v.AuditCompared)]
    left = [record for record in evidence.records if record.sequence not in compared]
    with pytest.raises(FallowError, match="was drawn and never decided"):
        compose(world.resigned(job_id, left, zoo.state), manifest=b"", outputs={})
    for worker in zoo.state.workers.values():
        worker.account_id = zoo.operator_id
    one_owner = world.resigned(job_id, list(evidence.records), zoo.state)
    facts = compose(one_owner, manifest=b"", outputs={}).facts
    with pytest.raises(FallowError, match="have one owner"):
        check_certificate(facts, world.fingerprint)
