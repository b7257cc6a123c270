"""Models and habits that users bring: what comes back is what the runtime gives, row by row, or says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fallow.bundle_file import Bundle
from fallow.client.blocking import Client, connect
from fallow.errors import FallowError, Reason
from fallow.job import JobOptions
from integration.harness import CoordinatorService, worker

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

Rows = dict[str, NDArray[Any]]
F = TensorProto.FLOAT


@pytest.fixture(scope="module")
def client(shared_coordinator: CoordinatorService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client whose jobs one worker inspects and runs."""
    line = shared_coordinator.new_token("--role", "worker", "--tier", "operator")
    folder = tmp_path_factory.mktemp("worker")
    arguments = ("--tasks", "inspect,map", "--executor", "process")
    with (
        worker(shared_coordinator, folder, *arguments, join_line=line),
        connect(shared_coordinator.facts["client_credentials"]) as client,
    ):
        yield client


def saved(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], *weights: Any, **about: Any) -> Path:
    """A model at `path`; values are (name, element type, shape)."""
    given = [helper.make_tensor_value_info(*value) for value in inputs]
    made = [helper.make_tensor_value_info(*value) for value in outputs]
    if about.get("ir_version", 8) < 4:
        given += [helper.make_tensor_value_info(one.name, one.data_type, list(one.dims)) for one in weights]
    graph = helper.make_graph(nodes, "graph", given, made, list(weights))
    opset = helper.make_opsetid("", about.pop("opset", 17))
    onnx.save(helper.make_model(graph, opset_imports=[opset], **({"ir_version": 8} | about)), path)
    return path


def fixed_batch(path: Path) -> tuple[Path, Rows]:
    """Always three rows, and what is added depends on the slot."""
    steps = numpy_helper.from_array(np.array([[1.0], [2.0], [3.0]], np.float32), "steps")
    saved(path, [helper.make_node("Add", ["x", "steps"], ["y"])], [("x", F, [3, 2])], [("y", F, [3, 2])], steps)
    return path, {"x": np.arange(18, dtype=np.float32).reshape(9, 2)}


def many_kinds(path: Path) -> tuple[Path, Rows]:
    """Several inputs and outputs of several types, one number a row among them; the row axis has an odd name."""
    nodes = [
        helper.make_node("Cast", ["h:0"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Not", ["flag"], ["not flag"]),
        helper.make_node("Add", ["n", "n"], ["twice"]),
    ]
    inputs = [("h:0", TensorProto.FLOAT16, ["Abc", 1]), ("flag", TensorProto.BOOL, ["Abc"])]
    inputs.append(("n", TensorProto.INT64, ["Abc", 2, 2]))
    outputs = [("wide", TensorProto.DOUBLE, ["Abc", 1]), ("not flag", TensorProto.BOOL, ["Abc"])]
    saved(path, nodes, inputs, [*outputs, ("twice", TensorProto.INT64, ["Abc", 2, 2])])
    chance = np.random.default_rng(1)
    return path, {
        "h:0": chance.normal(size=(5, 1)).astype(np.float16),
        "flag": np.array([True, False, True, True, False]),
        "n": chance.integers(-(2**61), 2**61, (5, 2, 2)),
    }


def old_with_weights_as_inputs(path: Path) -> tuple[Path, Rows]:
    """IR 3 and opset 9, as exporters wrote before 2019."""
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32)[::-1].copy(), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    saved(path, [node], [("x", F, ["n", 3])], [("y", F, ["n", 3])], weights, opset=9, ir_version=3)
    return path, {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}


def loop(path: Path) -> tuple[Path, Rows]:
    """A subgraph that runs five times."""
    taken: list[Any] = [("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []), ("a", F, None)]
    given: list[Any] = [("d", TensorProto.BOOL, []), ("b", F, None)]
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "one"], ["b"]), helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [helper.make_tensor_value_info(*value) for value in taken],
        [helper.make_tensor_value_info(*value) for value in given],
    )
    one, trips = numpy_helper.from_array(np.array(1, np.float32), "one"), numpy_helper.from_array(np.array(5), "trips")
    node = helper.make_node("Loop", ["trips", "", "x"], ["y"], body=body)
    saved(path, [node], [("x", F, ["n", 2])], [("y", F, ["n", 2])], one, trips)
    return path, {"x": np.array([[np.nan, 1.0], [np.inf, -0.0], [1e-45, 3e38]], np.float32)}


@pytest.mark.parametrize("make", [fixed_batch, many_kinds, old_with_weights_as_inputs, loop])
def test_models_of_all_sorts_give_what_the_runtime_gives(
    client: Client, make: Callable[[Path], tuple[Path, Rows]], tmp_path: Path
) -> None:
    path, rows = make(tmp_path / "model.onnx")
    table = client.map(Bundle.from_onnx(path), rows, data="public").table()
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch = session.get_inputs()[0].shape[0]
    step = batch if isinstance(batch, int) else len(table)
    for output in session.get_outputs():
        parts = [
            session.run([output.name], {name: values[start : start + step] for name, values in rows.items()})[0]
            for start in range(0, len(table), step)
        ]
        wanted = np.concatenate(parts)
        got = np.asarray(table.column(output.name).to_pylist(), wanted.dtype)
        np.testing.assert_array_equal(got, wanted)


