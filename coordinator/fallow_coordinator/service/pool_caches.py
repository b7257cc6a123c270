"""Which workers serve blobs to others of their pool, and who is near enough to ask them, while they are connected.

Nothing of it is journaled and nothing depends on it: whoever asks in vain goes to the blob service.
"""

from __future__ import annotations

import hashlib
import ipaddress
from typing import Final

from fallow.ids import PoolId, SessionId
from fallow.limits import POOL_CACHES_TOLD_MAX
from fallow.roles import Tier
from fallow.session import PoolCache
from fallow_coordinator.service.auth import Caller

CACHES_OF_A_NETWORK_MAX: Final = 256
"""More of them in one network and pool are not told of."""
TIERS_THAT_SERVE: Final = frozenset({Tier.MANAGED, Tier.OPERATOR})
NETWORK_PREFIXES: Final = {4: 24, 6: 64}
"""Leading bits of an address, by version, that two machines of one network share. Behind one router all are one."""

_Place = tuple[PoolId, str]


class PoolCaches:
    """The caches of all pools. Used from one event loop."""

    def __init__(self) -> None:
        self._networks: dict[SessionId, str] = {}
        """Of every session that is open."""
        self._places: dict[SessionId, _Place] = {}
        """Of every session with a cache that is told of."""
        self._caches: dict[_Place, dict[SessionId, PoolCache]] = {}

    def opened(self, session_id: SessionId, caller: Caller, address: str, cache: PoolCache | None) -> None:
        """A worker has come from `address`; a cache counts when its tier may serve others."""
        network = network_of(address)
        self._networks[session_id] = network
        if cache is None or caller.tier not in TIERS_THAT_SERVE:
            return
        place = (caller.pool_id, network)
        here = self._caches.setdefault(place, {})
        if len(here) < CACHES_OF_A_NETWORK_MAX:
            here[session_id] = cache
            self._places[session_id] = place

    def closed(self, session_id: SessionId) -> None:
        """It has gone, and its cache with it."""
        self._networks.pop(session_id, None)
        place = self._places.pop(session_id, None)
        if place is None:
            return
        del self._caches[place][session_id]
        if not self._caches[place]:
            del self._caches[place]

    def near(self, session_id: SessionId, pool_id: PoolId) -> tuple[PoolCache, ...]:
        """Caches of the pool in the session's network, its own left out: the same few for everybody there, so that
        what one has left another finds."""
        here = self._caches.get((pool_id, self._networks.get(session_id, "")), {})
        chosen = sorted((other for other in here if other != session_id), key=_rank)[:POOL_CACHES_TOLD_MAX]
        return tuple([here[other] for other in chosen])


def network_of(address: str) -> str:
    """The network of an address as far as we can see; of what is no address, itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, NETWORK_PREFIXES[found.version]), strict=False))


def _rank(session_id: SessionId) -> bytes:
    """An order that nobody chooses, and that is the same for all."""
    return hashlib.sha256(session_id.encode()).digest()
