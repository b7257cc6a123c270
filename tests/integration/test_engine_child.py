"""A real engine child: how far it is locked in, and what it does with bundles, blocks and a vanished supervisor."""

from __future__ import annotations

import os
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from engine_children import aligned, answer, child, load, run, send_block
from engine_models import (
    FEATURES,
    INPUT_DIGEST,
    NONCE,
    OUTPUT_DIGEST,
    PROGRAM_FILE,
    dense_model,
    encoded,
    gather_model,
    onnx_model,
    tensor_manifest,
    text_bundle,
)
from fallow.bundle import BundleManifest
from fallow.errors import FallowError, Reason
from fallow.row_block import RowBlock
from fallow.schema import DType, TensorColumn
from fallow.session import Cause, SandboxLevel
from fallow_worker.engine import spawn
from fallow_worker.engine.chain import Chain
from fallow_worker.engine.protocol import (
    EXIT_DONE,
    EXIT_PARENT_GONE,
    EXIT_PROTOCOL,
    EXIT_START_FAILED,
    Done,
    Failed,
    Loaded,
    Progress,
    SpawnOptions,
    cause_of_exit,
)
from fallow_worker.engine.sandbox import can_filter_calls, landlock_abi
from fallow_worker.engine.spawn import ChildGoneError, child_environment, probe_level, spawn_child

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the lock-down is Linux's"),
]
needs_full = pytest.mark.skipif(
    landlock_abi() == 0 or not can_filter_calls(), reason="this kernel has no Landlock or the machine no filter"
)

DENSE = dense_model()
DENSE_MANIFEST = tensor_manifest(DENSE)


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, FEATURES), dtype=np.float32)}


def status_of_threads(process: int) -> list[dict[str, str]]:
    statuses: list[dict[str, str]] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        statuses.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return statuses


@needs_full
def test_a_child_reaches_the_full_level_and_says_what_was_denied() -> None:
    with child(threads=2) as (_, ready):
        assert ready.level is SandboxLevel.FULL
        assert ready.permitted == ()
        assert set(ready.denied) == {
            "open",
            "open-runtime",
            "write",
            "socket",
            "local-socket",
            "fork",
            "exec",
            "signal",
        }
        assert ready.execution_class.startswith("ort-")


@needs_full
def test_the_level_can_be_probed_without_a_bundle() -> None:
    assert probe_level().level is SandboxLevel.FULL


def test_a_probe_that_finds_no_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fallow_worker.engine.spawn.import_roots", lambda: (str(Path(spawn.__file__).parents[2]),))
    with pytest.raises(FallowError) as unavailable:
        probe_level()
    assert unavailable.value.reason is Reason.EXECUTOR_UNAVAILABLE
    assert "fallow[cpu]" in unavailable.value.hint


@needs_full
def test_every_thread_of_a_working_child_is_filtered_and_gains_no_privileges() -> None:
    manifest, files = text_bundle()
    with child(threads=3) as (spawned, _):
        assert isinstance(load(spawned, manifest, files), Loaded)
        done, _ = run(spawned, manifest, {"content": [b"some content"] * 500})
        assert isinstance(done, Done)
        statuses = status_of_threads(spawned.process.pid)
        assert len(statuses) >= 4
        for status in statuses:
            assert status["Seccomp"] == "2", status["Name"]
            assert status["NoNewPrivs"] == "1", status["Name"]


@pytest.mark.parametrize(
    ("level_max", "expected"),
    [
        (SandboxLevel.NO_FILES, SandboxLevel.NO_FILES),
        (SandboxLevel.LIMITS, SandboxLevel.LIMITS),
        (SandboxLevel.NONE, SandboxLevel.NONE),
    ],
)
@needs_full
def test_a_weaker_lock_down_is_reported_as_such(level_max: SandboxLevel, expected: SandboxLevel) -> None:
    with child(level_max=level_max) as (_, ready):
        assert ready.level is expected
        assert "socket" in ready.permitted