def test_rows_that_fail_leave_the_others_and_what_was_kept_in_place(client: Client, tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.arange(10, dtype=np.float32) * 1.5, "table")
    node = helper.make_node("Gather", ["table", "i"], ["y"], axis=0)
    path = saved(tmp_path / "m.onnx", [node], [("i", TensorProto.INT64, ["n"])], [("y", F, ["n"])], table)
    count = 3_000
    indexes = np.random.default_rng(2).integers(0, 10, count)
    spoiled = set(range(7, count, 13))
    indexes[sorted(spoiled)] = 99
    names = [f"row {i}" for i in range(count)]
    job = client.map(Bundle.from_onnx(path), {"i": indexes, "name": names}, data="public", keep="name")
    saved_to = job.save(tmp_path / "out.parquet")
    assert (saved_to.rows, saved_to.failed_rows) == (count - len(spoiled), len(spoiled))
    for row in pq.read_table(saved_to.path).to_pylist():
        assert row["fallow.row"] not in spoiled
        assert (row["name"], row["y"]) == (f"row {row['fallow.row']}", indexes[row["fallow.row"]] * 1.5)
    assert saved_to.failed_path is not None
    for row in pq.read_table(saved_to.failed_path).to_pylist():
        assert row["fallow.row"] in spoiled
        assert (row["name"], row["fallow.cause"]) == (f"row {row['fallow.row']}", "row")
        assert "idx=99" in row["fallow.reason"]
    with pytest.raises(FallowError, match=r"failed: .*; row 0: .*idx=99"):
        client.map(Bundle.from_onnx(path), {"i": np.full(2, 99)}, data="public", failed_rows_max=0).table()


def test_rows_without_a_value_are_retried_as_a_job_of_their_own(client: Client, tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.arange(10, dtype=np.float32) * 1.5, "table")
    node = helper.make_node("Gather", ["table", "i"], ["y"], axis=0)
    path = saved(tmp_path / "m.onnx", [node], [("i", TensorProto.INT64, ["n"])], [("y", F, ["n"])], table)
    # More than one task lists, in several blocks of the blob service.
    indexes = np.where(np.arange(20_000) % 40 == 3, 99, np.arange(20_000) % 10)
    spoiled = np.flatnonzero(indexes == 99).tolist()
    names = [f"row {i}" for i in range(len(indexes))]
    job = client.map(Bundle.from_onnx(path), {"i": indexes, "name": names}, data="public", keep="name", title="spoiled")
    assert job.wait().progress.rows_failed == len(spoiled)
    again = job.retry_failed()
    # None of them can have a value: that is no success.
    with pytest.raises(FallowError, match=r"none of its 500 rows has a value.*idx=99"):
        again.wait()
    assert again.status().title == "spoiled"
    third = again.retry_failed()
    third.wait(check=False)
    for retried in (again, third):
        failed = retried.table(partial=True)
        assert failed.column("first_row").to_pylist() == spoiled
        assert failed.column("name").to_pylist() == [f"row {row}" for row in spoiled]
        assert set(failed.column("fallow.status").to_pylist()) == {"failed"}
    job.delete()
    with pytest.raises(FallowError, match="not retained any more") as gone:
        job.retry_failed()
    assert gone.value.reason is Reason.JOB_DELETED


def test_rows_that_a_cancelled_job_never_reached_are_retried_and_put_together(client: Client, tmp_path: Path) -> None:
    path, rows = loop(tmp_path / "model.onnx")
    job = client.map(Bundle.from_onnx(path), rows, data="public")
    job.cancel()
    job.wait(check=False)
    done = job.table(partial=True)
    if len(done) < len(rows["x"]):
        retried = job.retry_failed().table()
        missing = set(range(len(rows["x"]))) - set(done.column("fallow.row").to_pylist())
        assert retried.column("first_row").to_pylist() == sorted(missing)
        np.testing.assert_array_equal(
            np.asarray(retried.column("y").to_pylist(), np.float32), rows["x"][sorted(missing)] + 5
        )
    else:
        with pytest.raises(FallowError, match="has a value"):
            job.retry_failed()


def test_a_job_may_be_told_that_no_row_needs_a_value(client: Client, tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.arange(10, dtype=np.float32), "table")
    node = helper.make_node("Gather", ["table", "i"], ["y"], axis=0)
    path = saved(tmp_path / "m.onnx", [node], [("i", TensorProto.INT64, ["n"])], [("y", F, ["n"])], table)
    bundle, rows = Bundle.from_onnx(path), {"i": np.full(2, 99)}
    with pytest.raises(FallowError, match=r"none of its 2 rows has a value"):
        client.map(bundle, rows, data="public").wait()
    allowed = client.map(bundle, rows, data="public", options=JobOptions(all_rows_may_fail=True))
    assert allowed.wait().progress.rows_failed == 2


def test_an_output_without_rows_is_refused_with_a_way_on(client: Client, tmp_path: Path) -> None:
    constant = numpy_helper.from_array(np.ones(3, np.float32))
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Constant", [], ["c"], value=constant)]
    path = saved(tmp_path / "m.onnx", nodes, [("x", F, ["n"])], [("y", F, ["n"]), ("c", F, [3])])
    rows = np.arange(4, dtype=np.float32)
    with pytest.raises(FallowError, match=r"'c' has no row axis: .*--outputs") as error:
        client.map(Bundle.from_onnx(path), rows, data="public").table()
    assert error.value.reason is Reason.JOB_FAILED
    job = client.map(Bundle.from_onnx(path, outputs="y"), rows, data="public")
    assert job.table().column("y").to_pylist() == [-0.0, -1.0, -2.0, -3.0]


def test_a_real_fork_is_told_instead_of_crashing(client: Client, shared_coordinator: CoordinatorService) -> None:
    script = """
import os, sys
from fallow.client import connect
from fallow.errors import FallowError
with connect(sys.argv[1]) as client:
    child = os.fork()
    if child == 0:
        code = 9
        try:
            client.jobs()
        except FallowError as error:
            code = 7 if "forked" in error.message else 8
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    client.jobs()
"""
    command = [sys.executable, "-c", script, shared_coordinator.facts["client_credentials"]]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
