"""URLs by which a client reads or writes one object of an S3 bucket itself, for a while, and nothing else.

AWS Signature Version 4, query parameters ("Authenticating Requests: Using Query Parameters", Amazon S3 API Reference).
An upload's digest and length are among the signed headers, so the URL is good for those bytes alone: the store refuses
others.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, urlsplit

from fallow.session import BlobReference
from fallow_coordinator.blobs.storage import blob_key

_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_UNSIGNED: Final = "UNSIGNED-PAYLOAD"
"""The body is bound by its checksum header instead, which is signed."""
EXPIRES_S_MAX: Final = 7 * 24 * 3_600


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where blobs lie and the key that may sign for them."""

    endpoint: str
    """`https://host[:port]`; objects are addressed as `endpoint/name/key`."""
    name: str
    region: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    prefix: str = ""
    """Stands before every key, `part/of/a/bucket`; empty: the bucket is ours alone."""


@dataclass(frozen=True, slots=True)
class PresignedRequest:
    """One request that its holder may make; `headers` must go with it, word for word."""

    method: str
    url: str
    headers: dict[str, str]


def presigned_get(bucket: Bucket, blob: BlobReference, *, now: datetime.datetime, expires_s: int) -> PresignedRequest:
    """Reading one blob until `expires_s` seconds after `now` (UTC)."""
    return _presigned(bucket, "GET", blob_key(blob.digest), {}, now, expires_s)


def presigned_put(
    bucket: Bucket, blob: BlobReference, *, now: datetime.datetime, expires_s: int, key: str = ""
) -> PresignedRequest:
    """Writing one blob, with exactly this digest and length, until `expires_s` seconds after `now` (UTC).

    It goes where blobs lie, or to `key`.
    """
    headers = {
        "content-length": str(blob.length_bytes),
        "x-amz-checksum-sha256": base64.b64encode(blob.digest).decode(),
    }
    return _presigned(bucket, "PUT", key or blob_key(blob.digest), headers, now, expires_s)


def _presigned(
    bucket: Bucket, method: str, key: str, headers: dict[str, str], now: datetime.datetime, expires_s: int
) -> PresignedRequest:
    assert 1 <= expires_s <= EXPIRES_S_MAX, "S3 takes no more than seven days"
    parts = urlsplit(bucket.endpoint)
    whole_key = f"{bucket.prefix}/{key}" if bucket.prefix else key
    path = quote(f"{parts.path.rstrip('/')}/{bucket.name}/{whole_key}", safe="/~")
    signed = {"host": parts.netloc, **headers}
    names = ";".join(sorted(signed))
    moment, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    scope = f"{day}/{bucket.region}/s3/aws4_request"
    query = _canonical_query(
        {
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{bucket.access_key_id}/{scope}",
            "X-Amz-Date": moment,
            "X-Amz-Expires": str(expires_s),
            "X-Amz-SignedHeaders": names,
        }
    )
    lines = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed))
    canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{_UNSIGNED}"
    to_sign = f"{_ALGORITHM}\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signature = hmac.new(_signing_key(bucket, day), to_sign.encode(), hashlib.sha256).hexdigest()
    url = f"{parts.scheme}://{parts.netloc}{path}?{query}&X-Amz-Signature={signature}"
    return PresignedRequest(method, url, headers)


def _canonical_query(parameters: dict[str, str]) -> str:
    return "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in sorted(parameters.items()))


def _signing_key(bucket: Bucket, day: str) -> bytes:
    key = f"AWS4{bucket.secret_access_key}".encode()
    for part in (day, bucket.region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key
