"""Named limits of the protocol, the same on both sides of every wire."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

PROTOCOL_VERSION = 1
PROTOCOL_VERSION_MIN_SUPPORTED = 1

ROW_BYTES_MAX = 16 * MIB
BLOCK_BYTES_MAX = 64 * MIB
BLOCK_ROWS_MAX = 1_000_000
JOB_ROWS_MAX = 10_000_000
JOB_TASKS_MAX = 100_000
JOB_BLOCKS_MAX = 20_000
"""Blocks a dataset may consist of."""

INLINE_PAYLOAD_BYTES_MAX = 64 * KIB
CONTROL_MESSAGE_BYTES_MAX = 1 * MIB
"""Largest message of the control plane in either direction (a submission lists up to `JOB_BLOCKS_MAX` blocks)."""
SESSION_MESSAGE_BYTES_MAX = 256 * KIB
MESSAGES_TOGETHER_MAX = 64
"""Messages of the coordinator that travel as one."""
BLOB_CHUNK_BYTES = 1 * MIB
BLOB_BYTES_MAX = 4 * GIB
MANIFEST_BYTES_MAX = 64 * KIB
REPORT_BYTES_MAX = 64 * KIB

BUNDLE_VARIANTS_MAX = 8
BUNDLE_FILES_MAX = 64
BUNDLE_STAGES_MAX = 16
SCHEMA_COLUMNS_MAX = 256
TENSOR_RANK_MAX = 8
SIZE_FEATURES_MAX = 8
COLUMN_NAME_BYTES_MAX = 128
TITLE_BYTES_MAX = 200

PROGRAM_BYTES_MAX = 2 * GIB
PROGRAM_NODES_MAX = 50_000
PROGRAM_NESTING_MAX = 16
PROGRAM_TENSOR_BYTES_MAX = 4 * GIB
"""Largest single tensor that a program may ask for, by static shape inference."""
LOOP_TRIPS_MAX = 10_000

ROW_FAILURE_REASON_BYTES_MAX = 256
ROW_FAILURES_LISTED_PER_TASK_MAX = 256
NODE_RUNS_PER_TASK_MAX = 256
"""Parts of a lease that the nodes of an owner's cluster may do."""
JOB_SHARES_SHOWN_MAX = 256
"""Nodes of workers that are told with a job, those with the most rows."""
"""Failed rows of one task that carry their own text; further ones are counted under the last text."""
FAILED_ROWS_MAX_DEFAULT = 1_000
"""Rows of a job that may fail before the job fails, unless the submitter says otherwise."""

REFEREE_ROWS_MAX = 1_024
"""Rows of one referee's lease."""
REFEREE_CANDIDATES_MAX = 8
REFEREE_FINDINGS_MAX = 4_096
"""Rows of all candidates of one referee's lease together."""
REFEREE_CLASSES_MAX = 64
"""Execution classes that the candidates of one referee's lease may have, and profiles that come with it."""
COMPARED_SOURCES_MAX = 4_096
"""Blocks of one request to compare rows, or to pack single ones."""
COMPARED_ROWS_MAX = 65_536
"""Rows, or pairs of rows, of one such request."""

TASK_ATTEMPTS_MAX = 5
LEASES_PER_WORKER_MAX = 64
IDENTIFIER_BYTES_MAX = 64
POOL_CACHES_TOLD_MAX = 4
"""Caches of a pool that a worker is told of with an offer."""
POOL_CACHE_CERTIFICATE_BYTES_MAX = 2 * KIB
"""Longest name of a lease that anybody may say."""
NAMED_FACT_BYTES_MAX = 256
"""Longest name of a software or an execution class."""
CAPABILITY_BYTES_MAX = 32 * KIB
"""A worker's whole capability: every change of it goes into the journal."""
GRANTS_PER_REQUEST_MAX = 1_000
TOKEN_USES_MAX = 10_000
