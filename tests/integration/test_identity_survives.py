"""Identity is the key: certificates that ended, proxies on the way, wrong servers; with real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fallow.credentials import Credentials
from integration.harness import CoordinatorService, coordinator, spawn, wait_for, worker
from integration.proxies import connect_proxy, inspecting_context

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

FAKETIME = shutil.which("faketime")
DAY_S = 86_400


def later(days: int) -> dict[str, str]:
    """The environment of a process whose clock is so many days ahead."""
    library = next(Path("/usr/lib").rglob("libfaketimeMT.so.1"))
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"+{days}d",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
    }


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True, text=True, timeout=90, check=False, env={**os.environ, **(environment or {})},
    )  # fmt: skip


def status_of(folder: Path) -> dict[str, object]:
    try:
        said: dict[str, object] = json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return said


def session_of(folder: Path) -> object:
    return status_of(folder).get("session")


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.parametrize(("days", "renews"), [(30, True), (95, False)])
def test_a_worker_comes_back_after_its_certificate_ended(tmp_path: Path, days: int, renews: bool) -> None:
    state, folder = tmp_path / "coordinator", tmp_path / "worker"
    with coordinator(state) as service, worker(service, folder, "--executor", "process"):
        wait_for(lambda: session_of(folder) == "online", 60, "the worker's first session")
        before = Credentials.load(folder)
    with coordinator(state, environment=later(days)) as service:
        log = folder / "later.log"
        process = spawn(
            ["-m", "fallow_worker", "start", "--state", str(folder), "--executor", "process"], log, later(days)
        )
        try:
            if renews:
                wait_for(
                    lambda: Credentials.load(folder).not_after_ms > before.not_after_ms, 60, "a renewed certificate"
                )
                wait_for(lambda: session_of(folder) == "online", 60, "a session with it")
                assert Credentials.load(folder).party_id == before.party_id
                # A client whose certificate ended does it by itself as well.
                listed = command(
                    "fallow.cli", "job", "list", "--login", service.facts["client_credentials"], environment=later(days)
                )
                assert listed.returncode == 0, listed.stderr
            else:
                wait_for(lambda: "94 days ago" in log.read_text(), 60, "the words that say why not")
                assert "new join line" in log.read_text()
        finally:
            process.terminate()
            process.wait(30)


def test_everything_goes_through_a_connect_proxy(shared_coordinator: CoordinatorService, tmp_path: Path) -> None:
    with connect_proxy(login="lab:secret") as proxy:
        environment = {"https_proxy": proxy.url, "no_proxy": ""}
        line = shared_coordinator.new_token("--role", "client")
        joined = command("fallow.cli", "login", line, "--folder", str(tmp_path / "client"), environment=environment)
        assert joined.returncode == 0, joined.stderr
        facts = shared_coordinator.facts
        assert facts["enrollment_endpoint"] in proxy.asked
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "large").write_bytes(os.urandom(100_000))
        listed = command("fallow.cli", "job", "list", "--login", str(tmp_path / "client"), environment=environment)
        assert listed.returncode == 0, listed.stderr
        assert facts["control_endpoint"] in proxy.asked
        asked = len(proxy.asked)
        direct = {"https_proxy": proxy.url, "no_proxy": "example.org,127.0.0.0/8"}
        listed = command("fallow.cli", "job", "list", "--login", str(tmp_path / "client"), environment=direct)
        assert listed.returncode == 0 and len(proxy.asked) == asked


def test_who_answers_instead_of_the_coordinator_is_named(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    line = shared_coordinator.new_token("--role", "worker")

    def refusal(environment: dict[str, str]) -> str:
        done = command("fallow_worker", "join", line, "--state", str(tmp_path / "worker"), environment=environment)
        assert done.returncode == 1
        return done.stderr

    with connect_proxy(tls=inspecting_context(tmp_path, "Corporate Inspection CA")) as proxy:
        said = refusal({"https_proxy": proxy.url, "no_proxy": ""})
        assert "'Corporate Inspection CA'" in said and "the proxy 127.0.0.1:" in said and "intercepts TLS" in said
    with connect_proxy(refuses="403 Forbidden") as proxy:
        said = refusal({"https_proxy": proxy.url, "no_proxy": ""})
        assert "does not connect to" in said and "403 Forbidden" in said
    said = refusal({"https_proxy": "http://127.0.0.1:1", "no_proxy": ""})
    assert "the proxy of https_proxy at 127.0.0.1:1 cannot be reached: nothing listens there" in said
