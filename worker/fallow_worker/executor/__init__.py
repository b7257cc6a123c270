"""Executors: how leases become work of engine children, on this machine's processes or on the owner's Ray."""

from __future__ import annotations

from fallow.session import Cause


class WorkFailed(Exception):
    """A task that could not be done here: whose fault it was, and why, in words for people."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(cause, reason)
        self.cause = cause
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason} (cause: {self.cause.value})"
