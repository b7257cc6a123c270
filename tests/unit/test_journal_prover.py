"""Proofs of the journal's records hold wherever the records lie, and follow from the nodes that the follower keeps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fallow.checkpoint import signer_of
from fallow.identity import PrivateKey
from fallow.ids import AccountId, Digest
from fallow.journal_proof import check_consistency, root_shown
from fallow.merkle import root_of
from fallow_coordinator.config import FollowerSettings
from fallow_coordinator.core.events import AccountCreated, JournalStarted
from fallow_coordinator.follower import Follower
from fallow_coordinator.store import sqlite
from fallow_coordinator.store.journal_nodes import RUN_RECORDS
from fallow_coordinator.store.journal_prover import JournalProver
from fallow_coordinator.store.journal_reader import JOURNAL_FILE, JournalReader
from fallow_coordinator.store.sqlite import SqliteStore
from fallow_coordinator.store.view_file import VIEWS_FILE, view_rows
from fallow_coordinator.store.views import SqliteViews

SIGN = signer_of(PrivateKey.generate())
RECORDS = 5 * RUN_RECORDS + 77
SETTINGS = FollowerSettings(chunk_records=100, segment_records=2 * RUN_RECORDS)


def grown(folder: Path, records: int) -> SqliteStore:
    store = SqliteStore(folder)
    grow(store, records)
    return store


def grow(store: SqliteStore, records: int) -> None:
    first = store.last_sequence + 1
    store.append(
        expected_sequence=store.last_sequence,
        events=[
            (number, JournalStarted(b"id") if number == 1 else AccountCreated(AccountId(f"account-{number}"), "name"))
            for number in range(first, first + records)
        ],
        payloads={},
    )


def leaves_of(folder: Path) -> list[bytes]:
    with JournalReader(folder / JOURNAL_FILE) as journal:
        leaves: list[bytes] = []
        while stored := journal.stored(after_sequence=len(leaves), limit=1_000):
            leaves += [record.leaf for record in stored]
        return leaves


def follow(folder: Path, *, seal: bool = False) -> None:
    follower = Follower(folder, SETTINGS, SIGN)
    follower.catch_up()
    if seal:
        follower.write_snapshot()
        while follower.seal_step():
            pass
    follower.close()


def check_proofs(folder: Path, sizes: Sequence[int]) -> None:
    """Every proof that matters, against leaves that were all read."""
    leaves, views = leaves_of(folder), SqliteViews(folder)
    prover = JournalProver(folder, views)
    assert prover.size() == len(leaves)
    for size in sizes:
        root = prover.root(size)
        assert root == root_of(leaves[:size]), size
        for wanted in ([1], [size], [1, 2, 3, size // 2, size], list(range(max(1, size - 600), size))):
            sequences = sorted({sequence for sequence in wanted if 1 <= sequence <= size})
            proof = prover.inclusion(sequences, size)
            shown = {record.sequence - 1: record.leaf for found in prover.records(sequences) for record in found}
            assert sorted(shown) == [sequence - 1 for sequence in sequences]
            assert root_shown(shown, size, proof) == root
        for old_size in (1, 255, 256, 257, size - 1, size):
            check_consistency(
                old_size=min(old_size, size),
                old_root=Digest(root_of(leaves[: min(old_size, size)])),
                size=size,
                root=root,
                proof=prover.consistency(min(old_size, size), size),
            )
    prover.close()
    views.close()


def test_proofs_hold_with_views_behind_up_to_date_and_with_sealed_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "JOURNAL_TAIL_RECORDS", 3)
    store = grown(tmp_path, 300)
    follow(tmp_path)
    grow(store, RECORDS - 300)
    check_proofs(tmp_path, (300, RECORDS))
    follow(tmp_path, seal=True)
    check_proofs(tmp_path, (1, RUN_RECORDS, RECORDS - 1, RECORDS))
    while store.let_go_of_sealed(300):
        pass
    check_proofs(tmp_path, (RECORDS,))
    grow(store, RUN_RECORDS)
    follow(tmp_path)
    check_proofs(tmp_path, (RECORDS, RECORDS + RUN_RECORDS))
    store.close()


def test_nodes_are_the_same_however_often_the_follower_stopped(tmp_path: Path) -> None:
    state = tmp_path / "state"
    store = grown(state, 10)
    for count in (0, 245, 1, 1, 600, 300):
        if count:
            grow(store, count)
        follow(state, seal=True)
    store.close()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(state / JOURNAL_FILE, fresh / JOURNAL_FILE)
    follow(fresh)
    nodes = view_rows(state / VIEWS_FILE)[1]["tree_nodes"]
    assert nodes == view_rows(fresh / VIEWS_FILE)[1]["tree_nodes"]
    assert [number for number, _ in nodes] == list(range(4))
