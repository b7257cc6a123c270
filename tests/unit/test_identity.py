"""Keys, signatures, credentials and join lines."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.credentials import Credentials, key_of_folder
from fallow.envelope import Domain, check_signature, sign_payload, transcript
from fallow.errors import FallowError, Reason
from fallow.identity import PrivateKey, verify
from fallow.ids import Digest, KeyFingerprint, TokenId
from fallow.join_line import JoinLine, parse_join_line

KEY = PrivateKey.generate()
PEER = KeyFingerprint(bytes([9]) * 32)


def test_a_signature_holds_only_for_its_own_place() -> None:
    place = {"method": "/m", "session": "session-a", "sequence": 4, "peer": PEER}
    signature = sign_payload(KEY, Domain.SESSION_WORKER, b"payload", **place)  # type: ignore[arg-type]
    check_signature(KEY.public_der, signature, Domain.SESSION_WORKER, b"payload", **place)  # type: ignore[arg-type]
    moved: list[tuple[Domain, bytes, dict[str, object]]] = [
        (Domain.SESSION_COORDINATOR, b"payload", place),
        (Domain.SESSION_WORKER, b"payloaD", place),
        (Domain.SESSION_WORKER, b"payload", place | {"method": "/n"}),
        (Domain.SESSION_WORKER, b"payload", place | {"session": "session-b"}),
        (Domain.SESSION_WORKER, b"payload", place | {"sequence": 5}),
        (Domain.SESSION_WORKER, b"payload", place | {"peer": KeyFingerprint(bytes(32))}),
    ]
    for domain, payload, where in moved:
        with pytest.raises(FallowError) as caught:
            check_signature(KEY.public_der, signature, domain, payload, **where)  # type: ignore[arg-type]
        assert caught.value.reason is Reason.SIGNATURE_INVALID


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_transcripts_of_different_fields_differ(a: str, b: str, c: str, d: str) -> None:
    one = transcript(Domain.GRANT, b"x", method=a, session=b)
    other = transcript(Domain.GRANT, b"x", method=c, session=d)
    assert (one == other) == ((a, b) == (c, d))


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_garbage_never_verifies_and_never_raises(public_key: bytes, signature: bytes) -> None:
    assert not verify(public_key, signature, b"message")
    assert not verify(KEY.public_der, signature, b"message")


def test_a_key_file_is_private_and_an_open_one_is_refused(tmp_path: Path) -> None:
    key = key_of_folder(tmp_path / "party")
    path = tmp_path / "party" / "key.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_of_folder(tmp_path / "party").fingerprint == key.fingerprint
    path.chmod(0o644)
    with pytest.raises(FallowError, match="chmod 600"):
        PrivateKey.load(path)


def test_an_empty_folder_says_how_to_join(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match="join") as caught:
        Credentials.load(tmp_path)
    assert caught.value.reason is Reason.UNAUTHENTICATED


LINES = st.builds(
    JoinLine,
    st.from_regex(r"[a-z0-9.\-]{1,60}:[0-9]{1,5}", fullmatch=True),
    st.binary(min_size=32, max_size=32).map(Digest),
    st.from_regex(r"token-[a-z2-7]{16}", fullmatch=True).map(TokenId),
    st.binary(min_size=32, max_size=32),
)


@given(LINES)
def test_join_lines_round_trip_as_one_plain_word(line: JoinLine) -> None:
    word = line.encode()
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
    assert parse_join_line(f"  {word}\n") == line


@given(LINES, st.data())
def test_a_cut_or_altered_join_line_is_refused(line: JoinLine, data: st.DataObject) -> None:
    word = line.encode()
    place = data.draw(st.integers(0, len(word) - 1))
    letter = data.draw(st.sampled_from("abcXYZ019").filter(lambda letter: letter != word[place]))
    altered = word[:place] + letter + word[place + 1 :]
    for bad in (word[:place], altered):
        try:
            parsed = parse_join_line(bad)
        except FallowError as error:
            assert error.reason is Reason.FIELD_INVALID
        else:
            assert parsed == line  # only unused bits of the last letter differ