def test_a_child_inherits_nothing_but_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        with child() as (spawned, _):
            folder = Path(f"/proc/{spawned.process.pid}")
            names = {entry.split("=")[0] for entry in (folder / "environ").read_text().split("\0") if entry}
            assert names == set(child_environment())
            assert names.isdisjoint({"HOME", "AWS_SECRET_ACCESS_KEY", "USER"})
            targets = sorted(str(entry.readlink()) for entry in (folder / "fd").iterdir())
            ours = ("/dev/null", "/memfd:fallow-", "socket:", "pipe:")
            assert not [target for target in targets if not target.startswith(ours)]
            assert str((folder / "cwd").readlink()).endswith(" (deleted)")
            assert os.getsid(spawned.process.pid) == spawned.process.pid
    finally:
        os.close(leaked)


def test_a_locked_in_child_gives_the_bits_of_an_unlocked_process() -> None:
    chain = Chain(
        DENSE_MANIFEST,
        {PROGRAM_FILE: DENSE},
        input_schema_digest=INPUT_DIGEST,
        output_schema_digest=OUTPUT_DIGEST,
        batch_rows=4,
    )
    columns = rows(1001)
    here = chain.run(RowBlock.parse(encoded(DENSE_MANIFEST, columns)), nonce=NONCE).block
    for threads in (1, 2):
        with child(threads=threads) as (spawned, ready):
            loaded = load(spawned, DENSE_MANIFEST, {PROGRAM_FILE: DENSE})
            assert isinstance(loaded, Loaded)
            assert loaded.execution_class == f"{ready.execution_class}/fp32/b4"
            done, block = run(spawned, DENSE_MANIFEST, columns)
            assert isinstance(done, Done), done
            assert (done.rows, done.failed_rows, done.failures) == (1001, 0, ())
            assert done.usage.cpu_microseconds > 0
            assert done.usage.memory_bytes_peak > 1 << 20
            assert block == here


def test_blocks_sent_ahead_are_answered_in_order() -> None:
    with child() as (spawned, _):
        load(spawned, DENSE_MANIFEST, {PROGRAM_FILE: DENSE})
        blocks = [encoded(DENSE_MANIFEST, rows(count, seed=count)) for count in (5, 900)]
        second = aligned(len(blocks[0]))
        send_block(spawned, blocks[0], task="first")
        send_block(spawned, blocks[1], task="second", at=second)
        answers = [answer(spawned), answer(spawned)]
        assert [(done.task, done.rows) for done in answers if isinstance(done, Done)] == [("first", 5), ("second", 900)]


def test_failed_rows_come_back_with_causes_and_the_child_goes_on() -> None:
    model = gather_model()
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.INT64, (1,)),),
        output_columns=(TensorColumn("y", DType.FLOAT32, (2,)),),
    )
    with child() as (spawned, _):
        load(spawned, manifest, {PROGRAM_FILE: model})
        indexes = np.arange(600, dtype=np.int64).reshape(-1, 1)
        done, _ = run(spawned, manifest, {"x": indexes})
        assert isinstance(done, Done)
        assert done.failed_rows == 596
        assert len(done.failures) == 256
        assert {failure.cause for failure in done.failures} == {Cause.ROW}
        again, _ = run(spawned, manifest, {"x": indexes[:4]})
        assert isinstance(again, Done)
        assert again.failed_rows == 0


def test_a_malformed_block_fails_its_task_and_not_the_child() -> None:
    with child() as (spawned, _):
        load(spawned, DENSE_MANIFEST, {PROGRAM_FILE: DENSE})
        send_block(spawned, b"nonsense" * 100)
        failed = answer(spawned)
        assert isinstance(failed, Failed)
        assert (failed.reason, failed.cause) == (Reason.ROW_BLOCK_MALFORMED, Cause.PLATFORM)
        done, _ = run(spawned, DENSE_MANIFEST, rows(3))
        assert isinstance(done, Done)


def test_a_bundle_that_does_not_fit_its_program_names_the_tensor() -> None:
    manifest = tensor_manifest(DENSE, input_columns=(TensorColumn("x", DType.INT32, (FEATURES,)),))
    with child() as (spawned, _):
        failed = load(spawned, manifest, {PROGRAM_FILE: DENSE})
        assert isinstance(failed, Failed)
        assert (failed.reason, failed.cause, failed.field) == (Reason.BUNDLE_INVALID, Cause.PROGRAM, "inputs[x]")


