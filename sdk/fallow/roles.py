"""Who somebody is and how far they are trusted."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a certificate lets its holder do."""

    WORKER = "worker"
    CLIENT = "client"
    OPERATOR = "operator"
    """May use the admin API."""
    SERVICE = "service"
    """The coordinator and its blob service, to each other."""


class Tier(StrEnum):
    """How far a worker is trusted. The tier in a certificate is a ceiling; the pool decides."""

    VOLUNTEER = "volunteer"
    MANAGED = "managed"
    OPERATOR = "operator"


class DataClass(StrEnum):
    """Where a job's rows may go: public to volunteers, internal to managed pools, sensitive to the operator only."""

    PUBLIC = "public"
    INTERNAL = "internal"
    SENSITIVE = "sensitive"


TIERS_ALLOWED: dict[DataClass, frozenset[Tier]] = {
    DataClass.PUBLIC: frozenset(Tier),
    DataClass.INTERNAL: frozenset({Tier.MANAGED, Tier.OPERATOR}),
    DataClass.SENSITIVE: frozenset({Tier.OPERATOR}),
}
"""Which tiers may see rows of which class."""
