"""Quotes and terms as submitters meet them: keywords, flags, what is asked of the coordinator, what is told."""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper

from engine_models import text_bundle
from fake_coordinator import FakeCoordinator, quote_of
from fallow.bundle import VariantForm
from fallow.bundle_file import Bundle
from fallow.cli.root import fallow
from fallow.client.client import AsyncClient, connect_async
from fallow.client.loop_thread import LoopThread
from fallow.client.terms import JobTerms, terms_of
from fallow.cost import SizeBin
from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.job import JobOptions, Objective
from fallow.quote import Quote, QuoteRequest
from fallow.roles import DataClass
from fallow.rows import DecodedRows
from fallow.wire.quote import (
    quote_from_message,
    quote_request_from_message,
    quote_request_to_message,
    quote_to_message,
)

NOW = datetime.datetime(2026, 11, 22, 6, 0, tzinfo=datetime.UTC)


def negated(rows: DecodedRows) -> dict[str, Any]:
    values = rows.columns["x"]
    assert isinstance(values, np.ndarray)
    return {"y": -values}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "graph", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((5, 2), np.float32))
    return path


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
async def client(coordinator: FakeCoordinator) -> AsyncIterator[AsyncClient]:
    async with await connect_async(coordinator.credentials) as made:
        yield made


def invoke(*words: object) -> Result:
    return CliRunner().invoke(fallow, [str(word) for word in words])


def bundle_with_forms(model: Path) -> Bundle:
    return Bundle.from_onnx(model).optimized("fp16", "fixed")


# ------------------------------------------------------------------------------------------------------------- terms


def test_terms_become_options() -> None:
    given: JobTerms = {
        "limit": "0.5",
        "budget": 12,
        "deadline": datetime.timedelta(minutes=5),
        "objective": "speed",
        "device": "gpu",
        "memory_bytes": 1 << 30,
        "region": "us-east",
        "priority": 3,
        "precision": "fp16",
        "accept": ["fp16", "int8", "fp16"],
    }
    terms = terms_of(given, JobOptions(failed_rows_max=7), now=NOW)
    assert (terms.limit_microcredits_per_1000_rows, terms.budget_microcredits) == (500_000, 12_000_000)
    assert terms.accept == (VariantForm.FP16, VariantForm.INT8)
    assert terms.options == JobOptions(
        failed_rows_max=7,
        deadline_ms=int((NOW + datetime.timedelta(minutes=5)).timestamp() * 1_000),
        objective=Objective.SPEED,
        device_kind="gpu",
        memory_bytes_min=1 << 30,
        region="us-east",
        priority=3,
        precision=terms.options.precision,
    )
    assert terms_of({}, JobOptions(), now=NOW).options == JobOptions()
    assert terms_of({"limit": 0.1}, JobOptions(), now=NOW).limit_microcredits_per_1000_rows == 100_000


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"limit": -1}, "limit"),
        ({"limit": float("nan")}, "limit"),
        ({"budget": float("inf")}, "budget"),
        ({"budget": "0.0000001"}, "budget"),
        ({"budget": 10**12}, "budget"),
        ({"deadline": NOW - datetime.timedelta(seconds=1)}, "deadline"),
        ({"deadline": datetime.timedelta(0)}, "deadline"),
        ({"deadline": datetime.datetime(2030, 1, 1)}, "deadline"),
        ({"objective": "luck"}, "objective"),
        ({"device": "abacus"}, "device"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"memory_bytes": 1 << 51}, "memory_bytes"),
        ({"region": "a b"}, "region"),
        ({"region": "x" * 65}, "region"),
        ({"priority": 10}, "priority"),
        ({"precision": "fp8"}, "precision"),
        ({"accept": ["fp8"]}, "accept"),
    ],
)
def test_terms_that_cannot_be_are_refused_by_name(given: Any, field: str) -> None:
    with pytest.raises(FallowError) as caught:
        terms_of(given, JobOptions(), now=NOW)
    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, field)
    assert caught.value.limit


