"""Who has which bundle, as far as leases tell: a guess that saves downloads, never a promise. Only `evolve` calls this.

A worker is thought to have loaded the bundles it worked on last and to have earlier ones on its disk. It is thought to
have nothing loaded after its daemon started anew, and nothing at all after a long absence or a failure of its own.
"""

from __future__ import annotations

from fallow.ids import Digest
from fallow_coordinator.core.limits import (
    BUNDLES_LOADED_PER_WORKER_MAX,
    BUNDLES_PER_WORKER_MAX,
    HOLDERS_PER_BUNDLE_MAX,
)
from fallow_coordinator.core.state import State, Worker


def takes_bundle(state: State, worker: Worker, bundle_digest: Digest) -> None:
    """The worker is about to work with the bundle."""
    held = worker.bundles
    if held and next(reversed(held)) == bundle_digest and held[bundle_digest]:
        return
    held.pop(bundle_digest, None)
    held[bundle_digest] = True
    recent = list(held)
    for digest in recent[:-BUNDLES_LOADED_PER_WORKER_MAX]:
        held[digest] = False
    if len(held) > BUNDLES_PER_WORKER_MAX:
        forget_bundle(state, worker, recent[0])
    holders = state.bundles[bundle_digest].holders
    holders.pop(worker.worker_id, None)
    holders[worker.worker_id] = None
    if len(holders) > HOLDERS_PER_BUNDLE_MAX:
        del holders[next(iter(holders))]


def forget_bundle(state: State, worker: Worker, bundle_digest: Digest) -> None:
    """The worker may not have the bundle any more."""
    if worker.bundles.pop(bundle_digest, None) is not None:
        state.bundles[bundle_digest].holders.pop(worker.worker_id, None)


def forget_all(state: State, worker: Worker) -> None:
    """The worker's cache may be gone."""
    for digest in list(worker.bundles):
        forget_bundle(state, worker, digest)


def unload_all(worker: Worker) -> None:
    """The worker's daemon started anew: what it has lies on its disk at best."""
    worker.bundles = dict.fromkeys(worker.bundles, False)
