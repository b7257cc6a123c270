"""One seeded run: a coordinator, workers, clients, faults; then quiet; then everything must have ended well.

Reproduce a seed by hand: `PYTHONPATH=tests .venv/bin/python -m simulation.run SEED`.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, JobId, PartyId
from fallow.job import JOB_STATES_FINAL, DatasetBlock, JobOptions, JobState, Objective, TaskResult
from fallow.roles import DataClass, Role, Tier
from fallow.session import BlobReference, EnergySource, TaskKind, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import evolve as evolving
from fallow_coordinator.core import questions
from fallow_coordinator.core.answers import Answer, CertificateGranted, JobAccepted, TokenMade
from fallow_coordinator.core.events import RegionForecast
from fallow_coordinator.core.state import State
from fallow_coordinator.store.snapshots import encode_state
from simulation.coordinator_side import Blobs, CoordinatorLife, Disk, EngineBugs, Rows, carry
from simulation.core_world import INPUT_SCHEMA, OUTPUT_SCHEMA, capability, digest, fingerprint
from simulation.virtual_time import Faults, Schedule, SimulationError
from simulation.worker_side import FAILED_ROW, SimulatedWorker, answer_of

WALL_MS = 1_700_000_000_000
FAULTS_END_MS = 40_000
QUIET_MS_MAX = 1_800_000
"""After faults stop, everything ends within half an hour: the longest lease and its retries."""
CERTIFICATE_MS = 30 * 86_400_000

AnswerHeard = Callable[[Answer | FallowError], None]


@dataclass
class Client:
    """Somebody with one job: submits until it is acknowledged, then looks at it now and then."""

    number: int
    rows: Rows
    blocks: int
    inline: bool
    cancels: bool
    options: JobOptions
    job_id: JobId | None = None
    acknowledged: bool = False
    seen: list[TaskResult] = field(default_factory=list[TaskResult])
    state: JobState | None = None
    reason_code: str = ""


class Weather:
    """Electricity of one seed, with dice of its own: forecasts that change, jobs that may wait, energy claimed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(f"weather {seed}")
        self.forecasts = self._dice.random() < 0.4

    def region(self) -> str:
        """Where a worker stands."""
        return self._dice.choice(("", "north", "south"))

    def changes(self) -> bool:
        """Whether a new forecast comes in this second."""
        return self.forecasts and self._dice.random() < 0.1

    def objective(self, client: int) -> Objective:
        """What a client asks for: always the same, however often it submits."""
        return Objective.CARBON if self.forecasts and client % 3 != 2 else Objective.COST

    def forecast(self, now_ms: int) -> c.RecordForecasts:
        """Dirty or clean hours, as they fall."""
        return self._told(now_ms, lambda: self._dice.choice((50, 300, 900)))

    def fair(self, now_ms: int) -> c.RecordForecasts:
        """Every hour is like every other: nobody has anything to wait for."""
        return self._told(now_ms, lambda: 100)

    def usage(self) -> Usage:
        """What a worker says of a task, seldom absurd."""
        joules = self._dice.choice((0.0, 0.5, 20.0, 1e9, math.nan, -1.0))
        return Usage(energy_joules=joules, energy_source=self._dice.choice((None, *EnergySource)))

    def _told(self, now_ms: int, grams: Callable[[], int]) -> c.RecordForecasts:
        told = tuple(RegionForecast(region, tuple(grams() for _ in range(8))) for region in ("north", "south", ""))
        return c.RecordForecasts(now_ms - now_ms % 3_600_000, told, "dice")


