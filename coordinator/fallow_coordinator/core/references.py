"""What the state refers to in the blob service: whatever is not referred to, here or in the views, may go."""

from __future__ import annotations

from fallow.ids import Digest
from fallow_coordinator.core.state import State


def referenced_blobs(state: State, candidates: frozenset[Digest], *, now_ms: int, grace_ms: int) -> frozenset[Digest]:
    """Those of `candidates` to which something in the state refers.

    Datasets, kept columns and outputs of all jobs that are here, files of all bundles, inputs of all live tasks,
    outputs that live leases are bound to, outputs of audits that are not decided, and uploads that an account recorded
    or claimed less than `grace_ms` ago. Of jobs that have left the state the views know.
    """
    # NOTE: looks at the whole state once for each page of candidates, some 50 ns a reference; with many millions of
    # them, counts kept beside the state would be needed.
    found: set[Digest] = set()
    for account in state.accounts.values():
        recorded_at_ms = account.blobs_recorded_at_ms
        found.update(
            digest for digest in recorded_at_ms.keys() & candidates if now_ms - recorded_at_ms[digest] < grace_ms
        )
    for bundle in state.bundles.values():
        found.update(file.digest for file in bundle.files if file.digest in candidates)
    for job in state.jobs.values():
        found.update(block.blob.digest for block in job.blocks if block.blob.digest in candidates)
        found.update(
            result.output.digest
            for result in job.results
            if result.output is not None and result.output.digest in candidates
        )
        if job.kept is not None and job.kept.digest in candidates:
            found.add(job.kept.digest)
    for task in state.tasks.values():
        if task.input is not None and task.input.digest in candidates:
            found.add(task.input.digest)
        found.update(one.block.digest for one in task.candidates if one.block.digest in candidates)
    for lease in state.leases.values():
        if lease.commitment is not None and lease.commitment.output.digest in candidates:
            found.add(lease.commitment.output.digest)
    for verification in state.verifications.values():
        outputs = (audit.output.digest for audit in verification.audits.values() if audit.output is not None)
        found.update(digest for digest in outputs if digest in candidates)
    return frozenset(found)
