"""The contract between an engine child and whoever spawns and feeds it (the supervisor of an executor).

**One child, one program.** A supervisor spawns a child, waits for `Ready`, sends one `Load` (or one `Inspect`), then
any number of `Run`. For another bundle it spawns another child. `spawn.spawn_child` does the spawning as told here and
gives back the process, the control socket and the memory; reading and writing frames, deadlines and killing are the
supervisor's.

**Spawning.** `sys.executable -I -S -B <engine>/child.py <options as JSON>`: the script by its path, so that no package
is imported before lock-down. `ChildArguments.search_paths` are the only import roots besides the standard library. The
environment is built anew (no HOME, no secrets), the working directory is an empty one that is already deleted, the
session is new, every descriptor is closed but these, whose numbers stand in the options:

- *control*: one end of a stream socketpair. Frames run both ways (`frames.py`): u32 little-endian length (at most
  `CONTROL_FRAME_BYTES_MAX`), then UTF-8 JSON of one message class of this file. A child that sends anything else is to
  be killed: the program in it may have taken it over. Closing the control socket makes an idle child exit with 0.
- *input*: memory that the supervisor writes and the child can only read (descriptor opened read-only). It may grow
  (`SharedMemory.write` does it), never shrink. It holds bundle files for `Load`, and row blocks for `Run`; placements
  begin on multiples of `PLACEMENT_ALIGNMENT_BYTES`. Bytes of `Load` may be overwritten after `Loaded`; the block of a
  `Run` after its `Done` or `Failed`.
- *output*: memory of a fixed size (`OUTPUT_MEMORY_BYTES` unless told otherwise), sealed against shrinking and growing:
  the child can neither make the supervisor fault nor fill the machine with it. The child writes each output block at
  the place that `Run.output` names. Read it with `SharedMemory.read` (pread) and take nothing in it for granted: hash,
  parse and bound the copy you read, not the memory.
- *log*: the child's stdout and stderr, a sealed memory of `LOG_BYTES_MAX`; what does not fit is lost. Readable after
  the child's death.
- *life*: the read end of a pipe that the supervisor holds open. When it closes, the child ends: by SIGIO from the
  kernel (whatever the program does), or by a watchdog thread with `EXIT_PARENT_GONE`.

**Limits, set by the child before anything else**: RLIMIT_CORE 0, RLIMIT_NOFILE `OPEN_FILES_MAX`, RLIMIT_FSIZE the size
of the output memory, RLIMIT_DATA `SpawnOptions.data_bytes_max` rounded down to a power of two (`data_limit_class`; it
decides constant folding, so it is part of the execution class). RLIMIT_DATA does not count shared memory; the filter
forbids making any, so what a child can hold is bounded by RLIMIT_DATA + its input and output memory. The supervisor
still watches RSS.

**Lock-down** happens in the order of `child.py`: no_new_privs, limits and Landlock before imports, a canary along the
path that a foreign program takes, seccomp over every thread, the canary again (equal bits demanded), then `Ready` with
the level that was probed, not hoped for. Nothing foreign is read before `Ready`.

**Conversation** (several `Run` may be sent ahead; they are done in order, so the next block can be written while one is
being worked on, at another place):

====================  =================================================================================
supervisor            child
====================  =================================================================================
(spawn)               `Ready` within `READY_SECONDS_MAX`, or an exit code
`Load`                `Loaded` | `Failed(task="")`, after which the child can only be closed
`Run`                 `Progress` now and then (at least one each `PROGRESS_INTERVAL_MS` while batches end), then
                      `Done` | `Failed(task=…)`; after `Failed` of a task the child takes the next one
`Inspect`             `Progress` now and then, then `Inspected` | `Failed`; refusals stand in the report
`Challenge`           `Progress` now and then, then `Answered` | `Failed`
`Check`               `Checked` | `Failed`
`Referee`             `Progress` now and then, then `Refereed` | `Failed`
====================  =================================================================================

There is no cancel message: kill the child (`killpg` of its own session) and spawn another; a start takes 0.3 to 0.5 s.

**When a child dies** `cause_of_exit` says whose fault it was. A signal that the supervisor did not send (SEGV, ABRT,
BUS, …) and `EXIT_MEMORY` are the program's once foreign bytes were loaded; exits before `Ready` are the platform's.
Time limits are the supervisor's to keep: it kills, and the cause is `program` when one task alone overran on an
otherwise answering machine.

**Rows.** `Run` takes any number of rows; the child runs them in batches of exactly b rows, the last one zero-padded.
Row i of the output block answers row i of the input block; a row of no bytes has failed. `Done.failures` lists up to
`ROW_FAILURES_LISTED_PER_TASK_MAX` of them, `Done.failed_rows` counts all. The same block, nonce, bundle and execution
class give the same output bytes.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from fallow.bundle import BundleManifest, InspectionReport
from fallow.challenge import ChallengePlan, ChallengeVerdict
from fallow.comparison import RowFinding, Spread, ToleranceProfile
from fallow.errors import Reason
from fallow.ids import Digest
from fallow.limits import BLOCK_BYTES_MAX, GIB, KIB, MIB, ROW_FAILURE_REASON_BYTES_MAX, ROW_FAILURES_LISTED_PER_TASK_MAX
from fallow.session import Cause, RowFailure, SandboxLevel, Usage
from fallow.shown_text import shown_line

CONTROL_FRAME_BYTES_MAX: Final = 1 * MIB
PLACEMENT_ALIGNMENT_BYTES: Final = 64 * KIB
"""Placements begin on multiples of this: the largest page size in use."""
OUTPUT_MEMORY_BYTES: Final = 2 * BLOCK_BYTES_MAX
"""Room for two of the largest blocks: one being read by the supervisor, one being written by the child. Pages cost
memory only once they are written."""
LOG_BYTES_MAX: Final = 64 * KIB
OPEN_FILES_MAX: Final = 64
READY_SECONDS_MAX: Final = 60.0
PROGRESS_INTERVAL_MS: Final = 250
INSPECTION_SECONDS_MAX: Final = 60.0
DATA_BYTES_MIN: Final = GIB // 2
DATA_BYTES_DEFAULT: Final = 4 * GIB
THREADS_MAX: Final = 256
WARM_UP_BATCHES: Final = 1
"""Batches of zeros that `Load` runs, so that the first task is not slower than the rest."""
WIDE_PROGRAM_BYTES_MAX: Final = 64 * MIB
"""Programs up to this size are loaded twice when there are several lanes: once for throughput, once for short waits."""
FAILING_ROWS_GIVEN_UP_AFTER: Final = 16
"""When so many first rows of a task fail one by one and the program fails on zeros too, the task fails with cause
`program` rather than trying every row."""

EXIT_DONE: Final = 0
EXIT_PARENT_GONE: Final = 71
EXIT_START_FAILED: Final = 72
"""Imports, lock-down or the canary failed; the log says how."""
EXIT_PROTOCOL: Final = 73
"""The supervisor sent what this contract does not know."""
EXIT_MEMORY: Final = 74
"""Memory ran out where the child could not go on."""
EXIT_INTERNAL: Final = 75
"""A mistake of the engine itself; the log holds the traceback."""


class ChildKind(StrEnum):
    """What a child is for: it decides what is imported before lock-down."""

    RUN = "run"
    INSPECT = "inspect"


@dataclass(frozen=True, slots=True)
class SpawnOptions:
    """How a child is to be spawned; travels as the JSON in its second argument, with the descriptors' numbers."""

    kind: ChildKind = ChildKind.RUN
    threads: int = 1
    """Cores that the program may keep busy."""
    lanes: int = 0
    """Batches in flight at once, each on threads // lanes threads; 0: as many as threads. Lanes waste nothing on
    waiting for one another. Blocks too short to fill them run on all threads one batch after the other, in a second
    session that small programs (`WIDE_PROGRAM_BYTES_MAX`) get. Neither changes a bit of the output."""
    data_bytes_max: int = DATA_BYTES_DEFAULT
    """RLIMIT_DATA, rounded down to a power of two, at least `DATA_BYTES_MIN`."""
    allow_spinning: bool = False
    """Let idle runtime threads burn a core between operators: faster by little, rude to an owner."""
    niceness: int = 0
    """Added to the niceness of the child: 10 for a machine in use."""