def test_questions_and_answers_come_back_whole() -> None:
    asked = QuoteRequest(
        Digest(bytes(32)), (SizeBin(3, (7, 0)), SizeBin(1, (9, 2))), DataClass.PUBLIC, "pool-2", JobOptions(priority=3)
    )
    assert quote_request_from_message(quote_request_to_message(asked)) == asked
    answer = replace(quote_of(asked), warnings=("odd",), micrograms=5, carbon_known=True, own_workers=1)
    assert quote_from_message(quote_to_message(answer)) == answer


@pytest.mark.parametrize(
    "bins",
    [
        (),
        (SizeBin(0, ()),),
        (SizeBin(1, (1 << 32,)),),
        (SizeBin(1, (1,) * 9),),
        (SizeBin(10**7, ()), SizeBin(1, ())),
        tuple(SizeBin(1, ()) for _ in range(4_097)),
    ],
)
def test_questions_beyond_their_limits_are_refused(bins: tuple[SizeBin, ...]) -> None:
    message = quote_request_to_message(QuoteRequest(Digest(bytes(32)), bins, DataClass.PUBLIC))
    with pytest.raises(FallowError) as caught:
        quote_request_from_message(message)
    assert caught.value.reason in {Reason.FIELD_INVALID, Reason.LIMIT_EXCEEDED, Reason.DATASET_EMPTY}
    assert caught.value.field.startswith("bins")


# ------------------------------------------------------------------------------------------------------------ client


async def test_a_quote_carries_sizes_and_no_rows(client: AsyncClient, coordinator: FakeCoordinator) -> None:
    manifest, files = text_bundle()
    contents = [b"a" * 3, b"b" * 3, b"c" * 20]
    quote = await client.quote(Bundle(manifest, dict(files)), contents, data="public", region="de")
    asked = coordinator.quotes_asked[0]
    assert [(group.rows, group.size_sums) for group in asked.bins] == [(2, (6,)), (1, (20,))]
    assert asked.options.region == "de"
    assert (quote.rows, quote.form, quote.alternatives) == (3, "fp32", ())
    assert coordinator.jobs == {}
    assert not any(content in data for content in contents[2:] for data in coordinator.blobs.values())


