"""The client against a coordinator that goes away, loses replies and breaks streams: every row comes once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from fake_coordinator import FakeCoordinator
from fallow.client import AsyncClient, Bundle, FolderSource, JobState, Reason, connect, connect_async
from fallow.client import submission as submission_module
from fallow.client.loop_thread import LoopThread
from fallow.client.results import ResultDecoder
from fallow.errors import FallowError
from fallow.ids import digest_of
from fallow.job import JobRowFailure, RowSpan, TaskResult
from fallow.rows import DecodedRows, RowCodec
from fallow.session import Cause
from fallow.wire.schema import encode_schema


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """float32[2] to float32[2]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture
def bytes_bundle(tmp_path: Path) -> Bundle:
    """Bytes to a label and a score."""
    given = helper.make_tensor_value_info("t", TensorProto.INT32, ["n", 4])
    scores = helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Cast", ["t"], ["s"], to=TensorProto.FLOAT)], "g", [given], [scores])
    path = tmp_path / "bytes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return Bundle.from_bytes_model(
        path,
        head_window=4,
        tail_window=4,
        head_tokens=2,
        tail_tokens=2,
        padding_token=256,
        labels=["a", "b", "c", "d"],
    )


def negated(rows: DecodedRows) -> dict[str, Any]:
    values = rows.columns["x"]
    assert isinstance(values, np.ndarray)
    return {"y": -values}


def lengths(rows: DecodedRows) -> dict[str, Any]:
    contents = rows.columns["bytes"]
    return {
        "label": [bytes(content).decode() for content in contents],  # type: ignore[arg-type]
        "label_score": np.asarray([len(content) for content in contents], dtype=np.float32),
    }


@pytest.fixture
async def coordinator(tmp_path: Path) -> AsyncIterator[FakeCoordinator]:
    fake = FakeCoordinator(tmp_path, negated)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def client(coordinator: FakeCoordinator) -> AsyncIterator[AsyncClient]:
    made = await connect_async(coordinator.credentials)
    yield made
    await made.close()


def rows_of(count: int) -> dict[str, Any]:
    return {"x": np.arange(2 * count, dtype=np.float32).reshape(count, 2), "name": [f"row {i}" for i in range(count)]}


def wanted(count: int) -> list[list[float]]:
    return (-rows_of(count)["x"]).tolist()  # type: ignore[no-any-return]


async def outcome(job: Any, order: Any = "row") -> list[tuple[int, list[float]]]:
    return [(row.position, row.values["y"].tolist()) async for row in job.results(order)]


async def test_rows_come_back_in_order_with_what_was_kept(client: AsyncClient, model: Path) -> None:
    job = await client.map(Bundle.from_onnx(model), rows_of(10), data="public", keep=["name"])
    rows = [row async for row in job.results()]
    assert [row.position for row in rows] == list(range(10))
    assert [row.values["y"].tolist() for row in rows] == wanted(10)
    assert [row.kept for row in rows] == [{"name": f"row {i}"} for i in range(10)]
    assert {row.status for row in rows} == {"unverified"}
    assert (await job.wait()).state is JobState.SUCCEEDED


