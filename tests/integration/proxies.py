"""Small real proxies for tests: one that connects, and one that opens TLS as inspecting firewalls do."""

from __future__ import annotations

import base64
import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fallow.identity import PrivateKey, write_private


@dataclass
class ConnectProxy:
    """Answers CONNECT on a free loopback port; with `tls`, it opens the connection itself."""

    login: str = ""
    tls: ssl.SSLContext | None = None
    opens: str = ""
    """The endpoint whose connections are opened by `tls`; empty: all of them."""
    refuses: str = ""
    delay_s: float = 0.0
    """How much later everything arrives, each way: a far country."""
    asked: list[str] = field(default_factory=list[str])
    """Endpoints that were asked for, in order."""
    _listener: socket.socket = field(default_factory=socket.socket)

    def start(self) -> None:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        login = f"{self.login}@" if self.login else ""
        return f"http://{login}127.0.0.1:{self._listener.getsockname()[1]}"

    def stop(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(1)
                if not piece:
                    return
                head += piece
            lines = head.decode("latin-1").split("\r\n")
            method, endpoint, _ = lines[0].split(" ")
            assert method == "CONNECT"
            self.asked.append(endpoint)
            wanted = f"Proxy-Authorization: Basic {base64.b64encode(self.login.encode()).decode()}"
            if self.login and wanted.lower() not in [line.lower() for line in lines]:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            if self.refuses:
                client.sendall(f"HTTP/1.1 {self.refuses}\r\n\r\n".encode())
                return
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self.tls is not None and self.opens in ("", endpoint):
                with contextlib.suppress(ssl.SSLError), self.tls.wrap_socket(client, server_side=True) as opened:
                    opened.recv(1)
                return
            host, _, port = endpoint.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port))) as server:
                other = threading.Thread(target=_pump, args=(server, client, self.delay_s), daemon=True)
                other.start()
                _pump(client, server, self.delay_s)
                other.join(5)


def _pump(source: socket.socket, target: socket.socket, delay_s: float = 0.0) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            if delay_s:
                time.sleep(delay_s)
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def connect_proxy(**options: object) -> Iterator[ConnectProxy]:
    proxy = ConnectProxy(**options)  # type: ignore[arg-type]  # handed on
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def inspecting_context(folder: Path, name: str) -> ssl.SSLContext:
    """TLS of somebody who opens everybody's connections under an authority called `name`."""
    key = PrivateKey.generate()
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.raw.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key.raw, hashes.SHA256())
    )
    path = folder / "inspecting.pem"
    write_private(path, key.pem + certificate.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    return context