@dataclass(frozen=True, slots=True)
class ChildArguments:
    """Everything `child.py` is told at its start: the options, the descriptors, and where imports may come from."""

    options: SpawnOptions
    control_fd: int
    input_fd: int
    output_fd: int
    life_fd: int
    output_bytes: int
    search_paths: tuple[str, ...]
    readable_paths: tuple[str, ...]
    """Files and folders that may still be read between the start and lock-down."""
    level_max: SandboxLevel = SandboxLevel.FULL
    """Stop locking down here: for tests of weaker platforms, and never set by an executor."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where bytes lie in the input or the output memory."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class FilePlacement:
    """One file of the bundle, in the input memory. The supervisor has checked its digest."""

    name: str
    place: Placement


@dataclass(frozen=True, slots=True)
class Setting:
    """So many batches in flight at once, each on so many threads. It changes no bit of the output."""

    in_flight: int
    threads: int


@dataclass(frozen=True, slots=True)
class Trial:
    """How fast one setting was."""

    setting: Setting
    rows_milli_per_s: int
    gain_permille: int
    """Against the fixed setting on the same rows: 1,000 is as fast."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """The setting that measuring chose, and what it chose from."""

    setting: Setting
    trials: tuple[Trial, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Make this bundle ready to run. Sent once, in a `RUN` child."""

    bundle_digest: Digest
    manifest: BundleManifest
    input_schema_digest: Digest
    output_schema_digest: Digest
    files: tuple[FilePlacement, ...]
    canonical_batch_rows: int
    """b, from the inspection report. 0: the program's own fixed batch, else 1 (only for bundles nobody inspected)."""
    slot_dependent: bool = False
    neighbour_dependent: bool = False
    setting: Setting | None = None
    """How to run it, as measured before; None: as `SpawnOptions` say."""
    measures: bool = False
    """Measure on the first rows what is best, and tell it with a `Done`."""


