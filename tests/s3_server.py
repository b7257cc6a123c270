"""A local S3 server for tests: moto behind a gate that checks what moto lets pass.

The gate refuses presigned requests that are expired or altered, recomputing their signatures with botocore, which knows
nothing of ours; and bodies that are not what their signed checksum says.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.client
import io
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from obstore.store import S3Store

from fallow_coordinator.blobs.presigning import Bucket, PresignedRequest

ACCESS_KEY_ID = "fallow-test"
SECRET_ACCESS_KEY = "not-a-secret"
REGION = "us-east-1"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The server's endpoint while the block runs; `AWS_*` variables of `environment_of_keys` open it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, Gate(DomainDispatcherApplication(create_backend_app)), threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="s3-server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Gate:
    """Checks presigned requests before moto sees them."""

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner = inner

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        fault = self._fault(environment)
        if fault:
            start("403 Forbidden", [("Content-Type", "text/plain")])
            return [fault.encode()]
        return self._inner(environment, start)

    def _fault(self, environment: dict[str, Any]) -> str:
        query = dict(parse_qsl(environment["QUERY_STRING"]))
        given = query.pop("X-Amz-Signature", "")
        if not given:
            return ""
        began = datetime.datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
        if datetime.datetime.now(datetime.UTC) > began + datetime.timedelta(seconds=int(query["X-Amz-Expires"])):
            return "AccessDenied: Request has expired"
        if not secrets.compare_digest(given, self._signature(environment, query)):
            return "SignatureDoesNotMatch"
        body = environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        environment["wsgi.input"] = io.BytesIO(body)
        checksum = environment.get("HTTP_X_AMZ_CHECKSUM_SHA256")
        if checksum and base64.b64encode(hashlib.sha256(body).digest()).decode() != checksum:
            return "BadDigest"
        return ""

    @staticmethod
    def _signature(environment: dict[str, Any], query: dict[str, str]) -> str:
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        auth = S3SigV4QueryAuth(Credentials(ACCESS_KEY_ID, SECRET_ACCESS_KEY), "s3", REGION)
        headers: dict[str, str] = {}
        for name in query["X-Amz-SignedHeaders"].split(";"):
            key = {"content-length": "CONTENT_LENGTH"}.get(name, f"HTTP_{name.upper().replace('-', '_')}")
            headers[name] = environment.get(key, "")
        url = f"http://{environment['HTTP_HOST']}{environment['PATH_INFO']}"
        request = AWSRequest(environment["REQUEST_METHOD"], url, headers=headers, params=query)
        request.context["timestamp"] = query["X-Amz-Date"]
        names = query["X-Amz-SignedHeaders"]
        canonical = "\n".join(
            [
                request.method.upper(),
                environment["PATH_INFO"],
                auth.canonical_query_string(request),
                "".join(f"{name}:{headers[name]}\n" for name in names.split(";")),
                names,
                auth.payload(request),
            ]
        )
        signature: str = auth.signature(auth.string_to_sign(request, canonical), request)
        return signature


def environment_of_keys() -> dict[str, str]:
    """For a process that is to open the buckets."""
    return {"AWS_ACCESS_KEY_ID": ACCESS_KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY}


@dataclass(frozen=True, slots=True)
class S3Bucket:
    """One bucket of the server."""

    bucket: Bucket

    @classmethod
    def made(cls, endpoint: str) -> S3Bucket:
        """A fresh one."""
        name = f"blobs-{secrets.token_hex(6)}"
        made = cls(Bucket(endpoint, name, REGION, ACCESS_KEY_ID, SECRET_ACCESS_KEY))
        assert send(PresignedRequest("PUT", f"{endpoint}/{name}", {"content-length": "0"}), b"")[0] == 200
        return made

    def store(self) -> S3Store:
        return S3Store(
            self.bucket.name,
            endpoint=self.bucket.endpoint,
            region=REGION,
            access_key_id=ACCESS_KEY_ID,
            secret_access_key=SECRET_ACCESS_KEY,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )


def send(request: PresignedRequest, body: bytes | None = None) -> tuple[int, bytes]:
    """Makes the request: status and body."""
    parts = urlsplit(request.url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    try:
        connection.request(request.method, f"{parts.path}?{parts.query}", body=body, headers=request.headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
