"""Every program of the corpus ends in a clear refusal or is contained; none reaches anybody else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from adversarial.attackers import Submitter, submitter
from adversarial.hostile_corpus import corpus
from adversarial.hostile_models import Fate, Hostile, loop
from engine_children import inspected
from engine_models import FEATURES, PROGRAM_FILE, dense_model, tensor_manifest
from fallow.bundle import BundleManifest, InspectionReport
from fallow.limits import GIB, REPORT_BYTES_MAX
from fallow.schema import DType, TensorColumn
from fallow.v1 import job_service_pb2
from fallow.wire.bundle import encode_manifest, report_to_message
from fallow_worker.engine.onnx_graph import examine
from fallow_worker.engine.spawn import ChildGoneError
from integration.harness import coordinator

pytestmark = pytest.mark.processes

INSPECTING = job_service_pb2.BUNDLE_STATE_INSPECTING
CORPUS = {program.name: program for program in corpus()}
UNRUN = [name for name, program in CORPUS.items() if program.fate is Fate.REFUSED_UNRUN]
RUN = [name for name, program in CORPUS.items() if program.fate is not Fate.REFUSED_UNRUN]


def manifest_of(model: bytes) -> BundleManifest:
    return tensor_manifest(model, output_columns=(TensorColumn("y", DType.FLOAT32, (FEATURES,)),))


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 80


@pytest.mark.parametrize("name", UNRUN)
def test_what_a_look_can_tell_is_refused_before_it_runs(name: str) -> None:
    program = CORPUS[name]
    refusals = examine(program.model, PROGRAM_FILE).refusals
    assert refusals and program.words in " ".join(refusals), refusals


@pytest.mark.parametrize("name", [*RUN, "names_that_fill_a_report", "names_with_escape_sequences"])
def test_what_must_be_tried_is_refused_or_contained(name: str) -> None:
    program = CORPUS[name]
    report = _report(program)
    if program.fate is Fate.CRASH:
        assert report is None
    if report is None:
        assert program.fate in {Fate.CRASH, Fate.REFUSED}, "its child died, which refuses it"
        return
    _check(program, report)


def _report(program: Hostile) -> InspectionReport | None:
    manifest = manifest_of(program.model)
    try:
        return inspected(manifest, {PROGRAM_FILE: program.model}, data_bytes_max=GIB).report
    except ChildGoneError:
        return None


def _check(program: Hostile, report: InspectionReport) -> None:
    assert report.accepted != bool(report.refusals)
    assert not (report.accepted and program.fate in {Fate.REFUSED, Fate.REFUSED_UNRUN, Fate.CRASH})
    if report.accepted and program.fate is Fate.LONE:
        assert (report.canonical_batch_rows, report.neighbour_dependent) == (1, True)
    assert all(refusal.isprintable() for refusal in report.refusals)
    assert report_to_message(report).ByteSize() < REPORT_BYTES_MAX
    assert report.memory_bytes_peak < GIB


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_whole_corpus_goes_through_a_real_coordinator_and_honest_bundles_beside_it(tmp_path: Path) -> None:
    with coordinator(tmp_path / "state", operator_worker=True) as service:
        line = service.new_token("--role", "client", "--uses", "100")
        async with submitter(line, tmp_path) as honest:
            programs = list(CORPUS.values())
            for start in range(0, len(programs), 16):
                async with submitter(line, tmp_path) as attacker:
                    batch = programs[start : start + 16]
                    digests = [await _register(attacker, program.model) for program in batch]
                    good = await _inspected(
                        honest, await _register(honest, dense_model(outputs=FEATURES, hidden=start + 5))
                    )
                    assert good.report.accepted
                    for program, digest in zip(batch, digests, strict=True):
                        status = await _inspected(attacker, digest)
                        accepted = status.state == job_service_pb2.BUNDLE_STATE_ACCEPTED
                        assert accepted or status.reason, program.name
                        assert not accepted or program.fate in {Fate.ANY, Fate.LONE}, program.name
        assert service.running()
        workers = service.cli("worker", "list")["workers"]
        assert [worker["connected"] for worker in workers] == [True]


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_programs_that_run_without_end_keep_an_honest_one_waiting_for_one_limit_only(tmp_path: Path) -> None:
    with coordinator(tmp_path / "state", operator_worker=True) as service:
        line = service.new_token("--role", "client", "--uses", "10")
        async with submitter(line, tmp_path) as attacker, submitter(line, tmp_path) as honest:
            slow = [await _register(attacker, _slow_model(seed)) for seed in range(3)]
            good = await _register(honest, dense_model(outputs=FEATURES))
            status = await _inspected(honest, good)
            assert status.state == job_service_pb2.BUNDLE_STATE_ACCEPTED, status.reason
            assert (await _status(attacker, slow[1])).state == INSPECTING, "it waited for one of them, not for two"
            refused = await _inspected(attacker, slow[0])
            assert refused.state == job_service_pb2.BUNDLE_STATE_REFUSED
            assert "too long" in refused.reason


def _slow_model(seed: int) -> bytes:
    """Ten thousand products of matrices, each of the one before."""
    weights = np.random.default_rng(seed).standard_normal((1024, 1024)).astype(np.float32)
    return loop(
        np.array(9_999, np.int64),
        helper.make_node("ReduceMax", ["carried"], ["most"], keepdims=0),
        helper.make_node("Mul", ["w", "most"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "w"], ["product"]),
        helper.make_node("ReduceMax", ["product"], ["top"], keepdims=0),
        helper.make_node("Add", ["carried", "top"], ["next"]),
        w=weights,
    )


async def _register(who: Submitter, model: bytes) -> bytes:
    await who.upload(model)
    return (await who.register(encode_manifest(manifest_of(model)))).bundle_digest


async def _inspected(who: Submitter, digest: bytes) -> job_service_pb2.BundleStatus:
    async with asyncio.timeout(300):
        while True:
            status = await _status(who, digest)
            if status.state != INSPECTING:
                return status
            await asyncio.sleep(0.2)


async def _status(who: Submitter, digest: bytes) -> job_service_pb2.BundleStatus:
    request = job_service_pb2.GetBundleRequest(bundle_digest=digest)
    return (await who.jobs.GetBundle(request, timeout=10)).status
