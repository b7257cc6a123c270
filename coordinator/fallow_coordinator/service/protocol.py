"""Which protocol a peer speaks, and who must upgrade when it is not ours."""

from __future__ import annotations

from importlib import metadata
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.limits import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN_SUPPORTED
from fallow.v1 import identity_pb2

SOFTWARE: Final = f"fallow {metadata.version('fallow')}"


def check_protocol(protocol: identity_pb2.ProtocolVersion) -> None:
    """Returns when both sides can speak. Raises FIELD_MISSING, PROTOCOL_TOO_OLD or PROTOCOL_TOO_NEW."""
    check_versions(version=protocol.version, min_supported=protocol.min_supported)


def check_versions(*, version: int, min_supported: int) -> None:
    """As `check_protocol`, of a peer that speaks `version` and understands down to `min_supported`."""
    allowed = f"{PROTOCOL_VERSION_MIN_SUPPORTED} to {PROTOCOL_VERSION}"
    if version == 0:
        raise FallowError(Reason.FIELD_MISSING, "the protocol version is not set", field="protocol", limit=allowed)
    if version < PROTOCOL_VERSION_MIN_SUPPORTED:
        raise FallowError(
            Reason.PROTOCOL_TOO_OLD,
            f"this side speaks protocol {version}",
            field="protocol.version",
            limit=allowed,
            hint="upgrade fallow here: pip install --upgrade fallow",
        )
    if min_supported > PROTOCOL_VERSION:
        raise FallowError(
            Reason.PROTOCOL_TOO_NEW,
            f"this side needs protocol {min_supported} or newer",
            field="protocol.min_supported",
            limit=allowed,
            hint="the coordinator is older than this side: ask its operator to upgrade",
        )


def spoken() -> identity_pb2.ProtocolVersion:
    """What the coordinator speaks."""
    return identity_pb2.ProtocolVersion(
        version=PROTOCOL_VERSION, min_supported=PROTOCOL_VERSION_MIN_SUPPORTED, software=SOFTWARE
    )
