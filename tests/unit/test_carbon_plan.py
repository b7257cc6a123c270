"""The plan for clean hours: cleanest slots first, deadlines kept, nothing waits for what does not come."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.ids import JobId
from fallow_coordinator.core.carbon import (
    ELSEWHERE,
    NO_CEILING,
    Demand,
    Forecast,
    Plan,
    grams_at,
    latest_end_ms,
    micrograms,
    plan,
)
from fallow_coordinator.core.limits import CARBON_CAPACITY_PERCENT, CARBON_MARGIN_MS_MIN, HOUR_MS, MINUTE_MS

NOW = 1_000 * HOUR_MS
HOUR_OF_WORK = 3_600 * 1_000_000
"""Micro-units that one reference core does in an hour."""
JOB = JobId("job-1")


def forecast(*grams: int) -> Forecast:
    return Forecast(NOW, grams)


def demand(hours: float, due_hours: float, job_id: str = JOB) -> Demand:
    """Work of so many hours of one core at the share of it that plans count on."""
    share = CARBON_CAPACITY_PERCENT / 100
    return Demand(JobId(job_id), int(hours * HOUR_OF_WORK * share), NOW + int(due_hours * HOUR_MS))


ONE_CORE = {"de": HOUR_OF_WORK}
DAY = forecast(300, 300, 300, 100, 100, 300, 300, 300, 300, 300, 300, 300)


def test_a_job_waits_for_the_clean_hours() -> None:
    made = plan(NOW, {"de": DAY}, ONE_CORE, [demand(2, 10)])
    assert made.ceilings == {JOB: 100}
    assert made.waits_until_ms == {JOB: NOW + 3 * HOUR_MS}
    assert not made.closed, "nobody runs"


def test_it_runs_in_them() -> None:
    then = NOW + 3 * HOUR_MS
    made = plan(then, {"de": DAY}, ONE_CORE, [demand(2, 10)])
    assert made.ceilings == {JOB: 100} and not made.waits_until_ms


def test_more_work_needs_dirtier_hours() -> None:
    made = plan(NOW, {"de": DAY}, ONE_CORE, [demand(3, 11)])
    assert made.ceilings == {JOB: 300} and not made.waits_until_ms


def test_a_near_deadline_does_not_wait() -> None:
    made = plan(NOW, {"de": DAY}, ONE_CORE, [demand(1, 3)])
    assert made.ceilings == {JOB: 300} and not made.waits_until_ms
    late = plan(NOW, {"de": DAY}, ONE_CORE, [demand(20, 3)])
    assert late.ceilings == {JOB: NO_CEILING} and not late.waits_until_ms
    past = plan(NOW, {"de": DAY}, ONE_CORE, [demand(1, -3)])
    assert past.ceilings == {JOB: NO_CEILING}


def test_other_work_goes_first() -> None:
    made = plan(NOW, {"de": DAY}, ONE_CORE, [demand(2, 10)], other_unit_micros=4 * HOUR_OF_WORK)
    assert made.ceilings == {JOB: NO_CEILING}


def test_a_clean_region_is_used_before_a_dirty_one() -> None:
    forecasts = {"de": DAY, "se": forecast(*[40] * 12)}
    rooms = {"de": HOUR_OF_WORK, "se": HOUR_OF_WORK}
    made = plan(NOW, forecasts, rooms, [demand(5, 10)])
    assert made == Plan({JOB: 40}, {}, frozenset({"de"}))
    both = plan(NOW, forecasts, rooms, [demand(10, 10)])
    assert both.ceilings == {JOB: 100} and both.closed == {"de"}, "Germany joins in its clean hours"


def test_one_that_may_run_in_one_region_only_opens_that() -> None:
    forecasts = {"de": DAY, "se": forecast(*[40] * 12)}
    rooms = {"de": HOUR_OF_WORK, "se": HOUR_OF_WORK}
    only = replace(demand(8, 10), regions=frozenset({"de"}))
    made = plan(NOW, forecasts, rooms, [only])
    assert made.ceilings == {JOB: 300} and not made.closed


def test_an_earlier_deadline_goes_first_and_the_later_one_still_waits() -> None:
    made = plan(NOW, {"de": DAY}, ONE_CORE, [demand(1, 10, "later"), demand(1, 2, "sooner")])
    assert made.ceilings == {"sooner": 300, "later": 100}
    assert made.waits_until_ms == {"later": NOW + 3 * HOUR_MS}


def test_without_forecast_or_workers_nothing_waits() -> None:
    assert plan(NOW, {}, ONE_CORE, [demand(1, 10)]) == Plan()
    assert plan(NOW, {"de": DAY}, {}, [demand(1, 10)]) == Plan()
    assert plan(NOW + 20 * HOUR_MS, {"de": DAY}, ONE_CORE, [demand(1, 40)]) == Plan(), "the forecast is over"


def test_regions_that_are_not_forecast_share_one_forecast() -> None:
    forecasts = {"de": DAY, ELSEWHERE: forecast(481)}
    assert grams_at(forecasts, "DE", NOW) == 300
    assert grams_at(forecasts, "atlantis", NOW) == 481
    assert grams_at({"de": DAY}, "atlantis", NOW) is None


def test_a_kilowatt_hour_of_400_grams_is_400_grams() -> None:
    assert micrograms(3_600_000_000, 400) == 400_000_000


grams = st.lists(st.integers(1, 900), min_size=48, max_size=48)


@settings(max_examples=60)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.tuples(grams, st.integers(1, 100)), min_size=1),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=8),
    st.integers(0, HOUR_MS - 1),
)
def test_waiting_leaves_room_for_all_work_before_every_deadline(
    regions: dict[str, tuple[list[int], int]], jobs: list[tuple[int, int]], minute: int
) -> None:
    now = NOW + minute
    forecasts = {name: Forecast(NOW, tuple(curve)) for name, (curve, _) in regions.items()}
    rooms = {name: cores * HOUR_OF_WORK for name, (_, cores) in regions.items()}
    demands = [demand(hours, due, f"job-{number}") for number, (hours, due) in enumerate(jobs)]
    made = plan(now, forecasts, rooms, demands)
    for each in demands:
        ceiling = made.ceilings[each.job_id]
        until = made.waits_until_ms.get(each.job_id)
        if until is None:
            continue
        assert until > now and ceiling != NO_CEILING
        latest = latest_end_ms(now, each.due_ms)
        assert latest <= each.due_ms - CARBON_MARGIN_MS_MIN
        assert all(curve[0] > ceiling for curve, _ in regions.values()), "it waits because every region is too dirty"
        work = sum(other.unit_micros for other in demands if other.due_ms < each.due_ms) + each.unit_micros
        room = sum(
            rooms[name] * max(0, min(NOW + (hour + 1) * HOUR_MS, latest) - (NOW + hour * HOUR_MS)) // HOUR_MS
            for name, (curve, _) in regions.items()
            for hour in range(1, 48)
            if curve[hour] <= ceiling
        )
        assert room * CARBON_CAPACITY_PERCENT // 100 + MINUTE_MS >= work
        clean = {name for name, (curve, _) in regions.items() if curve[(until - NOW) // HOUR_MS] <= ceiling}
        assert clean, "what it waits for is clean enough"
    running = [made.ceilings[each.job_id] for each in demands if each.job_id not in made.waits_until_ms]
    for name in made.closed:
        assert running and regions[name][0][0] > max(running)
