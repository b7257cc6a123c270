"""The carbon file: read with line numbers, resolved by region, and a default that says it is synthetic."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow_coordinator.carbon.synthetic import HOURS_OF_YEAR, grid_mixes, synthetic_year
from fallow_coordinator.carbon.table import (
    GRAMS_PER_KWH_MAX,
    SYNTHETIC,
    WORLD,
    CarbonTable,
    lines_of,
    parse_table,
    read_table,
)

HEADER = "region,hour_of_year,grams_per_kwh"


def day(region: str, grams: int = 100) -> list[str]:
    return [f"{region},{hour},{grams + hour}" for hour in range(24)]


def at_ms(*moment: int) -> int:
    return int(datetime.datetime(*moment, tzinfo=datetime.UTC).timestamp() * 1000)  # type: ignore[misc,arg-type]


def test_a_day_a_week_and_a_year_come_again() -> None:
    week = [f"week,{hour},{hour}" for hour in range(168)]
    year = [f"year,{hour},{hour % 1000}" for hour in range(HOURS_OF_YEAR)]
    table = parse_table([HEADER, *day("day"), *week, *year], "carbon.csv")
    monday = at_ms(2026, 11, 23, 5)
    assert (table.grams("day", monday), table.grams("week", monday)) == (105, 5)
    assert table.grams("year", at_ms(2026, 1, 2, 3)) == 27
    last = at_ms(2028, 12, 31, 23)
    assert table.grams("year", last) == (HOURS_OF_YEAR - 1) % 1000, "a leap year's last day is lent"


def test_regions_are_found_by_their_country_or_stand_for_the_world() -> None:
    table = parse_table([HEADER, *day("de", 1), *day("de-south", 2), *day(WORLD, 3)], "carbon.csv")
    midnight = at_ms(2026, 1, 1)
    told = {name: table.grams(name, midnight) for name in ("DE", "de-south", "de-south-1", "de-north", "fr", "")}
    assert told == {"DE": 1, "de-south": 2, "de-south-1": 2, "de-north": 1, "fr": 3, "": 3}
    without = parse_table([HEADER, *day("de")], "carbon.csv")
    assert without.grams("fr", midnight) is None
    assert without.forecast("fr", midnight, 48) == ()


@pytest.mark.parametrize(
    ("lines", "where", "what"),
    [
        ([], 1, "no figures"),
        (["region;hour;grams"], 1, "the header is"),
        ([HEADER, "de,0"], 2, "2 cells"),
        ([HEADER, "", "# about", "de,0,x"], 4, "grams_per_kwh is 'x'"),
        ([HEADER, "de,0,-1"], 2, "grams_per_kwh is '-1'"),
        ([HEADER, "de,0,nan"], 2, "grams_per_kwh is 'nan'"),
        ([HEADER, "de,0,1e9"], 2, "grams_per_kwh is '1e9'"),
        ([HEADER, "de,9000,5"], 2, "hour_of_year is '9000'"),
        ([HEADER, "de,1.5,5"], 2, "hour_of_year is '1.5'"),
        ([HEADER, ",0,5"], 2, "region is ''"),
        ([HEADER, "de,0,5", "DE,0,6"], 3, "a second time"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(lines: list[str], where: int, what: str) -> None:
    with pytest.raises(FallowError) as caught:
        parse_table(lines, "carbon.csv")
    assert caught.value.reason is Reason.FIELD_INVALID
    assert f"carbon.csv, line {where}: " in caught.value.message and what in caught.value.message
    assert caught.value.limit


@pytest.mark.parametrize(("skip", "gap"), [(7, "hour 7 is missing"), (23, "hours after the last one are missing")])
def test_a_missing_hour_is_told(skip: int, gap: str) -> None:
    lines = [line for hour, line in enumerate(day("de")) if hour != skip]
    with pytest.raises(FallowError, match=gap):
        parse_table([HEADER, *lines], "carbon.csv")


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match="can't be read"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FallowError, match="not UTF-8"):
        read_table(tmp_path / "binary.csv")


@settings(max_examples=50)
@given(st.lists(st.text(max_size=30), max_size=8))
def test_no_text_breaks_the_reader(lines: list[str]) -> None:
    try:
        parse_table([HEADER, *lines], "carbon.csv")
    except FallowError as error:
        assert error.reason is Reason.FIELD_INVALID


@settings(max_examples=20)
@given(st.dictionaries(st.sampled_from(["de", "fr", "x-1"]), st.lists(st.integers(0, GRAMS_PER_KWH_MAX),
       min_size=24, max_size=24), min_size=1))  # fmt: skip
def test_a_written_table_is_read_as_it_was(hours: dict[str, list[int]]) -> None:
    table = CarbonTable("mine", hours)
    again = parse_table(lines_of(table), "carbon.csv")
    assert (again.label, {name: list(values) for name, values in again.hours.items()}) == ("mine", hours)


# ------------------------------------------------------------------------------------------------- the default


def test_the_default_says_that_it_is_synthetic_and_from_what() -> None:
    assert SYNTHETIC.is_synthetic and SYNTHETIC.label.startswith("synthetic")
    for source in ("Ember", "IPCC", "CC BY 4.0"):
        assert source in SYNTHETIC.label
    assert SYNTHETIC.known("UK") == "gb" and SYNTHETIC.known("us-east") == "us" and SYNTHETIC.known("atlantis") == WORLD


@pytest.mark.parametrize("region", ["au", "de", "fr", "in", "no", "za"])
def test_a_synthetic_year_has_the_published_mean(region: str) -> None:
    year = synthetic_year(region)
    assert len(year) == HOURS_OF_YEAR
    assert sum(year) / len(year) == pytest.approx(grid_mixes()[region].grams_per_kwh, abs=1)
    assert min(year) >= 1 and max(year) <= 1_000


def test_sunny_countries_are_cleaner_at_noon() -> None:
    noon, evening = at_ms(2026, 6, 10, 11), at_ms(2026, 6, 10, 18)
    for region in ("de", "es", "it"):
        at_noon, in_the_evening = SYNTHETIC.grams(region, noon), SYNTHETIC.grams(region, evening)
        assert at_noon is not None and in_the_evening is not None and at_noon < 0.8 * in_the_evening
