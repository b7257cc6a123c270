"""Which executor a worker runs, and how a node's cores and memory are dealt out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.limits import GIB, MIB
from fallow.roles import Tier
from fallow_worker.engine.protocol import DATA_BYTES_DEFAULT, data_limit_class
from fallow_worker.executor.choice import ExecutorKind, ExecutorSetting, chosen_executor
from fallow_worker.executor.layout import CHILDREN_MAX, SHARED_BYTES_MAX, Layout, memory_cap, node_layout

SETTINGS = st.sampled_from(ExecutorSetting)
TIERS = st.sampled_from(Tier)


@pytest.mark.parametrize(
    ("devices", "address", "tier", "kind"),
    [
        (1, "", Tier.VOLUNTEER, ExecutorKind.PROCESS),
        (0, "", Tier.VOLUNTEER, ExecutorKind.PROCESS),
        (2, "", Tier.VOLUNTEER, ExecutorKind.RAY),
        (2, "", Tier.MANAGED, ExecutorKind.RAY),
        (1, "lab:6379", Tier.VOLUNTEER, ExecutorKind.RAY),
        (4, "", Tier.OPERATOR, ExecutorKind.PROCESS),
        (1, "lab:6379", Tier.OPERATOR, ExecutorKind.RAY),
    ],
)
def test_auto_takes_ray_where_there_is_something_to_spread_over(
    devices: int, address: str, tier: Tier, kind: ExecutorKind
) -> None:
    choice = chosen_executor(ExecutorSetting.AUTO, devices=devices, ray_address=address, tier=tier)
    assert choice.kind is kind
    assert choice.why


@given(st.integers(0, 64), st.sampled_from(["", "lab:6379"]), TIERS)
def test_what_the_owner_says_stands(devices: int, address: str, tier: Tier) -> None:
    for setting, kind in ((ExecutorSetting.RAY, ExecutorKind.RAY), (ExecutorSetting.PROCESS, ExecutorKind.PROCESS)):
        assert chosen_executor(setting, devices=devices, ray_address=address, tier=tier).kind is kind


@given(st.integers(0, 64 * GIB), st.integers(0, 2 * GIB))
def test_a_cap_lets_a_program_grow_beyond_what_inspection_saw(peak: int, program: int) -> None:
    cap = memory_cap(peak, program_bytes=program)
    assert cap.data_bytes == data_limit_class(cap.data_bytes) >= DATA_BYTES_DEFAULT
    assert cap.data_bytes >= 2 * peak
    assert 2 * peak < cap.resident_bytes <= cap.data_bytes + SHARED_BYTES_MAX


def test_small_programs_share_one_data_limit() -> None:
    limits = {memory_cap(peak).data_bytes for peak in (0, MIB, 100 * MIB, GIB)}
    assert limits == {DATA_BYTES_DEFAULT}


@given(st.integers(1, 256), st.integers(256 * MIB, 1024 * GIB), st.integers(0, 32 * GIB), st.integers(0, 16))
def test_no_layout_uses_more_cores_than_there_are(cores: int, memory: int, peak: int, wanted: int) -> None:
    layout = node_layout(cores=cores, memory_bytes=memory, cap=memory_cap(peak), children_wanted=wanted)
    assert 1 <= layout.children * layout.threads <= cores
    assert layout.children <= max(CHILDREN_MAX, wanted)


def test_children_share_the_cores_and_large_models_get_fewer_of_them() -> None:
    small = memory_cap(100 * MIB)
    assert node_layout(cores=2, memory_bytes=8 * GIB, cap=small) == Layout(children=1, threads=2)
    assert node_layout(cores=16, memory_bytes=64 * GIB, cap=small) == Layout(children=4, threads=4)
    assert node_layout(cores=64, memory_bytes=256 * GIB, cap=small) == Layout(children=8, threads=8)
    assert node_layout(cores=8, memory_bytes=16 * GIB, cap=memory_cap(4 * GIB)) == Layout(children=1, threads=8)
