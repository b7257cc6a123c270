"""What is raised when the state contradicts itself."""

from __future__ import annotations


class InvariantError(AssertionError):
    """The state contradicts itself: the core is wrong."""


def must(holds: bool, what: str) -> None:
    """Returns when it holds. Raises InvariantError."""
    if not holds:
        raise InvariantError(what)
