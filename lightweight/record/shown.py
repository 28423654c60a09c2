"""Text of a record that is safe to print on a terminal or a page."""

from __future__ import annotations

import unicodedata


def one_line(text: str) -> str:
    """`text` in one line, without characters that control a terminal, reverse text, or cannot be encoded."""
    return readable(" ".join(text.split()))


def readable(text: str) -> str:
    """`text` with such characters replaced, but with its lines."""
    return "".join(
        c if c in "\n\t" or not _UNREADABLE & {unicodedata.category(c), unicodedata.bidirectional(c)} else "\ufffd"
        for c in text
    )


_UNREADABLE = {"Cc", "Cs", "Cn", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