async def test_a_small_job_takes_two_calls_when_its_bundle_is_known(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    bundle = Bundle.from_onnx(model)
    await client.register(bundle)
    coordinator.seen.clear()
    job = await client.map(bundle, rows_of(1), data="public")
    assert await outcome(job) == [(0, wanted(1)[0])]
    assert coordinator.seen == {"SubmitMapJob": 1, "WatchJob": 1}


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("order", ["row", "any"])
async def test_results_that_come_in_any_order_are_put_in_row_order(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path, inline: bool, order: Any
) -> None:
    coordinator.inline = inline
    coordinator.order = lambda results: results[::-1]
    job = await client.map(Bundle.from_onnx(model), rows_of(8), data="public")
    rows = await outcome(job, order)
    assert sorted(rows) == list(enumerate(wanted(8)))
    positions = [position for position, _ in rows]
    assert positions == (list(range(8)) if order == "row" else [6, 7, 3, 4, 5, 0, 1, 2])


async def test_a_broken_watch_goes_on_where_it_was(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.faults.watch_breaks = [1, 0, 2]
    coordinator.faults.watch_ends_early = 1
    job = await client.map(Bundle.from_onnx(model), rows_of(10), data="public")
    assert await outcome(job) == list(enumerate(wanted(10)))
    assert coordinator.seen["WatchJob"] == 5


async def test_a_coordinator_that_restarts_in_mid_job_is_waited_for(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.finishes = False
    job = await client.map(Bundle.from_onnx(model), rows_of(7), data="public")
    rows = job.results()
    first = await anext(rows)
    assert first.position == 0
    await coordinator.stop()
    coordinator.finish(job.id, JobState.SUCCEEDED)
    await coordinator.start()
    rest = [row.position async for row in rows]
    assert rest == list(range(1, 7))


async def test_every_call_survives_an_absence(client: AsyncClient, coordinator: FakeCoordinator, model: Path) -> None:
    methods = (
        "GetBundle",
        "GrantUploads",
        "Put",
        "RecordUploads",
        "RegisterBundle",
        "SubmitMapJob",
        "WatchJob",
        "GetJob",
    )
    coordinator.faults.calls.update(dict.fromkeys(methods, 1))
    job = await client.map(Bundle.from_onnx(model), rows_of(4), data="public", keep=["name"])
    assert await outcome(job) == list(enumerate(wanted(4)))
    assert (await job.status()).progress.rows_done == 4
    assert len(coordinator.jobs) == 1, "a lost reply makes no second job"
    for method in methods:
        assert coordinator.seen[method] >= 2


async def test_patience_ends(coordinator: FakeCoordinator, model: Path) -> None:
    async with await connect_async(coordinator.credentials, patience_s=0.3) as client:
        await coordinator.stop()
        with pytest.raises(FallowError) as error:
            await client.jobs()
    assert error.value.reason is Reason.COORDINATOR_UNREACHABLE
    assert "gave up after 0.3 s" in error.value.message


async def test_an_upload_goes_on_where_it_broke_off(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.faults.put_breaks_after_bytes = [10**9, 2 << 20, 3 << 20]
    coordinator.task_rows = 10**6
    values = np.random.default_rng(1).random((350_000, 2), dtype=np.float32)
    job = await client.map(Bundle.from_onnx(model), {"x": values}, data="public")
    table = await job.table()
    np.testing.assert_array_equal(np.stack(table.column("y").to_numpy()), -values)
    assert coordinator.seen["GetUpload"] == 3
    stored = sum(len(block.blob.digest) > 0 for block in coordinator.jobs[job.id].request.blocks)
    assert stored == len(coordinator.jobs[job.id].request.blocks)
    puts = coordinator.seen["Put"]
    await client.map(Bundle.from_onnx(model), {"x": values}, data="public")
    assert coordinator.seen["Put"] == puts, "what the account has is not uploaded again"


async def test_expired_grants_are_asked_for_again(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.inline = False
    coordinator.faults.expired_grants = 2
    coordinator.faults.get_breaks_after_chunks = [0, 1]
    job = await client.map(Bundle.from_onnx(model), rows_of(300), data="public")
    coordinator.faults.expired_grants = 1
    assert len(await outcome(job)) == 300


async def test_failed_rows_are_told_and_saved_beside(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path, tmp_path: Path
) -> None:
    coordinator.failing = {1: "odd row", 5: "another"}
    job = await client.map(Bundle.from_onnx(model), rows_of(7), data="public", keep=["name"])
    rows = [row async for row in job.results()]
    assert [row.position for row in rows if row.failure] == [1, 5]
    assert rows[1].failure is not None
    assert (rows[1].failure.cause, rows[1].failure.reason, rows[1].status) == (Cause.ROW, "odd row", "failed")
    assert rows[1].kept == {"name": "row 1"}
    saved = await job.save(tmp_path / "out.parquet")
    assert (saved.rows, saved.failed_rows) == (5, 2)
    assert [share.rows for share in saved.shares] == [4, 3]
    table = pq.read_table(saved.path)
    assert table.column_names == ["name", "y", "fallow.row", "fallow.status"]
    assert table.column("fallow.row").to_pylist() == [0, 2, 3, 4, 6]
    assert table.column("y").to_pylist() == [wanted(7)[i] for i in (0, 2, 3, 4, 6)]
    assert saved.failed_path == tmp_path / "out.failed.parquet"
    assert pq.read_table(saved.failed_path).to_pylist() == [
        {"name": "row 1", "fallow.row": 1, "fallow.cause": "row", "fallow.reason": "odd row"},
        {"name": "row 5", "fallow.row": 5, "fallow.cause": "row", "fallow.reason": "another"},
    ]
    coordinator.failing = {}
    job = await client.map(Bundle.from_onnx(model), rows_of(7), data="public")
    again = await job.save(tmp_path / "out.parquet")
    assert (again.rows, again.failed_path) == (7, None)
    assert not saved.failed_path.exists(), "an older side file is gone"
    assert list(tmp_path.glob(".*partial")) == []


def test_a_row_whose_reason_is_not_listed_borrows_none(model: Path) -> None:
    bundle = Bundle.from_onnx(model)
    schema = encode_schema(bundle.manifest.output_schema)
    codec = RowCodec(bundle.manifest.output_schema, digest_of(schema))
    block = codec.encode({"y": np.zeros((1, 2), np.float32)}, nonce=bytes(16), positions=np.array([1]), row_count=3)
    listed = (JobRowFailure(10, Cause.ROW, "index 99"),)
    result = TaskResult(1, (RowSpan(10, 0, 3),), None, listed, "worker-1", 0, None)
    rows = ResultDecoder(schema).decode(result, block)
    assert rows.positions.tolist() == [11]
    assert rows.failures[10].reason == "index 99"
    assert rows.failures[12].reason == "its own reason is not listed; row 10 of its task: index 99"
    given_up = ResultDecoder(schema).decode(result, None)
    assert {failure.reason for failure in given_up.failures.values()} == {"index 99"}


async def test_tables_and_batches_hold_all_rows(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path, tmp_path: Path
) -> None:
    coordinator.failing = {2: "no"}
    coordinator.order = lambda results: results[::-1]
    job = await client.map(Bundle.from_onnx(model), rows_of(5), data="public", keep=["name"])
    table = await job.table()
    assert table.column("fallow.row").to_pylist() == list(range(5))
    assert table.column("y").to_pylist() == [*wanted(5)[:2], None, *wanted(5)[3:]]
    assert table.column("fallow.reason").to_pylist() == [None, None, "no", None, None]
    assert table.column("name").to_pylist() == [f"row {i}" for i in range(5)]
    live = pa.Table.from_batches([batch async for batch in job.batches("any")])
    assert live.schema == table.schema
    assert live.sort_by("fallow.row").to_pylist() == table.to_pylist()
    saved = await job.save(tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in saved.path.read_text(encoding="utf-8").splitlines()]
    assert [line["fallow.row"] for line in lines] == [0, 1, 3, 4]
    arrow = await job.save(tmp_path / "out.arrow")
    assert pa.ipc.open_file(arrow.path).read_all().num_rows == 4


async def test_a_correction_replaces_rows(client: AsyncClient, coordinator: FakeCoordinator, model: Path) -> None:
    bundle = Bundle.from_onnx(model)
    schema = bundle.manifest.output_schema
    codec = RowCodec(schema, digest_of(encode_schema(schema)))
    output = codec.encode({"y": np.full((2, 2), 9, np.float32)}, nonce=bytes(16))
    corrected = TaskResult(0, (RowSpan(2, 0, 2),), None, (), "worker-9", 0, None)
    coordinator.corrections = [(1, corrected, output)]
    job = await client.map(bundle, rows_of(6), data="public")
    table = await job.table()
    assert table.column("y").to_pylist() == [*wanted(6)[:2], [9, 9], [9, 9], *wanted(6)[4:]]
    live = [(row.position, row.corrects) async for row in job.results()]
    assert live == [*((i, False) for i in range(6)), (2, True), (3, True)]


async def test_a_folder_is_submitted_with_its_paths_and_unread_files(
    client: AsyncClient, coordinator: FakeCoordinator, bytes_bundle: Bundle, tmp_path: Path
) -> None:
    coordinator.compute = lengths
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a").write_bytes(b"one")
    (folder / "b").write_bytes(b"0123456789abcdef")
    with (folder / "c").open("wb") as huge:
        huge.truncate(1 << 30)
    (folder / "d").write_bytes(b"")

    async def submit() -> Any:
        return await client.map(bytes_bundle, folder, data="public")

    job = await submit()
    rows = [row async for row in job.results()]
    assert [row.kept["path"] for row in rows] == ["a", "b", "c", "d"]
    assert [row.values["label"] for row in rows] == ["one", "0123cdef", "\0" * 8, ""]
    source = FolderSource(folder)
    request = submission_module.MapRequest(bytes_bundle, source, submission_module.data_class_of("public"))
    assert request.source_request().windows == {"bytes": (4, 4)}


async def test_unread_rows_come_last_from_any_process(
    client: AsyncClient, coordinator: FakeCoordinator, bytes_bundle: Bundle, tmp_path: Path, monkeypatch: Any
) -> None:
    coordinator.compute = lengths
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(name.encode())
    from fallow.sources import folder as folder_module

    read = folder_module._read

    def unreadable(path: Path, window: Any) -> Any:
        if path.name == "b":
            raise PermissionError(13, "Permission denied")
        return read(path, window)

    monkeypatch.setattr(folder_module, "_read", unreadable)
    submitted = await client.map(bytes_bundle, folder, data="public")
    for job in (submitted, await client.job(submitted.id)):
        rows = [row async for row in job.results("any")]
        assert [(row.position, row.kept["path"], row.status) for row in rows] == [
            (0, "a", "unverified"),
            (1, "c", "unverified"),
            (2, "b", "failed"),
        ]
        table = await job.table()
        assert table.column("path").to_pylist() == ["a", "c", "b"]
        assert table.column("fallow.reason").to_pylist() == [None, None, "could not be read: Permission denied"]
        saved = await job.save(tmp_path / "out.parquet")
        assert (saved.rows, saved.failed_rows) == (2, 1)


@pytest.mark.parametrize(
    ("state", "reason"), [(JobState.FAILED, Reason.JOB_FAILED), (JobState.CANCELLED, Reason.JOB_CANCELLED)]
)
async def test_a_job_without_success_raises_after_its_rows(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path, tmp_path: Path, state: JobState, reason: Reason
) -> None:
    coordinator.final = state
    job = await client.map(Bundle.from_onnx(model), rows_of(4), data="public")
    seen: list[int] = []
    with pytest.raises(FallowError) as error:
        async for row in job.results():
            seen.append(row.position)
    assert (error.value.reason, seen) == (reason, [0, 1, 2, 3])
    for ask in (job.wait, job.table):
        with pytest.raises(FallowError) as error:
            await ask()
        assert error.value.reason is reason
    with pytest.raises(FallowError):
        await job.save(tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    assert (await job.wait(check=False)).state is state
    assert (await job.table(partial=True)).num_rows == 4


async def test_the_same_key_gives_the_same_job(client: AsyncClient, coordinator: FakeCoordinator, model: Path) -> None:
    bundle = Bundle.from_onnx(model)
    jobs = [await client.map(bundle, rows_of(2), data="public", idempotency_key="nightly") for _ in range(2)]
    jobs.append(await client.map(bundle, rows_of(2), data="public"))
    assert [job.id for job in jobs] == ["job-1", "job-1", "job-2"]


async def test_jobs_are_listed_over_pages_and_found_by_id(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    for _ in range(5):
        await client.map(Bundle.from_onnx(model), rows_of(1), data="internal")
    assert [status.job_id for status in await client.jobs()] == [f"job-{i}" for i in (5, 4, 3, 2, 1)]
    assert [status.job_id for status in await client.jobs(limit=3)] == ["job-5", "job-4", "job-3"]
    assert await outcome(await client.job("job-2")) == [(0, wanted(1)[0])]
    with pytest.raises(FallowError) as error:
        await client.job("job-99")
    assert error.value.reason is Reason.JOB_UNKNOWN


async def test_cancel_ends_a_running_job(client: AsyncClient, coordinator: FakeCoordinator, model: Path) -> None:
    coordinator.finishes = False
    job = await client.map(Bundle.from_onnx(model), rows_of(1), data="public")
    assert (await job.cancel()).state is JobState.CANCELLED
    with pytest.raises(FallowError) as error:
        await job.wait()
    assert error.value.reason is Reason.JOB_CANCELLED


async def test_a_refused_bundle_is_told_at_submission(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.refusals = ("operator Foo is not on the list",)
    with pytest.raises(FallowError) as error:
        await client.map(Bundle.from_onnx(model), rows_of(1), data="public")
    assert error.value.reason is Reason.PROGRAM_REFUSED
    assert "operator Foo" in error.value.message


async def test_a_bundle_that_the_coordinator_forgot_is_registered_again(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    bundle = Bundle.from_onnx(model)
    await client.register(bundle)
    coordinator.bundles.clear()
    job = await client.map(bundle, rows_of(1), data="public")
    assert await outcome(job) == [(0, wanted(1)[0])]


async def test_a_model_that_changed_after_bundling_is_refused(client: AsyncClient, model: Path) -> None:
    bundle = Bundle.from_onnx(model)
    model.write_bytes(b"changed")
    with pytest.raises(FallowError, match="was changed after the bundle was made"):
        await client.map(bundle, rows_of(1), data="public")


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"data": ""}, Reason.DATA_CLASS_MISSING, "data"),
        ({"data": "secret"}, Reason.FIELD_INVALID, "data"),
        ({"keep": ["absent"]}, Reason.SCHEMA_MISMATCH, "absent"),
        ({"keep": ["y"]}, Reason.FIELD_INVALID, "keep[y]"),
        ({"keep": ["name", "name"]}, Reason.FIELD_INVALID, "keep[name]"),
        ({"inputs": {"z": "x"}}, Reason.SCHEMA_MISMATCH, "inputs[z]"),
        ({"inputs": {"x": "q"}}, Reason.SCHEMA_MISMATCH, "q"),
        ({"title": "x" * 201}, Reason.LIMIT_EXCEEDED, "title"),
        ({"idempotency_key": b"short"}, Reason.FIELD_INVALID, "idempotency_key"),
        ({"failed_rows_max": -1}, Reason.FIELD_INVALID, "failed_rows_max"),
        ({"failed_rows_max": 10**12}, Reason.FIELD_INVALID, "failed_rows_max"),
    ],
)
async def test_what_is_wrong_is_told_before_anything_travels(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path, changes: dict[str, Any], reason: Reason, field: str
) -> None:
    coordinator.seen.clear()
    with pytest.raises(FallowError) as error:
        await client.map(Bundle.from_onnx(model), rows_of(1), **({"data": "public"} | changes))
    assert (error.value.reason, error.value.field) == (reason, field)
    assert not coordinator.seen


async def test_one_kept_column_may_be_named_alone(client: AsyncClient, model: Path) -> None:
    job = await client.map(Bundle.from_onnx(model), rows_of(2), data="public", keep="name")
    assert (await job.table()).column("name").to_pylist() == ["row 0", "row 1"]


async def test_kept_times_finer_than_python_knows_come_back(client: AsyncClient, model: Path, tmp_path: Path) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0], pa.float32()), 2)
    at = pa.array([1_000_000_001], pa.timestamp("ns", "UTC"))
    nested = pa.StructArray.from_arrays([at], ["at"])
    rows = pa.table({"x": column, "at": at, "nested": nested})
    job = await client.map(Bundle.from_onnx(model), rows, data="public", keep=["at", "nested"])
    assert (await job.table()).column("at").cast(pa.int64()).to_pylist() == [1_000_000_001]
    (row,) = [row async for row in job.results()]
    assert row.kept["at"].isoformat() == "1970-01-01T00:00:01+00:00" == row.kept["nested"]["at"].isoformat()
    saved = await job.save(tmp_path / "out.jsonl")
    assert json.loads(saved.path.read_text())["at"].startswith("1970-01-01 00:00:01")


async def test_json_lines_are_json_whatever_a_model_gives(client: AsyncClient, model: Path, tmp_path: Path) -> None:
    values = np.array([[1, np.nan], [np.inf, -np.inf]], np.float32)
    job = await client.map(Bundle.from_onnx(model), {"x": values}, data="public")
    saved = await job.save(tmp_path / "out.jsonl")

    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in saved.path.read_text().splitlines()]
    assert [line["y"] for line in lines] == [[-1, "NaN"], ["-Infinity", "Infinity"]]


async def test_a_column_that_a_file_cannot_hold_is_told_with_another_way(
    client: AsyncClient, model: Path, tmp_path: Path
) -> None:
    column = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0], pa.float32()), 2)
    rows = pa.table({"x": column, "age": pa.array([pa.MonthDayNano([1, 2, 3])])})
    job = await client.map(Bundle.from_onnx(model), rows, data="public", keep=["age"])
    with pytest.raises(FallowError, match=r"cannot go into a \.parquet file") as error:
        await job.save(tmp_path / "out.parquet")
    assert ".arrow" in error.value.hint
    assert list(tmp_path.glob("*out*")) == []
    assert (await job.save(tmp_path / "out.arrow")).rows == 1


