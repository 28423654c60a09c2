"""FlashAttention's operator for the CPU, where torch has none: the same numbers from a mask, in fp64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from lightweight.captured import flash
from lightweight.internals import torch as torch_internals


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scale: float | None
) -> Tensor:
    """Causal attention of sequences of `lengths` tokens, one behind the other: [tokens, heads, width]."""
    pieces = [
        torch.einsum("hqk,khd->qhd", _weights(query[own], key[own], window, scale), _shared(value[own], query))
        for own in _spans(lengths)
    ]
    return torch.cat(pieces)


def gradients(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `attention`, by hand: autograd does not look into a kernel."""
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for own in _spans(lengths):
        weights, groups = _weights(query[own], key[own], window, scale), key.shape[1]
        of_weights = torch.einsum("qhd,khd->hqk", upstream[own], _shared(value[own], query))
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        found[0].append(torch.einsum("hqk,khd->qhd", of_scores, _shared(key[own], query)))
        for pieces, of_pairs, other in ((found[1], of_scores, query), (found[2], weights, upstream)):
            of_each = torch.einsum("hqk,qhd->khd", of_pairs, other[own])
            pieces.append(of_each.unflatten(1, (groups, -1)).sum(2))
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2])


def _weights(query: Tensor, key: Tensor, window: int | None, scale: float | None) -> Tensor:
    """What a token's key weighs for another: [heads, time, time]."""
    time = len(query)
    scores = torch.einsum("qhd,khd->hqk", query, _shared(key, query))
    places = torch.arange(time, device=query.device)
    back = places[:, None] - places
    seen = (back >= 0) & (back < (time if window is None else window))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _shared(tensor: Tensor, query: Tensor) -> Tensor:
    """Heads of keys or values, once for each head of `query`."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)


def _spans(lengths: list[int]) -> list[slice]:
    return [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]


@contextmanager
def on_a_cpu(seen: list[tuple[object, ...]] | None = None) -> Iterator[None]:
    """Inside, the CPU has flash kernels for halves; what they were asked for goes to `seen`: the shape of the queries,
    how long the sequences are, their longest as it was given, and the window."""

    def forward(*arguments, **options):
        asked = _named(torch_internals.FLASH_FORWARD, arguments, options)
        query, left = asked["query"], asked["window_size_left"]
        ends, longest = asked["cum_seq_q"], asked["max_q"]
        assert asked["cum_seq_k"] is ends and asked["max_k"] == longest
        assert asked["window_size_right"] == 0 and asked["dropout_p"] == 0 and asked["is_causal"] == (left == -1)
        if ends is not None:
            assert ends.dtype == torch.int32 and int(ends.diff().max()) <= longest
        if seen is not None:
            seen.append((tuple(query.shape), None if ends is None else tuple(ends.diff().tolist()), longest, left))
        output = attention(*_flat(asked, "query", "key", "value"), *_rest(asked))
        nothing = torch.empty(0)
        return output.view(query.shape).to(query.dtype), nothing, nothing, nothing, nothing

    def backward(*arguments, **options):
        asked = _named(torch_internals.FLASH_BACKWARD, arguments, options)
        found = gradients(*_flat(asked, "grad_out", "query", "key", "value"), *_rest(asked))
        return tuple(
            own.view(asked[name].shape).to(asked[name].dtype)
            for own, name in zip(found, ("query", "key", "value"), strict=True)
        )

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
    try:
        with flash.as_on(flash.CAPABILITY):
            yield
    finally:
        torch_internals.unregister(library)


def _named(operator, arguments, options):
    """An operator's arguments by their names."""
    parameters = torch_internals.schema(operator).arguments
    return {each.name: each.default_value for each in parameters if each.has_default_value()} | {
        each.name: value for each, value in zip(parameters, arguments, strict=False)
    } | options  # fmt: skip


def _flat(asked, *names):
    return [asked[name].double().flatten(0, -3) for name in names]


def _rest(asked):
    """How long the sequences are, the window, and the scale."""
    query, left = asked["query"], asked["window_size_left"]
    if asked["cum_seq_q"] is None:
        lengths = [query.shape[1]] * query.shape[0]
    else:
        lengths = asked["cum_seq_q"].diff().tolist()
        if sum(lengths) != len(query):
            raise RuntimeError(f"sequences of {lengths} in {len(query)} tokens: the others would be anything")
    scale = query.shape[-1] ** -0.5 if asked["scale"] is None else asked["scale"]
    return lengths, None if left < 0 else left + 1, scale
