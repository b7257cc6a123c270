"""Named limits of the core: every wait, retry and count has one."""

from __future__ import annotations

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

STEPS_PER_TURN_MAX = 4_096
"""Events that may start work in one turn; what is left starts in the next."""

ACCOUNTS_MAX = 100_000
POOLS_MAX = 1_000
TOKENS_MAX = 100_000
PARTIES_MAX = 1_000_000
SESSIONS_MAX = 10_000
NAME_BYTES_MAX = 200
TAGS_MAX = 32
TOKEN_VALID_MS_MAX = 365 * DAY_MS
CERTIFICATE_VALID_MS_MAX = 30 * DAY_MS
MACHINE_PRIORITY_MS = 5 * MINUTE_MS
"""So long after its session ended another machine with the same key is kept out: a copy must not slip in between."""
RENEWAL_GRACE_MS = 90 * DAY_MS
"""How long after the end of its certificate a key renews it by itself."""

SESSION_GRACE_MS = 15 * SECOND_MS
"""How long leases outlive their closed session, so that an honest reconnect keeps them."""
RESTART_GRACE_MS = 30 * SECOND_MS
"""The same after a restart of the coordinator, when everybody reconnects at once."""

BLOBS_PER_ACCOUNT_MAX = 1_000_000
BLOBS_PER_COMMAND_MAX = 1_000
BUNDLES_PER_ACCOUNT_MAX = 10_000
JOBS_UNFINISHED_PER_ACCOUNT_MAX = 1_000
BLOCKS_UNFINISHED_PER_ACCOUNT_MAX = 100_000
"""Dataset blocks of an account's unfinished jobs: they are held in memory, some 300 bytes each."""
INSPECTIONS_WAITING_PER_ACCOUNT_MAX = 16
"""Bundles of one account that wait for inspection: each may take a minute, and others wait behind them."""
COST_UNIT_MICROS_MAX = 10**12
"""Dearest row, and dearest KiB of a row, that a report may claim: 10⁶ seconds of a reference core."""
TASK_UNIT_MICROS_MAX = 10**15
"""A task's cost is counted up to here, whatever its rows say of their sizes; its time ends long before."""
ARCHIVED_PER_COMMAND_MAX = 1_000

IDEMPOTENCY_KEY_BYTES_MIN = 16
IDEMPOTENCY_KEY_BYTES_MAX = 64
IDEMPOTENCY_MS = 24 * HOUR_MS
IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX = 20_000

LEASES_REMEMBERED_MAX = 20_000
"""Leases that are over and still get a precise answer; older ones are unknown."""

TASK_LOSSES_MAX = 50
"""How often a task may be lost, expire, be pre-empted or revoked: nobody's fault, but not for ever."""
RETRY_DELAY_MS_MIN = 250
RETRY_DELAY_MS_MAX = 10 * SECOND_MS
"""Wait before a failed task is tried again: doubles with every attempt between these two."""

PACK_ATTEMPTS_MAX = 100
"""Packings of one task in a row that may fail before its job fails: about a quarter of an hour."""
PACK_PATIENCE_MS = 120 * SECOND_MS
"""A packing that nobody answered for so long is asked for again, with the next number."""

UNIT_MICROS = 1_000_000
TASK_UNITS_TARGET = 30
"""Largest task, in units: seconds of a reference core."""
TASK_UNITS_FIRST = 4
"""Largest task while a job begins: small blocks are packed and fetched soon."""
TASK_UNITS_MIN = 1
"""Smallest task worth its overhead."""
SLOTS_PER_WORKER_MAX = 1_024

RUNTIME_MS_MIN = 60 * SECOND_MS
RUNTIME_FACTOR = 20
"""A lease may run this many times longer than its cost on a reference core."""
RUNTIME_MS_MAX = 6 * HOUR_MS
INSPECTION_RUNTIME_MS = 10 * MINUTE_MS
TRANSFER_BYTES_PER_MS_MIN = 125
"""Slowest link we wait for: 1 Mbit/s."""
UPLOAD_MS_MIN = 30 * SECOND_MS
"""A committed worker has at least so long to upload its output, whatever its lease's deadline was."""
TASK_BLOCKS_MAX = 256
"""Dataset blocks that one task's rows may come from."""
DUPLICATES_LIVE_MAX = 256
"""Tasks of all jobs that are in two hands at a time."""
DUPLICATES_PER_JOB_PERCENT = 10
"""How many of a job's tasks may ever be given out a second time while the first lease lives."""
DUPLICATES_PER_JOB_MIN = 4
"""The same for small jobs."""
DUPLICATES_PER_TASK_MAX = 2
STRAGGLERS_LOOKED_AT_MAX = 512
"""Live leases, the oldest first, that one tick looks at for late ones."""
TAKERS_LOOKED_AT_MAX = 8
"""Free workers of each group that are looked at for one to take a late task."""
STRAGGLER_GAIN_FACTOR = 2
"""A lease is late enough when it is expected to last so many times longer than a free worker would take."""
STRAGGLER_FAR_FACTOR = 4
"""While its job has other work to give out, a lease must also have run so many times longer than expected."""
STRAGGLER_FAR_MS_MIN = 30 * SECOND_MS
LEASE_OVERHEAD_MS = 2 * SECOND_MS
"""What any lease is expected to take beside its work: a message each way, a start, an upload."""
FETCH_BYTES_PER_MS = 1_250
"""Link that is expected when nothing is known: 10 Mbit/s."""
LATE_MS_MAX = 2 * MINUTE_MS
"""How long after the end of its job a lease may still commit when its rows came from another one first."""
DUE_PER_TICK_MAX = 4_096
"""Deadlines, and workers gone, that one tick deals with; the rest waits for the next."""

