"""Quotes on the submitter's side: sizes are counted here, no row travels; limits and budgets follow from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fallow.bundle import VariantForm
from fallow.client.submission import MapRequest
from fallow.client.terms import Terms, limit_per_unit
from fallow.cost import SizeBin, SizeCounter
from fallow.credits import PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.job import JobOptions, Objective
from fallow.quote import Quote
from fallow.rows import RowCodec
from fallow.sources import source_of
from fallow.wire.schema import encode_schema

FP32_FORM = "fp32"
"""What the form of a bundle itself is called beside those of its variants."""


def size_bins(request: MapRequest) -> tuple[SizeBin, ...]:
    """The rows in groups of like size. Reads the source once, in bounded memory; may block.

    Raises what the source raises, and DATASET_EMPTY.
    """
    schema = request.bundle.manifest.input_schema
    codec = RowCodec(schema, digest_of(encode_schema(schema)))
    counter = SizeCounter(len(schema.size_features))
    for batch in source_of(request.rows, schema).batches(request.source_request()):
        if not batch.row_count:
            continue
        if not schema.size_features:
            counter.add((), batch.row_count)
            continue
        sizes, counts = np.unique(codec.size_features(batch.columns), axis=0, return_counts=True)
        for row, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            counter.add(row, count)
    if not counter.bins:
        raise FallowError(Reason.DATASET_EMPTY, "there are no rows to quote", field="rows")
    return counter.bins


def check_forms(request: MapRequest, accept: Sequence[VariantForm]) -> None:
    """Raises FIELD_INVALID when the bundle has none of a form that was accepted."""
    for form in accept:
        if form not in request.bundle.variants:
            have = (
                ", ".join(known.value for known in request.bundle.variants)
                or "none: `fallow bundle optimize` makes them"
            )
            raise FallowError(Reason.FIELD_INVALID, f"the bundle has no {form.value} form", field="accept", limit=have)


def best_quote(quotes: Sequence[Quote], objective: Objective) -> Quote:
    """The quote of the form that serves the objective best, with those of the others beside it."""

    def rank(quote: Quote) -> tuple[bool, int, int]:
        seconds, price = quote.wait_ms + quote.run_ms, quote.price_microcredits
        first = {Objective.COST: price, Objective.SPEED: seconds, Objective.CARBON: quote.millijoules}[objective]
        return not quote.workers_fitting, first, quote.unit_micros

    ranked = sorted(quotes, key=rank)
    return replace(ranked[0], alternatives=tuple(ranked[1:]))


def agreed_options(options: JobOptions, terms: Terms, quote: Quote) -> JobOptions:
    """The options with limit and budget as the terms and the quote make them. Raises FIELD_INVALID, FIELD_MISSING."""
    market = quote.pool_mode == PoolMode.MARKET
    limit = terms.limit_microcredits_per_1000_rows
    if limit is not None and market:
        options = replace(options, limit_microcredits_per_unit=limit_per_unit(limit, quote))
    budget = terms.budget_microcredits
    if budget is None:
        budget = quote.budget_microcredits if market else 0
        if market and not quote.workers_fitting:
            raise FallowError(
                Reason.FIELD_MISSING,
                "no worker can take this job now, so there is no price from which a budget would follow",
                field="budget",
                hint=f"state a budget, or change what stands in the way: {'; '.join(quote.warnings)}",
            )
        if limit is not None and market and not budget:
            # Only workers that ask nothing fit: a limit is of no use.
            options = replace(options, limit_microcredits_per_unit=0)
    return replace(options, budget_microcredits=budget)
