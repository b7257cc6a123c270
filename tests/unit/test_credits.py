"""Credits in words and numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.credits import MICROCREDITS_MAX, ask_per_unit, check_amount, credits_text, parse_credits, price_per_hour
from fallow.errors import FallowError, Reason


@given(st.integers(0, MICROCREDITS_MAX))
def test_an_amount_survives_being_written_and_read(microcredits: int) -> None:
    assert parse_credits(credits_text(microcredits).replace(",", ""), "amount") == microcredits


@pytest.mark.parametrize(
    "text",
    ["-1", "-0.000001", "nan", "NaN", "inf", "-inf", "1e999999999", "1e-999999999", "0.0000001", "1000000001", "", "x",
     "1,5", "0x10", "1" * 50, "sNaN"],
)  # fmt: skip
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(FallowError) as caught:
        parse_credits(text, "--budget")
    assert caught.value.reason is Reason.FIELD_INVALID
    assert caught.value.field == "--budget"
    assert "1,000,000,000" in caught.value.limit


def test_amounts_are_read_exactly() -> None:
    assert parse_credits("0.1", "x") == 100_000
    assert parse_credits("1000000000", "x") == MICROCREDITS_MAX
    assert parse_credits("0e-99", "x") == 0
    assert credits_text(1_234_500_000) == "1,234.5"
    assert credits_text(-1) == "-0.000001"


@given(st.integers(0, 10**12))
def test_an_hourly_ask_is_never_rounded_below_itself(per_hour: int) -> None:
    assert per_hour <= price_per_hour(ask_per_unit(per_hour)) < per_hour + 3_600


def test_an_amount_out_of_bounds_names_its_field() -> None:
    with pytest.raises(FallowError) as caught:
        check_amount(-1, "options.budget_microcredits")
    assert caught.value.field == "options.budget_microcredits"
