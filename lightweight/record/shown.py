"""What of a record may stand on a terminal or a page? Text in one line, without what steers either."""

from __future__ import annotations

import unicodedata


def one_line(text: str) -> str:
    """`text` on one line, without characters that steer a terminal, turn text around, or cannot be encoded."""
    return readable(" ".join(text.split()))


def readable(text: str) -> str:
    """`text` with those characters replaced, its lines kept."""
    return "".join(
        c if c in "\n\t" or not _UNREADABLE & {unicodedata.category(c), unicodedata.bidirectional(c)} else "\ufffd"
        for c in text
    )


_UNREADABLE = {"Cc", "Cs", "Cn", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
