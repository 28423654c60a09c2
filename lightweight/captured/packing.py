"""Which token of an optimizer step lies where: several dialogues in one row, in static buffers of a few shapes.

Rows are of one width, and packed where that saves enough of them; or, where attention needs no mask, a pass is a single
row of all its dialogues, and as long as they are.

Exact: a dialogue's tokens keep their order and their positions from 0, attention sees only its own
(`attention.packed`), and every answer token keeps its weight in the loss, whichever row and pass it comes to lie in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from lightweight.corpus import IGNORED, Row, Rows

BUCKET_STEPS = 200
"""Optimizer steps that a further static shape must serve: capturing it takes some three uncaptured steps, 0.2 to 0.5 s,
and a row less saves 1 to 4 ms a step."""

ANSWER_BLOCK = 64
"""Room for answers comes in multiples of this, the height of a matrix unit's tile."""

SHAPE_TOKENS = 50_000
"""Tokens that a further static shape of joined rows must save a job: 0.2 to 0.8 s of a captured step's time, which is
what capturing it takes."""

MOST_SHAPES = 8
"""Static shapes of joined rows: a graph of thousands of kernels holds some memory for itself."""

COMPILED_SHAPE_TOKENS = 1_000_000
"""As SHAPE_TOKENS where layers are compiled anew for each shape, which took 12 s for qwen3-0.6b (H100, torch 2.11)."""

MOST_COMPILED_SHAPES = 4
"""And fewer than torch compiles one function for before it gives up: `torch._dynamo.config.recompile_limit`, 8."""

TOKEN_BLOCK = 128
"""Joined rows come in multiples of this, the height of a large product's tile."""

NO_DIALOGUE = -1
"""The dialogue number of tokens that belong to none."""


@dataclass(frozen=True)
class Layout:
    """One optimizer step: `rows[i]` are the numbers of the dialogues in row i, one behind the other. `weights` has for
    each dialogue what one of its answer tokens weighs in the step's loss. Of the whole step, `answers` counts the
    tokens that are predicted, `tokens` all of its dialogues', and `fullest` those of its longest row, where dialogues
    are joined: ranks take one shape for the step, whichever of its rows are theirs."""

    rows: list[list[int]]
    weights: dict[int, float]
    answers: int
    tokens: int = 0
    fullest: int = 0


@dataclass(frozen=True)
class Shape:
    """The static shape of a step: `passes` of `rows` x `time` tokens, with room for `answers` answer tokens in each.
    Where dialogues are joined to a single row, there is room for `sequences` of at most `longest` tokens in it."""

    passes: int
    rows: int
    time: int
    answers: int
    sequences: int = 0
    longest: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that a step of this shape computes, padding included."""
        return self.passes * self.rows * self.time


def length(row: Row) -> int:
    """Tokens of `row`."""
    return len(row["input_ids"])


def answer_tokens(row: Row) -> int:
    """Tokens of `row` that are predicted; its first one has nothing before it to be predicted from."""
    return int((row["labels"][1:] != IGNORED).sum())


def one_a_row(passes: list[list[int]], rows: Rows, *, over_step: bool) -> Layout:
    """The Trainer's own layout of a step of `passes`, each the numbers of its dialogues.

    `over_step`: the loss is the mean over the answer tokens of the whole step; else, for models that do not take the
    number of tokens from the Trainer, it is the mean over passes of each one's mean.
    """
    weights: dict[int, float] = {}
    in_pass = [sum(answer_tokens(rows[number]) for number in numbers) for numbers in passes]
    for numbers, tokens in zip(passes, in_pass, strict=True):
        share = 1 / max(1, sum(in_pass)) if over_step else 1 / max(1, tokens) / len(passes)
        weights |= dict.fromkeys(numbers, share)
    tokens = sum(length(rows[number]) for numbers in passes for number in numbers)
    return Layout([[number] for numbers in passes for number in numbers], weights, sum(in_pass), tokens)


def packed(layout: Layout, rows: Rows) -> Layout:
    """`layout` in as few rows as first fit, longest first, finds."""
    return replace(layout, rows=_first_fit(layout.weights, rows, rows.width))


def _first_fit(numbers: Iterable[int], rows: Rows, width: int) -> list[list[int]]:
    lengths = {number: length(rows[number]) for number in numbers}
    filled: list[list[int]] = []
    left: list[int] = []
    for number in sorted(lengths, key=lambda number: -lengths[number]):
        index = next((i for i, room in enumerate(left) if room >= lengths[number]), None)
        if index is None:
            filled.append([])
            left.append(width)
            index = -1
        filled[index].append(number)
        left[index] -= lengths[number]
    return filled


def joined(layout: Layout, rows: Rows, most: int, ranks: int = 1) -> Layout:
    """`layout` with a row for each pass, of at most `most` tokens, and filled as evenly as can be: as few rows as first
    fit, longest first, finds, or more, for each of the `ranks` to have as many."""
    filled = _first_fit(layout.weights, rows, most)
    count = -(-max(1, len(filled)) // ranks) * ranks
    even: list[list[int]] = [[] for _ in range(count)]
    taken = [0] * count
    for number in sorted(layout.weights, key=lambda number: -length(rows[number])):
        emptiest = taken.index(min(taken))
        even[emptiest].append(number)
        taken[emptiest] += length(rows[number])
    chosen = even if max(taken) <= most else filled + [[]] * (count - len(filled))
    return replace(layout, rows=chosen, fullest=max(tokens_of(row, rows) for row in chosen))


def share(layout: Layout, rank: int, world_size: int) -> Layout:
    """The rows of `layout` that `rank` computes, or one that holds nothing where there are none for it; what a token
    weighs in the step's loss stays as it is."""
    rows = layout.rows[rank::world_size] or [[]]
    return replace(layout, rows=rows, weights={number: layout.weights[number] for row in rows for number in row})