def test_progress_comes_while_a_long_task_runs() -> None:
    manifest, model = slow_bundle(trips=200_000)
    with child() as (spawned, _):
        load(spawned, manifest, {PROGRAM_FILE: model}, canonical_batch_rows=1)
        send_block(spawned, encoded(manifest, {"x": np.zeros(12, np.float32)}))
        heard: list[int] = []
        while isinstance(message := spawned.receive(timeout_s=60), Progress):
            heard.append(message.rows_done)
        assert isinstance(message, Done)
        assert heard == sorted(heard)
        assert heard


def slow_bundle(trips: int) -> tuple[BundleManifest, bytes]:
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "carried"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("trip", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, ["rows"]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["rows"]),
        ],
    )
    model = onnx_model(
        [helper.make_node("Loop", ["limit", "yes", "x"], ["y"], body=body)],
        [("x", TensorProto.FLOAT, ["rows"])],
        [("y", TensorProto.FLOAT, ["rows"])],
        {"limit": np.array(trips, np.int64), "yes": np.array(True)},
    )
    manifest = tensor_manifest(
        model,
        input_columns=(TensorColumn("x", DType.FLOAT32, ()),),
        output_columns=(TensorColumn("y", DType.FLOAT32, ()),),
    )
    return manifest, model


def test_a_child_ends_when_its_supervisor_closes_the_socket() -> None:
    with child() as (spawned, _):
        spawned.control.shutdown(2)
        assert spawned.process.wait(20) == EXIT_DONE


@pytest.mark.parametrize("busy", [False, True])
def test_a_child_ends_with_its_supervisor_even_in_the_middle_of_work(busy: bool) -> None:
    manifest, model = slow_bundle(trips=20_000 if busy else 1)
    with child() as (spawned, _):
        load(spawned, manifest, {PROGRAM_FILE: model}, canonical_batch_rows=1)
        if busy:
            send_block(spawned, encoded(manifest, {"x": np.zeros(100_000, np.float32)}))
            assert isinstance(spawned.receive(timeout_s=30), Progress)
        spawned.let_go()
        assert spawned.process.wait(20) in {EXIT_PARENT_GONE, -signal.SIGIO}


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", struct.pack("<I", 4) + b"what", struct.pack("<I", 2) + b"{}"])
def test_what_is_no_message_ends_the_child_with_its_own_code(garbage: bytes) -> None:
    with child() as (spawned, _):
        spawned.control.sendall(garbage)
        with pytest.raises(ChildGoneError):
            spawned.receive(timeout_s=30)
        assert spawned.process.wait(20) == EXIT_PROTOCOL
        assert cause_of_exit(EXIT_PROTOCOL, program_loaded=True) is Cause.PLATFORM


def test_a_run_before_a_load_is_no_conversation() -> None:
    with child() as (spawned, _):
        send_block(spawned, encoded(DENSE_MANIFEST, rows(1)))
        assert spawned.process.wait(20) == EXIT_PROTOCOL


def test_the_output_memory_can_be_neither_shrunk_nor_grown() -> None:
    with child(output_bytes=1 << 20) as (spawned, _):
        descriptor = os.open(f"/proc/{spawned.process.pid}/fd/{memory_fd(spawned.process.pid, 'output')}", os.O_RDWR)
        try:
            for size in (0, 1 << 19, 1 << 21):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)


def test_the_input_memory_is_open_for_reading_only() -> None:
    with child() as (spawned, _):
        info = Path(f"/proc/{spawned.process.pid}/fdinfo/{memory_fd(spawned.process.pid, 'input')}").read_text()
        flags = int(next(line for line in info.splitlines() if line.startswith("flags:")).split()[1], 8)
        assert flags & os.O_ACCMODE == os.O_RDONLY


def memory_fd(process: int, name: str) -> int:
    for entry in Path(f"/proc/{process}/fd").iterdir():
        if str(entry.readlink()).startswith(f"/memfd:fallow-{name}"):
            return int(entry.name)
    raise AssertionError(f"no memory {name!r}")


def test_a_child_that_cannot_start_says_so_with_its_code_and_log(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = tuple(root for root in spawn.import_roots() if not Path(root, "numpy").is_dir())
    monkeypatch.setattr(spawn, "import_roots", lambda: roots)
    spawned = spawn_child(SpawnOptions())
    try:
        with pytest.raises(ChildGoneError):
            spawned.receive(timeout_s=30)
        assert spawned.process.wait(20) == EXIT_START_FAILED
        assert "numpy" in spawned.log_text()
    finally:
        spawned.close()
