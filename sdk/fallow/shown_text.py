"""Text of strangers as people may see it: titles, reasons and names steer no terminal and forge no line of a log."""

from __future__ import annotations

import logging


def shown(text: str) -> str:
    """`text` with everything that does not print spelt out (`\\x1b`), line breaks and tabs left alone."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else _spelt(one) for one in text)


def shown_line(text: str) -> str:
    """As `shown`, on one line: line breaks and tabs are spelt out too."""
    return text if text.isprintable() else "".join(one if one.isprintable() else _spelt(one) for one in text)


class LogFormatter(logging.Formatter):
    """Writes each record's message on one line, whoever's words are in it; tracebacks follow as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is the library's
        """The line of a record, without its traceback."""
        return shown_line(super().formatMessage(record))


def log_to_stderr(level: int | str, line_format: str) -> None:
    """Makes stderr the log of this process."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(line_format))
    logging.basicConfig(level=level, handlers=[handler])


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
