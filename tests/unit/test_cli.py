"""The command: results on stdout, the rest on stderr, exit codes that scripts can trust."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from fake_coordinator import FakeCoordinator
from fallow.cli.progress import job_bar
from fallow.cli.root import fallow
from fallow.client.loop_thread import LoopThread
from fallow.ids import AccountId, Digest, JobId, PoolId
from fallow.job import JobProgress, JobState, JobStatus
from fallow.roles import DataClass
from fallow.rows import DecodedRows
from fallow.schema import SchemaBytes


def negated(rows: DecodedRows) -> dict[str, Any]:
    values = rows.columns["x"]
    assert isinstance(values, np.ndarray)
    return {"y": -values}


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator(tmp_path, negated)
    server = LoopThread()
    server.run(fake.start())
    monkeypatch.setenv("FALLOW_LOGIN", str(fake.credentials))
    monkeypatch.delenv("FALLOW_STATE", raising=False)
    yield fake
    server.run(fake.stop())
    server.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    columns = {"a": np.arange(5, dtype=np.float32), "b": np.arange(5, dtype=np.float32), "id": list("vwxyz")}
    pq.write_table(pa.table(columns), path)
    return path


def invoke(*words: object, stdin: str = "") -> Result:
    return CliRunner().invoke(fallow, [str(word) for word in words], input=stdin)


def test_map_saves_rows_and_says_so(coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    done = invoke("map", model, rows, "-o", out, "--data", "public", "--input", "x=a,b", "--keep", "id")
    assert done.exit_code == 0, done.output
    assert f"5 rows in {out}" in done.stdout
    assert "policy unverified, price 0 credits" in done.stdout
    table = pq.read_table(out)
    assert table.column("y").to_pylist() == [[-i, -i] for i in range(5)]
    assert table.column("id").to_pylist() == list("vwxyz")


def test_map_json_is_one_object(coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path) -> None:
    coordinator.failing = {1: "odd"}
    out = tmp_path / "out.jsonl"
    done = invoke("map", model, rows, "-o", out, "--data", "public", "--input", "x=a,b", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["rows"], facts["failed_rows"], facts["path"]) == (4, 1, str(out))
    assert facts["failed_path"] == str(tmp_path / "out.failed.jsonl")
    assert facts["status"]["state"] == "succeeded"
    assert sum(share["rows"] for share in facts["shares"]) == 5


def test_data_is_refused_when_it_is_not_stated(model: Path, rows: Path, tmp_path: Path) -> None:
    for words in (["map", model, rows, "-o", tmp_path / "out.parquet"], ["job", "submit", model, rows]):
        done = invoke(*words)
        assert done.exit_code == 2
        assert "who may see the rows" in done.stderr


def test_a_mistake_about_the_result_is_told_before_anything_else(model: Path, rows: Path, tmp_path: Path) -> None:
    done = invoke("map", model, rows, "-o", tmp_path / "out.csv", "--data", "public")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no known ending" in done.stderr
    done = invoke("map", model, rows, "-o", tmp_path / "absent" / "out.parquet", "--data", "public")
    assert "is no folder" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--input", "x"], "--input takes NAME=VALUE"),
        (["--shape", "x=a"], "'a' is no size for 'x'"),
        (["--dim", "n=0"], "'0' is no size for 'n'"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    done = invoke("map", model, rows, "-o", tmp_path / "out.parquet", "--data", "public", *words)
    assert done.exit_code == 2, done.output
    assert told in done.stderr


def test_errors_name_field_limit_and_hint_and_are_json_when_asked(
    coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path
) -> None:
    words = ("map", model, rows, "-o", tmp_path / "out.parquet", "--data", "public")
    done = invoke(*words)
    assert done.exit_code == 1
    assert "column 'x' is missing; there is: a, b, id" in done.stderr
    assert "--input NAME=COLUMN" in done.stderr
    done = invoke(*words, "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    error = json.loads(done.stderr)["error"]
    assert (error["reason"], error["field"]) == ("SCHEMA_MISMATCH", "x")


def test_a_job_is_submitted_listed_shown_watched_saved(
    coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path
) -> None:
    done = invoke("job", "submit", model, rows, "--data", "internal", "--input", "x=a,b", "--title", "A title")
    job_id = done.stdout.strip()
    assert (done.exit_code, job_id) == (0, "job-1")
    assert "job-1  succeeded  5/5 rows  A title" in invoke("job", "list").stdout
    shown = json.loads(invoke("job", "show", job_id, "--json").stdout)
    assert (shown["state"], shown["data_class"], shown["progress"]["rows_total"]) == ("succeeded", "internal", 5)
    told = invoke("job", "show", job_id).stdout
    assert "A title" in told
    assert [line.split() for line in told.splitlines()[-4:]] == [
        ["7", "worker-1"], ["4", "node", "0"], ["3", "node", "1"], ["1", "worker-2"],
    ]  # fmt: skip
    assert shown["shares"][1] == {"worker_id": "worker-1", "node": 1, "rows": 3}
    states = [json.loads(line)["state"] for line in invoke("job", "watch", job_id, "--json").stdout.splitlines()]
    assert states == ["succeeded"]
    assert invoke("job", "wait", job_id).exit_code == 0
    saved = invoke("job", "results", job_id, "-o", tmp_path / "out.arrow")
    assert (saved.exit_code, pa.ipc.open_file(tmp_path / "out.arrow").read_all().num_rows) == (0, 5)
    assert "succeeded" in invoke("job", "cancel", job_id).stdout
    assert invoke("job", "show", "job-9").exit_code == 1


def test_a_failed_job_is_exit_code_one_with_a_way_on(
    coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path
) -> None:
    coordinator.final = JobState.FAILED
    out = tmp_path / "out.parquet"
    done = invoke("map", model, rows, "-o", out, "--data", "public", "--input", "x=a,b")
    assert done.exit_code == 1
    assert "job job-1 failed: the test says so" in done.stderr
    assert "fallow job results job-1 -o OUT --partial" in done.stderr
    assert not out.exists()
    assert invoke("job", "wait", "job-1").exit_code == 1
    assert invoke("job", "results", "job-1", "-o", out, "--partial").exit_code == 0
    assert out.exists()


def test_bundles_are_created_and_inspected(coordinator: FakeCoordinator, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m.bundle"
    done = invoke("bundle", "create", model, "-o", folder, "--title", "Negation", "--licence", "Apache-2.0")
    assert done.exit_code == 0, done.output
    assert "takes     x: float32[2]" in done.stdout
    again = invoke("bundle", "create", model, "-o", folder)
    assert (again.exit_code, "exists already" in again.stderr) == (1, True)
    facts = json.loads(invoke("bundle", "inspect", folder, "--json").stdout)
    assert (facts["title"], facts["inputs"], facts["outputs"]) == ("Negation", {"x": "float32[2]"}, {"y": "float32[2]"})
    assert facts["stages"][0]["kind"] == "ProgramStage"
    registered = invoke("bundle", "inspect", folder, "--register")
    assert "inspection accepted" in registered.stdout
    pickled = tmp_path / "pickled.onnx"
    pickled.write_bytes(b"\x80\x04}.")
    refused = invoke("bundle", "inspect", pickled)
    assert (refused.exit_code, "it is a Python pickle" in refused.stderr) == (1, True)


def test_a_bytes_bundle_needs_its_windows(model: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n", encoding="utf-8")
    done = invoke("bundle", "create", model, "--labels", labels, "--head-window", "8")
    assert done.exit_code == 2
    assert "--tail-window, --head-tokens, --tail-tokens" in done.stderr


def test_login_refuses_half_a_line(tmp_path: Path) -> None:
    done = invoke("login", "fallow1_AAAA", "--folder", tmp_path / "login")
    assert done.exit_code == 1
    assert "this is not a join line" in done.stderr
    assert not (tmp_path / "login").exists()


def test_nobody_logged_in_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, model: Path, rows: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("FALLOW_STATE", str(tmp_path / "nowhere"))
    done = invoke("job", "list")
    assert done.exit_code == 1
    assert "fallow login LINE" in done.stderr


def test_what_keeps_a_job_waiting_is_told_without_a_terminal_too(
    coordinator: FakeCoordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = _status(JobState.QUEUED, "no worker is connected [yet]")
    with job_bar(shown=True) as bar:
        for status in (waiting, waiting, _status(JobState.RUNNING, "")):
            bar.status(status)
    assert capsys.readouterr().err == "waiting for workers: no worker is connected [yet]\n"
    with job_bar(shown=False) as bar:
        bar.status(waiting)
    assert capsys.readouterr() == ("", "")


def test_failed_rows_are_counted_once_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = JobProgress(rows_total=10, rows_done=6, rows_failed=4)
    with job_bar(shown=True) as bar:
        bar.status(_status(JobState.RUNNING, "", progress))
        assert bar._progress is not None
        assert bar._progress.tasks[0].completed == 6


def test_a_reason_is_no_markup_and_steers_no_terminal(
    coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path
) -> None:
    words = ("job", "submit", model, rows, "--data", "internal", "--input", "x=a,b", "--title", "\x1b[31mred\x07")
    assert invoke(*words).exit_code == 0
    shown = invoke("job", "list").stdout
    assert "\x1b" not in shown
    assert "\\x1b[31mred\\x07" in shown
    assert json.loads(invoke("job", "show", "job-1", "--json").stdout)["title"] == "\x1b[31mred\x07"


def test_a_result_never_replaces_its_own_input(coordinator: FakeCoordinator, model: Path, rows: Path) -> None:
    before = rows.read_bytes()
    done = invoke("map", model, rows, "-o", rows, "--data", "public", "--input", "x=a,b")
    assert (done.exit_code, "would replace its own input" in done.stderr) == (1, True)
    assert rows.read_bytes() == before


def test_a_model_with_open_dimensions_can_be_inspected(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "width"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", values[:1], values[1:])
    path = tmp_path / "open.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    assert "--dim width=N" in invoke("bundle", "inspect", path).stderr
    assert "takes     x: float32[3]" in invoke("bundle", "inspect", path, "--dim", "width=3").stdout


def _status(state: JobState, reason: str, progress: JobProgress | None = None) -> JobStatus:
    return JobStatus(
        job_id=JobId("job-1"),
        account_id=AccountId("account-1"),
        pool_id=PoolId("pool-1"),
        state=state,
        reason=reason,
        reason_code="",
        bundle_digest=Digest(bytes(32)),
        title="",
        data_class=DataClass.PUBLIC,
        policy="unverified",
        price_microcredits=0,
        submitted_at_ms=0,
        finished_at_ms=0,
        output_schema=SchemaBytes(b""),
        kept=None,
        results=0,
        progress=progress or JobProgress(),
    )


def test_explain_tells_who_fell_out_and_what_a_job_waits_for(
    coordinator: FakeCoordinator, model: Path, rows: Path
) -> None:
    submitted = invoke("job", "submit", model, rows, "--data", "public", "--input", "x=a,b", "--json")
    job_id = json.loads(submitted.stdout)["job_id"]
    told = invoke("job", "explain", job_id)
    assert "5 considered, 2 fit, 0 free now" in told.stdout
    assert "3 × it is not connected: start it" in told.stdout
    facts = json.loads(invoke("job", "explain", job_id, "--json").stdout)
    assert facts["fallen_out"][0] == {"code": "away", "count": 3, "words": "it is not connected", "advice": "start it"}
