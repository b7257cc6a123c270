"""A join line: one opaque word that carries everything needed to join, and nothing that a shell would touch."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from dataclasses import dataclass

from fallow.errors import FallowError, Reason
from fallow.ids import DIGEST_BYTES, Digest, TokenId

_PREFIX = "fallow1_"
SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class JoinLine:
    """Where to enrol, which authority to trust, and the token."""

    enrollment_endpoint: str
    """`host:port`."""
    authority_fingerprint: Digest
    """SHA-256 of the authority's certificate, DER."""
    token_id: TokenId
    token_secret: bytes

    def encode(self) -> str:
        """The word: letters, digits, `-` and `_` only, with a checksum against half-copied lines."""
        endpoint, token = self.enrollment_endpoint.encode(), self.token_id.encode()
        body = struct.pack(">BB", len(endpoint), len(token)) + endpoint + token
        body += self.authority_fingerprint + self.token_secret
        body += struct.pack(">I", zlib.crc32(body))
        return _PREFIX + base64.urlsafe_b64encode(body).decode("ascii").rstrip("=")


def parse_join_line(text: str) -> JoinLine:
    """The join line in `text`. Raises FIELD_INVALID when it was cut, altered or is none."""
    word = text.strip()
    if not word.startswith(_PREFIX):
        raise _invalid(f"a join line begins with {_PREFIX}")
    encoded = word[len(_PREFIX) :]
    try:
        body = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        (checksum,) = struct.unpack(">I", body[-4:])
        if zlib.crc32(body[:-4]) != checksum:
            raise _invalid("its checksum is wrong: part of it is missing or altered")
        endpoint_bytes, token_bytes = struct.unpack(">BB", body[:2])
        if len(body) != 2 + endpoint_bytes + token_bytes + DIGEST_BYTES + SECRET_BYTES + 4:
            raise _invalid("its length is wrong")
        cut = 2 + endpoint_bytes
        endpoint = body[2:cut].decode()
        token = body[cut : cut + token_bytes].decode()
    except (binascii.Error, struct.error, UnicodeDecodeError):
        raise _invalid("it is not complete") from None
    cut += token_bytes
    return JoinLine(endpoint, Digest(body[cut : cut + DIGEST_BYTES]), TokenId(token), body[cut + DIGEST_BYTES : -4])


def _invalid(why: str) -> FallowError:
    return FallowError(
        Reason.FIELD_INVALID,
        f"this is not a join line: {why}",
        field="join line",
        hint="copy the whole word and try again",
    )
