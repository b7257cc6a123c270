"""What fits what, and why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.bundle import Precision
from fallow.credits import PoolMode
from fallow.ids import PoolId
from fallow.job import JobOptions
from fallow.roles import DataClass, Tier
from fallow.session import Capability, Device, DeviceKind, DeviceLevel, TaskKind
from fallow_coordinator.core.needs import (
    INSPECTION,
    MISFIT_WORDS,
    Ability,
    Misfit,
    ability_of,
    misfit,
    needs_of_job,
    price_class,
)

GIB = 1 << 30
POOL = PoolId("pool-a")
CPU = Device("cpu-0", DeviceKind.CPU, DeviceLevel.USABLE, memory_bytes=32 * GIB)
GPU = Device("gpu-0", DeviceKind.GPU, DeviceLevel.USABLE, memory_bytes=8 * GIB)
NPU = Device("npu-0", DeviceKind.NPU, DeviceLevel.USABLE, memory_bytes=4 * GIB)


def able(
    *devices: Device, tier: Tier = Tier.VOLUNTEER, mode: PoolMode = PoolMode.DONATION, **changes: object
) -> Ability:
    """A worker's offer."""
    capability = replace(Capability(devices=devices or (CPU,)), **changes)  # type: ignore[arg-type]
    return ability_of(capability, pool_id=POOL, tier=tier, mode=mode, measured=True)


def why(
    ability: Ability, mode: PoolMode = PoolMode.DONATION, data_class: DataClass = DataClass.PUBLIC, **wishes: object
) -> object:
    """The reason for a job with these wishes."""
    options = JobOptions(**wishes)  # type: ignore[arg-type]
    return misfit(needs_of_job(options, pool_id=POOL, data_class=data_class, mode=mode), ability)


@pytest.mark.parametrize(
    ("ability", "wishes", "reason"),
    [
        (able(CPU), {}, None),
        (able(CPU), {"device_kind": "gpu"}, Misfit.DEVICE_KIND),
        (able(replace(GPU, level=DeviceLevel.PRESENT), CPU), {"device_kind": "gpu"}, Misfit.DEVICE_KIND),
        (able(CPU, GPU), {"device_kind": "gpu"}, None),
        (able(CPU, GPU), {"device_kind": "gpu", "memory_bytes_min": 8 * GIB}, None),
        (able(CPU, GPU), {"device_kind": "gpu", "memory_bytes_min": 8 * GIB + 1}, Misfit.MEMORY),
        (able(CPU, GPU), {"memory_bytes_min": 20 * GIB}, None),
        (able(NPU), {"precision": Precision.FP32}, Misfit.PRECISION),
        (able(NPU), {}, Misfit.PRECISION),
        (able(NPU), {"precision": Precision.INT8}, None),
        (able(NPU, CPU), {"precision": Precision.FP32}, None),
        (able(region="us-east"), {"region": "US"}, None),
        (able(region="us-east"), {"region": "us-east"}, None),
        (able(region="use"), {"region": "us"}, Misfit.REGION),
        (able(), {"region": "de"}, Misfit.REGION),
        (able(task_kinds=frozenset({TaskKind.INSPECT})), {}, Misfit.KIND),
        (able()._replace(pool_id=PoolId("pool-b")), {}, Misfit.POOL),
    ],
)
def test_a_worker_fits_or_says_why_not(ability: Ability, wishes: dict[str, object], reason: Misfit | None) -> None:
    assert why(ability, **wishes) is reason  # type: ignore[arg-type]


def test_rows_go_only_to_tiers_that_may_see_them() -> None:
    assert why(able(), data_class=DataClass.INTERNAL) is Misfit.TIER
    assert why(able(tier=Tier.MANAGED), data_class=DataClass.INTERNAL) is None
    assert misfit(INSPECTION, able(tier=Tier.OPERATOR, task_kinds=frozenset({TaskKind.INSPECT}))) is None
    assert misfit(INSPECTION, able(task_kinds=frozenset({TaskKind.INSPECT}))) is Misfit.TIER


def test_asks_and_limits_count_in_markets_alone() -> None:
    dear = able(mode=PoolMode.MARKET, ask_microcredits_per_unit=1_000)
    assert why(able(ask_microcredits_per_unit=1_000), limit_microcredits_per_unit=10) is None
    assert why(dear, mode=PoolMode.MARKET, limit_microcredits_per_unit=10) is Misfit.ASK
    assert why(dear, mode=PoolMode.MARKET, limit_microcredits_per_unit=1_000) is None
    assert why(dear, mode=PoolMode.MARKET) is Misfit.ASK, "no limit means free work only"
    assert why(able(mode=PoolMode.MARKET), mode=PoolMode.MARKET) is None
    unmeasured = able(mode=PoolMode.MARKET)._replace(measured=False)
    assert why(unmeasured, mode=PoolMode.MARKET, limit_microcredits_per_unit=1) is Misfit.NOT_MEASURED
    assert why(unmeasured, mode=PoolMode.MARKET) is None, "free work needs no measuring"


@given(ask=st.integers(0, 10**12), limit=st.integers(1, 10**12))
def test_a_class_never_shuts_out_an_ask_that_the_limit_allows(ask: int, limit: int) -> None:
    ability = able(mode=PoolMode.MARKET, ask_microcredits_per_unit=ask)
    reason = why(ability, mode=PoolMode.MARKET, limit_microcredits_per_unit=limit)
    assert ask > limit or reason is None
    assert reason is None or ask > limit
    assert price_class(ask) <= price_class(limit) or ask > limit


@given(asked=st.integers(1, 1 << 50), there=st.integers(1, 1 << 50))
def test_memory_that_is_not_there_is_never_promised(asked: int, there: int) -> None:
    fits = why(able(replace(CPU, memory_bytes=there)), memory_bytes_min=asked) is None
    assert not fits or there >= asked
    assert fits or there < 4 * asked, "rounding costs at most two powers of two"


def test_each_reason_has_words_and_a_way_out() -> None:
    assert set(MISFIT_WORDS) == set(Misfit)
    assert all(what and then for what, then in MISFIT_WORDS.values())
