"""Checkpoints: the coordinator's signed word on the root of its journal's tree at some size.

A checkpoint is a C2SP signed note (`tlog-checkpoint`): origin, size, root and time on lines of their own, a blank line,
and a signature with the coordinator's key. Two checkpoints of one journal are consistent because leaves are only added.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fallow.identity import PrivateKey, verify
from fallow.ids import Digest

ORIGIN = "fallow journal"
SIGNER = "coordinator"
KEY_ID_BYTES = 4
_TIME = "time "
_SIGNATURE = "\N{EM DASH} "


class CheckpointUnusable(Exception):
    """A note that is no checkpoint, or that nobody signed who may; the message says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the journal was at some moment."""

    journal_id: bytes
    size: int
    """Records, which is the sequence of the newest."""
    root: Digest
    at_ms: int

    def text(self) -> str:
        """What is signed."""
        root = base64.b64encode(self.root).decode()
        return f"{ORIGIN} {self.journal_id.hex()}\n{self.size}\n{root}\n{_TIME}{self.at_ms}\n"


Sign = Callable[[Checkpoint], str]
"""Gives the signed note of a checkpoint."""


def signer_of(key: PrivateKey) -> Sign:
    """Signs checkpoints with the coordinator's key."""
    return lambda checkpoint: sign_checkpoint(checkpoint, key)


def sign_checkpoint(checkpoint: Checkpoint, key: PrivateKey) -> str:
    """The note: its text, a blank line, and `— coordinator` with key id and DER ECDSA signature in base64."""
    text = checkpoint.text()
    word = base64.b64encode(_key_id(key.public_der) + key.sign(text.encode())).decode()
    return f"{text}\n{_SIGNATURE}{SIGNER} {word}\n"


def read_checkpoint(note: str, public_der: bytes | None) -> Checkpoint:
    """The checkpoint that a note holds, signed by that key; None checks no signature. Raises CheckpointUnusable."""
    text, blank, signatures = note.partition("\n\n")
    text += "\n"
    lines = text.splitlines()
    try:
        origin, size, root, time = lines
        checkpoint = Checkpoint(
            journal_id=bytes.fromhex(origin.removeprefix(f"{ORIGIN} ")),
            size=int(size),
            root=Digest(base64.b64decode(root, validate=True)),
            at_ms=int(time.removeprefix(_TIME)),
        )
    except (ValueError, binascii.Error) as error:
        raise CheckpointUnusable(f"the checkpoint can't be read: {error}") from error
    if not blank or checkpoint.text() != text:
        raise CheckpointUnusable("the checkpoint is not written as checkpoints are")
    if public_der is not None and not any(
        _is_signed(line, text, public_der) for line in signatures.splitlines() if line.startswith(_SIGNATURE)
    ):
        raise CheckpointUnusable("the checkpoint carries no signature of the coordinator's key")
    return checkpoint


def _is_signed(line: str, text: str, public_der: bytes) -> bool:
    try:
        word = base64.b64decode(line.rpartition(" ")[2], validate=True)
    except binascii.Error:
        return False
    return word[:KEY_ID_BYTES] == _key_id(public_der) and verify(public_der, word[KEY_ID_BYTES:], text.encode())


def _key_id(public_der: bytes) -> bytes:
    return hashlib.sha256(public_der).digest()[:KEY_ID_BYTES]
