"""Names of regions, where workers stand and where jobs may go: the same rule for everybody."""

from __future__ import annotations

from typing import Final

REGION_BYTES_MAX: Final = 32
REGION_RULE: Final = f"1 to {REGION_BYTES_MAX} letters, digits, '-' and '_', such as de or us-east"


def is_region(text: str) -> bool:
    """Whether this names a region: `REGION_RULE`."""
    return len(text) <= REGION_BYTES_MAX and text.isascii() and text.replace("-", "").replace("_", "").isalnum()
