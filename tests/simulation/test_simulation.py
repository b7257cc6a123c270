"""Seeds of the fast tier, and the proof that they see."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simulation.planted_bugs import PLANTED, Plant
from simulation.run import simulate
from simulation.virtual_time import SimulationError

SEEDS = 240
SEEDS_A_TEST = 20
MEASURING_SEEDS = 60


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_A_TEST))
def test_every_promise_holds_in_every_seed(first: int) -> None:
    for seed in range(first, first + SEEDS_A_TEST):
        simulate(seed)


@pytest.mark.parametrize("first", range(0, MEASURING_SEEDS, SEEDS_A_TEST))
def test_certificates_are_of_devices_that_answered(first: int) -> None:
    """Devices are measured while messages are lost, workers and coordinators crash, and devices lie and change."""
    measured = sum(simulate(seed, measures=True).disk.oracle.measured for seed in range(first, first + SEEDS_A_TEST))
    assert measured, "nothing was measured"


def test_a_seed_always_tells_the_same_story() -> None:
    stories = [simulate(7).disk.records for _ in range(2)]
    assert stories[0] == stories[1]


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("first", range(SEEDS, SEEDS + 10_000, 1_000))
def test_every_promise_holds_in_thousands_of_seeds(first: int) -> None:
    for seed in range(first, first + 1_000):
        simulate(seed)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found_by_the_seeds(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    bugs = plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            simulate(seed, bugs)
        except SimulationError as error:
            print(f"{plant.__name__}: {error}")
            record_property("seed", seed)
            return
    pytest.fail(f"{plant.__name__} was found by none of {SEEDS} seeds")
