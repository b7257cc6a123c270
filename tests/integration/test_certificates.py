"""Certificates of real jobs: an honest one holds offline; of one that was touched the first wrong thing is named."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from engine_models import FEATURES, dense_model
from fallow.bundle_file import Bundle
from fallow.certificate_check import authority_fingerprint, check_certificate
from fallow.cli.root import fallow
from fallow.client.blocking import connect
from fallow.errors import FallowError, Reason
from fallow.identity import load_certificate
from integration.harness import CoordinatorService, coordinator, worker

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

ROWS = {"x": np.random.default_rng(7).random((300, FEATURES), np.float32)}
START = ("--executor", "process", "--cpus", "1", "--slots", "1")


def said(*arguments: str | Path) -> Result:
    """What `fallow ARGUMENTS` says, in this process: starting one for each would take most of the time."""
    return CliRunner().invoke(fallow, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CoordinatorService, Path]]:
    """A coordinator, and a folder with the certificates and results of two jobs: `small` and `large` outputs."""
    folder = tmp_path_factory.mktemp("certificates")
    with coordinator(folder / "state", "--heartbeat", "1s", operator_worker=True) as service:
        login = service.facts["client_credentials"]
        with worker(service, folder / "worker", *START), connect(login) as client:
            for name, outputs in (("small", 3), ("large", 400)):
                model = folder / f"{name}.onnx"
                model.write_bytes(dense_model(outputs=outputs))
                job = client.map(Bundle.from_onnx(model), ROWS, data="public", title=name)
                job.save(folder / f"{name}.parquet")
                done = said("job", "certificate", job.id, "-o", folder / f"{name}.json", "--login", login)
                assert done.exit_code == 0, done.stderr
            (folder / "authority.pem").write_bytes((Path(login) / "authority.pem").read_bytes())
            yield service, folder
        assert "Traceback" not in service.log.read_text(errors="replace")


def checked(folder: Path, name: str, *arguments: str | Path) -> dict[str, Any]:
    """What `fallow verify --json` says of a certificate that holds."""
    done = said("verify", folder / f"{name}.json", "--authority", folder / "authority.pem", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_honest_certificates_hold_with_their_results(place: tuple[CoordinatorService, Path]) -> None:
    _, folder = place
    for name in ("small", "large"):
        facts = checked(folder, name, "--results", folder / f"{name}.parquet")
        assert (facts["state"], facts["rows"], facts["rows_compared"]) == ("succeeded", 300, 300)
        assert facts["signatures_checked"] == facts["results"] > 0, "each with the exact bytes"
        assert facts["signatures_unchecked"] == 0
    assert checked(folder, "small")["roots_checked"] > 0
    assert checked(folder, "large")["roots_checked"] == 0, "they lie in the blob service"


def test_people_read_what_held(place: tuple[CoordinatorService, Path]) -> None:
    service, folder = place
    login = service.facts["client_credentials"]
    done = said("verify", folder / "small.json", "--login", login)
    assert done.exit_code == 0
    assert re.search(r"job job-\w+ succeeded: 300 rows, 0 failed\n\d+ records of the journal stand", done.stdout)
    fingerprint = service.facts["authority_fingerprint"]
    assert said("verify", folder / "small.json", "--fingerprint", fingerprint).exit_code == 0
    other = said("verify", folder / "small.json", "--fingerprint", "0" * 64)
    assert other.exit_code == 1
    assert "evidence.authority_certificate" in other.stderr


def test_changed_results_are_named(place: tuple[CoordinatorService, Path], tmp_path: Path) -> None:
    _, folder = place
    for name in ("small", "large"):
        table = pq.read_table(folder / f"{name}.parquet")
        values = np.array(table.column("y").to_pylist(), np.float32)
        values[17, 0] = np.nextafter(values[17, 0], np.float32(9))
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        changed = table.set_column(table.schema.get_field_index("y"), "y", column)
        for told, made in (("row 17" if name == "small" else "among rows", changed), ("", table.slice(0, 299))):
            pq.write_table(made, tmp_path / "touched.parquet")
            done = said("verify", folder / f"{name}.json", "--authority", folder / "authority.pem", "--results",
                        tmp_path / "touched.parquet", "--json")  # fmt: skip
            assert done.exit_code == 1, done.stdout
            error = json.loads(done.stderr)["error"]
            assert error["reason"] == "EVIDENCE_WRONG"
            assert told in error["message"]
    twice = pa.concat_tables([table, table.slice(0, 1)])
    pq.write_table(twice, tmp_path / "twice.parquet")
    done = said("verify", folder / "large.json", "--authority", folder / "authority.pem",
                "--results", tmp_path / "twice.parquet")  # fmt: skip
    assert "row 0 stands there twice" in done.stderr


def test_every_field_that_is_touched_is_found(place: tuple[CoordinatorService, Path]) -> None:
    """Each value of the file in turn: the check fails, and names that place or the one that it belongs to."""
    _, folder = place
    authority = authority_fingerprint(load_certificate((folder / "authority.pem").read_bytes()))
    for name in ("small", "large"):
        honest = json.loads((folder / f"{name}.json").read_text())
        check_certificate(honest, authority)
        touched = 0
        for path, parent, key in places(honest):
            kept = parent[key]
            for other in changed(kept):
                parent[key] = other
                told = first_wrong(honest, authority)
                assert told, f"{path} may be {other!r}"
                assert belongs(path, told), f"{path} was touched, {told} was named"
                touched += 1
            parent[key] = kept
        check_certificate(honest, authority)
        assert touched > 100


def test_left_out_and_added_parts_are_found(place: tuple[CoordinatorService, Path]) -> None:
    _, folder = place
    authority = authority_fingerprint(load_certificate((folder / "authority.pem").read_bytes()))
    honest = json.loads((folder / "small.json").read_text())
    for path, _, _ in list(places(honest, inner=True)):
        if path.startswith("outputs."):
            continue
        made = copy.deepcopy(honest)
        target = follow(made, path)
        if isinstance(target, dict):
            target["more"] = 1
        elif isinstance(target, list):
            target.append(copy.deepcopy(target[-1]) if target else 1)
        else:
            continue
        assert first_wrong(made, authority), f"{path} took an addition"
    for at in range(len(honest["evidence"]["records"])):
        made = copy.deepcopy(honest)
        del made["evidence"]["records"][at]
        assert first_wrong(made, authority) == "evidence.records"
    made = copy.deepcopy(honest)
    del made["results"][0]["rows"]
    assert first_wrong(made, authority) == "results[0].rows"
    made = copy.deepcopy(honest)
    made["outputs"] = {}
    assert check_certificate(made, authority).signatures_unchecked == len(honest["results"])


def test_unfinished_and_unknown_jobs_have_none(place: tuple[CoordinatorService, Path], tmp_path: Path) -> None:
    service, _ = place
    login = service.facts["client_credentials"]
    done = said("job", "certificate", "job-nobody", "-o", tmp_path / "x.json", "--login", login, "--json")
    assert json.loads(done.stderr)["error"]["reason"] == "JOB_UNKNOWN"
    model = tmp_path / "other.onnx"
    model.write_bytes(dense_model(outputs=5, hidden=5))
    with connect(login) as client:
        job = client.map(Bundle.from_onnx(model), ROWS, data="sensitive", title="waits for a worker that may")
        with pytest.raises(FallowError) as caught:
            job.certificate()
        job.cancel()
        assert caught.value.reason in (Reason.JOB_UNFINISHED,)
        assert job.certificate().job["state"] == "cancelled"


def test_checkpoints_go_on_and_a_rewritten_one_is_told(place: tuple[CoordinatorService, Path]) -> None:
    service, _ = place
    login = Path(service.facts["client_credentials"])
    first = json.loads(said("checkpoint", "--login", login, "--json").stdout)
    second = json.loads(said("checkpoint", "--login", login, "--json").stdout)
    assert first["journal_id"] == second["journal_id"]
    assert second["records"] >= first["records"] > 0
    note = login / "checkpoint.note"
    kept = note.read_text()
    note.write_text(kept.replace("fallow journal", "fallow  journal"))
    refused = said("checkpoint", "--login", login, "--json")
    assert json.loads(refused.stderr)["error"]["reason"] == "EVIDENCE_WRONG"
    note.write_text(kept)


# ------------------------------------------------------------------------------------------------ touching


def places(value: Any, path: str = "", *, inner: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """(path, container, key) of every value in a JSON document; of containers too with `inner`."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries):
        where = f"{path}.{key}".lstrip(".") if isinstance(value, dict) else f"{path}[{key}]"
        if isinstance(entry, dict | list):
            if inner:
                yield where, value, key
            yield from places(entry, where, inner=inner)
        elif not inner:
            yield where, value, key


def follow(value: Any, path: str) -> Any:
    for part in re.findall(r"[^.\[\]]+", path):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def changed(value: Any) -> Iterator[Any]:
    """Other values in its place."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        yield str(value)
    elif value is None:
        yield "something"
    elif value and re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", value) and len(value) >= 16 and len(value) % 4 == 0:
        data = bytearray(base64.b64decode(value))
        data[len(data) // 2] ^= 1
        yield base64.b64encode(data).decode()
        yield value[:-1]
    else:
        yield f"{value}x"


def first_wrong(certificate: Any, authority: Any) -> str:
    """The place that a check names; empty when it finds nothing wrong."""
    try:
        check_certificate(certificate, authority)
    except FallowError as error:
        assert error.reason is Reason.EVIDENCE_WRONG, error
        return error.field
    return ""


def belongs(path: str, told: str) -> bool:
    """Whether a place that is named is the one that was touched, a part of it, or what it is a part of."""
    return (
        path.startswith(told)
        or told.startswith(path)
        or told.split(".", maxsplit=1)[0] == path.split(".", maxsplit=1)[0]
    )