@dataclass(frozen=True, slots=True)
class Run:
    """Work on one row block."""

    task: str
    """Any name; it comes back with every answer."""
    input: Placement
    output: Placement
    """Room for the output block: what does not fit fails the task with BLOCK_TOO_LARGE."""
    nonce: bytes
    """16 fresh bytes for the output block."""
    slots: Placement | None = None
    """One u32 for each row in the input memory: the slot of its batch in which it must run (redos and audits of
    slot-dependent programs). None: row i runs in slot i mod b."""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Take this bundle apart, run it, and say what was found. Sent once, in an `INSPECT` child."""

    bundle_digest: Digest
    manifest: BundleManifest
    input_schema_digest: Digest
    output_schema_digest: Digest
    files: tuple[FilePlacement, ...]
    sample: Placement | None = None
    """A row block of the submitter's rows, used beside synthetic ones. It never alone decides a cost."""
    seconds_max: float = INSPECTION_SECONDS_MAX
    """Measurements stop early rather than overrun this."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """Work this out, with nothing of anybody else's loaded. Sent once, in a `RUN` child."""

    plan: ChallengePlan
    threads: int
    """Cores to keep busy."""
    nonce: bytes
    """16 fresh bytes for the answer's block."""


@dataclass(frozen=True, slots=True)
class Check:
    """Find out whether an answer holds. Sent once, in a `RUN` child."""

    plan: ChallengePlan
    answer: Placement
    entropy: bytes
    """32 fresh bytes, unknown when the answer was committed to."""


@dataclass(frozen=True, slots=True)
class CandidatePlacement:
    """A block of others' output rows in the input memory."""

    block: Placement
    rows: tuple[int, ...]
    """Rows of `Referee.own` that the block's rows answer."""
    class_numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Referee:
    """Put others' rows beside our own. Sent once, in an `INSPECT` child: the program may have to be taken apart."""

    manifest: BundleManifest
    input_schema_digest: Digest
    output_schema_digest: Digest
    files: tuple[FilePlacement, ...]
    """None at all: compare without running the program in other forms."""
    canonical_batch_rows: int
    slot_dependent: bool
    input: Placement
    slots: Placement | None
    own: Placement
    """Our output rows for `input`."""
    own_class: str
    candidates: tuple[CandidatePlacement, ...]
    execution_classes: tuple[str, ...]
    profiles: tuple[ToleranceProfile, ...]
    spread: Spread | None
    """The bundle's, when it was measured before."""
    seconds_max: float
    """For running the program in other forms."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The child is locked down and works."""

    level: SandboxLevel
    denied: tuple[str, ...]
    """What the child tried after lock-down and was refused: `open`, `socket`, `fork`, …"""
    permitted: tuple[str, ...]
    """What it tried and was not refused; empty at level FULL."""
    landlock_abi: int
    """0: the kernel has none."""
    runtime: str
    """The program runtime and its version, `onnxruntime 1.31.1`."""
    execution_class: str
    """Everything that decides output bits on this machine but the program's canonical batch."""
    start_ms: int
    memory_bytes: int
    """Resident size."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The bundle is ready to run."""

    canonical_batch_rows: int
    execution_class: str
    """Of `Ready`, with the precision and the canonical batch of this bundle."""
    load_ms: int
    memory_bytes: int
    """Resident size after the warm-up."""