async def test_an_unknown_order_is_refused(client: AsyncClient, model: Path) -> None:
    job = await client.map(Bundle.from_onnx(model), rows_of(1), data="public")
    wrong: Any = "rows"
    for stream in (job.results(wrong), job.batches(wrong)):
        with pytest.raises(FallowError, match="'rows' is no order") as error:
            await anext(stream)
        assert error.value.limit == "row, any"


async def test_a_closed_client_says_so(coordinator: FakeCoordinator, model: Path) -> None:
    client = await connect_async(coordinator.credentials)
    job = await client.map(Bundle.from_onnx(model), rows_of(1), data="public")
    await client.close()
    for use in (job.status, job.table, client.jobs):
        with pytest.raises(FallowError, match="this client is closed"):
            await use()
    await client.close()


async def test_a_failed_job_tells_why_its_first_row_failed(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.failing = {2: "index 99 is out of bounds", 3: "later"}
    coordinator.final = JobState.FAILED
    job = await client.map(Bundle.from_onnx(model), rows_of(5), data="public")
    with pytest.raises(FallowError, match="row 2: index 99 is out of bounds"):
        await job.table()


async def test_data_has_no_default(client: AsyncClient, model: Path) -> None:
    submit: Any = client.map
    with pytest.raises(TypeError, match="data"):
        await submit(Bundle.from_onnx(model), rows_of(1))


async def test_an_abandoned_stream_leaves_nothing_running(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.finishes = False
    job = await client.map(Bundle.from_onnx(model), rows_of(30), data="public")
    before = asyncio.all_tasks()
    for order in ("row", "any"):
        rows = job.results(order)
        await anext(rows)
        await rows.aclose()

    def left() -> list[str]:
        return [str(task) for task in asyncio.all_tasks() - before if "/fallow/client/" in str(task.get_coro())]

    async with asyncio.timeout(5):
        while left():  # noqa: ASYNC110 - tasks tell nobody when they are gone
            await asyncio.sleep(0)


async def test_held_outputs_spill_to_a_file(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path, monkeypatch: Any
) -> None:
    from fallow.client import stream

    monkeypatch.setattr(stream, "HELD_BYTES_IN_MEMORY_MAX", 200)
    monkeypatch.setattr(stream, "DECODED_BYTES_MAX", 200)
    coordinator.order = lambda results: results[::-1]
    job = await client.map(Bundle.from_onnx(model), rows_of(20), data="public")
    assert await outcome(job) == list(enumerate(wanted(20)))
    assert (await job.table()).column("y").to_pylist() == wanted(20)


def test_the_blocking_face_works_inside_a_running_loop(tmp_path: Path, model: Path) -> None:
    fake = FakeCoordinator(tmp_path, negated)
    server = LoopThread()
    server.run(fake.start())
    try:

        async def notebook() -> None:
            with connect(fake.credentials) as client:
                job = client.map(Bundle.from_onnx(model), rows_of(5), data="public", keep=["name"])
                assert [row.values["y"].tolist() for row in job.results()] == wanted(5)
                assert [status.state for status in job.statuses()][-1] is JobState.SUCCEEDED
                assert job.wait().progress.rows_done == job.progress().rows_done == 5
                assert job.table().num_rows == sum(batch.num_rows for batch in job.batches()) == 5
                assert job.save(tmp_path / "out.parquet").rows == 5
                assert client.job(job.id).status().job_id == job.id == client.jobs()[0].job_id
                first = next(iter(job.results("any")))
                assert first.position == 0
                assert job.cancel().state is JobState.SUCCEEDED
                assert client.session.account_id == "account-1"

        asyncio.run(notebook())
    finally:
        server.run(fake.stop())
        server.stop()


def test_an_interrupted_caller_is_detached_and_told_the_id(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCoordinator(tmp_path, negated)
    fake.finishes = False
    server = LoopThread()
    server.run(fake.start())
    try:
        with connect(fake.credentials) as client:
            job = client.map(Bundle.from_onnx(model), rows_of(4), data="public")
            for stream in (job.results("any"), job.results("row"), job.batches(), job.statuses()):
                with pytest.raises(KeyboardInterrupt):
                    interrupt_when_waiting(stream)
                assert f"detached: job {job.id} goes on" in capsys.readouterr().err
            assert job.status().state is JobState.RUNNING
    finally:
        server.run(fake.stop())
        server.stop()


def interrupt_when_waiting(stream: Iterator[Any]) -> None:
    """Takes what is there, and sends this process a Ctrl-C while the next value is waited for."""
    next(stream)
    # A test run in the background inherits SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        for _ in stream:
            pass
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_a_forked_process_is_told_that_it_has_no_connection(tmp_path: Path) -> None:
    fake = FakeCoordinator(tmp_path, negated)
    server = LoopThread()
    server.run(fake.start())
    try:
        with connect(fake.credentials) as client:
            told: list[str] = []
            # A fork for real would leave threads of this very test run behind in the child.
            here = os.getpid()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: here + 1)
                for use in (client.jobs, lambda: connect(fake.credentials)):
                    with pytest.raises(FallowError, match="forked") as error:
                        use()
                    told.append(error.value.hint)
            assert all("spawn" in hint for hint in told)
            assert client.jobs() == []
    finally:
        server.run(fake.stop())
        server.stop()


def test_nobody_logged_in_is_told_where_was_looked(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FALLOW_STATE", str(tmp_path / "state"))
    with pytest.raises(FallowError) as error:
        connect()
    assert error.value.reason is Reason.UNAUTHENTICATED
    assert str(tmp_path / "state" / "client") in error.value.message
    assert "fallow login LINE" in error.value.hint
