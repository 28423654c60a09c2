"""Can the network do without what a part leaves out? Asked of the network itself, where loss and gradients of a step
show too little of it.

Each `check_*` raises PartError where it cannot. `autocast` gives the context that the network computes in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lightweight.captured import agreement, temporary
from lightweight.captured.agreement import Tolerance
from lightweight.captured.parts import PartError

PROBED_TOKENS = 64
"""Of a row that is asked what moves it: their logits are all there at one time."""

Autocast = Callable[[], AbstractContextManager[Any]]


def check_loss(network: Any, autocast: Autocast, allowed: Tolerance) -> None:
    """Raise PartError unless the network's loss is the cross-entropy of its own logits, within what is `allowed` to its
    arithmetic. Both are of one forward pass here, so that half precision hides no small further loss, as a router's
    balance is."""
    ids = _tokens(network)
    with torch.no_grad(), autocast():
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    expected = cross_entropy(output.logits[0, -ids.shape[1] : -1].float(), ids[0, 1:])
    off = ((output.loss - expected).abs() / expected).item()
    # some take the mean in half precision
    if not off <= (agreement.TOLERANCES["fp32"] if output.loss.dtype == torch.float32 else allowed).loss:
        raise PartError(f"the model's loss is {off:.0e} off the cross-entropy of its logits")


def check_head(model: Any, autocast: Autocast) -> None:
    """Raise PartError unless the logits of `model`, without peft around it, are its body's output times its head: a
    soft cap after it leaves small logits nearly as they are, so that loss and gradients do not show it before training
    has enlarged them."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise PartError(f"its head is a {type(head).__module__.split('.')[0]}.{type(head).__name__}")
    ids = _tokens(model)
    enlarged: list[torch.Tensor] = []

    def enlarge(_: torch.nn.Module, __: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        enlarged.append(output * (100 / output.abs().max()))
        return enlarged[0]

    hook = head.register_forward_hook(enlarge)
    try:
        with torch.no_grad(), autocast():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
    (expected,) = enlarged
    if logits.shape != expected.shape or not torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-3):
        raise PartError("its head is not its last operation")


def check_dialogues_are_apart(
    network: Any, embeddings: torch.nn.Module, run: Callable[[], torch.Tensor], own: torch.Tensor
) -> None:
    """Raise PartError where a dialogue's gradient reaches another one in its row, by whatever way: a state that is
    carried along, a mask that is not asked for. What a mask hides has a gradient of exactly 0 in every precision, where
    the difference that a little state makes to the step may be less than half precision's rounding.

    `embeddings` are the network's; `run` computes the row's logits, [time, vocabulary]; `own`, [time], is where the
    dialogue lies in it.
    """
    embedded: list[torch.Tensor] = []

    def begin_here(_: torch.nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some networks write into what they embedded

    hook = embeddings.register_forward_hook(begin_here)
    try:
        logits = run()
    finally:
        hook.remove()
    # weighed differently, or the sum of what a softmax or a norm gives might not depend on anything
    loss = (logits[own].float() * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).sum()
    loss.backward()  # not autograd.grad, which reentrant checkpointing does not take part in
    reached: Any = sum(tensor.grad[0].float().norm(dim=-1) for tensor in embedded if tensor.grad is not None)
    temporary.drop_gradients(network)
    elsewhere = reached[~own].norm() / reached[own].norm()
    if elsewhere.item() != 0:
        raise PartError(f"{elsewhere.item():.0e} of a dialogue's gradient reaches other dialogues of its row")


def check_positions(network: Any, autocast: Autocast) -> None:
    """Raise PartError unless the network takes positions from 0 that it is given for its own. Some do not look at them
    and count through the row, some begin with another number: that makes little of a step's loss, but the same numbers
    are the same in every precision."""
    ids = _tokens(network)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    with torch.no_grad(), autocast():
        own, given, reversed_ones = (
            network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more).logits.float()
            for more in ({}, {"position_ids": positions}, {"position_ids": positions.flip(1)})
        )
    off, effect = (own - given).norm().item(), (reversed_ones - given).norm().item()
    if not off < effect / 10:
        raise PartError("it takes no positions" if effect == 0 else "its positions are not 0, 1, 2, ...")


def check_rows_are_apart(model: Any, autocast: Autocast, ends: tuple[int, int], allowed: Tolerance) -> None:
    """Raise PartError where what `model`, without peft around it, makes of a row depends on where other rows of its
    pass end: LongRoPE and dynamic rotary embeddings turn by the largest position of a pass. `ends` are the least and
    the most that a pass may end at, the Trainer's or the captured step's.

    The same row is computed three times, in passes of one shape: beside one that ends early, beside other tokens, and
    beside one that ends late. It is the same bits each time, or moves by rounding, where experts take a pass's rows
    together.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return
    early, late = ends
    count = min(early, PROBED_TOKENS)
    begin = torch.arange(count, device=next(model.parameters()).device)
    ids = begin % 8 + 1

    def beside(other: torch.Tensor, end: int) -> torch.Tensor:
        rows, positions = torch.stack([ids, other]), torch.stack([begin, begin + end - count])
        mask = torch.ones_like(rows)
        logits: torch.Tensor = model(
            input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        return logits[0].float()

    try:
        with torch.no_grad(), autocast():
            own, rounded, moved = beside(ids, early), beside(torch.ones_like(ids), early), beside(ids, late)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001  of any model's code, which need not take positions to compute a whole batch
        return
    off, rounding = ((each - own).norm().item() / own.norm().item() for each in (moved, rounded))
    if off > max(allowed.loss, 10 * rounding):
        raise PartError(f"a row moves by {off:.0e} with where others of its pass end")


def _tokens(network: Any) -> torch.Tensor:
    """A short row of tokens: [1, 8]."""
    return torch.arange(1, 9, device=next(network.parameters()).device).unsqueeze(0)
