"""A worker in virtual time: works, fails, hangs, lies, crashes, reconnects; remembers as much as a real one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fallow.challenge import OUTPUT_SCHEMA_DIGEST, ChallengeVerdict
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, PartyId, SessionId
from fallow.session import Capability, Cause, HeldLease, NodeRows, RowFailure, TaskKind, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import questions
from fallow_coordinator.core.answers import Answer, CertificateGranted, SessionGranted
from simulation.coordinator_side import Link, Rows, carry
from simulation.core_world import OUTPUT_SCHEMA, report
from simulation.virtual_time import Faults, SimulationError

if TYPE_CHECKING:
    from simulation.run import Simulation

FAILED_ROW = -1
LIES = 0.2
"""How often the answer to a challenge is wrong."""
SessionCommand = Callable[[SessionId], c.Command]


def answer_of(row: int) -> int:
    """What the program makes of a row."""
    return row * 7 + 3


def answer_of_seed(seed: bytes) -> int:
    """What an honest device makes of a challenge."""
    return int.from_bytes(seed[:4], "big") % 1_000_000


def root_of(rows: Rows) -> Digest:
    """Stands for the Merkle root."""
    return Digest(hashlib.sha256(b"root" + repr(rows).encode()).digest())


@dataclass
class Work:
    """One lease in the worker's hands."""

    lease: questions.LeaseToSend
    output: Rows | None = None
    """Set when it is done."""
    taken_at_ms: int = 0
    delivered: bool = False
    """An honest delivery is on its way."""


