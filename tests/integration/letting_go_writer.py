"""Appends to a journal for ever, lets go of what is sealed, and tells what is acknowledged; a test kills it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fallow.ids import AccountId
from fallow_coordinator.core.events import AccountCreated, Event, JournalStarted
from fallow_coordinator.store import sqlite


def event_of(number: int) -> Event:
    """What record `number` holds."""
    return JournalStarted(b"journal") if number == 1 else AccountCreated(AccountId(f"account-{number}"), "x" * 50)


def main() -> None:
    sqlite.JOURNAL_TAIL_RECORDS = 50  # so that short journals let go too
    store = sqlite.SqliteStore(Path(sys.argv[1]))
    while True:
        first = store.last_sequence + 1
        store.append(
            expected_sequence=store.last_sequence,
            events=[(number, event_of(number)) for number in range(first, first + 1 + first % 40)],
            payloads={},
        )
        os.write(1, f"{store.last_sequence}\n".encode())
        store.let_go_of_sealed(60)


if __name__ == "__main__":
    main()
