"""Programs that mean harm hurt their own task and nothing else."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adversarial import hostile_programs
from engine_children import answer, child, inspected, load, run, send_block
from engine_models import FEATURES, PROGRAM_FILE, dense_model, encoded, tensor_manifest
from fallow.errors import Reason
from fallow.limits import GIB, MIB
from fallow.session import Cause
from fallow_worker.engine import sandbox
from fallow_worker.engine.protocol import EXIT_MEMORY, Done, Failed, Loaded, cause_of_exit
from fallow_worker.engine.spawn import ChildGoneError, SpawnedChild, import_roots

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the lock-down is Linux's"),
]

SEED = 20_261
KILL_SECONDS_MAX = 5.0


def set_off(spawned: SpawnedChild, program: hostile_programs.HostileProgram, **options: int) -> Done | Failed | int:
    """What came of it: an answer, or the return code of the child."""
    try:
        loaded = load(spawned, program.manifest, {PROGRAM_FILE: program.model}, **options)
        if isinstance(loaded, Failed):
            return loaded
        done, _ = run(spawned, program.manifest, program.rows)
    except ChildGoneError:
        return spawned.process.wait(KILL_SECONDS_MAX)
    return done


def is_sound(spawned: SpawnedChild) -> bool:
    """Whether a child still does honest work."""
    model = dense_model()
    done, _ = run(spawned, tensor_manifest(model), {"x": np.ones((2, FEATURES), np.float32)})
    return isinstance(done, Done) and done.failed_rows == 0


@pytest.mark.parametrize("gigabytes", [2, 64, 4096])
def test_a_memory_bomb_fails_its_row_below_the_limit_and_spares_the_others(gigabytes: int) -> None:
    program = hostile_programs.memory_bomb(gigabytes * GIB // 4)
    with child(data_bytes_max=GIB) as (spawned, _):
        outcome = set_off(spawned, program, canonical_batch_rows=1)
        if isinstance(outcome, int):
            assert cause_of_exit(outcome, program_loaded=True) is Cause.PROGRAM
            return
        assert isinstance(outcome, Done), outcome
        assert [(failure.row, failure.cause) for failure in outcome.failures] == [(1, Cause.ROW)]
        assert outcome.usage.memory_bytes_peak < GIB + 300 * MIB


def test_a_range_without_end_fails_its_row() -> None:
    with child(data_bytes_max=GIB) as (spawned, _):
        outcome = set_off(spawned, hostile_programs.range_bomb(), canonical_batch_rows=1)
        if isinstance(outcome, int):
            assert cause_of_exit(outcome, program_loaded=True) is Cause.PROGRAM
        else:
            assert isinstance(outcome, Done)
            assert outcome.failed_rows == 1


def test_an_endless_loop_can_be_killed_while_another_child_works() -> None:
    program = hostile_programs.endless_loop()
    model = dense_model()
    with child() as (looping, _), child() as (honest, _):
        assert isinstance(
            load(looping, program.manifest, {PROGRAM_FILE: program.model}, canonical_batch_rows=1), Loaded
        )
        send_block(looping, encoded(program.manifest, program.rows))
        assert isinstance(load(honest, tensor_manifest(model), {PROGRAM_FILE: model}), Loaded)
        assert is_sound(honest)
        assert looping.receive(timeout_s=0.5) is None
        started = time.monotonic()
        looping.kill()
        assert looping.process.wait(KILL_SECONDS_MAX) == -signal.SIGKILL
        assert time.monotonic() - started < KILL_SECONDS_MAX
        assert is_sound(honest)


def test_an_endless_loop_is_refused_at_inspection() -> None:
    program = hostile_programs.endless_loop()
    report = inspected(program.manifest, {PROGRAM_FILE: program.model}).report
    assert not report.accepted
    assert "no constant limit of trips" in report.refusals[0]


def test_outputs_of_another_shape_than_declared_fail_the_task() -> None:
    program = hostile_programs.shape_liar()
    with child() as (spawned, _):
        outcome = set_off(spawned, program, canonical_batch_rows=1)
        assert isinstance(outcome, Failed)
        assert (outcome.reason, outcome.cause) == (Reason.BUNDLE_INVALID, Cause.PROGRAM)


@pytest.mark.parametrize("number", range(12))
def test_broken_files_are_refused_run_or_kill_their_own_child(number: int) -> None:
    program = hostile_programs.broken_files(12, seed=SEED)[number]
    with child(data_bytes_max=GIB) as (spawned, _):
        outcome = set_off(spawned, program)
        if isinstance(outcome, int):
            assert cause_of_exit(outcome, program_loaded=True) is Cause.PROGRAM
        elif isinstance(outcome, Failed):
            assert outcome.cause is Cause.PROGRAM
            assert outcome.message
    report_of = inspected(program.manifest, {PROGRAM_FILE: program.model}).report
    assert report_of.accepted or report_of.refusals


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE])
def test_a_crash_is_seen_at_once_and_is_the_programs_fault(number: signal.Signals) -> None:
    program = hostile_programs.endless_loop()
    with child() as (spawned, _):
        load(spawned, program.manifest, {PROGRAM_FILE: program.model}, canonical_batch_rows=1)
        send_block(spawned, encoded(program.manifest, program.rows))
        os.kill(spawned.process.pid, number)
        with pytest.raises(ChildGoneError):
            answer(spawned, seconds=KILL_SECONDS_MAX)
        code = spawned.process.wait(KILL_SECONDS_MAX)
        assert code == -number
        assert cause_of_exit(code, program_loaded=True) is Cause.PROGRAM
        assert cause_of_exit(code, program_loaded=False) is Cause.PLATFORM


def test_deaths_tell_whose_fault_they_are() -> None:
    assert cause_of_exit(EXIT_MEMORY, program_loaded=True) is Cause.PROGRAM
    assert cause_of_exit(-signal.SIGKILL, program_loaded=True) is Cause.WORKER
    assert cause_of_exit(75, program_loaded=True) is Cause.PLATFORM


@pytest.mark.skipif(not sandbox.can_filter_calls(), reason="there is no filter for this machine")
def test_native_code_behind_the_filter_gets_nothing_from_the_kernel() -> None:
    """As a program that took the child over would: raw system calls, from threads older and younger than the filter."""
    script = Path(__file__).with_name("attack_from_inside.py")
    environment = {"PYTHONPATH": os.pathsep.join(import_roots())}
    finished = subprocess.run([sys.executable, script], env=environment, capture_output=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr.decode()
    answers: dict[str, int] = json.loads(finished.stdout)
    assert len(answers) > 500
    granted = {attack for attack, number in answers.items() if number not in {errno.EPERM, errno.ENOSYS}}
    assert not granted


@pytest.mark.skipif(sandbox.landlock_abi() == 0 or not sandbox.can_filter_calls(), reason="no full lock-down here")
def test_the_runtimes_own_threads_are_bound_too() -> None:
    """Threads that imports started, before the filter, are under it: the kernel says so of each."""
    with child(threads=2) as (spawned, ready):
        assert "open-runtime" in ready.denied
        names: set[str] = set()
        for task in Path(f"/proc/{spawned.process.pid}/task").iterdir():
            status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
            names.add(status["Name"])
            assert status["Seccomp"].strip() == "2"
        assert len(names) >= 1
