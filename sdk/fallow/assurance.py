"""How sure a submitter wants to be of results, as numbers, and what those numbers ask for.

All rates and bounds are shares in parts per million, so that a decision recorded today is the same integer for ever.
Formulas are those of random spot checks: someone who alters a share c of the rows, each alteration found with
probability d when checked, stays unseen through n checked rows with probability (1 − c·d)ⁿ.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import Digest

PPM: Final = 1_000_000
ROWS_MAX: Final = 10_000_000
"""No job has more rows, so no answer is larger."""
_DRAW_DOMAIN: Final = b"fallow.v1 audit draw"
_COUNT_DOMAIN: Final = b"fallow.v1 audit count"
_REFEREE_DOMAIN: Final = b"fallow.v1 audit referee"


@dataclass(frozen=True, slots=True)
class Assurance:
    """What is asked of the checking of a job's results."""

    wrong_rows_ppm_max: int
    """ε: the share of wrong rows of one worker that would be found with `confidence_ppm`."""
    confidence_ppm: int
    """q: how surely."""
    audit_rate_ppm_min: int
    """Share of rows that is audited whatever a worker's record says."""
    referee_share_ppm: int
    """ρ: share of audits that goes to an operator's worker, whom colluders cannot buy."""

    def __post_init__(self) -> None:
        """Raises FIELD_INVALID naming the number that cannot be."""
        _within("wrong_rows_ppm_max", self.wrong_rows_ppm_max, 1, PPM - 1)
        _within("confidence_ppm", self.confidence_ppm, PPM // 2, PPM - 1)
        _within("audit_rate_ppm_min", self.audit_rate_ppm_min, 1, PPM)
        _within("referee_share_ppm", self.referee_share_ppm, 1, PPM)


def rows_to_audit(*, wrong_ppm: int, confidence_ppm: int, detection_ppm: int = PPM) -> int:
    """Fewest checked rows that find someone who alters `wrong_ppm` of the rows with `confidence_ppm`.

    n = ⌈ln(1 − q) / ln(1 − c·d)⌉ (Golle and Mironov, CT-RSA 2001); at most `ROWS_MAX`.
    """
    found = wrong_ppm * detection_ppm / PPM**2
    if found >= 1:
        return 1
    if found <= 0:
        return ROWS_MAX
    # A whole answer must not become one more by the last bit of a logarithm.
    needed = math.log1p(-confidence_ppm / PPM) / math.log1p(-found)
    return min(ROWS_MAX, max(1, math.ceil(needed - 1e-9)))


def wrong_rows_bound_ppm(*, audited: int, confidence_ppm: int, found_wrong: int = 0) -> int:
    """Largest share of wrong rows that `audited` checks leave possible, of which `found_wrong` failed; rounded up.

    The one-sided bound of Clopper and Pearson (1934): the share at which so few findings would have the probability
    1 − q. `PPM` when nothing was checked.
    """
    if audited <= 0 or found_wrong >= audited:
        return PPM
    unlikely = 1 - confidence_ppm / PPM
    low, high = found_wrong / audited, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(found_wrong, audited, middle) > unlikely:
            low = middle
        else:
            high = middle
    return min(PPM, math.ceil(high * PPM))


def _at_most(count: int, trials: int, share: float) -> float:
    """Probability of at most `count` findings in so many trials."""
    if share >= 1:
        return 0.0
    log_share, log_rest = math.log(share) if share > 0 else -math.inf, math.log1p(-share)
    total = 0.0
    for found in range(count + 1):
        logs = math.lgamma(trials + 1) - math.lgamma(found + 1) - math.lgamma(trials - found + 1)
        total += math.exp(logs + (found * log_share if found else 0.0) + (trials - found) * log_rest)
    return total


def audit_rate_ppm(assurance: Assurance, *, rows_verified: int, stake_rows: int) -> int:
    """Share of a worker's next rows to audit.

    The largest of the floor, of 1 / (n + 1) by its verified rows n in batches of `rows_to_audit` (a newcomer is audited
    fully), and of what makes cheating not pay: p > (1 − c₀/R) / (1 + S/R) with forfeited stake S counted in rows of pay
    R, faking at a twentieth of it, and a margin of two (the inspection game; see Avenhaus et al., 2002).
    """
    batch = rows_to_audit(wrong_ppm=assurance.wrong_rows_ppm_max, confidence_ppm=assurance.confidence_ppm)
    by_record = -(-PPM * batch // (batch + max(0, rows_verified)))
    by_stake = -(-PPM * 2 * 95 // (100 * (1 + max(0, stake_rows))))
    return min(PPM, max(assurance.audit_rate_ppm_min, by_record, by_stake))


def drawn_rows(*, secret: bytes, commitment: Digest, rows: int, count: int) -> tuple[int, ...]:
    """`count` different rows of `rows`, rising, chosen by a key that was fixed before the commitment and shown after.

    The first `count` places of a Fisher-Yates shuffle whose numbers come from HMAC-SHA256(secret, domain ‖ commitment
    ‖ counter), each draw free of bias by rejection. Everybody who knows the secret draws the same.
    """
    count = min(max(0, count), rows)
    swapped: dict[int, int] = {}
    chosen: list[int] = []
    numbers = _numbers(secret, commitment)
    for place in range(count):
        span = rows - place
        limit = (1 << 64) - (1 << 64) % span
        number = next(numbers)
        while number >= limit:
            number = next(numbers)
        other = place + number % span
        chosen.append(swapped.get(other, other))
        swapped[other] = swapped.get(place, place)
    return tuple(sorted(chosen))


def drawn_count(*, secret: bytes, commitment: Digest, rows: int, rate_ppm: int) -> int:
    """How many of `rows` are drawn at this rate: its whole part, and one more with the probability of the rest.

    So small tasks are drawn from as often as large ones, and nobody who does not know the secret can tell which.
    """
    whole, rest = divmod(rows * rate_ppm, PPM)
    number = int.from_bytes(hmac.digest(secret, _COUNT_DOMAIN + commitment, sha256)[:8], "big")
    return min(rows, whole + (number % PPM < rest))


def goes_to_referee(*, secret: bytes, commitment: Digest, row: int, referee_share_ppm: int) -> bool:
    """Whether a drawn row goes straight to a referee."""
    digest = hmac.digest(secret, _REFEREE_DOMAIN + commitment + row.to_bytes(8, "big"), sha256)
    return int.from_bytes(digest[:8], "big") % PPM < referee_share_ppm


def _numbers(secret: bytes, commitment: Digest) -> Iterator[int]:
    counter = 0
    while True:
        block = hmac.digest(secret, _DRAW_DOMAIN + commitment + counter.to_bytes(8, "big"), sha256)
        for start in range(0, len(block), 8):
            yield int.from_bytes(block[start : start + 8], "big")
        counter += 1


def _within(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise FallowError(Reason.FIELD_INVALID, f"{field} is {value}", field=field, limit=f"{low} to {high} ppm")


PRESETS: Final[dict[str, Assurance]] = {
    "basic": Assurance(50_000, 990_000, 10_000, 100_000),
    "standard": Assurance(10_000, 990_000, 20_000, 200_000),
    "strict": Assurance(1_000, 999_000, 100_000, 500_000),
}
"""The named levels, weakest first."""
_NAMES: Final = {
    "error": "wrong_rows_ppm_max",
    "confidence": "confidence_ppm",
    "rate": "audit_rate_ppm_min",
    "referee": "referee_share_ppm",
}
TEXT_BYTES_MAX: Final = 128


@lru_cache(maxsize=256)
def assurance_of(text: str) -> Assurance:
    """What a job's `assurance` asks for: a level, or a level and shares that differ from it.

    `standard`, or `standard,error=0.005,confidence=0.99,rate=0.05,referee=0.3`. Raises FIELD_INVALID.
    """
    if len(text.encode("utf-8", errors="replace")) > TEXT_BYTES_MAX:
        raise _unreadable(text[:TEXT_BYTES_MAX])
    level, *parts = [part.strip() for part in text.split(",")]
    if level not in PRESETS:
        raise _unreadable(text)
    changes: dict[str, int] = {}
    for part in parts:
        name, _, value = part.partition("=")
        try:
            share = float(value)
        except ValueError:
            raise _unreadable(text) from None
        if name not in _NAMES or not 0 <= share <= 1:
            raise _unreadable(text)
        changes[_NAMES[name]] = round(share * PPM)
    return replace(PRESETS[level], **changes)


def _unreadable(text: str) -> FallowError:
    return FallowError(
        Reason.FIELD_INVALID,
        f"assurance {text!r}",
        field="options.assurance",
        limit=f"{', '.join(PRESETS)}; after it, if need be, shares of {', '.join(_NAMES)}",
        hint="as in standard,error=0.005,rate=0.05",
    )
