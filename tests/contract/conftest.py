"""What contract suites share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from s3_server import S3Bucket, s3_server


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A local S3 server that checks signatures, lifetimes and checksums as the real one does."""
    pytest.importorskip("moto", reason="needs moto[server] of the dev extra")
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> S3Bucket:
    """An empty bucket of its own."""
    return S3Bucket.made(s3_endpoint)
