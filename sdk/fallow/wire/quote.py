"""Quotes to protobuf and back."""

from __future__ import annotations

from fallow.cost import SIZE_MAX, SizeBin
from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import JOB_ROWS_MAX, SIZE_FEATURES_MAX
from fallow.quote import QUOTE_BINS_MAX, Quote, QuoteRequest, Shortfall
from fallow.v1 import job_service_pb2 as pb
from fallow.wire.blob import digest_from
from fallow.wire.enums import DATA_CLASSES
from fallow.wire.job import options_from_message, options_to_message


def quote_request_to_message(request: QuoteRequest) -> pb.QuoteMapJobRequest:
    """The protobuf form of a question."""
    return pb.QuoteMapJobRequest(
        bundle_digest=request.bundle_digest,
        bins=[pb.SizeBin(rows=group.rows, size_sums=group.size_sums) for group in request.bins],
        data_class=DATA_CLASSES.number(request.data_class),
        pool_id=request.pool_id,
        options=options_to_message(request.options),
    )


def quote_request_from_message(message: pb.QuoteMapJobRequest) -> QuoteRequest:
    """The question that a message asks. Raises FIELD_INVALID, LIMIT_EXCEEDED or DATASET_EMPTY."""
    if len(message.bins) > QUOTE_BINS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"{len(message.bins)} groups of rows",
            field="bins",
            limit=f"{QUOTE_BINS_MAX} groups",
            hint="group sizes more coarsely",
        )
    total = 0
    bins: list[SizeBin] = []
    for index, group in enumerate(message.bins):
        sums = tuple(group.size_sums)
        if not group.rows or len(sums) > SIZE_FEATURES_MAX or any(size > SIZE_MAX * group.rows for size in sums):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{group.rows} rows of sizes {list(sums)[:8]} in all",
                field=f"bins[{index}]",
                limit=f"at least one row, {SIZE_FEATURES_MAX} size features, {SIZE_MAX} for each row",
            )
        total += group.rows
        bins.append(SizeBin(group.rows, sums))
    if not total:
        raise FallowError(Reason.DATASET_EMPTY, "there are no rows to quote", field="bins", limit="at least 1 row")
    if total > JOB_ROWS_MAX:
        raise FallowError(Reason.LIMIT_EXCEEDED, f"{total} rows", field="bins", limit=f"{JOB_ROWS_MAX} rows in one job")
    return QuoteRequest(
        bundle_digest=digest_from(message.bundle_digest, "bundle_digest"),
        bins=tuple(bins),
        data_class=DATA_CLASSES.member(message.data_class, "data_class"),
        pool_id=message.pool_id,
        options=options_from_message(message.options),
    )


def quote_to_message(quote: Quote) -> pb.QuoteMapJobResponse:
    """The protobuf form of a quote."""
    return pb.QuoteMapJobResponse(
        bundle_digest=quote.bundle_digest,
        rows=quote.rows,
        unit_micros=quote.unit_micros,
        learned_permille=quote.learned_permille,
        pool_id=quote.pool_id,
        pool_mode=quote.pool_mode,
        policy=quote.policy,
        price_microcredits_per_unit=quote.price_microcredits_per_unit,
        price_microcredits_per_1000_rows=quote.price_microcredits_per_1000_rows,
        price_microcredits=quote.price_microcredits,
        budget_microcredits=quote.budget_microcredits,
        wait_ms=quote.wait_ms,
        run_ms=quote.run_ms,
        end_at_ms=quote.end_at_ms,
        millijoules=quote.millijoules,
        energy_source=quote.energy_source,
        micrograms=quote.micrograms,
        carbon_known=quote.carbon_known,
        checking_permille=quote.checking_permille,
        workers_considered=quote.workers_considered,
        workers_fitting=quote.workers_fitting,
        workers_free=quote.workers_free,
        own_workers=quote.own_workers,
        fallen_out=[
            pb.Shortfall(code=each.code, workers=each.workers, words=each.words, advice=each.advice)
            for each in quote.fallen_out
        ],
        warnings=quote.warnings,
    )


def quote_from_message(message: pb.QuoteMapJobResponse) -> Quote:
    """The quote that a message carries."""
    return Quote(
        bundle_digest=Digest(message.bundle_digest),
        rows=message.rows,
        unit_micros=message.unit_micros,
        learned_permille=message.learned_permille,
        pool_id=message.pool_id,
        pool_mode=message.pool_mode,
        policy=message.policy,
        price_microcredits_per_unit=message.price_microcredits_per_unit,
        price_microcredits_per_1000_rows=message.price_microcredits_per_1000_rows,
        price_microcredits=message.price_microcredits,
        budget_microcredits=message.budget_microcredits,
        wait_ms=message.wait_ms,
        run_ms=message.run_ms,
        end_at_ms=message.end_at_ms,
        millijoules=message.millijoules,
        energy_source=message.energy_source,
        micrograms=message.micrograms,
        carbon_known=message.carbon_known,
        checking_permille=message.checking_permille,
        workers_considered=message.workers_considered,
        workers_fitting=message.workers_fitting,
        workers_free=message.workers_free,
        own_workers=message.own_workers,
        fallen_out=tuple(Shortfall(each.code, each.workers, each.words, each.advice) for each in message.fallen_out),
        warnings=tuple(message.warnings),
    )
