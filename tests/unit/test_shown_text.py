"""Words of strangers on terminals and in logs."""

from __future__ import annotations

import logging

from hypothesis import given
from hypothesis import strategies as st

from fallow.shown_text import LogFormatter, shown, shown_line


@given(st.text())
def test_what_is_shown_prints(text: str) -> None:
    assert shown_line(text).isprintable()
    assert all(one.isprintable() or one in "\n\t" for one in shown(text))


@given(st.text())
def test_what_prints_is_shown_as_it_is(text: str) -> None:
    plain = "".join(one for one in text if one.isprintable())
    assert shown(plain) == shown_line(plain) == plain


def test_escape_sequences_and_reversed_text_are_spelt_out() -> None:
    assert shown("\x1b[2Ja\nb\u202e\x9b") == "\\x1b[2Ja\nb\\u202e\\x9b"
    assert shown_line("a\r\nb") == "a\\r\\nb"


def test_a_record_of_the_log_is_one_line_and_its_traceback_follows() -> None:
    formatter = LogFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("name", logging.INFO, "file", 1, "reason=%s", ("x\nERROR forged",), None)
    assert formatter.format(record) == "INFO reason=x\\nERROR forged"
    try:
        raise ValueError("wrong")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    first, *rest = formatter.format(record).splitlines()
    assert first == "INFO reason=x\\nERROR forged"
    assert rest[0].startswith("Traceback") and rest[-1] == "ValueError: wrong"
