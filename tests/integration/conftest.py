"""What integration tests share: one coordinator for all tests that do it no lasting harm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.harness import CoordinatorService, coordinator

HEARTBEAT_S = 2


@pytest.fixture(scope="session")
def shared_coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """A coordinator without workers, on free loopback ports; every test joins with parties of its own."""
    with coordinator(tmp_path_factory.mktemp("coordinator"), "--heartbeat", f"{HEARTBEAT_S}s") as service:
        yield service