async def test_a_limit_for_rows_becomes_one_for_units(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    coordinator.pool_mode = "market"
    async with await connect_async(coordinator.credentials) as buyer:
        job = await buyer.map(Bundle.from_onnx(model), np.zeros((5, 2), np.float32), data="public", limit="2.5")
        await job.wait()
    options = coordinator.submitted[0].options
    assert options.limit_microcredits_per_unit == 2_500
    assert options.budget_microcredits == 5 * 2_400, "the quote and a fifth more"
    assert [asked.options.limit_microcredits_per_unit for asked in coordinator.quotes_asked] == [0, 2_500]
    with pytest.raises(FallowError, match="less than one micro-credit"):
        await buyer_quote(coordinator, model, limit="0.000001")


async def buyer_quote(coordinator: FakeCoordinator, model: Path, **terms: Any) -> Quote:
    async with await connect_async(coordinator.credentials) as buyer:
        return await buyer.quote(Bundle.from_onnx(model), np.zeros((5, 2), np.float32), data="public", **terms)


async def test_a_job_that_costs_nothing_asks_for_no_quote(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    await client.map(Bundle.from_onnx(model), np.zeros((5, 2), np.float32), data="public", priority=2)
    assert coordinator.seen["QuoteMapJob"] == 0
    assert coordinator.submitted[0].options.priority == 2


async def test_a_market_without_workers_wants_a_stated_budget(coordinator: FakeCoordinator, model: Path) -> None:
    coordinator.pool_mode = "market"
    coordinator.quote = lambda asked: replace(quote_of(asked), workers_fitting=0, warnings=("nobody is there",))
    rows = np.zeros((5, 2), np.float32)
    async with await connect_async(coordinator.credentials) as buyer:
        with pytest.raises(FallowError, match="no worker can take this job now") as caught:
            await buyer.map(Bundle.from_onnx(model), rows, data="public")
        assert "nobody is there" in caught.value.hint
        await buyer.map(Bundle.from_onnx(model), rows, data="public", budget=3)
    assert coordinator.submitted[0].options.budget_microcredits == 3_000_000


async def test_the_best_of_the_accepted_forms_is_taken(
    client: AsyncClient, coordinator: FakeCoordinator, model: Path
) -> None:
    bundle = bundle_with_forms(model)
    half = bundle.variants[VariantForm.FP16]

    def cheaper_in_half(asked: QuoteRequest) -> Quote:
        quote = quote_of(asked)
        return replace(quote, price_microcredits=1) if asked.bundle_digest == half.digest else quote

    coordinator.quote = cheaper_in_half
    rows = np.zeros((5, 2), np.float32)
    quote = await client.quote(bundle, rows, data="public", accept=["fixed", "fp16"])
    assert quote.form == "fp16"
    assert {other.form for other in quote.alternatives} == {"fp32", "fixed"}
    await client.map(bundle, rows, data="public", accept=["fp16"])
    assert coordinator.submitted[-1].bundle_digest == half.digest
    await client.map(bundle, rows, data="public")
    assert coordinator.submitted[-1].bundle_digest == bundle.digest, "not without consent"
    with pytest.raises(FallowError, match="no int8 form"):
        await client.map(bundle, rows, data="public", accept=["int8"])


# ---------------------------------------------------------------------------------------------------------- commands


def test_quote_tells_price_time_workers_and_forms(
    coordinator: FakeCoordinator, model: Path, rows: Path, tmp_path: Path
) -> None:
    bundle_with_forms(model).save(tmp_path / "forms.bundle")
    done = invoke("job", "quote", tmp_path / "forms.bundle", rows, "--data", "public", "--accept", "fp16,fixed")
    assert done.exit_code == 0, done.output
    assert "2 credits for 1,000 rows, 0.01 in all; budget 0.012" in done.stdout
    assert "1 of 3 fit, 1 free now" in done.stdout
    assert "2 x   its tier may not see rows of this data class: declare the rows public" in done.stdout
    assert "policy unverified: none, 0 % more work" in done.stdout
    assert "off by at most" in done.stdout
    done = invoke("job", "quote", model, rows, "--data", "public", "--json")
    facts = json.loads(done.stdout)
    assert (facts["rows"], facts["price_microcredits"], facts["alternatives"]) == (5, 10_000, [])
    assert coordinator.jobs == {}


def test_flags_reach_the_job(coordinator: FakeCoordinator, model: Path, rows: Path) -> None:
    flags = ["--budget", "7.5", "--deadline", "90m", "--objective", "speed", "--device", "gpu", "--memory", "8GiB"]
    done = invoke("job", "submit", model, rows, "--data", "public", *flags, "--region", "us-east", "--priority", "4")
    assert done.exit_code == 0, done.output
    options = coordinator.submitted[0].options
    assert (options.budget_microcredits, options.memory_bytes_min, options.priority) == (7_500_000, 8 << 30, 4)
    assert (options.device_kind, options.region) == ("gpu", "us-east")
    in_s = options.deadline.seconds - datetime.datetime.now(datetime.UTC).timestamp()
    assert 5_300 < in_s < 5_401


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--limit", "-1"], 1, "'-1' is no amount of credits"),
        (["--budget", "much"], 1, "'much' is no amount of credits"),
        (["--deadline", "yesterday"], 2, "is no duration"),
        (["--deadline", "2020-01-01T00:00"], 1, "has passed"),
        (["--deadline", "12"], 2, "is no moment"),
        (["--memory", "8 apples"], 2, "is no size"),
        (["--memory", "9999999TiB"], 2, "is no size"),
        (["--priority", "10"], 2, "0<=x<=9"),
        (["--accept", "fp8"], 1, "'fp8' is no accept"),
        (["--accept", "int8"], 1, "the bundle has no int8 form"),
        (["--region", "over there"], 1, "is no name of a region"),
        (["--objective", "luck"], 2, "luck"),
    ],
)
def test_flags_that_cannot_be_are_told(
    coordinator: FakeCoordinator, model: Path, rows: Path, flags: list[str], code: int, told: str
) -> None:
    done = invoke("job", "submit", model, rows, "--data", "public", *flags)
    assert (done.exit_code, told in done.stderr) == (code, True), done.output
    assert coordinator.submitted == []
