"""Threads and batches in flight: what is tried, what is chosen, what is remembered; and never another bit."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.ids import Digest, digest_of
from fallow.session import SandboxLevel
from fallow_worker.engine.lanes import Answer, Lanes
from fallow_worker.engine.protocol import Ready, Setting, SpawnOptions, Trial, Tuned
from fallow_worker.engine.tuning import GAIN_PERMILLE_MIN, ROUNDS, TUNING_SECONDS_MAX, Tuner, settings_to_try
from fallow_worker.executor.tunings import BUNDLES_MAX, Tunings, identity_of, read_tunings, tuning_words

BUNDLE = digest_of(b"bundle")
OPTIONS = SpawnOptions(threads=4)
READY = Ready(SandboxLevel.FULL, (), (), 1, "onnxruntime 1", "class", 1, 1)
TUNED = Tuned(Setting(2, 1), (Trial(Setting(4, 1), 1_000, 1_000), Trial(Setting(2, 1), 1_100, 1_100)))


@settings(max_examples=30)
@given(st.integers(1, 64), st.data(), st.booleans())
def test_the_fixed_setting_comes_first_and_nothing_asks_for_more_threads_than_there_are(
    threads: int, data: st.DataObject, wide: bool
) -> None:
    lanes = data.draw(st.integers(1, threads))
    tried = settings_to_try(threads=threads, lanes=lanes, wide=wide)
    assert tried[0] == Setting(lanes, threads // lanes)
    assert len(set(tried)) == len(tried) <= 5
    assert all(1 <= one.in_flight <= threads + 1 and 1 <= one.threads <= threads for one in tried)
    assert wide or all(one.threads == threads // lanes for one in tried)


SETTINGS = settings_to_try(threads=4, lanes=4, wide=True)


def decided(speeds: dict[Setting, float], other_bits: tuple[Setting, ...] = ()) -> Tuned:
    """What is chosen when a round takes a slice's time over the speed."""
    tuner = Tuner(SETTINGS)
    rounds = 0
    while tuner.wants_more():
        rounds += 1
        tuner.measured(100, {one: 0.01 / speeds[one] for one in tuner.round()}, other_bits)
    assert rounds <= ROUNDS + 1
    assert tuner.decided is not None
    return tuner.decided


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10), min_size=len(SETTINGS), max_size=len(SETTINGS)))
def test_the_best_is_chosen_and_what_is_not_clearly_better_is_not(speeds: list[float]) -> None:
    told = dict(zip(SETTINGS, speeds, strict=True))
    chosen = decided(told).setting
    fixed = told[SETTINGS[0]]
    assert told[chosen] >= fixed
    if max(speeds) < fixed * (GAIN_PERMILLE_MIN - 1) / 1_000:
        assert chosen == SETTINGS[0]
    if max(speeds) > fixed * (GAIN_PERMILLE_MIN + 1) / 1_000:
        assert told[chosen] >= max(speeds) * 0.999


@settings(max_examples=30)
@given(st.lists(st.floats(1, 20), min_size=ROUNDS, max_size=ROUNDS), st.data())
def test_a_machine_that_is_busy_at_times_does_not_make_an_equal_setting_look_better(
    busy: list[float], data: st.DataObject
) -> None:
    tuner = Tuner(SETTINGS[:2])
    tuner.measured(100, dict.fromkeys(SETTINGS[:2], 0.01), ())
    spared = data.draw(st.integers(0, ROUNDS - 1))
    for number, factor in enumerate(busy):
        # The fixed one suffers in every round but one.
        tuner.measured(100, {SETTINGS[0]: 0.01 * (1 if number == spared else factor), SETTINGS[1]: 0.01}, ())
    assert tuner.decided is not None and tuner.decided.setting == SETTINGS[0]


def test_a_setting_with_other_bits_is_out_however_fast_it_is() -> None:
    speeds = dict.fromkeys(SETTINGS, 1.0) | {SETTINGS[1]: 9.0}
    assert decided(speeds).setting == SETTINGS[1]
    tuned = decided(speeds, other_bits=(SETTINGS[1],))
    assert tuned.setting == SETTINGS[0]
    assert SETTINGS[1] not in {trial.setting for trial in tuned.trials}


def test_measuring_ends_even_when_every_batch_fails_or_takes_long() -> None:
    tuner = Tuner(SETTINGS)
    for _ in range(100):
        if tuner.wants_more():
            tuner.spoilt(dict.fromkeys(tuner.round(), TUNING_SECONDS_MAX / 40))
    assert tuner.decided == Tuned(SETTINGS[0])
    slow = Tuner(SETTINGS)
    slow.measured(1, dict.fromkeys(slow.round(), TUNING_SECONDS_MAX), ())
    assert slow.decided is not None and slow.decided.setting == SETTINGS[0]