RETENTION_MS_DEFAULT = 30 * DAY_MS
"""How long results, dataset and kept columns outlive the end of their job, unless its submitter says otherwise."""
RETENTION_MS_MIN = SECOND_MS
RETENTION_MS_MAX = 366 * DAY_MS
EXPIRED_PER_COMMAND_MAX = 1_000
UPLOAD_GRACE_MS = DAY_MS
"""How long a recorded upload stays when nothing refers to it; asking for it anew begins the time anew."""
FORGOTTEN_PER_COMMAND_MAX = 2_000
BLOB_BYTES_PER_ACCOUNT_DEFAULT = 100 * 1024 * 1024 * 1024
"""Bytes of uploads that an account may have recorded, unless an operator says otherwise: 100 GiB."""
BLOB_BYTES_PER_ACCOUNT_MAX = 1 << 50

TRANSFERS_REMEMBERED_MAX = 20_000
"""Transfers of credits that people asked for and that may be asked for again without harm; older ones are unknown."""
TREASURY_MICROCREDITS_MAX = 9 * 10**18
"""Most that is ever made in one purse: what a signed number of 64 bits can count."""
ALLOTMENTS_MAX = 100_000
ALLOTMENT_PERIOD_MS_MIN = MINUTE_MS
ALLOTMENT_PERIOD_MS_MAX = 366 * DAY_MS
CHALLENGES_LIVE_MAX = 64
"""Devices that are being measured at a time."""
WORKERS_LOOKED_AT_MAX = 1_000
"""Workers whose devices are looked at in a tick: the rest has its turn in one of the next."""
CHALLENGE_STEPS_TARGET = 128
"""Products of a challenge: faster devices get larger ones before they get more."""
CHALLENGE_RUNTIME_MS = 2 * MINUTE_MS
CHALLENGE_UPLOAD_MS = 30 * SECOND_MS
CHECK_RUNTIME_MS = 5 * MINUTE_MS
CHECK_WAIT_MS = 30 * MINUTE_MS
"""How long an answer waits for a checker, from its challenge on."""
CHECKS_PER_CHALLENGE_MAX = 3
"""Checks of one answer that may come to nothing."""
CLAIM_MILLI_PER_CORE = 1_000
"""Speed taken for granted of a core, in thousandths of a unit a second, when a device states none."""
CLAIM_MILLI_PER_S_MAX = 10_000_000
"""Largest claim that a challenge is sized to: 500 TFLOP/s."""
CLAIM_SLACK = 3
"""A device that states its speed must show at least one part in so many of it."""
CLAIM_SLACK_UNSTATED = 50
"""The same for one that states none: what it shows is what counts."""
FILL_FREE_PART = 4
"""A challenge takes at most one part in so many of the memory that a machine says is free."""
FILL_START_MS = 15 * SECOND_MS
FILL_BYTES_PER_MS_MIN = 20_000
"""Slowest filling that counts as memory rather than as a disk: 20 MB/s after `FILL_START_MS`."""
ROUND_TRIP_MS_MAX = 500
"""Most of a round trip that is taken off a challenge's time, and never more than a quarter of it."""
CERTIFICATE_AGAIN_MS_MIN = DAY_MS
CERTIFICATE_MEASURED_MS = 7 * DAY_MS
"""A certificate of a device ends after so long; the next measurement is drawn between the two."""
CHALLENGE_RETRY_MS_MIN = 5 * SECOND_MS
CHALLENGE_RETRY_MS_MAX = HOUR_MS
"""Wait after a challenge that came to nothing through nobody's fault: doubles between these two."""
CHALLENGE_RETRY_BLAMED_MS_MIN = 10 * MINUTE_MS
CHALLENGE_RETRY_BLAMED_MS_MAX = DAY_MS
"""The same after a wrong or late answer."""
WATTS_PER_NODE_MAX = 10_000
"""What one machine of a worker may spend, at most: more is not believed."""
NODES_BELIEVED_MAX = 1_000
"""Machines of one worker of which energy is believed."""
FORECAST_HOURS_MAX = 48
FORECAST_REGIONS_MAX = 64
FORECAST_GRAMS_PER_KWH_MAX = 3_000
PLANNED_JOBS_MAX = 1_000
"""Jobs of one lane that are planned for, those due first; the others do not wait."""
PLAN_EVERY_MS = MINUTE_MS
"""How often waiting for clean hours is planned anew, while jobs may wait."""
CARBON_PATIENCE_MS = DAY_MS
"""How long a job that asks for little carbon may wait when it names no deadline."""
CARBON_MARGIN_MS_MIN = 15 * MINUTE_MS
CARBON_MARGIN_PERCENT = 10
"""How long before its deadline a job that waited shall be done."""
CARBON_CAPACITY_PERCENT = 50
"""How much of what workers could do a plan counts on: others may come, and speeds are not known."""

