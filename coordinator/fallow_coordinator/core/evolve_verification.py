"""How events about verifying results change the state."""

from __future__ import annotations

from fallow_coordinator.core.state import State
from fallow_coordinator.core.verification_events import VerificationEvent


def evolve_verification(state: State, event: VerificationEvent, at_ms: int) -> None:
    """Applies one event about verifying results."""
    raise AssertionError(f"nothing decides {type(event).__name__} yet")
