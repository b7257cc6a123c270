"""Questions about credits to the follower's file: statements, earnings, prices paid. Read-only."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fallow.credits import StatementLine
from fallow.ids import AccountId, PartyId
from fallow_coordinator.core.prices import PricePoint
from fallow_coordinator.ports import EarningsRow, StatementPage
from fallow_coordinator.store.failures import storage_failures
from fallow_coordinator.store.view_file import VIEWS_FILE

# Work is one line for each book, job and worker; everything else a line for each event.
_LINES = """SELECT min(at_ms), max(at_ms), what, book, sum(microcredits), job_id, worker_id, pool_id, note, count(*)
    FROM postings WHERE account_id = ? AND at_ms >= ? AND at_ms < ?
    GROUP BY CASE WHEN what = 'work' THEN 'work ' || book || ' ' || job_id || ' ' || worker_id
        ELSE sequence || ' ' || number END
    ORDER BY min(sequence), min(number) LIMIT ? OFFSET ?"""
_BALANCES = "SELECT book, sum(microcredits) FROM postings WHERE account_id = ? AND at_ms < ? GROUP BY book"
_EARNINGS = """SELECT at_ms / 86400000 * 86400000, pool_id, count(*), sum(rows), sum(rows_failed), sum(unit_micros),
        sum(microcredits), sum(contribution_microcredits), sum(energy_millijoules)
    FROM settlements WHERE worker_id = ? AND at_ms >= ? GROUP BY 1, 2 ORDER BY 1 DESC, 2"""
_PRICES = """SELECT device_class, price_microcredits_per_unit, count(*), sum(unit_micros), sum(microcredits)
    FROM settlements WHERE at_ms >= ? AND price_microcredits_per_unit > 0 AND microcredits > 0
    GROUP BY 1, 2 ORDER BY 1, 2"""
_SEQUENCE = "SELECT value FROM view_meta WHERE name = 'applied_sequence'"


class SqliteLedgerViews:
    """The LedgerViews port over the follower's file. Any thread may ask; one at a time. Empty until it begins."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / VIEWS_FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def statement(
        self, account_id: AccountId, *, since_ms: int, until_ms: int, offset: int, limit: int
    ) -> StatementPage:
        """A page of the account's statement, all of one moment."""
        with self._moment() as connection:
            if connection is None:
                return StatementPage((), {}, {}, 0)
            lines = connection.execute(_LINES, (account_id, since_ms, until_ms, limit, offset)).fetchall()
            return StatementPage(
                rows=[StatementLine(*line) for line in lines],
                opening=dict(connection.execute(_BALANCES, (account_id, since_ms)).fetchall()),
                closing=dict(connection.execute(_BALANCES, (account_id, until_ms)).fetchall()),
                sequence=_sequence(connection),
            )

    def earnings(self, worker_id: PartyId, *, since_ms: int) -> tuple[int, Sequence[EarningsRow]]:
        """(view_sequence, days, the newest first)."""
        with self._moment() as connection:
            if connection is None:
                return 0, ()
            rows = connection.execute(_EARNINGS, (worker_id, since_ms)).fetchall()
            return _sequence(connection), [EarningsRow(*row) for row in rows]

    def prices(self, *, since_ms: int) -> Mapping[str, Sequence[PricePoint]]:
        """What was paid, by class of devices, each rising by price."""
        found: dict[str, list[PricePoint]] = {}
        with self._moment() as connection:
            rows = [] if connection is None else connection.execute(_PRICES, (since_ms,)).fetchall()
        for device_class, price, tasks, unit_micros, microcredits in rows:
            found.setdefault(device_class, []).append(PricePoint(price, tasks, unit_micros, microcredits))
        return found

    def close(self) -> None:
        """Gives the file back."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _moment(self) -> Generator[sqlite3.Connection | None, None, None]:
        """The file as it stands at one moment; None while the follower has not made its tables."""
        with self._lock, storage_failures(self._path):
            if self._connection is None and self._path.exists():
                self._connection = sqlite3.connect(
                    f"{self._path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
                )
            connection = self._connection
            if connection is None:
                yield None
                return
            connection.execute("BEGIN")
            try:
                made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'settlements'").fetchone()
                yield connection if made else None
            finally:
                connection.execute("COMMIT")


def _sequence(connection: sqlite3.Connection) -> int:
    row = connection.execute(_SEQUENCE).fetchone()
    return int(row[0]) if row else 0