class Sloth:
    """Who is slow in one seed, with dice of its own: tasks that take far too long, machines of two kinds, bad hosts."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(f"sloth {seed}")
        self._often = self._dice.choice((0.0, 0.3, 0.6))
        self._kinds = self._dice.random() < 0.3
        self._broken = "worker-1" if self._dice.random() < 0.15 else ""

    def breaks(self, worker: str) -> bool:
        """Whether a task fails by the fault of this host, which is a bad one."""
        return worker == self._broken and self._dice.random() < 0.9

    def more_ms(self, kind: TaskKind) -> int:
        """How much longer a task takes."""
        if kind is not TaskKind.MAP or self._dice.random() >= self._often:
            return 0
        return self._dice.choice((8_000, 20_000, 45_000, 200_000))

    def execution_class(self, worker: str) -> str:
        """What a worker says of its numerics."""
        return f"test {sum(worker.encode()) % 2}" if self._kinds else "test"


class Simulation:
    """The world of one seed."""

    def __init__(self, seed: int, bugs: EngineBugs | None = None, *, measures: bool = False) -> None:
        self.seed = seed
        self.measures = measures
        """Devices are challenged, now and then lie, and now and then change."""
        self.schedule = Schedule(seed)
        dice = self.schedule.dice
        self.bugs = bugs or EngineBugs()
        self.disk = Disk()
        self.blobs = Blobs()
        self.wall_error_ms = 0
        self.refusals: dict[Reason, int] = {}
        self.faults = Faults(
            loss=dice.choice((0.0, 0.02, 0.1)),
            duplication=dice.choice((0.0, 0.1, 0.4)),
            delay_ms_max=dice.choice((5, 100, 2_000)),
            worker_crash=dice.choice((0.0, 0.02, 0.08)),
            coordinator_crash=dice.choice((0.0, 0.03, 0.1)),
            link_break=dice.choice((0.0, 0.05)),
            task_trouble=dice.choice((0.0, 0.1, 0.3)),
            pack_trouble=dice.choice((0.0, 0.2)),
        )
        self.program_crashes = dice.random() < 0.1
        self.weather = Weather(seed)
        self.sloth = Sloth(seed)
        self.unit_micros_per_row = dice.choice((20_000, 100_000, 400_000))
        self.clients = [self._client(number) for number in range(dice.randint(1, 3))]
        self.coordinator = self._new_life()
        kinds = (TaskKind.MAP, TaskKind.CHALLENGE) if measures else ()
        checks = (TaskKind.CHECK,) if measures else ()
        self.workers = [
            SimulatedWorker(
                self,
                f"worker-{n}",
                # Each region has one, so that whatever is asked for is there.
                replace(
                    capability(*kinds, slots=dice.randint(1, 2)),
                    region=(self.weather.region(), *("north", "south")[n : n + 1])[-1],
                ),
                dice.randint(1, 4),
            )
            for n in range(dice.randint(2, 4))
        ]
        self.inspector = SimulatedWorker(self, "inspector", capability(TaskKind.INSPECT, *checks), 1)
        self.client_party = digest("no party")
        self.file = BlobReference(digest("file"), 10)
        self.bundle_digest = digest("bundle")
        self._set_up()

    def _client(self, number: int) -> Client:
        dice = self.schedule.dice
        count = dice.randint(1, 60)
        rows = tuple(dice.randrange(1_000_000) for _ in range(count))
        own = random.Random(f"wishes {self.seed} {number}")
        wishes = JobOptions(
            failed_rows_max=len(rows),
            priority=own.randint(0, 9),
            # Where much fails, a region of one worker may use up a task's attempts.
            region=own.choice(("", "", "north", "south")) if self.faults.task_trouble < 0.3 else "",
            device_kind=own.choice(("", "", "cpu")),
            deadline_ms=WALL_MS + 3_600_000 if own.random() < 0.2 else 0,
        )
        return Client(number, rows, min(count, dice.randint(1, 4)), dice.random() < 0.5, dice.random() < 0.1, wishes)

    def _new_life(self) -> CoordinatorLife:
        wall_ms = WALL_MS + self.schedule.now_ms + self.wall_error_ms
        life = CoordinatorLife(self.schedule, self.disk, self.blobs, lambda: self.faults, self.bugs, wall_ms)
        if self.measures:
            life.measuring = c.MeasuringRules(idle_ms=2_000)
        return life

    # ---------------------------------------------------------------------------------------------- what goes on

    def _set_up(self) -> None:
        """People, workers and the bundle, before any fault."""
        life = self.coordinator
        life.submit(
            c.EnrollLocal(fingerprint("client"), b"client", "client", Role.CLIENT, None, CERTIFICATE_MS), self._enrolled
        )
        life.submit(
            c.EnrollLocal(fingerprint("i"), b"i", "inspector", Role.WORKER, Tier.OPERATOR, CERTIFICATE_MS),
            self.inspector.enrolled,
        )
        life.submit(
            c.IssueToken(digest("secret"), None, Role.WORKER, None, None, len(self.workers), 3_600_000), self._token
        )
        self.schedule.after(1_000, self._second)

    def _token(self, answer: Answer | FallowError) -> None:
        assert isinstance(answer, TokenMade)
        for worker in self.workers:
            name = worker.name
            command = c.Enroll(answer.token_id, fingerprint(name), name.encode(), name, CERTIFICATE_MS)
            self.coordinator.submit(command, worker.enrolled)
        extra = c.Enroll(answer.token_id, fingerprint("extra"), b"extra", "one too many", CERTIFICATE_MS)
        self.coordinator.submit(extra, self._one_too_many)

    def _one_too_many(self, answer: Answer | FallowError) -> None:
        if not isinstance(answer, FallowError):
            raise SimulationError("a token let in more than it says")

    def _enrolled(self, answer: Answer | FallowError) -> None:
        assert isinstance(answer, CertificateGranted)
        self.account_id, self.client_id = answer.account_id, answer.party_id
        life = self.coordinator
        life.submit(c.RecordBlobs(self.account_id, (c.StoredBlob(self.file),)), _ignore)
        if self.weather.forecasts:
            life.submit(self.weather.forecast(life.now_ms), _ignore)
        life.submit(
            c.RegisterBundle(
                account_id=self.account_id,
                party_id=self.client_id,
                bundle_digest=self.bundle_digest,
                files=(self.file,),
                input_schema_digest=INPUT_SCHEMA,
                output_schema_digest=OUTPUT_SCHEMA,
                size_feature_count=0,
                bytes_feature_index=-1,
            ),
            self._registered,
        )

    def _registered(self, answer: Answer | FallowError) -> None:
        assert not isinstance(answer, FallowError), answer
        for client in self.clients:
            self.schedule.after(self.schedule.between(0, 15_000), lambda client=client: self._submit(client))  # type: ignore[misc]

    def _second(self) -> None:
        """Each second, while faults last, somebody may have bad luck."""
        if self.schedule.now_ms >= FAULTS_END_MS:
            self._calm()
            return
        chance = self.schedule.chance
        if chance(0.1):
            self.coordinator.read(self._compare)
        if self.weather.changes():
            self.coordinator.submit(self.weather.forecast(self.coordinator.now_ms), _ignore)
        for worker in (*self.workers, self.inspector):
            if worker.alive and chance(self.faults.worker_crash):
                worker.crash()
            elif worker.link is not None and worker.link.open and chance(self.faults.link_break):
                worker.connect()
            elif chance(self.faults.worker_crash / 2):
                worker.change_window()
            elif worker.party_id is not None and chance(self.faults.worker_crash / 4):
                self._quarantine(worker.party_id)
            elif self.measures and chance(0.02):
                worker.change_device()
        if self.coordinator.alive and self.disk.records and chance(self.faults.coordinator_crash):
            self.coordinator.crash(synced=chance(0.5))
            self.wall_error_ms += self.schedule.dice.choice((0, 0, -300_000, 300_000))
            self.schedule.after(self.schedule.between(100, 8_000), self._restart)
        self.schedule.after(1_000, self._second)

    def host_breaks(self, worker: str) -> bool:
        """Whether a task fails now by its host's own fault."""
        return self.schedule.now_ms < FAULTS_END_MS and self.sloth.breaks(worker)

    def _quarantine(self, worker_id: PartyId) -> None:
        self.coordinator.submit(c.QuarantineWorker(worker_id, "odd"), _ignore)

    def _calm(self) -> None:
        """Faults are over: everybody is let in and takes work again, as soon as the coordinator is up."""
        self.faults = Faults()
        if not self.coordinator.alive:
            self.schedule.after(500, self._calm)
            return
        if self.weather.forecasts:
            self.coordinator.submit(self.weather.fair(self.coordinator.now_ms), _ignore)
        for worker in (*self.workers, self.inspector):
            if worker.party_id is not None:
                self.coordinator.submit(c.ReleaseWorker(worker.party_id), _ignore)
            if not worker.window:
                worker.window = 1
                worker.connect()

    def _restart(self) -> None:
        self.coordinator = self._new_life()
        self.coordinator.read(self._promises_kept)

    def _promises_kept(self, state: State) -> None:
        """What was acknowledged is still there after a restart."""
        for client in self.clients:
            if client.job_id is not None and client.job_id not in self.disk.oracle.jobs:
                raise SimulationError("an acknowledged job is gone")
            if client.job_id in state.jobs:
                results = questions.results_after(state, client.job_id, 0, len(client.seen))
                if list(results) != client.seen:
                    raise SimulationError("results that a client has seen are gone or changed")

    # ---------------------------------------------------------------------------------------------- clients

    def _submit(self, client: Client) -> None:
        if client.acknowledged and not self.schedule.chance(0.5):
            return
        life = self.coordinator
        self.schedule.after(self.schedule.between(500, 4_000), lambda: self._submit(client))
        if not life.alive:
            return
        count = client.blocks
        cuts = [len(client.rows) * n // count for n in range(count + 1)]
        refs = [self.blobs.put(client.rows[a:b]) for a, b in pairwise(cuts)]
        blocks = tuple(DatasetBlock(ref, b - a, client.inline) for ref, a, b in zip(refs, cuts, cuts[1:], strict=False))
        facts = tuple(
            c.StoredBlob(block.blob, block.rows, digest("root", block.blob.digest), INPUT_SCHEMA) for block in blocks
        )
        if not client.inline:
            life.submit(c.RecordBlobs(self.account_id, facts), _ignore)
        command = c.SubmitMapJob(
            account_id=self.account_id,
            party_id=self.client_id,
            idempotency_key=digest("key", client.number)[:16],
            request_digest=digest("request", client.number),
            bundle_digest=self.bundle_digest,
            blocks=blocks,
            inline_blocks=facts if client.inline else (),
            data_class=DataClass.PUBLIC,
            pool_id=None,
            title="",
            options=self._options(client),
            kept=None,
        )
        heard = self._accepted(client)
        # The answer travels too: a lost one makes the client ask again with the same key.
        carry(
            self.schedule,
            self.faults,
            lambda: life.submit(command, lambda a: carry(self.schedule, self.faults, lambda: heard(a))),
        )

    def _options(self, client: Client) -> JobOptions:
        return replace(client.options, objective=self.weather.objective(client.number))

    def _accepted(self, client: Client) -> AnswerHeard:
        def heard(answer: Answer | FallowError) -> None:
            if isinstance(answer, FallowError):
                if answer.reason is Reason.INSUFFICIENT_CREDITS:
                    return  # asked again later
                if answer.reason not in (Reason.PROGRAM_HELD, Reason.BUNDLE_INVALID, Reason.PROGRAM_REFUSED):
                    raise SimulationError(f"an honest submission was refused: {answer}")
                client.acknowledged, client.state = True, JobState.FAILED
                return
            assert isinstance(answer, JobAccepted)
            if client.job_id is not None and client.job_id != answer.job_id:
                raise SimulationError("one idempotency key gave two jobs")
            if answer.job_id not in self.disk.oracle.jobs:
                raise SimulationError("a job was acknowledged before it was durable")
            if not client.acknowledged:
                client.acknowledged, client.job_id = True, answer.job_id
                self._watch(client)

        return heard

    def _watch(self, client: Client) -> None:
        life = self.coordinator
        if client.state in JOB_STATES_FINAL:
            return
        if client.cancels and client.job_id is not None and self.schedule.chance(0.2):
            life.submit(c.CancelJob(self.account_id, client.job_id), _ignore)
        life.read(lambda state: self._look(client, state))
        self.schedule.after(self.schedule.between(500, 3_000), lambda: self._watch(client))

    def _look(self, client: Client, state: State) -> None:
        assert client.job_id is not None
        status = questions.job_status(state, client.job_id)
        if status is None:
            # Archived: the views have it; here that is the oracle's word.
            client.state = self.disk.oracle.jobs[client.job_id].state
            return
        client.seen.extend(questions.results_after(state, client.job_id, len(client.seen), 1_000))
        if status.state in JOB_STATES_FINAL:
            client.state, client.reason_code = status.state, status.reason_code

    # ---------------------------------------------------------------------------------------------- the end

    def done(self) -> bool:
        """Faults are over, the coordinator is up, every worker is connected, every job has ended, nobody is late."""
        ended = all(client.state in JOB_STATES_FINAL for client in self.clients)
        connected = all(worker.link is not None and worker.link.session_id for worker in self.workers)
        quiet = self.schedule.now_ms >= FAULTS_END_MS and not self.disk.oracle.late_out()
        return ended and connected and quiet and self.coordinator.alive

    def run(self) -> None:
        """Runs to the end and judges it."""
        if not self.schedule.run(until_ms=FAULTS_END_MS + QUIET_MS_MAX, done=self.done):
            waiting = [client.job_id for client in self.clients if client.state not in JOB_STATES_FINAL]
            raise SimulationError(f"jobs did not end, or a worker could not come back: {waiting}")
        self.coordinator.read(self._judge)
        self.coordinator.read(self._compare)
        self.judged = False
        self.schedule.run(until_ms=self.schedule.now_ms + 60_000, done=lambda: self.judged)
        if not self.judged:
            raise SimulationError("the coordinator answers nobody")

    def _judge(self, state: State) -> None:
        for client in self.clients:
            self._judge_client(client)
        self.judged = True

    def _compare(self, state: State) -> None:
        """Replay gives the very state, orders of dictionaries included."""
        replayed = State()
        for at_ms, event in self.disk.records:
            evolving.evolve(replayed, event, at_ms)
        if replayed != state or list(encode_state(replayed)) != list(encode_state(state)):
            raise SimulationError("replay gives another state")

    def _judge_client(self, client: Client) -> None:
        if client.job_id is None:
            return
        seen = self.disk.oracle.jobs[client.job_id]
        if client.state is JobState.FAILED and not self.program_crashes:
            raise SimulationError(f"a job failed without cause: {client.reason_code}")
        if client.state is JobState.CANCELLED and not client.cancels:
            raise SimulationError("a job was cancelled by nobody")
        if client.state is JobState.SUCCEEDED and len(seen.delivered) != len(client.rows):
            raise SimulationError("a job succeeded without all of its rows")
        for position, (output, row) in seen.delivered.items():
            if output is not None:
                value = self.blobs.rows[Digest(output)][row]
                if value not in (answer_of(client.rows[position]), FAILED_ROW):
                    raise SimulationError(f"row {position} has another row's answer")


def _ignore(_: Answer | FallowError) -> None:
    return


def simulate(seed: int, bugs: EngineBugs | None = None, *, measures: bool = False) -> Simulation:
    """Runs one seed; a failure says how to see it again."""
    simulation = None
    try:
        simulation = Simulation(seed, bugs, measures=measures)
        simulation.run()
    except Exception as error:
        at_ms = simulation.schedule.now_ms if simulation is not None else 0
        raise SimulationError(
            f"seed {seed}, at {at_ms} ms: {type(error).__name__}: {error}\n"
            f"reproduce: PYTHONPATH=tests .venv/bin/python -m simulation.run {'measuring ' * measures}{seed}"
        ) from error
    return simulation


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument == "measuring":
            continue
        ran = simulate(int(argument), measures="measuring" in sys.argv)
        print(f"seed {argument}: {len(ran.disk.records)} records, {ran.schedule.now_ms} virtual ms, {ran.refusals}")