def shapes(layouts: Sequence[Layout], rows: Rows, rows_per_pass: int, most: int | None) -> dict[int, Shape]:
    """The static shapes for a job's `layouts`: number of rows in a step -> the shape it runs in.

    A further shape is made for smaller steps where at least BUCKET_STEPS of them use it, and at most `most` in all.
    """
    sizes = sorted(len(layout.rows) for layout in layouts)
    largest: list[int] = []  # of each bucket
    served = 0
    for index, size in enumerate(sizes):
        served += 1
        is_last = index + 1 == len(sizes)
        if is_last or (sizes[index + 1] != size and served >= BUCKET_STEPS):
            largest.append(size)
            served = 0
    if most is not None:
        largest = largest[-most:]
    passes: dict[int, tuple[int, int]] = {}
    for size in set(sizes):
        bucket = next(bound for bound in largest if bound >= size)
        count = -(-bucket // rows_per_pass)
        passes[size] = count, -(-bucket // count)
    return _with_answers(layouts, rows, passes)


def exact_shapes(layouts: Sequence[Layout], rows: Rows, rows_per_pass: int) -> dict[int, Shape]:
    """As `shapes`, but each step in passes of its own: the Trainer's, where `layouts` have one dialogue a row."""
    sizes = {len(layout.rows) for layout in layouts}
    return _with_answers(layouts, rows, {size: (-(-size // rows_per_pass), min(size, rows_per_pass)) for size in sizes})


def joined_shapes(layouts: Sequence[Layout], rows: Rows, ranks: int, *, compiled: bool) -> list[Shape]:
    """The static shapes for a job's `layouts`, of joined rows, of all ranks together: those that make the least of the
    tokens that are computed, each shape counted as SHAPE_TOKENS more, or as what it costs where layers are `compiled`;
    at most MOST_SHAPES of them. A step runs in the smallest that it fits in, see `holding_joined`."""
    costs, most = (COMPILED_SHAPE_TOKENS, MOST_COMPILED_SHAPES) if compiled else (SHAPE_TOKENS, MOST_SHAPES)
    sizes = Counter((len(layout.rows) // ranks, _blocks(_fullest(layout, rows))) for layout in layouts)
    ordered = sorted(sizes)
    # the cheapest way to serve the first so many sizes with so many shapes: what it costs, and the shapes
    best: list[dict[int, tuple[int, list[tuple[int, int]]]]] = [{0: (0, [])}]
    for end in range(1, len(ordered) + 1):
        ways: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        blocks = steps = 0
        for begin in reversed(range(end)):
            blocks, steps = max(blocks, ordered[begin][1]), steps + sizes[ordered[begin]]
            shape = ordered[end - 1][0], blocks
            for count, (cost, chosen) in best[begin].items():
                whole = cost + costs + steps * shape[0] * shape[1] * TOKEN_BLOCK * ranks
                if count < most and whole < ways.get(count + 1, (whole + 1,))[0]:
                    ways[count + 1] = whole, [*chosen, shape]
        best.append(ways)
    _, chosen = min(best[-1].values())
    everywhere = [row for layout in layouts for row in layout.rows]
    longest = max((length(rows[number]) for row in everywhere for number in row), default=rows.width)
    answers = {number: answer_tokens(rows[number]) for number in set(chain.from_iterable(everywhere))}
    contents = {(tokens_of(row, rows), len(row), sum(answers[number] for number in row)) for row in everywhere}
    return [_joined_shape(passes, blocks * TOKEN_BLOCK, longest, [(0, 0, 0), *contents]) for passes, blocks in chosen]


def _joined_shape(passes: int, time: int, longest: int, contents: Iterable[tuple[int, int, int]]) -> Shape:
    """A shape with room for every row that is not longer than `time` tokens; `contents` are each one's tokens,
    dialogues and answers."""
    fitting = [content for content in contents if content[0] <= time]
    return Shape(
        passes,
        rows=1,
        time=time,
        answers=_room(max(1, *(answers for _, _, answers in fitting))),
        sequences=max(dialogues + -(-(time - tokens) // longest) for tokens, dialogues, _ in fitting),
        longest=longest,
    )


def holding_joined(layout: Layout, rows: Rows, shapes: Iterable[Shape]) -> Shape | None:
    """The smallest of `shapes` with room for the joined rows of `layout`; None where there is none."""
    most = _fullest(layout, rows)
    large_enough = [shape for shape in shapes if shape.passes >= len(layout.rows) and shape.time >= most]
    return min(large_enough, key=lambda shape: shape.tokens, default=None)


def part(row: list[int], rows: Rows, first: int | None = None) -> list[int]:
    """As many dialogues of `row` as there is room for in `rows`, or it as it is where they all fit: `first`, or the two
    shortest, and then the shortest that are left."""
    if tokens_of(row, rows) <= rows.width:
        return row
    shortest = sorted(row, key=lambda number: (number != first, length(rows[number])))
    taken = shortest[: 2 if first is None else 1]
    for number in shortest[len(taken) :]:
        if tokens_of([*taken, number], rows) <= rows.width:
            taken.append(number)
    return taken


def _fullest(layout: Layout, rows: Rows) -> int:
    return max(layout.fullest, *(tokens_of(row, rows) for row in layout.rows))


def tokens_of(row: list[int], rows: Rows) -> int:
    """Tokens of the dialogues in `row`."""
    return sum(length(rows[number]) for number in row)


def _blocks(tokens: int) -> int:
    return max(1, -(-tokens // TOKEN_BLOCK))


def holding(layout: Layout, rows: Rows, shapes: Iterable[Shape]) -> Shape | None:
    """The smallest of `shapes` with room for the rows of `layout`, and with room for its answers; None where its rows
    are too many."""
    large_enough = [shape for shape in shapes if shape.passes * shape.rows >= len(layout.rows)]
    if not large_enough:
        return None
    shape = min(large_enough, key=lambda shape: shape.passes * shape.rows)
    return replace(shape, answers=max(shape.answers, _room(_most_answers(layout, rows, shape.rows))))


def _with_answers(layouts: Sequence[Layout], rows: Rows, passes: dict[int, tuple[int, int]]) -> dict[int, Shape]:
    """`passes` and the rows in each, by number of rows in a step, as shapes with room for every layout's answers."""
    answers = dict.fromkeys(passes.values(), 1)
    for layout in layouts:
        shape = passes[len(layout.rows)]
        answers[shape] = max(answers[shape], _most_answers(layout, rows, shape[1]))
    return {size: Shape(*shape, time=rows.width, answers=_room(answers[shape])) for size, shape in passes.items()}


def _most_answers(layout: Layout, rows: Rows, size: int) -> int:
    """Answer tokens of that pass of `size` rows that has most of them."""
    return max(
        sum(answer_tokens(rows[number]) for numbers in of_pass for number in numbers)
        for of_pass in _split(layout.rows, size)
    )


def _room(answers: int) -> int:
    return -(-answers // ANSWER_BLOCK) * ANSWER_BLOCK


def _split(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class Buffers:
    """What a step of one static shape reads, at fixed places on the device.

    `input_ids`, `attention_mask`, `position_ids`, `dialogues`, `labels`: [passes, rows, time]. `answers`, `targets`,
    `weights`: [passes, answers] - the flat place in [rows x time] an answer token is predicted at, the token, and what
    it weighs in the loss; 0 where there is none. `count`: answer tokens of the step. `ends`: [passes, sequences + 1],
    in joined rows how many tokens lie before each sequence, and the row's length once it is full.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._whole, self._fractions = self._allocate(device)
        tokens, answers = self._views(self._whole)
        self.input_ids, self.attention_mask, self.position_ids, self.dialogues, self.labels = tokens.unbind(0)
        self.answers, self.targets = answers.unbind(0)
        self.weights, self.count = self._fractions[:-1].view(shape.passes, shape.answers), self._fractions[-1]
        self.ends = self._empty_ends().to(device)

    def fill(self, layout: Layout, rows: Rows) -> None:
        """Put one optimizer step in, without waiting for the device."""
        shape = self.shape
        whole, fractions = self._allocate(torch.device("cpu"))
        tokens, answers = self._views(whole)
        ids, mask, positions, dialogues, labels = tokens.unbind(0)
        places, targets = answers.unbind(0)
        weights = fractions[:-1].view(shape.passes, shape.answers)
        dialogues.fill_(NO_DIALOGUE)
        labels.fill_(IGNORED)
        positions[:] = self._positions(shape.time)
        ends = self._empty_ends()
        for index, numbers_of_rows in enumerate(_split(layout.rows, shape.rows)):
            taken = 0
            for line, numbers in enumerate(numbers_of_rows):
                start = 0
                for place, number in enumerate(numbers):
                    row = rows[number]
                    if shape.sequences:
                        ends[index, place + 1] = start + length(row)
                    span = slice(start, start + length(row))
                    ids[index, line, span] = torch.from_numpy(row["input_ids"])
                    positions[index, line, span] = torch.arange(length(row))
                    dialogues[index, line, span] = number
                    mask[index, line, span] = 1
                    own = torch.from_numpy(row["labels"]).long()
                    own[0] = IGNORED  # nothing before it, and certainly not the dialogue before it
                    labels[index, line, span] = own
                    at = (own != IGNORED).nonzero().squeeze(1)
                    room = slice(taken, taken + len(at))
                    places[index, room] = line * shape.time + start + at - 1
                    targets[index, room] = own[at]
                    weights[index, room] = layout.weights[number]
                    taken += len(at)
                    start += length(row)
                if len(numbers) == 1:  # a row as a batch has it
                    ids[index, line, start:] = rows.pad_token_id
                positions[index, line, start:] = self._positions(shape.time - start)
                if shape.sequences:
                    padding = torch.arange(1, shape.sequences + 1 - len(numbers)) * shape.longest
                    ends[index, len(numbers) + 1 :] = (start + padding).clamp_max(shape.time)
        fractions[-1] = layout.answers
        if self.device.type == "cuda":  # torch keeps pinned memory until the copy out of it has run
            whole, fractions, ends = whole.pin_memory(), fractions.pin_memory(), ends.pin_memory()
        self._whole.copy_(whole, non_blocking=True)
        self._fractions.copy_(fractions, non_blocking=True)
        self.ends.copy_(ends, non_blocking=True)

    def _positions(self, count: int) -> torch.Tensor:
        """Positions of `count` tokens of no dialogue: no larger than a dialogue's, which a table may end with."""
        places = torch.arange(count)
        return places % self.shape.longest if self.shape.sequences else places

    def _empty_ends(self) -> torch.Tensor:
        """`ends` where there is no dialogue: what is padded is in sequences, too, for every token to be computed."""
        shape = self.shape
        ends = torch.arange(shape.sequences + 1, dtype=torch.int32) * shape.longest
        return ends.clamp_max(shape.time).repeat(shape.passes, 1)

    def _allocate(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shape
        whole = shape.passes * (5 * shape.rows * shape.time + 2 * shape.answers)
        return (
            torch.zeros(whole, dtype=torch.int64, device=device),
            torch.zeros(shape.passes * shape.answers + 1, device=device),
        )

    def _views(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.shape
        split = 5 * shape.passes * shape.rows * shape.time
        return (
            whole[:split].view(5, shape.passes, shape.rows, shape.time),
            whole[split:].view(2, shape.passes, shape.answers),
        )
