"""Nonces for renewals: made without remembering them, good once, for one key, for a short while.

A nonce is its expiry, 16 random bytes and an HMAC over both and the key's fingerprint under a secret of this process.
Only nonces that were used are remembered, until they expire; so nobody can push another's out of a table by asking for
many.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import OrderedDict
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import KeyFingerprint

NONCE_VALID_FOR_MS: Final = 60_000
NONCES_USED_MAX: Final = 100_000
_RANDOM_BYTES: Final = 16
_HEAD: Final = struct.Struct(f">Q{_RANDOM_BYTES}s")


class Nonces:
    """Gives out nonces and takes each back once."""

    def __init__(self, secret: bytes) -> None:
        """`secret` is 32 fresh bytes; nonces of an earlier process are unknown to this one."""
        self._secret = secret
        self._used: OrderedDict[bytes, int] = OrderedDict()

    def give(self, key_fingerprint: KeyFingerprint, *, now_ms: int, random: bytes) -> tuple[bytes, int]:
        """A nonce for that key and when it expires. `random` is 16 fresh bytes."""
        expires_at_ms = now_ms + NONCE_VALID_FOR_MS
        head = _HEAD.pack(expires_at_ms, random)
        return head + self._mac(head, key_fingerprint), expires_at_ms

    def check(self, nonce: bytes, key_fingerprint: KeyFingerprint, *, now_ms: int) -> None:
        """Returns when the nonce may be used by that key now. Raises NONCE_INVALID."""
        head, mac = nonce[: _HEAD.size], nonce[_HEAD.size :]
        known = len(head) == _HEAD.size and hmac.compare_digest(mac, self._mac(head, key_fingerprint))
        if not known or _HEAD.unpack(head)[0] < now_ms or nonce in self._used:
            raise FallowError(
                Reason.NONCE_INVALID,
                "the nonce is unknown, used or too old",
                field="nonce",
                limit=f"{NONCE_VALID_FOR_MS // 1000} s, once",
                hint="ask for another",
            )

    def use(self, nonce: bytes, key_fingerprint: KeyFingerprint, *, now_ms: int) -> None:
        """Takes the nonce out of use; call it once the signature over it holds. Raises NONCE_INVALID or OVERLOADED."""
        self.check(nonce, key_fingerprint, now_ms=now_ms)
        while self._used and next(iter(self._used.values())) < now_ms:
            self._used.popitem(last=False)
        if len(self._used) >= NONCES_USED_MAX:
            raise FallowError(Reason.OVERLOADED, "too many renewals at once", hint="try again in a minute")
        self._used[nonce] = _HEAD.unpack(nonce[: _HEAD.size])[0]

    def _mac(self, head: bytes, key_fingerprint: KeyFingerprint) -> bytes:
        return hmac.new(self._secret, head + key_fingerprint, hashlib.sha256).digest()
