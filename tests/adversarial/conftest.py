"""One coordinator that all attacks share: whatever one of them does, the next must find it as it should be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.harness import CoordinatorService, coordinator


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorService]:
    """A coordinator without workers; it must have lived through every test of the session."""
    with coordinator(tmp_path_factory.mktemp("target"), "--heartbeat", "5s") as service:
        yield service
        assert service.running(), service.tail()
        assert "engine.undecided" not in service.log.read_text(errors="replace")
        assert "Traceback" not in service.log.read_text(errors="replace")


@pytest.fixture(scope="session")
def accounts(target: CoordinatorService) -> str:
    """A join line for clients that gives each of them an account of its own."""
    return target.new_token("--role", "client", "--uses", "1000")
