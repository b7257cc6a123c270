"""Which bucket a coordinator keeps its blobs in: as `start` is told, and remembered for `check`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

from fallow.errors import FallowError, Reason
from fallow.identity import write_private
from fallow.ids import Digest
from fallow_coordinator.blobs.direct import may_be_given_out
from fallow_coordinator.blobs.presigning import Bucket
from fallow_coordinator.blobs.storage import blob_key

BUCKET_FILE: Final = "bucket.json"


@dataclass(frozen=True, slots=True)
class BucketPlace:
    """A bucket, and which part of it. Keys come from AWS_* variables and lie in no file of ours."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    """Of a store that is not Amazon's; empty: Amazon's own."""
    region: str = "us-east-1"

    @classmethod
    def parse(cls, place: str, endpoint: str, region: str) -> BucketPlace:
        """From `s3://bucket/prefix`. Raises FIELD_INVALID."""
        parts = urlsplit(place)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"{place!r} names no bucket",
                field="--blobs",
                limit="s3://bucket or s3://bucket/prefix",
                hint="without --blobs they lie in the state folder",
            )
        if endpoint and urlsplit(endpoint).scheme not in {"http", "https"}:
            raise FallowError(
                Reason.FIELD_INVALID, f"{endpoint!r} is no endpoint", field="--s3-endpoint", limit="https://host[:port]"
            )
        return cls(parts.netloc, parts.path.strip("/"), endpoint.rstrip("/"), region)

    @classmethod
    def of_folder(cls, folder: Path) -> BucketPlace | None:
        """As the blob service's folder remembers it; None: blobs lie in the folder."""
        path = folder / BUCKET_FILE
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def remember(self, folder: Path) -> None:
        """Keeps it for `check` and for later starts. Raises FIELD_INVALID when blobs lie somewhere else already."""
        before = self.of_folder(folder)
        elsewhere = before.url() if before is not None and before.url() != self.url() else ""
        if before is None and any((folder / "blobs").glob("*/*")):
            elsewhere = str(folder)
        if elsewhere:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"the blobs of this coordinator lie in {elsewhere}",
                field="--blobs",
                hint=f"copy everything below blobs/ and notes/ from there to {self.url()}, and remove it there "
                f"or {folder / BUCKET_FILE}; or start without --blobs",
            )
        write_private(folder / BUCKET_FILE, json.dumps(asdict(self)).encode())

    def url(self) -> str:
        """For people."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def store(self) -> S3Store:
        """Opened with the keys of AWS_* variables."""
        return S3Store(
            self.bucket,
            prefix=self.prefix or None,
            config={"endpoint": self.endpoint} if self.endpoint else None,
            region=self.region,
            virtual_hosted_style_request=not self.endpoint,
            client_options={"allow_http": self.endpoint.startswith("http://")},
        )

    def signing(self, environment: Mapping[str, str]) -> Bucket | None:
        """For URLs; None without a lasting key, or when the endpoint is neither encrypted nor this machine."""
        endpoint = self.endpoint or f"https://s3.{self.region}.amazonaws.com"
        key, secret = environment.get("AWS_ACCESS_KEY_ID", ""), environment.get("AWS_SECRET_ACCESS_KEY", "")
        if not (key and secret) or environment.get("AWS_SESSION_TOKEN") or not may_be_given_out(endpoint):
            return None
        return Bucket(endpoint, self.bucket, self.region, key, secret, self.prefix)


class BucketBlobs:
    """Blobs in a bucket, for whoever only looks."""

    def __init__(self, place: BucketPlace) -> None:
        self._store = place.store()

    def length_bytes(self, digest: Digest) -> int | None:
        """How long a blob is; None: it is not there."""
        try:
            return obstore.head(self._store, blob_key(digest))["size"]
        except FileNotFoundError:
            return None

    def digest(self, digest: Digest) -> Digest:
        """The digest of what lies in a blob's place, read in bounded memory."""
        found = hashlib.sha256()
        for piece in obstore.get(self._store, blob_key(digest)).stream():
            found.update(piece)
        return Digest(found.digest())
