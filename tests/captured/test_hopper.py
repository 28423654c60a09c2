"""Attention by our kernels for Hopper, forward and backward, against fp64: on the GPU where there is one of these, else
in Triton's interpreter, with tiles that a few tokens fill."""

import itertools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lightweight.captured import flash, hopper, launching
from lightweight.captured.agreement import Deviation
from lightweight.captured.check import Check
from lightweight.captured.flash import Reach, Sequences
from lightweight.captured.hopper import Sees, Tile
from lightweight.captured.parts import PartError, Parts
from tests.captured.test_kernels import DEVICE, HAS_CUDA, apart, exact, gradient, random  # noqa: F401

SMALL = Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)
CASES = {
    "rows": ([20, 20], None, None, 2),
    "several, one of them empty": ([17, 0, 36, 5], None, None, 1),
    "a window": ([40, 13], 9, None, 2),
    "a window of one": ([20], 1, None, 1),
    "a window that ends within a tile": ([50], 33, None, 1),
    "capped": ([33, 9], None, 3.0, 1),
    "capped, and a window": ([41], 12, 2.0, 1),
}
"""Lengths of sequences, window, cap, and heads of queries for one of keys."""


def attention(query, key, value, lengths, window, scale, cap):
    """By torch, of each sequence: [tokens, heads, width]."""
    pieces = []
    for own in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (tensor.transpose(0, 1) for tensor in own)
        k, v = (tensor.repeat_interleave(q.shape[0] // k.shape[0], 0) for tensor in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        scores = scores if cap is None else cap * (scores / cap).tanh()
        places = torch.arange(q.shape[1])
        back = places[:, None] - places
        seen = (back >= 0) & (back < (window or 10**9))
        pieces.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_fp64_forward_and_backward(apart, case):  # noqa: F811
    apart(check_attention, 16, torch.float32, *CASES[case])


@pytest.mark.needs_cuda
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("case", CASES)
def test_halves_too_in_the_tiles_that_a_card_has(case, width):
    if torch.cuda.get_device_capability() != hopper.CAPABILITY:
        pytest.skip("not run: the tiles are Hopper's")
    for dtype in (torch.float16, torch.bfloat16):
        lengths, window, cap, group = CASES[case]
        longer = [9 * length for length in lengths], window and 9 * window
        check_attention(width, dtype, *longer, cap, group)


def check_attention(width, dtype, lengths, window, cap, group):
    if width not in hopper.TILES:
        hopper.TILES[width] = SMALL
    tokens, groups = sum(lengths), 2 if HAS_CUDA else 1
    heads = group * groups
    whole, upstream = random(dtype, (tokens, heads + 2 * groups, width), (tokens, heads, width))
    parts = whole.split([heads, groups, groups], 1)  # as one product gives them
    ends = None
    if len(set(lengths)) > 1:
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    query, key, value = leaves = [part.detach().requires_grad_() for part in parts]
    output = hopper.attend(query, key, value, Sees(ends, max(lengths), window, 0.3, cap))
    output.backward(upstream)
    query, key, value = exactly = exact(*parts)
    expected = attention(query, key, value, lengths, window, 0.3, cap)
    expected.backward(upstream.cpu().double())
    found = [output.detach(), *(gradient(leaf) for leaf in leaves)]
    for own, right in zip(found, (expected.detach(), *(gradient(leaf) for leaf in exactly)), strict=True):
        if dtype == torch.float32:  # where a token sees itself alone, the gradient of its scores is rounding
            torch.testing.assert_close(own.cpu().double(), right, rtol=0, atol=1e-5)
        else:
            assert (own.cpu().double() - right).norm() <= flash.OFF[dtype] * right.norm()


@pytest.mark.parametrize(
    ("capability", "width", "cap", "takes"),
    [
        ((9, 0), 128, None, True),
        ((9, 0), 64, None, True),
        ((9, 0), 256, None, False),  # torch's are faster
        ((9, 0), 256, 50.0, True),  # and bend nothing
        ((9, 0), 96, None, False),
        ((8, 0), 128, None, False),
        ((10, 0), 128, None, False),
        ((7, 5), 64, None, False),
        (None, 64, None, False),
    ],
)
def test_hopper_alone_has_them(monkeypatch, capability, width, cap, takes):
    monkeypatch.setattr(launching, "take", lambda x: True)
    assert hopper.takes(torch.empty(1, 1, 1, width), capability, cap) is takes
    monkeypatch.setattr(launching, "take", lambda x: False)  # no Triton
    assert not hopper.takes(torch.empty(1, 1, 1, width), capability, cap)


def test_rows_and_dialogues_run_on_them_where_they_are(monkeypatch):
    told: list[tuple[tuple[int, ...], Sees]] = []

    def attend(query, key, value, sees):
        told.append((tuple(query.shape), sees))
        return torch.zeros_like(query)

    monkeypatch.setattr(hopper, "attend", attend)
    query, key = torch.empty(2, 4, 30, 64, dtype=torch.bfloat16), torch.empty(2, 2, 30, 64, dtype=torch.bfloat16)
    with flash.as_on((9, 0)), launching.shapes_alone():
        output = flash.attend(query, key, key, Reach(window=8), 0.0, 0.5)
        assert output is not None and output.shape == (2, 30, 4, 64)
        ends = torch.tensor([0, 10, 30], dtype=torch.int32)
        query, key = query[:1], key[:1]
        output = flash.attend(query, key, key, Reach(sequences=Sequences(ends, 20)), 0.0, None)
        assert output is not None and output.shape == (1, 30, 4, 64)
        query, key = query.repeat(1, 1, 1, 4), key.repeat(1, 1, 1, 4)
        assert flash.attend(query, key, key, Reach(), 0.0, 0.5, cap=50.0) is not None
    with flash.as_on((8, 0)), launching.shapes_alone():
        assert flash.attend(query, key, key, Reach(), 0.0, 0.5, cap=50.0) is None  # nothing of torch's bends scores
    assert told[0] == ((60, 4, 64), Sees(None, 30, 8, 0.5))
    assert told[1][0] == (30, 4, 64) and told[1][1][1:] == (20, None, 0.125, None)
    assert told[2][1].cap == 50.0


PARTS = Parts(packing=False, attention=True, loss="chunked", lean=True)


@pytest.mark.parametrize("helps", [True, False])
def test_attention_is_left_to_torch_where_ours_fails_and_the_note_says_so(monkeypatch, helps):
    """Where it does not help, ours are not to blame, and stay."""
    check = object.__new__(Check)
    check._notes, check._expected, check._full = [], [], PARTS
    check._epochs = cast(Any, SimpleNamespace(ends=lambda _: (8, 8)))
    monkeypatch.setattr(flash, "_are_ours_wanted", True)
    monkeypatch.setattr(flash, "_have_ours_run", True)

    def check_met() -> None:
        if flash._are_ours_wanted or not helps:
            raise PartError("our attention for Hopper is 1e-01 off")

    monkeypatch.setattr(flash, "check_met", check_met)
    monkeypatch.setattr(Check, "_use", lambda *_: None)
    monkeypatch.setattr(Check, "_problem_of", lambda self, act, asked_for: next(iter(_errors(act)), None))
    off = check._deviation(PARTS)
    assert off.is_rounding is helps and flash._are_ours_wanted is not helps
    assert check._notes == (["attention left to torch's kernels: our attention for Hopper is 1e-01 off"] * helps)
    assert isinstance(off, Deviation)


def _errors(act):
    try:
        act()
    except PartError as error:
        yield str(error)


@pytest.mark.parametrize("is_joined", [True, False])
def test_what_our_kernels_see_is_asked_of_those_that_have_run(monkeypatch, is_joined):
    """Others would have to be compiled."""
    asked: list[Sees] = []

    def attend(query, key, value, sees):
        asked.append(sees)
        lengths = [sees.time] * 3 if sees.ends is None else sees.ends.diff()[:3].tolist()
        wrong = sees.window if len(asked) == 1 else sees.window + 1
        return attention(query.double(), key.double(), value.double(), lengths, wrong, sees.scale, sees.cap).to(
            query.dtype
        )

    monkeypatch.setattr(hopper, "attend", attend)
    kernel = flash._Kernel(torch.device("cpu"), torch.bfloat16, 2, 64, 30, None, True, is_joined)
    flash._met.add(kernel)
    flash.check_met()
    assert (asked[0].ends is not None) == is_joined
    flash._checked.discard(kernel)
    flash._met.add(kernel)
    with pytest.raises(PartError, match="our attention for Hopper sees 31 tokens instead of 30"):
        flash.check_met()