@pytest.mark.parametrize("setting", [None, *SETTINGS, Setting(99, 1)])
def test_batches_are_answered_in_order_by_so_many_at_once(setting: Setting | None) -> None:
    lanes = Lanes(threads=4, lanes=4)
    lanes.warmed(0.5)
    lanes.tune(setting, measures=True, wide=True)
    busy, most, lock = 0, 0, threading.Lock()
    together = threading.Event()

    def run(start: int, wide: bool) -> Answer:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        together.wait(0.0005)
        with lock:
            busy -= 1
        return {"y": np.array([start])}

    total = 1_000
    found = list(lanes.answers(run, total, 2))
    assert [start for start, _ in found] == list(range(0, total, 2))
    assert all(isinstance(answer, dict) and answer["y"][0] == start for start, answer in found)
    assert most <= max(one.in_flight for one in SETTINGS)
    if setting in SETTINGS and setting:
        assert most <= setting.in_flight
    tuned = lanes.newly_tuned()
    assert (tuned is not None) is (setting is None)
    assert lanes.newly_tuned() is None, "told once"


def test_a_setting_that_answers_with_other_bits_is_found_out_while_measuring() -> None:
    lanes = Lanes(threads=2, lanes=2)
    lanes.warmed(0.5)
    lanes.tune(None, measures=True, wide=True)
    # A batch on all threads is instantaneous, and wrong in its last bit.
    step = threading.Event()

    def run(start: int, wide: bool) -> Answer:
        if not wide:
            step.wait(0.001)
        return {"y": np.array([start + wide], np.float32)}

    found = dict(lanes.answers(run, 200, 1))
    measured = [start for start, answer in found.items() if isinstance(answer, dict) and answer["y"][0] == start]
    assert measured == list(range(200)), "what was delivered is of the fixed setting"
    tuned = lanes.newly_tuned()
    assert tuned is not None and tuned.setting.threads == 1


# ------------------------------------------------------------------------------------------------- remembering


def test_what_was_measured_is_remembered_for_this_machine_and_runtime_alone(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    identity = identity_of(READY, OPTIONS)
    Tunings(path).keep(BUNDLE, identity, OPTIONS, TUNED)
    again = Tunings(path)
    assert again.setting(BUNDLE, identity, OPTIONS) == TUNED.setting
    assert again.setting(digest_of(b"other"), identity, OPTIONS) is None
    for other in (
        identity_of(replace(READY, runtime="onnxruntime 2"), OPTIONS),
        identity_of(replace(READY, execution_class="another"), OPTIONS),
        identity_of(READY, replace(OPTIONS, threads=8)),
        identity_of(READY, replace(OPTIONS, allow_spinning=True)),
    ):
        assert again.setting(BUNDLE, other, OPTIONS) is None
    assert tuning_words(read_tunings(path)[BUNDLE.hex()]) == "2×1 (4×1: 1 rows/s, 2×1: 1 rows/s)"


def test_what_is_old_or_from_the_future_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.json"
    Tunings(path).keep(BUNDLE, "here", OPTIONS, TUNED)
    for days, known in ((0, True), (29, True), (31, False), (-1, False)):
        at = time.time() + days * 86_400
        with monkeypatch.context() as patched:
            patched.setattr("fallow_worker.executor.tunings.time.time", lambda at=at: at)
            assert (Tunings(path).setting(BUNDLE, "here", OPTIONS) is not None) is known


def test_another_machine_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    here = identity_of(READY, OPTIONS)
    monkeypatch.setattr("fallow_worker.executor.tunings.machine_digest", lambda: bytes(32))
    assert identity_of(READY, OPTIONS) != here


@pytest.mark.parametrize("setting", [Setting(0, 1), Setting(1, 9), Setting(-1, 1), Setting(10**6, 1)])
def test_what_no_child_can_have_measured_is_not_remembered(tmp_path: Path, setting: Setting) -> None:
    tunings = Tunings(tmp_path / "tuning.json")
    tunings.keep(BUNDLE, "here", OPTIONS, Tuned(setting))
    tunings.keep(BUNDLE, "here", OPTIONS, Tuned(Setting(1, 1), TUNED.trials * 9))
    assert tunings.setting(BUNDLE, "here", OPTIONS) is None
    assert not (tmp_path / "tuning.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"version": 2, "bundles": {}}', '{"version": 1, "bundles": {"00": 3}}',
        json.dumps({"version": 1, "bundles": {BUNDLE.hex(): {"identity": "here", "setting": {"in_flight": "x"}}}}),
        json.dumps({"version": 1, "bundles": {BUNDLE.hex(): {"identity": "here", "setting": [99, 1]}}}),
    ],
)  # fmt: skip
def test_a_damaged_file_costs_measuring_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(text)
    tunings = Tunings(path)
    assert tunings.setting(BUNDLE, "here", OPTIONS) is None
    tunings.keep(BUNDLE, "here", OPTIONS, TUNED)
    assert Tunings(path).setting(BUNDLE, "here", OPTIONS) == TUNED.setting
    assert tuning_words({"setting": {}}) == "cannot be read"


def test_the_newest_bundles_are_remembered_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    tunings = Tunings(path)
    digests = [Digest(number.to_bytes(32, "big")) for number in range(BUNDLES_MAX + 3)]
    for digest in digests:
        tunings.keep(digest, "here", OPTIONS, Tuned(Setting(1, 1)))
    assert list(read_tunings(path)) == [digest.hex() for digest in digests[3:]]
    assert Tunings(tmp_path / "absent" / "tuning.json").setting(BUNDLE, "here", OPTIONS) is None
