"""Which columns are in more than one table?"""

from __future__ import annotations

from collections.abc import Sequence

from lightweight.record import Entry
from lightweight.report import words
from lightweight.report.text_table import Column


def named(among: Sequence[Entry]) -> list[Column[Entry]]:
    """Model, method and the card that ran it, methods of one name `among` those told apart."""
    return [
        ("model", "l", lambda entry: entry.model),
        ("method", "l", lambda entry: words.method_among(entry, among)),
        ("card", "l", words.marked_card),
    ]


def shares(entries: Sequence[Entry]) -> list[Column[Entry]]:
    """The share of the card's peak, where the records know what their models need."""
    known = any(entry.share_of_peak is not None for entry in entries)
    return [("of the card's peak", "r", words.share_of_peak)] if known else []


def lengths(entries: Sequence[Entry]) -> list[Column[Entry]]:
    """The tokens of a row at most, where the records have rows of several lengths."""
    several = len({entry.max_length for entry in entries}) > 1
    return [("tokens a row", "r", lambda entry: str(entry.max_length or "-"))] if several else []
