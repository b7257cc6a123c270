"""An observer that knows only durable events: judges them by the promises alone, without the core's help."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fallow.ids import Digest, JobId, LeaseId, PartyId, SessionId, TaskId
from fallow.job import JOB_STATES_FINAL, JobOptions, JobState
from fallow.session import Capability, Cause
from fallow_coordinator.core import events as e
from fallow_coordinator.core import evolve_devices
from simulation.virtual_time import SimulationError

IDEMPOTENCY_MS = 24 * 3_600_000
AWAY_MS_MAX = 35_000
"""The longest grace and some ticks."""
TICKS_MS = 5_000
LATE_MS = 120_000
"""How long a lease outlives its job when its rows came from another one."""


@dataclass
class SeenJob:
    """What the journal says of a job."""

    rows: int
    state: JobState = JobState.PENDING
    delivered: dict[int, tuple[Digest | None, int]] = field(default_factory=dict[int, tuple[Digest | None, int]])
    """Position → (output block, row in it); no block for rows given up."""
    cursor: int = 0


@dataclass
class SeenLease:
    """What the journal says of a live lease."""

    task_id: TaskId
    worker_id: PartyId
    session_id: SessionId
    deadline_ms: int
    output: Digest | None = None


@dataclass
class SeenChallenge:
    """What the journal says of a challenge."""

    worker_id: PartyId
    model: str
    answered: bool = False


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise SimulationError(what)


@dataclass
class Oracle:
    """Folds durable records; raises SimulationError at the first broken promise."""

    ticks: bool = False
    """Whether the clock ticks every second, so that nothing falls due unseen for long."""
    at_ms: int = 0
    sequence: int = 0
    jobs: dict[JobId, SeenJob] = field(default_factory=dict[JobId, SeenJob])
    spans: dict[TaskId, tuple[JobId | None, tuple[tuple[int, int], ...]]] = field(
        default_factory=dict[TaskId, tuple[JobId | None, tuple[tuple[int, int], ...]]]
    )
    fences: dict[TaskId, int] = field(default_factory=dict[TaskId, int])
    packs: dict[TaskId, int] = field(default_factory=dict[TaskId, int])
    packed: dict[TaskId, int] = field(default_factory=dict[TaskId, int])
    over: set[TaskId] = field(default_factory=set[TaskId])
    leases: dict[LeaseId, SeenLease] = field(default_factory=dict[LeaseId, SeenLease])
    settled: set[LeaseId] = field(default_factory=set[LeaseId])
    sessions: dict[SessionId, PartyId] = field(default_factory=dict[SessionId, PartyId])
    windows: dict[PartyId, int] = field(default_factory=dict[PartyId, int])
    keys: dict[tuple[str, bytes], int] = field(default_factory=dict[tuple[str, bytes], int])
    cut: dict[JobId, int] = field(default_factory=dict[JobId, int])
    ended_at: dict[JobId, int] = field(default_factory=dict[JobId, int])
    """Sequence of each job's end."""
    ended_at_ms: dict[JobId, int] = field(default_factory=dict[JobId, int])
    dead_sessions: set[SessionId] = field(default_factory=set[SessionId])
    """Sessions of coordinators that are no more."""
    away_since_ms: dict[PartyId, int] = field(default_factory=dict[PartyId, int])
    capabilities: dict[PartyId, Capability] = field(default_factory=dict[PartyId, Capability])
    wishes: dict[JobId, JobOptions] = field(default_factory=dict[JobId, JobOptions])
    resting: dict[PartyId, int] = field(default_factory=dict[PartyId, int])
    """Workers that get nothing for now, and until when."""
    blamed: set[PartyId] = field(default_factory=set[PartyId])
    """Workers of which a lease just ended by their own fault."""
    restarted_at_ms: int = 0
    granted_at_ms: dict[LeaseId, int] = field(default_factory=dict[LeaseId, int])
    models: dict[PartyId, str] = field(default_factory=dict[PartyId, str])
    """Of each worker's device, as it was last told."""
    challenges: dict[TaskId, SeenChallenge] = field(default_factory=dict[TaskId, SeenChallenge])
    certified: dict[PartyId, str] = field(default_factory=dict[PartyId, str])
    """Model for which a worker holds a certificate, or half of one."""
    measured: int = 0
    """Certificates, and halves of them."""
    true_answers: dict[Digest, bool] = field(default_factory=dict[Digest, bool])
    """Answers that were looked at, and whether they hold."""
    lied: set[LeaseId] = field(default_factory=set[LeaseId])
    """Leases whose worker delivered something else than it had committed to."""
    doubled: int = 0
    """Second leases that were granted."""
    classes: dict[LeaseId, str] = field(default_factory=dict[LeaseId, str])
    """Execution class of each commitment."""
    answered: dict[TaskId, tuple[LeaseId, Digest | None]] = field(
        default_factory=dict[TaskId, tuple[LeaseId, Digest | None]]
    )
    """Who delivered a task, and what."""
    agreements: Counter[e.Agreement] = field(default_factory=Counter[e.Agreement])

    def new_life(self) -> None:
        """A fresh coordinator starts: the streams of the old one are gone."""
        self.dead_sessions.update(self.sessions)

    def see(self, at_ms: int, event: e.Event) -> None:  # noqa: C901 one arm for each event
        """The next durable record."""
        _must(at_ms >= self.at_ms, "the journal's clock went back")
        self.at_ms = at_ms
        self.sequence += 1
        if self.ticks and not isinstance(event, e.Restarted | e.LeaseEnded):
            self._check_graces(at_ms)
            self._check_rests(at_ms)
        match event:
            case e.JobSubmitted():
                key = (event.account_id, event.idempotency_key)
                last = self.keys.get(key)
                _must(last is None or at_ms - last >= IDEMPOTENCY_MS, "one idempotency key made two jobs")
                self.keys[key] = at_ms
                self.jobs[event.job_id] = SeenJob(event.rows)
                self.wishes[event.job_id] = event.options
                self.cut[event.job_id] = 0
            case e.JobStateChanged():
                self._move(event)
            case e.TaskCreated():
                self._create(event)
            case e.PackRequested():
                _must(event.pack_number == self.packs.get(event.task_id, 0) + 1, "packings are not counted one by one")
                self.packs[event.task_id] = event.pack_number
            case e.TaskInputPacked():
                _must(event.pack_number == self.packs[event.task_id], "an old packing was taken")
                _must(self.packed.get(event.task_id, 0) < event.pack_number, "one packing was taken twice")
                self.packed[event.task_id] = event.pack_number
            case e.SessionOpened():
                _must(event.worker_id not in self.sessions.values(), "a worker has two sessions")
                self.sessions[event.session_id] = event.worker_id
                self.windows[event.worker_id] = event.window
                self.capabilities[event.worker_id] = event.capability
                self._devices(event.worker_id, event.capability)
                self.away_since_ms.pop(event.worker_id, None)
                for lease_id in event.kept:
                    self.leases[lease_id].session_id = event.session_id
            case e.SessionClosed():
                self.away_since_ms[self.sessions.pop(event.session_id)] = at_ms
            case e.CapabilityReported():
                self.windows[self.sessions[event.session_id]] = event.window
                if event.capability is not None:
                    self.capabilities[self.sessions[event.session_id]] = event.capability
                    self._devices(self.sessions[event.session_id], event.capability)
            case e.WorkerStruck():
                _must(event.worker_id in self.blamed, "a worker was blamed for what is not its fault")
                self.blamed.discard(event.worker_id)
                self.resting.pop(event.worker_id, None)
                if event.cool_ms:
                    self.resting[event.worker_id] = at_ms + event.cool_ms
            case e.WorkerWarmed():
                _must(event.worker_id in self.resting, "who does not rest came back")
                del self.resting[event.worker_id]
            case e.Restarted():
                self.away_since_ms = dict.fromkeys([*self.sessions.values(), *self.away_since_ms], at_ms)
                self.sessions.clear()
                self.restarted_at_ms = at_ms
                for lease in self.leases.values():
                    lease.deadline_ms += event.down_time_ms
            case e.LeaseGranted():
                self._grant(event)
                self.granted_at_ms[event.lease_id] = at_ms
            case e.LeaseEnded():
                self._end(event, at_ms)
            case e.CommitmentRecorded():
                _must(event.lease_id in self.leases, "a lease that is over committed")
                _must(self.leases[event.lease_id].output is None, "a lease committed twice")
                self.leases[event.lease_id].output = event.output.digest
                self.classes[event.lease_id] = event.execution_class
            case e.TaskSettled():
                self._settle(event)
            case e.LateLeaseSettled():
                self._settle_late(event)
            case e.TaskAbandoned():
                _must(not event.reason.startswith("lost "), "a task was lost so often that it was given up")
                self._finish_task(event.task_id)
                job_id, spans = self.spans[event.task_id]
                if job_id is not None:
                    self._deliver(job_id, spans, event.cursor, None)
            case e.TaskDropped():
                self._finish_task(event.task_id)
            case (
                e.ChallengeIssued()
                | e.ChallengeAnswered()
                | e.DeviceMeasured()
                | e.DeviceCertificateEnded()
                | e.ChallengeEnded()
            ):
                self._measure(event)
            case _:
                pass

    def _devices(self, worker_id: PartyId, capability: Capability) -> None:
        if not capability.devices:
            return
        self.models[worker_id] = capability.devices[0].model
        held = self.certified.get(worker_id)
        _must(held is None or held == self.models[worker_id], "a certificate outlived its device")

    def _measure(self, event: evolve_devices.DeviceEvent) -> None:
        match event:
            case e.ChallengeIssued():
                worker_id = event.worker_id
                _must(all(c.worker_id != worker_id for c in self.challenges.values()), "a device has two challenges")
                self.challenges[event.task_id] = SeenChallenge(worker_id, self.models[worker_id])
            case e.ChallengeAnswered():
                self.challenges[event.task_id].answered = True
            case e.DeviceMeasured():
                seen = self.challenges.pop(event.task_id)
                _must(seen.answered and event.task_id in self.over, "a certificate without an answer in time")
                _must(event.check_lease_id in self.settled, "a certificate without a check")
                _must(self.true_answers[event.answer], "a wrong answer was certified")
                _must(seen.worker_id == event.worker_id, "a certificate for another worker's answer")
                _must(seen.model == self.models[event.worker_id], "a certificate for a device that is gone")
                self.certified[event.worker_id] = seen.model
                self.measured += 1
            case e.DeviceCertificateEnded():
                del self.certified[event.worker_id]
            case e.ChallengeEnded():
                del self.challenges[event.task_id]

    def _check_graces(self, at_ms: int) -> None:
        long_gone = {worker_id for worker_id, since in self.away_since_ms.items() if at_ms - since > AWAY_MS_MAX}
        if long_gone:
            outlived = any(lease.worker_id in long_gone for lease in self.leases.values())
            _must(not outlived, "a lease outlived its worker's grace")

    def _check_rests(self, at_ms: int) -> None:
        if at_ms - self.restarted_at_ms > TICKS_MS:
            late = any(at_ms - until_ms > TICKS_MS for until_ms in self.resting.values())
            _must(not late, "a host rests longer than it should")

    def _move(self, event: e.JobStateChanged) -> None:
        job = self.jobs[event.job_id]
        _must(job.state not in JOB_STATES_FINAL, "a finished job moved")
        job.state = event.state
        if event.state in JOB_STATES_FINAL:
            self.ended_at[event.job_id] = self.sequence
            self.ended_at_ms[event.job_id] = self.at_ms
            for lease in self.leases.values():
                if lease.task_id in self.answered and self.spans[lease.task_id][0] == event.job_id:
                    lease.deadline_ms = min(lease.deadline_ms, self.at_ms + LATE_MS)
        if event.state is JobState.SUCCEEDED:
            _must(len(job.delivered) == job.rows, "a job succeeded without all of its rows")

    def _create(self, event: e.TaskCreated) -> None:
        self.spans[event.task_id] = (event.job_id, event.spans)
        if event.job_id is not None:
            for start, end in event.spans:
                _must(start == self.cut[event.job_id] < end, "rows were cut twice or passed over")
                self.cut[event.job_id] = end

    def _check_fit(self, event: e.LeaseGranted) -> None:
        """By the job's words and the worker's alone."""
        _must(event.worker_id not in self.resting, "a resting worker was given a lease")
        job_id, _ = self.spans[event.task_id]
        if job_id is None:
            return
        wishes, able = self.wishes[job_id], self.capabilities[event.worker_id]
        region = not wishes.region or (able.region + "-").startswith(wishes.region + "-")
        _must(region, "a lease left its job's region")
        kinds = {device.kind.value for device in able.devices}
        _must(not wishes.device_kind or wishes.device_kind in kinds, "a lease went to another kind of device")

    def _grant(self, event: e.LeaseGranted) -> None:
        self._check_fit(event)
        _must(event.task_id not in self.over, "a task that is over was leased")
        self.doubled += event.duplicate
        _must(event.fence > self.fences.get(event.task_id, 0), "a fence did not grow")
        _must(self.sessions.get(event.session_id) == event.worker_id, "a lease went to a closed session")
        _must(event.session_id not in self.dead_sessions, "a lease went to a stream of a coordinator that is no more")
        job_id, _ = self.spans[event.task_id]
        if job_id is not None:
            packed = self.packed.get(event.task_id, 0)
            _must(packed > 0 and packed == self.packs[event.task_id], "a lease carries no fresh packing")
        self.fences[event.task_id] = event.fence
        live = [lease for lease in self.leases.values() if lease.task_id == event.task_id]
        _must(len(live) == event.duplicate, "two live leases of one task that are not told so, or three")
        _must(all(lease.worker_id != event.worker_id for lease in live), "a worker was given its own task again")
        self.leases[event.lease_id] = SeenLease(event.task_id, event.worker_id, event.session_id, event.deadline_ms)
        held = sum(lease.worker_id == event.worker_id for lease in self.leases.values())
        _must(held <= self.windows[event.worker_id], "a worker holds more leases than its window")

    def _end(self, event: e.LeaseEnded, at_ms: int) -> None:
        lease = self.leases.pop(event.lease_id, None)
        _must(lease is not None, "a lease ended twice")
        ours = self.granted_at_ms.get(event.lease_id, 0) < self.restarted_at_ms
        if lease is not None and event.cause is Cause.WORKER and not ours:
            self.blamed.add(lease.worker_id)
        if lease is not None and event.outcome is e.LeaseOutcome.EXPIRED:
            _must(at_ms >= lease.deadline_ms, "a lease expired before its deadline")
        if lease is not None:
            self._check_lateness(lease.task_id)

    def _check_lateness(self, task_id: TaskId) -> None:
        """Nobody is kept busy for long with rows that a finished job has."""
        ended_at_ms = self.ended_at_ms.get(self.spans[task_id][0] or JobId(""), self.at_ms)
        undisturbed = self.restarted_at_ms < ended_at_ms
        _must(
            not (self.ticks and undisturbed) or self.at_ms - ended_at_ms <= LATE_MS + TICKS_MS,
            "a lease outlived its job for long",
        )

    def _settle(self, event: e.TaskSettled) -> None:
        self._finish_task(event.task_id)
        lease = self.leases.pop(event.lease_id, None)
        _must(lease is not None and lease.task_id == event.task_id, "a lease that is over settled")
        assert lease is not None
        _must(event.lease_id not in self.lied, "a delivery settled that is not what was committed")
        self.settled.add(event.lease_id)
        job_id, spans = self.spans[event.task_id]
        if job_id is not None:
            _must(lease.output is not None, "a lease settled without commitment")
            self.answered[event.task_id] = (event.lease_id, lease.output)
            self._deliver(job_id, spans, event.cursor, lease.output)

    def _settle_late(self, event: e.LateLeaseSettled) -> None:
        lease = self.leases.pop(event.lease_id, None)
        _must(lease is not None and lease.task_id == event.task_id, "a lease that is over settled late")
        assert lease is not None
        _must(lease.output is not None, "a lease settled late without commitment")
        self.settled.add(event.lease_id)
        _must(event.task_id in self.answered, "a lease settled late whose task nobody delivered")
        delivered_by, output = self.answered[event.task_id]
        _must(event.delivered_lease_id == delivered_by != event.lease_id, "a late lease names another delivery")
        if self.classes[delivered_by] != self.classes[event.lease_id]:
            expected = e.Agreement.INCOMPARABLE
        else:
            expected = e.Agreement.SAME if output == lease.output else e.Agreement.DIFFERENT
        _must(event.agreement is expected, "a late commitment was compared wrongly")
        self._check_lateness(event.task_id)
        self.agreements[event.agreement] += 1

    def late_out(self) -> bool:
        """Whether a lease is out whose rows another one has delivered."""
        return any(lease.task_id in self.answered for lease in self.leases.values())

    def _finish_task(self, task_id: TaskId) -> None:
        _must(task_id not in self.over, "a task was done twice")
        self.over.add(task_id)

    def _deliver(self, job_id: JobId, spans: tuple[tuple[int, int], ...], cursor: int, output: Digest | None) -> None:
        job = self.jobs[job_id]
        _must(job.state not in JOB_STATES_FINAL, "rows were delivered to a finished job")
        job.cursor += 1
        _must(cursor == job.cursor, "results are not counted one by one")
        row = 0
        for start, end in spans:
            for position in range(start, end):
                _must(position not in job.delivered, "a row was delivered twice")
                job.delivered[position] = (output, row)
                row += 1