class SimulatedWorker:
    """One daemon; `life` counts its processes, so that what an older one planned does not happen."""

    def __init__(self, simulation: Simulation, name: str, capability: Capability, window: int) -> None:
        self.simulation = simulation
        self.schedule = simulation.schedule
        self.name = name
        self.capability = capability
        self.window = window
        self.party_id: PartyId | None = None
        self.remembers_token = self.schedule.chance(0.7)
        self.life = 0
        self.alive = True
        self.token: bytes | None = None
        self.tokens_made = 0
        self.link: Link | None = None
        self.held: dict[LeaseId, Work] = {}
        self.attempt = 0
        self.listed: set[LeaseId] = set()
        """What it said it holds when it connected."""

    # ---------------------------------------------------------------------------------------------- coming and going

    def enrolled(self, answer: Answer | FallowError) -> None:
        """The journal knows it: it connects."""
        if isinstance(answer, CertificateGranted):
            self.party_id = answer.party_id
            self.connect()

    def crash(self) -> None:
        """The process is gone, with all that it remembered."""
        self.life += 1
        self.alive = False
        self.held.clear()
        if not self.remembers_token:
            self.token = None
        self._hang_up()
        down_ms_max = self.schedule.dice.choice((2_000, 20_000, 120_000))
        self.schedule.after(self.schedule.between(100, down_ms_max), self._start)

    def _start(self) -> None:
        self.alive = True
        self.connect()

    def _hang_up(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.open = False
            link.life.link_broken(link)

    def connect(self) -> None:
        """Opens a stream to the coordinator that lives now, or tries again later."""
        if not self.alive or self.party_id is None:
            return
        self._hang_up()
        life = self.simulation.coordinator
        if not life.alive:
            self._again()
            return
        self.attempt += 1
        self.tokens_made += 1
        number, link = self.life, Link(life, self._receive, lambda: None)
        link.receive = lambda kind, message: self._receive(kind, message) if self.link is link else None
        link.lost = lambda: self.connect() if self.link is link else None
        self.link = link
        self.listed = set(self.held)
        next_token = f"{self.name}-{self.tokens_made}".encode()
        command = c.OpenSession(
            worker_id=self.party_id,
            resume_token_digest=_token_digest(self.token),
            next_resume_token_digest=Digest(hashlib.sha256(next_token).digest()),
            capability=self.capability,
            window=self.window,
            held_leases=tuple(
                HeldLease(lease_id, work.lease.fence, work.output is not None) for lease_id, work in self.held.items()
            ),
        )
        no_duplicates = Faults(loss=self.simulation.faults.loss, delay_ms_max=self.simulation.faults.delay_ms_max)
        carry(self.schedule, no_duplicates, lambda: life.submit(command, lambda a: self._answered(link, next_token, a)))
        attempt = self.attempt

        def impatient() -> None:
            if self.life == number and self.attempt == attempt and self.link is link and link.session_id is None:
                self.connect()

        self.schedule.after(5_000, impatient)

    def _again(self) -> None:
        life = self.life
        self.schedule.after(self.schedule.between(200, 3_000), lambda: self.connect() if self.life == life else None)

    def _answered(self, link: Link, next_token: bytes, answer: Answer | FallowError) -> None:
        """At the coordinator: the stream gets its session, and the worker its Welcome."""
        life = link.life
        if isinstance(answer, SessionGranted):
            link.session_id = answer.session_id
            if not link.open:
                life.link_broken(link)
                return
            life.links[answer.session_id] = link
            life.send(answer.session_id, "welcome", (next_token, answer))
        elif isinstance(answer, FallowError) and link.open:
            self.simulation.refusals[answer.reason] = self.simulation.refusals.get(answer.reason, 0) + 1
            if answer.reason not in (Reason.KEY_IN_USE, Reason.PARTY_QUARANTINED):
                raise AssertionError(f"an honest worker was refused: {answer}")
            link.open = False
            if self.link is link:
                self.link = None
                self._again()

    # ---------------------------------------------------------------------------------------------- messages

    def _receive(self, kind: str, message: object) -> None:
        match message:
            case (bytes() as token, SessionGranted() as granted):
                self._welcome(token, granted)
            case questions.LeaseToSend():
                self._take(message)
            case questions.UploadToOffer():
                self._upload(message)
            case f.SendSettled() | f.SendRevoked():
                self.held.pop(message.lease_id, None)
            case _:
                raise AssertionError(f"a worker got {kind}")

    def _welcome(self, token: bytes, granted: SessionGranted) -> None:
        self.token = token
        if not set(granted.kept) <= self.listed:
            raise SimulationError("a worker was told to keep a lease that it does not have")
        early = {lease_id for lease_id, work in self.held.items() if work.lease.session_id == granted.session_id}
        for lease_id in list(self.held):
            if lease_id not in granted.kept and lease_id not in early:
                del self.held[lease_id]
        for work in list(self.held.values()):
            if work.output is not None:
                self._commit(work)

    def _take(self, lease: questions.LeaseToSend) -> None:
        if lease.lease_id in self.held:
            return
        work = self.held[lease.lease_id] = Work(lease, taken_at_ms=self.schedule.now_ms)
        life = self.life
        self.schedule.after(
            self.schedule.between(20, 2_500) + self.simulation.sloth.more_ms(lease.kind),
            lambda: self._finish(work) if self.life == life and self.alive else None,
        )

    def _finish(self, work: Work) -> None:
        lease = work.lease
        if self.held.get(lease.lease_id) is not work:
            return
        if self.schedule.chance(self.simulation.faults.task_trouble):
            self._trouble(work)
        elif lease.kind is TaskKind.MAP and self.simulation.host_breaks(self.name):
            self.held.pop(lease.lease_id)
            self._tell(
                lambda s: c.FailTask(s, lease.worker_id, lease.lease_id, lease.fence, Cause.WORKER, "it is a bad host")
            )
        elif lease.kind is TaskKind.INSPECT:
            self._report(work)
        elif lease.kind is TaskKind.CHECK:
            self._check(work)
        elif lease.challenge is not None:
            work.output = (answer_of_seed(lease.challenge.seed) + self.schedule.chance(LIES),)
            self._commit(work)
        else:
            assert lease.input is not None
            live = lease.lease_id in self.simulation.disk.oracle.leases
            if live and lease.input.digest in self.simulation.blobs.dropped:
                raise SimulationError("the input of a live lease was dropped")
            rows = self.simulation.blobs.rows[lease.input.digest]
            work.output = tuple(answer_of(row) for row in rows)
            self._commit(work)

    def _trouble(self, work: Work) -> None:
        lease = work.lease
        kind = self.schedule.between(0, 5)
        if kind == 0:
            return  # hangs for ever
        if kind == 1 and lease.kind is TaskKind.MAP:
            assert lease.input is not None
            rows = [answer_of(row) for row in self.simulation.blobs.rows[lease.input.digest]]
            rows[self.schedule.between(0, len(rows) - 1)] = FAILED_ROW
            work.output = tuple(rows)
            self._commit(work)
            return
        self.held.pop(lease.lease_id)
        cause = Cause.PROGRAM if kind == 2 and self.simulation.program_crashes else Cause.WORKER
        if kind == 3:
            self._tell(
                lambda s: c.ReturnLease(s, lease.worker_id, lease.lease_id, lease.fence, Cause.OWNER_PREEMPT, "back")
            )
        elif kind == 4:
            self._tell(
                lambda s: c.FailTask(s, lease.worker_id, lease.lease_id, lease.fence + 1, cause, "forged fence"),
                must_be_refused=True,
            )
        else:
            self._tell(lambda s: c.FailTask(s, lease.worker_id, lease.lease_id, lease.fence, cause, "it broke"))

    def _report(self, work: Work) -> None:
        lease = work.lease
        found = report(lease.bundle_digest, per_row=self.simulation.unit_micros_per_row, batch=2)
        self._tell(
            lambda s: c.ReportInspection(
                session_id=s,
                worker_id=lease.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                report=found,
                usage=Usage(),
                message_digest=root_of(()),
                signature=b"",
                sequence=1,
            )
        )

    def _check(self, work: Work) -> None:
        lease = work.lease
        assert lease.challenge is not None and lease.input is not None
        holds = self.simulation.blobs.rows[lease.input.digest] == (answer_of_seed(lease.challenge.seed),)
        verdict = ChallengeVerdict(holds, "" if holds else "it is wrong")
        self.simulation.disk.oracle.true_answers[lease.input.digest] = holds
        self._tell(lambda s: c.ReportCheck(s, lease.worker_id, lease.lease_id, lease.fence, verdict))

    def change_device(self) -> None:
        """Its owner puts another processor in."""
        (device,) = self.capability.devices
        model = f"model {self.schedule.between(0, 2)}"
        self.capability = replace(self.capability, devices=(replace(device, model=model),))
        self._tell(lambda s: c.ChangeCapability(s, self.capability, self.window))

    def _stored(self, work: Work) -> c.StoredBlob:
        assert work.output is not None
        return c.StoredBlob(
            blob=self.simulation.blobs.put(work.output),
            rows=len(work.output),
            root=root_of(work.output),
            schema_digest=OUTPUT_SCHEMA if work.lease.kind is TaskKind.MAP else OUTPUT_SCHEMA_DIGEST,
            rows_failed=work.output.count(FAILED_ROW),
        )

    def _commit(self, work: Work) -> None:
        assert work.output is not None
        lease, stored = work.lease, self._stored(work)
        assert stored.root is not None
        root, inline = stored.root, len(work.output) % 2 == 0
        usage = replace(self.simulation.weather.usage(), nodes=_nodes_of(lease, stored.rows))
        failures = tuple(
            RowFailure(row, Cause.ROW, "bad row") for row, value in enumerate(work.output) if value == FAILED_ROW
        )
        self._tell(
            lambda s: c.Commit(
                session_id=s,
                worker_id=lease.worker_id,
                lease_id=lease.lease_id,
                fence=lease.fence,
                output_root=root,
                rows=stored.rows,
                output=stored.blob,
                inline=inline,
                failures=failures,
                usage=usage,
                execution_class=self.simulation.sloth.execution_class(self.name),
                message_digest=root,
                signature=b"",
                sequence=1,
                stored=stored if inline else None,
                elapsed_ms=self.schedule.now_ms - work.taken_at_ms + 1 if s == lease.session_id else 0,
            )
        )

    def _upload(self, offer: questions.UploadToOffer) -> None:
        work = self.held.get(offer.lease_id)
        if work is None or work.output is None:
            return
        stored = self._stored(work)
        if not work.delivered and self.schedule.chance(self.simulation.faults.task_trouble / 2):
            stored = c.StoredBlob(stored.blob, stored.rows, root_of((1,)), stored.schema_digest, (), stored.rows_failed)
            self.simulation.disk.oracle.lied.add(offer.lease_id)
            del self.held[offer.lease_id]
        work.delivered = True
        lease = work.lease
        self._tell(lambda s: c.Deliver(s, lease.worker_id, lease.lease_id, lease.fence, stored))

    def change_window(self) -> None:
        """Its owner gives more or less from now on."""
        self.window = self.schedule.between(0, 4)
        self._tell(lambda s: c.ChangeCapability(s, None, self.window))

    def _tell(self, make: SessionCommand, *, must_be_refused: bool = False) -> None:
        """Says something on the session of the stream that is open now; else it stays unsaid until a reconnect."""
        link = self.link
        if link is None or not link.open or link.session_id is None:
            return
        command = make(link.session_id)
        heard = self._refused if must_be_refused else self._heard
        carry(self.schedule, self.simulation.faults, lambda: link.life.submit(command, heard))

    def _refused(self, answer: Answer | FallowError) -> None:
        if not isinstance(answer, FallowError):
            raise SimulationError("a forged fence was taken")
        self._heard(answer)

    def _heard(self, answer: Answer | FallowError) -> None:
        if isinstance(answer, FallowError):
            refusals = self.simulation.refusals
            refusals[answer.reason] = refusals.get(answer.reason, 0) + 1


def _token_digest(token: bytes | None) -> Digest | None:
    return None if token is None else Digest(hashlib.sha256(token).digest())


def _nodes_of(lease: questions.LeaseToSend, rows: int) -> tuple[NodeRows, ...]:
    """Every third lease was spread over two nodes."""
    return () if lease.fence % 3 or rows < 2 else (NodeRows(1, rows - 1), NodeRows(0, 1))
