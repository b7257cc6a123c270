"""Appends to a journal for ever and tells on standard output what is acknowledged; a test kills it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fallow.ids import AccountId
from fallow_coordinator.core.events import AccountCreated
from fallow_coordinator.store.sqlite import SqliteStore


def main() -> None:
    store = SqliteStore(Path(sys.argv[1]))
    while True:
        first = store.last_sequence + 1
        numbers = range(first, first + 1 + first % 7)
        store.append(
            expected_sequence=store.last_sequence,
            events=[(number, AccountCreated(AccountId(f"account-{number}"), "x" * 100)) for number in numbers],
            payloads={},
        )
        os.write(1, f"{store.last_sequence}\n".encode())


if __name__ == "__main__":
    main()