@dataclass(frozen=True, slots=True)
class Progress:
    """So many rows of a task have been through the program."""

    task: str
    rows_done: int


@dataclass(frozen=True, slots=True)
class Done:
    """The output block lies at the beginning of `Run.output`."""

    task: str
    output_bytes: int
    rows: int
    failed_rows: int
    failures: tuple[RowFailure, ...]
    """The first `ROW_FAILURES_LISTED_PER_TASK_MAX` of them, in row order."""
    usage: Usage
    tuned: Tuned | None = None
    """Told once, when measuring is over."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A load, a task or an inspection came to nothing; the child is still sound."""

    task: str
    """Empty for `Load` and `Inspect`."""
    cause: Cause
    reason: Reason
    message: str
    field: str = ""
    limit: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """The report, complete but for nothing: `accepted` may be false."""

    report: InspectionReport
    usage: Usage


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer's block lies at the beginning of the output memory."""

    output_bytes: int
    usage: Usage
    execution_class: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in an answer."""

    verdict: ChallengeVerdict
    usage: Usage


@dataclass(frozen=True, slots=True)
class Refereed:
    """What was found of each row."""

    rows: tuple[RowFinding, ...]
    spread: Spread | None
    """The bundle's, when it is known by now."""
    usage: Usage


ToChild = Load | Run | Inspect | Challenge | Check | Referee
FromChild = Ready | Loaded | Progress | Done | Failed | Inspected | Answered | Checked | Refereed

_PROGRAM_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP}
    | ({signal.SIGSYS} if hasattr(signal, "SIGSYS") else set())
)


def data_limit_class(data_bytes: int) -> int:
    """The RLIMIT_DATA actually set for a wish of `data_bytes`: the power of two at or below it.

    Limits are few so that machines with slightly different memory share an execution class.
    """
    return 1 << (max(data_bytes, DATA_BYTES_MIN).bit_length() - 1)


def lanes_of(options: SpawnOptions) -> int:
    """How many batches are in flight at once under `options`."""
    return max(1, min(options.lanes or options.threads, options.threads, THREADS_MAX))


def cause_of_exit(return_code: int, *, program_loaded: bool) -> Cause:
    """Whose fault it was that a child ended by itself (`Popen.returncode`; negative: a signal).

    `program_loaded`: foreign bytes had been sent (`Load` or `Inspect`). A child that the supervisor killed has the
    cause for which it was killed, and is not asked about here. SIGKILL by the kernel (out of memory on the machine)
    counts as the worker's: the program stayed below the limit that it was given.
    """
    if not program_loaded:
        return Cause.PLATFORM
    if return_code == EXIT_MEMORY or (return_code < 0 and -return_code in _PROGRAM_SIGNALS):
        return Cause.PROGRAM
    if return_code == -signal.SIGKILL:
        return Cause.WORKER
    return Cause.PLATFORM


_REASON_CHARACTERS_READ: Final = 16 * ROW_FAILURE_REASON_BYTES_MAX
"""How far into a text its reason is looked for: a program's names may have megabytes."""


def clipped_reason(text: str) -> str:
    """`text` cut to at most `ROW_FAILURE_REASON_BYTES_MAX` bytes of UTF-8, on one line that prints."""
    line = shown_line(" ".join(text[:_REASON_CHARACTERS_READ].split()))
    data = line.encode("utf-8", "replace")
    if len(data) <= ROW_FAILURE_REASON_BYTES_MAX:
        return data.decode()
    return data[: ROW_FAILURE_REASON_BYTES_MAX - 3].decode("utf-8", "ignore") + "…"


__all__ = [
    "ROW_FAILURES_LISTED_PER_TASK_MAX",
    "Answered",
    "CandidatePlacement",
    "Cause",
    "Challenge",
    "Check",
    "Checked",
    "ChildArguments",
    "ChildKind",
    "Done",
    "Failed",
    "FilePlacement",
    "FromChild",
    "Inspect",
    "Inspected",
    "Load",
    "Loaded",
    "Placement",
    "Progress",
    "Ready",
    "Referee",
    "Refereed",
    "RowFailure",
    "Run",
    "SandboxLevel",
    "SpawnOptions",
    "ToChild",
    "Usage",
    "cause_of_exit",
    "clipped_reason",
    "data_limit_class",
    "lanes_of",
]
