"""Leases, offers and grants as a worker gets them: facts of committed state, payloads, and fresh grants for its key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from fallow import challenge
from fallow.bundle import BundleManifest
from fallow.ids import Digest, KeyFingerprint, LeaseId, PartyId, SessionId
from fallow.roles import DataClass
from fallow.session import BundleOffer, Candidate, DeviceStanding, GrantsRenewed, Lease, SignedBytes, UploadOffer
from fallow.wire.blob import BlobKind
from fallow.wire.bundle import decode_manifest, encode_manifest
from fallow_coordinator.core.events import PackedCandidate
from fallow_coordinator.core.questions import LeaseToSend, device_standing, lease_to_send, upload_to_offer
from fallow_coordinator.engine import Engine
from fallow_coordinator.service.grants import Grants, Holder
from fallow_coordinator.service.pool_caches import PoolCaches

MANIFESTS_REMEMBERED_MAX: Final = 256
_CACHED_BUNDLES: Final = frozenset({DataClass.PUBLIC, DataClass.INTERNAL})
"""Of jobs whose rows managed workers may see: those may hold their bundles for others too."""


class LeaseMessages:
    """Builds messages about leases for one coordinator; sessions share it."""

    def __init__(self, engine: Engine, grants: Grants, caches: PoolCaches, now_ms: Callable[[], int]) -> None:
        """Reads leases and payloads through `engine`, signs grants with `grants`, and tells of `caches` nearby."""
        self._engine = engine
        self._grants = grants
        self._caches = caches
        self._now_ms = now_ms
        self._manifests: OrderedDict[Digest, tuple[bytes, BundleManifest]] = OrderedDict()

    def facts(self, session_id: SessionId, lease_id: LeaseId) -> LeaseToSend | None:
        """The lease as it stands now; None when it is over or another session's."""
        facts = lease_to_send(self._engine.state, lease_id)
        return facts if facts is not None and facts.session_id == session_id else None

    def lease(self, facts: LeaseToSend, worker: KeyFingerprint, *, with_offer: bool) -> Lease:
        """The lease message, with grants for the worker's key."""
        manifest_bytes, manifest = self._manifest(facts.bundle_digest)
        inline = self._inline_input(facts)
        return Lease(
            lease_id=facts.lease_id,
            fence=facts.fence,
            kind=facts.kind,
            bundle_digest=facts.bundle_digest,
            offer=self._offer(facts, manifest_bytes, worker) if with_offer else None,
            rows=facts.rows,
            input=facts.input,
            inline_input=inline,
            input_grant=None if inline else self._input_grant(facts, worker),
            deadline_ms=facts.deadline_ms,
            runtime_max_ms=facts.runtime_max_ms,
            precision=facts.precision or manifest.precision,
            output_bytes_max=facts.output_bytes_max,
            unit_micros=facts.unit_micros,
            pool_id=facts.pool_id,
            latency_ms_max=facts.latency_ms_max,
            challenge=facts.challenge,
            slots=facts.slots,
            candidates=tuple(self._candidate(facts, packed, worker) for packed in facts.candidates),
            execution_classes=facts.execution_classes,
            profiles=facts.profiles,
        )

    def standing(self, worker_id: PartyId, device_id: str) -> DeviceStanding:
        """What is known of a worker's device now."""
        return device_standing(self._engine.state, worker_id, device_id)

    def renewed(self, facts: LeaseToSend, worker: KeyFingerprint) -> GrantsRenewed:
        """Fresh grants for everything that the lease needs to read."""
        manifest_bytes, _ = self._manifest(facts.bundle_digest)
        return GrantsRenewed(
            lease_id=facts.lease_id,
            fence=facts.fence,
            input_grant=None if facts.input_inline else self._input_grant(facts, worker),
            offer=self._offer(facts, manifest_bytes, worker),
        )

    def upload_offer(self, session_id: SessionId, lease_id: LeaseId, worker: KeyFingerprint) -> UploadOffer | None:
        """Permission to store the committed output; None when the lease owes no upload any more."""
        owed = upload_to_offer(self._engine.state, lease_id)
        if owed is None or owed.session_id != session_id:
            return None
        holder = Holder(worker, owed.account_id)
        grant = self._grants.put(owed.output, holder, now_ms=self._now_ms(), kind=BlobKind.ROW_BLOCK)
        return UploadOffer(owed.lease_id, owed.fence, grant)

    def _offer(self, facts: LeaseToSend, manifest: bytes, worker: KeyFingerprint) -> BundleOffer:
        cache_pool_id = facts.pool_id if facts.data_class in _CACHED_BUNDLES else None
        holder, now_ms = Holder(worker, facts.account_id, cache_pool_id), self._now_ms()
        return BundleOffer(
            bundle_digest=facts.bundle_digest,
            manifest=manifest,
            file_grants=tuple(self._grants.get(file, holder, now_ms=now_ms) for file in facts.bundle_files),
            canonical_batch_rows=facts.canonical_batch_rows,
            slot_dependent=facts.slot_dependent,
            memory_bytes_peak=facts.memory_bytes_peak,
            pool_caches=self._caches.near(facts.session_id, facts.pool_id) if cache_pool_id else (),
        )

    def _input_grant(self, facts: LeaseToSend, worker: KeyFingerprint) -> SignedBytes | None:
        if facts.input is None:
            return None
        holder = Holder(worker, facts.account_id, facts.pool_id if facts.data_class is DataClass.PUBLIC else None)
        return self._grants.get(facts.input, holder, now_ms=self._now_ms(), kind=BlobKind.ROW_BLOCK)

    def _candidate(self, facts: LeaseToSend, packed: PackedCandidate, worker: KeyFingerprint) -> Candidate:
        """A block of workers' rows, as bytes when it is small, else with a grant to read it."""
        inline = self._payload(packed.block.digest) if packed.inline else b""
        holder = Holder(worker, facts.account_id)
        now_ms = self._now_ms()
        grant = None if inline else self._grants.get(packed.block, holder, now_ms=now_ms, kind=BlobKind.ROW_BLOCK)
        return Candidate(packed.block, grant, inline, packed.class_numbers, packed.rows)

    def _inline_input(self, facts: LeaseToSend) -> bytes:
        if facts.input is None or not facts.input_inline:
            return b""
        return self._payload(facts.input.digest)

    def _payload(self, digest: Digest) -> bytes:
        payload = self._engine.payload(digest)
        assert payload is not None, "inline blocks of live leases are kept"
        return payload

    def _manifest(self, bundle_digest: Digest) -> tuple[bytes, BundleManifest]:
        if bundle_digest == challenge.BUNDLE_DIGEST:
            return encode_manifest(challenge.MANIFEST), challenge.MANIFEST
        known = self._manifests.get(bundle_digest)
        if known is None:
            payload = self._engine.payload(bundle_digest)
            assert payload is not None, "manifests of registered bundles are kept"
            known = self._manifests[bundle_digest] = (payload, decode_manifest(payload))
            if len(self._manifests) > MANIFESTS_REMEMBERED_MAX:
                self._manifests.popitem(last=False)
        return known