PRIORITY_MAX = 9
"""Highest priority of a job among those of its account; each step is an hour in the queue."""
SHARE_HALF_LIFE_MS = DAY_MS
"""Work done for an account counts half as much after this time."""
SHARE_FLOOR_UNITS = 60
"""Usage below this counts as this: the order of accounts that hardly used anything is by turns."""
READY_LOOK_AHEAD = 16
"""Ready tasks of a lane that are looked at for one that a free worker may take."""
OWN_WORKERS_LOOKED_AT_MAX = 16
REGIONS_UNKNOWN_MAX = 64
"""Regions of connected workers that are told apart although no forecast knows them; others count as `other`."""
GROUPS_MAX = 1_024
"""Kinds of connected workers that are told apart: matching looks at some of them for each task."""
MEMORY_BYTES_MIN_MAX = 1 << 50
"""Most memory that a job may ask for on one device: 1 PiB."""
LEARNED_SETTLEMENTS = 16
"""Tasks of a bundle whose work is summed before its cost is corrected."""
COST_PERMILLE_MIN = 125
COST_PERMILLE_MAX = 8_000
"""How far accepted work may move a bundle's cost from what inspection found."""
QUOTE_MS_MAX = 10 * 366 * DAY_MS
"""Longest waiting or running time that a quote tells."""
DEADLINE_MS_MAX = 366 * DAY_MS
"""How far ahead a deadline may lie."""
LATENCY_MS_MAX_MAX = HOUR_MS
BUNDLES_PER_WORKER_MAX = 16
"""Bundles that a worker is remembered to have."""
BUNDLES_LOADED_PER_WORKER_MAX = 2
HOLDERS_PER_BUNDLE_MAX = 16
"""Workers looked at for one that has a bundle already."""
BUNDLES_KEPT_AWAY_MS_MAX = 7 * DAY_MS
"""A worker that was away for longer may have emptied its cache."""
SPEED_MILLIUNITS_PER_S_MAX = 10**9
"""Fastest slot that is believed: a million reference cores."""

STRIKES_FREE = 2
"""Failures of a host's own, without success between, that cost it nothing."""
STRIKES_MAX = 32
COOL_DOWN_MS_MIN = 10 * SECOND_MS
"""Rest after the first strike that counts; doubles with each further one."""
COOL_DOWN_MS_MAX = 10 * MINUTE_MS
AMNESTY_MS = MINUTE_MS
"""Leases granted so soon after a restart of ours are no strikes, whatever becomes of them."""

WEEK_MS = 7 * DAY_MS
WEEKS_REMEMBERED = 8
"""After so many weeks what is known of a worker's presence counts half."""
STAY_GAP_MS = 5 * MINUTE_MS
"""A worker that is away for longer has left; before, its connection was lost."""
STAYS_BUCKETS = 16
"""Doublings of a minute in which stays are counted: up to three weeks."""
LONG_TASK_UNITS = 300
"""Tasks of more units are placed by who is likely to stay."""
STAYERS_LOOKED_AT_MAX = 8
"""Free workers of each group that are looked at for a long task."""

AUDIT_ROWS_MAX = 1_024
"""Rows of one audit."""
AUDIT_PATIENCE_MS = 10 * SECOND_MS
"""How long rows wait for an auditor where none is connected, before a referee checks them."""
AUDITS_LIVE_MAX = 64
"""Audits of one job that are being packed or worked on."""
AUDITORS_LOOKED_AT_MAX = 16
"""Workers of each group that are looked at for one that may audit."""
REFEREES_LIVE_MAX = 2
"""Referees' tasks of one job at a time: more rows come together meanwhile."""
TIES_MAX = 2
"""A referee that cannot tell looks once more; then the row stands."""
REDONE_MAX = 3
"""How often a row is done again that nobody is guilty of; then it stands."""
DEVIATIONS_KEPT = 64
"""Deviations remembered of each account, for one bundle and pair of classes."""
PROFILE_ACCOUNTS_MIN = 4
"""Accounts that must teach a tolerance, so that none of them has more than a quarter of it."""
PROFILE_ACCOUNTS_MAX = 16
TOLERANCES_KEPT_MAX = 1_024
"""Pairs of classes, bundle by bundle, of which deviations are remembered."""
