"""Why TLS with a coordinator fails, in words: who answers there really, and whose clock is wrong.

gRPC tells no more than that a connection failed. So the server's certificate is fetched once without being trusted, and
looked at.
"""

from __future__ import annotations

import asyncio
import datetime
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from fallow.credentials import Credentials
from fallow.errors import FallowError, Reason
from fallow.identity import AUTHORITY_EXTENSION, BLOBS_NAME, CONTROL_NAME, load_certificate
from fallow.proxy import open_socket, proxy_for

CONNECT_TIMEOUT_S: Final = 10.0
Explain = Callable[[FallowError], Awaitable[FallowError]]
"""Gives an error in better words, when a look at the server says what is wrong."""
_UTC = datetime.UTC


def server_certificate(endpoint: str, server_name: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> x509.Certificate:
    """The certificate that a server shows, trusted in nothing. Blocks. Raises COORDINATOR_UNREACHABLE."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = open_socket(endpoint, timeout_s=timeout_s)
    try:
        with context.wrap_socket(connection, server_hostname=server_name) as secured:
            der = secured.getpeercert(binary_form=True)
    except (OSError, ValueError) as error:
        connection.close()
        raise FallowError(
            Reason.COORDINATOR_UNREACHABLE,
            f"what answers at {endpoint} does not speak TLS with us: {getattr(error, 'reason', None) or error}",
            hint="is the port that of a Fallow coordinator?",
        ) from None
    if der is None:
        raise FallowError(Reason.CERTIFICATE_FOREIGN, f"the server at {endpoint} shows no certificate")
    return load_certificate(der)


def fault_of_server(
    leaf: x509.Certificate, authority: x509.Certificate, endpoint: str, server_name: str, now: datetime.datetime
) -> FallowError | None:
    """What is wrong with a server's certificate for whoever trusts `authority`; None: nothing."""
    if not _is_signed_by(leaf, authority):
        return foreign_server(leaf, endpoint)
    names = _dns_names(leaf)
    if server_name not in names:
        return FallowError(
            Reason.CERTIFICATE_FOREIGN,
            f"the coordinator's endpoint at {endpoint} is {' and '.join(names) or 'nameless'}, not {server_name}",
            hint="the ports are mixed up: see what `fallow-coordinator start` printed, or join again",
        )
    if leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        return None
    begins, ended = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if now < begins:
        words = f"{_duration(begins - now)} before the coordinator's certificate begins ({_moment(begins)})"
        hint = "this machine's clock is behind: set it, for instance with `timedatectl set-ntp true`"
    else:
        words = f"{_duration(now - ended)} after the coordinator's certificate ended ({_moment(ended)})"
        hint = "set this machine's clock if it is ahead; else the coordinator's operator must restart it"
    # Worth trying again: clocks are set while daemons wait.
    return FallowError(Reason.COORDINATOR_UNREACHABLE, f"this machine's clock says {_moment(now)}, {words}", hint=hint)


def foreign_server(leaf: x509.Certificate, endpoint: str) -> FallowError:
    """Who answers with a certificate of somebody else's authority: another coordinator, or whoever inspects TLS."""
    if _is_fallow(leaf):
        return FallowError(
            Reason.CERTIFICATE_FOREIGN,
            f"at {endpoint} answers a Fallow coordinator, but not the one that was joined: its authority is another",
            hint="ask its operator: if the coordinator was set up anew, join again with a new join line",
        )
    issuer = _name(leaf.issuer)
    proxy = proxy_for(endpoint)
    who = f"the proxy {proxy.name}" if proxy is not None else "something between here and there"
    return FallowError(
        Reason.CERTIFICATE_FOREIGN,
        f"the certificate at {endpoint} was issued by {issuer!r}, not by the coordinator: {who} intercepts TLS, or"
        " another server listens there",
        hint="Fallow trusts its coordinator's authority alone. Ask whoever runs the network to let this connection pass"
        " unopened, or set no_proxy if the coordinator is reachable directly",
    )


async def explained(
    error: FallowError, *, endpoint: str, server_name: str, authority_pem: bytes, certificate_pem: bytes = b""
) -> FallowError:
    """`error`, or a better one when a look at the server says what is wrong. Takes at most `CONNECT_TIMEOUT_S`."""
    if error.reason is not Reason.COORDINATOR_UNREACHABLE:
        return error
    try:
        leaf = await asyncio.to_thread(server_certificate, endpoint, server_name)
        now = datetime.datetime.fromtimestamp(time.time(), _UTC)
        better = fault_of_server(leaf, load_certificate(authority_pem), endpoint, server_name, now)
    except FallowError as found:
        better = found
    if better is None and certificate_pem:
        own = load_certificate(certificate_pem)
        if own.not_valid_before_utc > datetime.datetime.fromtimestamp(time.time(), _UTC):
            begins = _moment(own.not_valid_before_utc)
            better = FallowError(
                Reason.COORDINATOR_UNREACHABLE,
                f"this machine's clock stands before its own certificate was issued ({begins})",
                hint="set this machine's clock",
            )
    return better or error


def explain_control(credentials: Credentials) -> Explain:
    """Looks into failed calls of the control endpoint."""
    return partial(
        explained,
        endpoint=credentials.control_endpoint,
        server_name=CONTROL_NAME,
        authority_pem=credentials.authority_pem,
        certificate_pem=credentials.certificate_pem,
    )


def explain_blobs(credentials: Credentials) -> Explain:
    """Looks into failed transfers: a proxy may let one endpoint pass and open another."""
    return partial(
        explained,
        endpoint=credentials.blob_endpoint,
        server_name=BLOBS_NAME,
        authority_pem=credentials.authority_pem,
        certificate_pem=credentials.certificate_pem,
    )


def _is_signed_by(leaf: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _is_fallow(leaf: x509.Certificate) -> bool:
    try:
        leaf.extensions.get_extension_for_oid(AUTHORITY_EXTENSION)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return True


def _dns_names(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.DNSName)


def _name(name: x509.Name) -> str:
    for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        values = name.get_attributes_for_oid(oid)
        if values:
            return str(values[0].value)[:100]
    return name.rfc4514_string()[:100]


def _moment(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _duration(length: datetime.timedelta) -> str:
    hours = length.total_seconds() / 3600
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.0f} minutes"
