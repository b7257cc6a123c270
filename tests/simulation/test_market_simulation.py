"""Seeds with money, and the proof that they see."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simulation.market import simulate_market
from simulation.planted_market_bugs import PLANTED, Plant
from simulation.virtual_time import SimulationError

SEEDS = 60
SEEDS_A_TEST = 20


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_every_promise_about_money_holds_in_every_seed(first: int) -> None:
    for seed in range(first, first + SEEDS_A_TEST):
        simulate_market(seed)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("first", range(SEEDS, SEEDS + 5_000, 500))
def test_every_promise_about_money_holds_in_thousands_of_seeds(first: int) -> None:
    for seed in range(first, first + 500):
        simulate_market(seed)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_with_money_is_found_by_the_seeds(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    bugs = plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            simulate_market(seed, bugs)
        except SimulationError as error:
            print(f"{plant.__name__}: {error}")
            record_property("seed", seed)
            return
    pytest.fail(f"{plant.__name__} was found by none of {SEEDS} seeds")
