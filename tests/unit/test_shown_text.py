"""Nothing that a stranger writes steers a terminal or turns a line around."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.shown_text import shown, shown_line

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
C1 = "".join(map(chr, range(0x80, 0xA0)))


@pytest.mark.parametrize("character", [*BIDI, *C1, "\x1b", "\x07", "\x7f", "\u200b", "\ufeff", "\u2028"])
def test_controls_and_marks_of_direction_are_spelt_out(character: str) -> None:
    for told in (shown(f"gpj{character}exe"), shown_line(f"gpj{character}exe")):
        assert character not in told and told.startswith("gpj\\")


@given(st.text())
def test_what_is_shown_has_no_control_and_no_format_character(text: str) -> None:
    told = shown_line(text)
    assert all(unicodedata.category(one) not in {"Cc", "Cf", "Zl", "Zp"} for one in told)
    assert shown_line(told) == told
