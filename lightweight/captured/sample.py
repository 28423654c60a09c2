"""Which dialogues of a job show whether the captured step is the Trainer's?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from lightweight.captured import packing
from lightweight.captured.packing import Layout
from lightweight.corpus import IGNORED, Row, Rows


@dataclass(frozen=True)
class Sample:
    """Dialogues of the job, by number: in `passes` as the Trainer takes them, in `rows` as packing would lay them.
    Where there is not enough memory for a whole one, of each the last `tokens` up to its last answer."""

    passes: list[list[int]]
    rows: list[list[int]]
    tokens: int | None = None

    @property
    def size(self) -> int:
        """How many dialogues it has."""
        return sum(map(len, self.rows))

    def first(self, size: int) -> Sample:
        """The first `size` dialogues in order of rows, so that what shares a row is together as long as possible."""
        return self.of(list(chain.from_iterable(self.rows))[:size])

    def of(self, kept: Collection[int]) -> Sample:
        """Those of its dialogues that are among `kept`."""
        passes, rows = (
            [left for numbers in lists if (left := [n for n in numbers if n in kept])]
            for lists in (self.passes, self.rows)
        )
        return Sample(passes, rows, self.tokens)

    def smaller(self, lengths: Sequence[int]) -> Sample | None:
        """Half of its dialogues, or half of the only one; None where that is short. `lengths` are all dialogues'."""
        if self.size > 1:
            return self.first(self.size // 2)
        (number,) = chain.from_iterable(self.rows)
        tokens = (self.tokens or lengths[number]) // 2
        return replace(self, tokens=tokens) if tokens >= LEAST_TOKENS else None

    def of_each(self, rows: Rows) -> Rows:
        """`rows` with so much of each as is compared."""
        if self.tokens is None:
            return rows
        return replace(rows, each=[end_of(row, self.tokens) for row in rows.each])


LEAST_TOKENS = 512
"""What a dialogue is not cut below."""


def end_of(row: Row, tokens: int) -> Row:
    """The last `tokens` of a row up to its last answer."""
    answered = (row["labels"] != IGNORED).nonzero()[0]
    end = int(answered[-1]) + 1 if len(answered) else len(row["labels"])
    piece = slice(max(0, end - tokens), end)
    return {"input_ids": row["input_ids"][piece], "labels": row["labels"][piece]}


def samples(layouts: Sequence[Layout], first: list[list[int]], rows: Rows, rows_per_pass: int) -> list[Sample]:
    """The first two passes of the job's first step, which has the passes `first`, and one of two rows: that with the
    longest dialogue, where a window or a table of positions shows itself, and that with the most dialogues, where
    packing does; of what is joined to a longer row as much as fills one. A step with so few rows also leaves others of
    its shape empty. `layouts` are those of the whole job, the first step's first."""
    everywhere = [row for layout in layouts for row in layout.rows if row]
    longest = max(everywhere, key=lambda row: max(packing.length(rows[number]) for number in row))
    fullest = packing.part(max(everywhere, key=len), rows)
    longest = packing.part(longest, rows, first=max(longest, key=lambda number: packing.length(rows[number])))
    pair = [longest] if longest == fullest else [longest, [n for n in fullest if n not in longest]]
    numbers = list(chain.from_iterable(pair))
    passes = [numbers[start : start + rows_per_pass] for start in range(0, len(numbers), rows_per_pass)]
    begin = Sample(first, layouts[0].rows).of(list(chain.from_iterable(first[:2])))
    return [begin, Sample(passes, [row for row in pair if row])]
