"""Who tells the core of carbon: the file when it changes, the regions where workers are, each hour once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fallow.errors import FallowError
from fallow_coordinator.carbon.keeper import CarbonKeeper, forecasts
from fallow_coordinator.carbon.table import SYNTHETIC, CarbonTable
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.carbon import ELSEWHERE
from fallow_coordinator.core.limits import FORECAST_HOURS_MAX, FORECAST_REGIONS_MAX, HOUR_MS
from journal_world import World

HEADER = "region,hour_of_year,grams_per_kwh\n"


def write(path: Path, grams: int, *, bad: bool = False) -> None:
    lines = [f"{region},{hour},{grams}\n" for region in ("de", "world") for hour in range(24)]
    path.write_text(HEADER + "".join(lines[:-1] if bad else lines))


@pytest.fixture
async def world() -> World:
    made = World()
    await made.begin()
    worker = await made.volunteer()
    await made.tell(c.ChangeCapability(worker.session_id, replace(worker.capability, region="DE"), 1))
    return made


async def test_the_file_counts_when_it_comes_changes_and_goes(world: World, tmp_path: Path) -> None:
    path = tmp_path / "carbon.csv"
    keeper = CarbonKeeper(path, required=False)
    await keeper.keep(world.engine)
    state = world.engine.state
    assert state.forecast_source == SYNTHETIC.label and set(state.forecasts) == {"de", ELSEWHERE}
    for grams in (111, 22):
        write(path, grams)
        await keeper.keep(world.engine)
        assert set(state.forecasts["de"].grams_per_kwh) == {grams}
    path.unlink()
    await keeper.keep(world.engine)
    assert state.forecast_source == SYNTHETIC.label
    await world.engine.stop()


async def test_a_bad_file_is_told_and_the_last_good_one_stays(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "carbon.csv"
    write(path, 111)
    keeper = CarbonKeeper(path, required=True)
    write(path, 22, bad=True)
    await keeper.keep(world.engine)
    await keeper.keep(world.engine)
    assert set(world.engine.state.forecasts["de"].grams_per_kwh) == {111}
    assert caplog.text.count("carbon.file_refused") == 1 and "has 23 hours" in caplog.text
    await world.engine.stop()


async def test_nothing_is_written_twice_within_an_hour(world: World, tmp_path: Path) -> None:
    keeper = CarbonKeeper(tmp_path / "none.csv", required=False)
    await keeper.keep(world.engine)
    before = world.engine.state.sequence
    await keeper.keep(world.engine)
    assert world.engine.state.sequence <= before + 1, "unless the hour has just ended"
    await world.engine.stop()


def test_a_named_file_must_be_good(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match="can't be read"):
        CarbonKeeper(tmp_path / "none.csv", required=True)


def test_forecasts_are_bounded_and_begin_with_the_hour() -> None:
    command = forecasts(SYNTHETIC, tuple(f"region-{n}" for n in range(200)), 5 * HOUR_MS + 1)
    assert command.from_ms == 5 * HOUR_MS
    assert len(command.forecasts) == FORECAST_REGIONS_MAX
    assert {len(told.grams_per_kwh) for told in command.forecasts} == {FORECAST_HOURS_MAX}
    nobody = forecasts(CarbonTable("mine", {"de": [1] * 24}), ("fr",), 0)
    assert nobody.forecasts == (), "what the table does not know is not forecast"
