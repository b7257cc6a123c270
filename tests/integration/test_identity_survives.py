"""Identity is the key: certificates that ended, proxies on the way, wrong servers; with real processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine_models import FEATURES, dense_model
from fallow.bundle_file import Bundle
from fallow.client.blocking import connect
from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
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
        "FAKETIME": f"{days:+}d",
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


@pytest.mark.slow
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_a_worker_whose_clock_is_wrong_is_told_so_and_not_something_else(tmp_path: Path) -> None:
    with coordinator(tmp_path / "coordinator") as service:
        folder = tmp_path / "worker"
        with worker(service, folder, "--executor", "process"):
            wait_for(lambda: session_of(folder) == "online", 60, "the worker's first session")
        log = folder / "behind.log"
        start = ["-m", "fallow_worker", "start", "--state", str(folder), "--executor", "process"]
        process = spawn(start, log, later(-3))
        try:
            wait_for(lambda: "clock" in log.read_text(), 60, "the words about the clock")
            words = log.read_text()
            assert "days before" in words or "before its own certificate" in words, words
            assert "intercepts TLS" not in words and "Traceback" not in words
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


def test_blobs_travel_through_a_connect_proxy_and_who_opens_their_tls_is_named(
    shared_coordinator: CoordinatorService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, facts = Path(shared_coordinator.facts["client_credentials"]), shared_coordinator.facts
    monkeypatch.setenv("no_proxy", "")
    context = inspecting_context(tmp_path, "Corporate Inspection CA")

    def bundle(number: int) -> Bundle:
        model = tmp_path / f"{number}.onnx"
        model.write_bytes(dense_model(features=FEATURES + number))
        return Bundle.from_onnx(model)

    with connect_proxy(login="lab:secret") as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with connect(folder) as client:
            client.register(bundle(1))
        assert {facts["control_endpoint"], facts["blob_endpoint"]} <= set(proxy.asked)
    # A proxy that lets the control endpoint pass and opens the other.
    with connect_proxy(tls=context, opens=facts["blob_endpoint"]) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with connect(folder) as client, pytest.raises(FallowError) as refused:
            client.register(bundle(2))
        assert refused.value.reason is Reason.CERTIFICATE_FOREIGN
        assert "'Corporate Inspection CA'" in str(refused.value) and facts["blob_endpoint"] in str(refused.value)
    # The same on the way to the control endpoint: at once, and not after the client's patience.
    with connect_proxy(tls=context) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(FallowError) as refused, connect(folder):
            pass
        assert refused.value.reason is Reason.CERTIFICATE_FOREIGN and "Corporate" in str(refused.value)


@pytest.mark.slow
def test_rows_travel_through_connect_proxies_both_ways_and_a_worker_names_who_opens_its_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "negate.onnx"
    model.write_bytes(dense_model())
    bundle = Bundle.from_onnx(model)
    rows = np.zeros((20_000, FEATURES), np.float32)
    with coordinator(tmp_path / "coordinator", operator_worker=True) as service:
        folder, facts = Path(service.facts["client_credentials"]), service.facts
        with connect_proxy(login="lab:secret") as ours, connect_proxy(login="lab:secret") as theirs:
            monkeypatch.setenv("https_proxy", ours.url)
            monkeypatch.setenv("no_proxy", "")
            through = {"https_proxy": theirs.url, "no_proxy": ""}
            with (
                worker(service, tmp_path / "worker", "--executor", "process", environment=through),
                connect(folder) as client,
            ):
                assert len(client.map(bundle, rows, data="public").table()) == len(rows)
            for proxy in (ours, theirs):
                assert {facts["control_endpoint"], facts["blob_endpoint"]} <= set(proxy.asked)
            monkeypatch.delenv("https_proxy")
        context = inspecting_context(tmp_path, "Corporate Inspection CA")
        with connect_proxy(tls=context, opens=facts["blob_endpoint"]) as proxy:
            inspected = {"https_proxy": proxy.url, "no_proxy": ""}
            with (
                worker(service, tmp_path / "worker-2", "--executor", "process", environment=inspected) as second,
                connect(folder) as client,
            ):
                job = client.map(bundle, rows + 2, data="public")
                wait_for(lambda: "Corporate Inspection CA" in second.tail(100_000), 60, "the worker's word of it")
                job.cancel()


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


def test_images_enrol_themselves_and_copies_of_a_key_are_told_what_to_do(
    shared_coordinator: CoordinatorService, tmp_path: Path
) -> None:
    line = shared_coordinator.new_token("--role", "worker", "--uses", "10", "--tier", "managed")
    first, copy, image, clones = (tmp_path / name for name in ("first", "copy", "image", "clones"))
    machine = {"FALLOW_MACHINE_ID": "machine 1"}
    with worker(shared_coordinator, first, "--executor", "process", join_line=line, environment=machine) as service:
        wait_for(lambda: session_of(first) == "online", 60, "the first worker's session")
        # A copied disk holds the key and the resume token.
        shutil.copytree(first, copy)
        (copy / "lock").unlink()
        start = ["-m", "fallow_worker", "start", "--state", str(copy), "--executor", "process"]
        second = spawn(start, copy / "copy.log", {"FALLOW_MACHINE_ID": "machine 2"})
        try:
            said = wait_for(lambda: status_of(copy).get("last_error") or {}, 60, "a refusal")
            assert said["reason"] == "KEY_IN_USE" and "fallow-worker prepare-image" in said["message"]
            assert service.running() and session_of(first) == "online"
        finally:
            second.terminate()
            second.wait(30)
        assert session_of(first) == "online"
        # The way out that the refusal names.
        prepared = command("fallow_worker", "prepare-image", "--state", str(copy))
        assert prepared.returncode == 0, prepared.stderr
        assert not (copy / "key.pem").exists() and not (copy / "resume_token").exists()
        second = spawn(start, copy / "again.log", {"FALLOW_MACHINE_ID": "machine 2"})
        try:
            wait_for(lambda: session_of(copy) == "online", 60, "the copy as a worker of its own")
            assert Credentials.load(copy).party_id != Credentials.load(first).party_id
            assert session_of(first) == "online"
        finally:
            second.terminate()
            second.wait(30)
    bare = command("fallow_worker", "prepare-image", "--state", str(image))
    assert bare.returncode == 1 and "holds no join line" in bare.stderr
    assert command("fallow_worker", "prepare-image", line, "--state", str(image)).returncode == 0
    parties = set()
    for number in (1, 2):
        shutil.copytree(image, clones / str(number))
        log = clones / f"{number}.log"
        start = ["-m", "fallow_worker", "start", "--state", str(clones / str(number)), "--executor", "process"]
        clone = spawn(start, log, {"FALLOW_MACHINE_ID": f"clone {number}"})
        try:
            folder = clones / str(number)
            wait_for(lambda folder=folder: session_of(folder) == "online", 60, "a clone's first session")
            parties.add(Credentials.load(folder).party_id)
        finally:
            clone.terminate()
            clone.wait(30)
    assert len(parties) == 2


def test_one_port_leads_to_all_three_endpoints(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with coordinator(tmp_path / "coordinator", "--single-port", str(port), operator_worker=True) as service:
        endpoints = {service.facts[f"{name}_endpoint"] for name in ("enrollment", "control", "blob")}
        assert endpoints == {f"127.0.0.1:{port}"}
        wait_for(lambda: _accepts(port), 30, "the splice")
        login = command("fallow.cli", "login", service.client_join_line, "--folder", str(tmp_path / "client"))
        assert login.returncode == 0, login.stderr
        with (
            worker(service, tmp_path / "worker", "--executor", "process"),
            connect(tmp_path / "client") as client,
        ):
            model = tmp_path / "negate.onnx"
            model.write_bytes(dense_model())
            rows = np.zeros((20_000, FEATURES), np.float32)
            table = client.map(Bundle.from_onnx(model), rows, data="public").table()
            assert len(table) == 20_000
        # Whoever does not speak TLS is hung up on.
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
