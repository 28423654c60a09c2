"""How are two ways of computing a step compared? Loss and gradients, over the same dialogues from the same weights.

The Trainer's are computed first, by its own `training_step` on its own batches, before anything is replaced. Then the
captured step computes its own in the shapes it will train in, and where they differ by more than rounding it gives up
what makes the difference.

What this cannot see: dropout, which is off meanwhile, since masks are drawn in another order; what a CUDA graph or a
compiler makes of the step afterwards; and what shows itself only in weights that training reaches later.
"""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from lightweight.preload import peft  # isort: skip  # noqa: F401  # before Trainer, which imports peft

import numpy
import torch
from transformers import Trainer

from lightweight.captured import dropout, packing
from lightweight.captured.packing import Layout
from lightweight.corpus import IGNORED, Row, Rows
from lightweight.internals import accelerate as accelerate_internals
from lightweight.internals import bitsandbytes as bitsandbytes_internals
from lightweight.internals import torch as torch_internals
from lightweight.internals import transformers as transformers_internals
from lightweight.training import ranks

# What is given up


Loss = Literal["chunked", "logits", "model"]
"""How the captured step computes its loss: from the body's output, chunk by chunk; from the whole logits; or by the
model itself, which knows its own labels, caps and further losses."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What of the captured step is not the model's own. Packing needs the captured attention's mask."""

    packing: bool
    attention: bool
    loss: Loss
    lean: bool

    @property
    def needs_trainers_passes(self) -> bool:
        """Whether a step must have the Trainer's own passes, since the model computes its loss over one of them."""
        return self.loss == "model" and not self.packing

    def given_up(self, rest: Parts) -> list[str]:
        """The parts of this that `rest` does not have; packing that goes because attention does is no part of its
        own."""
        names = ["attention" if self.attention > rest.attention else "packing" if self.packing > rest.packing else None]
        names += ["loss" if self.loss != rest.loss else None, "lean" if self.lean > rest.lean else None]
        return [name for name in names if name is not None]

    def fewer(self, losses: Sequence[Loss]) -> list[Parts]:
        """This, and what is left of it where parts are given up, fewest first. `losses` are to be tried in this order,
        its own first."""
        rows = [(self.packing, self.attention), (False, self.attention), (False, False)]
        candidates = [
            replace(self, packing=packing, attention=attention, loss=loss, lean=lean)
            for loss in losses
            for lean in dict.fromkeys((self.lean, False))
            for packing, attention in dict.fromkeys(rows)
        ]
        return sorted(candidates, key=lambda rest: len(self.given_up(rest)))


class PartError(NotImplementedError):
    """A part that this network cannot have. The message says why, in words that a note can take."""


# What is compared


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
        return replace(rows, each=[_end_of(row, self.tokens) for row in rows.each])


LEAST_TOKENS = 512
"""What a dialogue is not cut below."""


def _end_of(row: Row, tokens: int) -> Row:
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


@dataclass(frozen=True)
class Gradients:
    """What forward and backward passes over a sample gave: `loss`, a scalar, and `of` each trained weight that they
    reached, times `scale`."""

    loss: torch.Tensor
    of: Mapping[torch.nn.Parameter, torch.Tensor]
    scale: float

    def over_ranks(self, weights: Iterable[torch.nn.Parameter]) -> Gradients:
        """All ranks' together, where these are one's share."""
        if ranks.world_size() == 1:
            return self
        of = {weight: self.of.get(weight, torch.zeros_like(weight)) for weight in weights}
        ranks.add_up([self.loss, *of.values()])
        return replace(self, of=of)


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing one step may be apart by rounding: `loss` of the Trainer's loss, `gradient` of the
    norm of the Trainer's gradient, `tensor` of that of any single weight, which is taken to be at least `floor` of the
    whole one: below that there is rounding and little else, as in the bias of keys, which softmax does not see."""

    loss: float
    gradient: float
    tensor: float
    floor: float


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(loss=1e-5, gradient=1e-4, tensor=1e-3, floor=1e-3),
    "fp32 on a GPU": Tolerance(loss=1e-5, gradient=1e-3, tensor=1e-2, floor=1e-3),
    "tf32": Tolerance(loss=3e-3, gradient=5e-2, tensor=3e-1, floor=3e-2),
    "fp16": Tolerance(loss=3e-3, gradient=5e-2, tensor=3e-1, floor=3e-2),
    "bf16": Tolerance(loss=1e-2, gradient=2e-1, tensor=8e-1, floor=3e-2),
}
"""By the coarsest number format that a step computes in.

Of some fifty architectures with two layers each, on a CPU, what agrees was off by at most 5e-6 of the gradient in fp32,
1e-2 in fp16 and 3e-2 in bf16, and by 3e-4 of the loss in either half; deeper networks round more often. On a GPU,
whose kernels sum in other orders, opt-350m's 24 layers were off by 2e-4 in fp32, and 4e-4 in one weight (H100, torch
2.11). A forgotten mask, or a loss that is not the model's, is off by 2e-1 and more. A state that runs from one dialogue
into the next may be off by 1e-3 alone, which a half hides; it is looked for in another way, whatever the format.
"""

CHAOTIC = Tolerance(loss=1e-4, gradient=1e-2, tensor=1e-1, floor=1e-3)
"""For fp32 in the place of halves that say nothing: a network of random weights may enlarge the last digit of a number
a thousandfold from layer to layer. That of gpt-neo-1.3b does, whose attention does not scale its products: rounding its
embeddings to fp16 turns half of its gradient, and to fp32 2e-4 of it (CPU, torch 2.13)."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What the Trainer makes of `sample`, in half precision or in fp32 in its place, and what is `allowed` to another
    way of computing it."""

    sample: Sample
    gradients: Gradients
    allowed: Tolerance
    in_fp32: bool = False


@dataclass(frozen=True)
class Deviation:
    """How far a captured step is from the Trainer's: relative, as in `Tolerance`, beside what is `allowed`. `error` is
    why it could not be computed, in one line."""

    loss: float = 0.0
    gradient: float = 0.0
    tensor: float = 0.0
    worst: str = ""
    allowed: Tolerance = TOLERANCES["fp32"]
    error: str | None = None

    @property
    def is_rounding(self) -> bool:
        """Whether this is rounding; what is not a number is not."""
        return (
            self.error is None
            and self.loss <= self.allowed.loss
            and self.gradient <= self.allowed.gradient
            and self.tensor <= self.allowed.tensor
        )

    def __str__(self) -> str:
        if self.error is not None:
            return self.error
        return f"its loss is {self.loss:.0e} off, its gradient {self.gradient:.0e} ({self.worst}: {self.tensor:.0e})"


def deviation(
    ours: Gradients, theirs: Gradients, names: Mapping[torch.nn.Parameter, str], allowed: Tolerance
) -> Deviation:
    """How far `ours` are from `theirs`, the Trainer's. Waits for the device once."""
    apart, norms = [], []
    for weight in names:
        zero = torch.zeros((), device=theirs.loss.device)
        expected = theirs.of[weight].float() / theirs.scale if weight in theirs.of else zero
        norms.append(expected.norm())
        apart.append((ours.of[weight].float() / ours.scale - expected).norm() if weight in ours.of else norms[-1])
    off, norm = torch.stack(apart), torch.stack(norms)
    whole = norm.norm()
    each = off / norm.clamp_min(allowed.floor * whole)
    worst = each.argmax()
    loss = (ours.loss - theirs.loss).abs() / theirs.loss.abs()
    loss_off, gradient, tensor, index = torch.stack([loss, off.norm() / whole, each[worst], worst]).tolist()
    return Deviation(loss_off, gradient, tensor, list(names.values())[int(index)], allowed)


# The Trainer's side


SCALES = (2.0**12, 2.0**8, 2.0**4, 1.0)
"""Loss scales to try for fp16, whose smallest number is 6e-8 and largest 65 504."""


class Reference:
    """The Trainer's own steps, computed before anything of the network is replaced or cast."""

    def __init__(self, trainer: Trainer, *, halves: bool) -> None:
        """`halves`: whether gradients may be fp16, and need a scale."""
        self._trainer = trainer
        self._model: Any = trainer.model
        self._scales = SCALES if halves else (1.0,)
        self._loader = trainer.get_train_dataloader()

    def draws(self, passes: Sequence[Sequence[int]]) -> bool:
        """Whether `passes` are the numbers of the rows that the Trainer draws in its first epoch, or the first of them;
        on one rank."""
        if ranks.world_size() > 1:  # which rank draws which rows is for `ranks.Deal`
            return True
        drawn: Any = self._loader.batch_sampler
        return [list(numbers) for numbers, _ in zip(drawn, passes, strict=False)] == [list(own) for own in passes]

    def gradients(self, sample: Sample) -> tuple[Sample, Gradients]:
        """The Trainer's loss and gradients of as many of the sample's dialogues as there is memory for, and those: at
        the least of the end of one, whose layers are computed twice. Raises torch.OutOfMemoryError where it is not
        enough for that."""
        while (gradients := self._where_it_fits(sample)) is None:
            smaller = sample.smaller(self._lengths)
            if smaller is None:
                raise torch.OutOfMemoryError(f"no room for the Trainer's step of {LEAST_TOKENS} tokens")
            sample = smaller
        return sample, gradients

    def least(self, sample: Sample) -> Sample:
        """What `gradients` would take of `sample` in the end."""
        while (smaller := sample.smaller(self._lengths)) is not None:
            sample = smaller
        return sample

    def in_fp32(self, sample: Sample) -> Gradients | None:
        """As `gradients`, of the whole sample and with fp32 in the place of halves, from the weights as they are now.
        None where a rank cannot: there is not enough memory, or the network has to be in half precision."""
        own = None
        with contextlib.suppress(PartError, torch.OutOfMemoryError), in_fp32(self._model):
            with contextlib.suppress(Exception):  # of any model's code
                own = self._gradients(sample, 1.0, autocast=contextlib.nullcontext)
            drop_gradients(self._model)  # before weights are halves again
        (lacks,) = ranks.any_says(own is None, device=self._trainer.args.device)
        return None if own is None or lacks else own.over_ranks(trained(self._model))

    def _where_it_fits(self, sample: Sample) -> Gradients | None:
        """Under the first scale that leaves them finite, or the last; None where a rank has not enough memory."""
        for scale in self._scales:
            own = None
            try:
                own = self._gradients(sample, scale)
            except torch.OutOfMemoryError:
                if sample.size == 1:
                    with contextlib.suppress(torch.OutOfMemoryError):
                        own = self._in_least_memory(sample, scale)
            (ran_out,) = ranks.any_says(own is None, device=self._trainer.args.device)
            drop_gradients(self._model)
            if own is None or ran_out:
                return None
            gradients = own.over_ranks(trained(self._model))
            if bool(torch.stack([gradient.float().norm() for gradient in gradients.of.values()]).isfinite().all()):
                break
        return gradients

    def recomputing(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the Trainer computes every layer again in the backward pass, as it does by its own argument: what
        takes the least memory. Dropout must be off."""
        return recomputing(transformers_internals.recomputable_layers(self._model))

    def _in_least_memory(self, sample: Sample, scale: float) -> Gradients:
        drop_gradients(self._model)
        with self.recomputing():
            return self._gradients(sample, scale)

    def _gradients(self, sample: Sample, scale: float, autocast: Callable[[], Any] | None = None) -> Gradients:
        trainer = self._trainer
        shares = [numbers[ranks.rank() :: ranks.world_size()] for numbers in sample.passes]
        batches, items = trainer.get_batch_samples(
            iter([self._batch(share, sample) for share in shares]), len(shares), trainer.args.device
        )
        trainer.current_gradient_accumulation_steps = len(batches)
        scaler = torch.amp.GradScaler(trainer.args.device.type, init_scale=scale, enabled=scale != 1)
        loss = torch.zeros((), device=trainer.args.device)
        with (
            torch_internals.no_hooks_left(),
            accelerate_internals.losses_scaled_by(trainer, scaler),
            transformers_internals.losses_computed_in(trainer, autocast or trainer.accelerator.autocast),
        ):
            for batch in batches:
                # of the Trainer itself: what the suite adds to it counts the loss as one of the job's
                loss += Trainer.training_step(trainer, self._model, batch, items).float()
        of = {weight: weight.grad for weight in trained(self._model) if weight.grad is not None}
        return Gradients(loss, of, scale)

    def _batch(self, numbers: Sequence[int], sample: Sample) -> dict[str, torch.Tensor]:
        rows: Any = self._trainer.train_dataset
        collate: Any = self._loader.collate_fn
        taken = [rows[number] for number in numbers or [len(rows) - 1]]
        if sample.tokens is None:
            whole: dict[str, torch.Tensor] = collate(taken)
            return whole
        # padded as if they were whole
        batch: dict[str, torch.Tensor] = collate([_end_of(row, sample.tokens) for row in taken])
        cut = {name: value[:, : sample.tokens] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return batch | cut

    @property
    def _lengths(self) -> list[int]:
        rows: Any = self._trainer.train_dataset
        return [len(row["input_ids"]) for row in rows]


@contextlib.contextmanager
def recomputing(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, `layers` are computed again in the backward pass."""
    undo = transformers_internals.recompute(layers, keeps_random_numbers=False)
    try:
        yield
    finally:
        undo()


def trained(network: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    """The weights that are trained, and their names."""
    return {weight: name for name, weight in network.named_parameters() if weight.requires_grad}


def drop_gradients(network: Any) -> None:
    """Forget the gradients of `network`."""
    for weight in network.parameters():
        weight.grad = None


# Without rounding


HALVES = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def in_fp32(network: torch.nn.Module) -> Iterator[None]:
    """Inside, `network` computes in fp32 what it computes in half precision outside, autocast aside. The halves stay
    where they are: what is freed and allocated anew among the rest of the check holds segments of the device's memory
    for as long as the job lasts. Raises PartError for weights of other formats, but for bitsandbytes' 4 bits, which are
    dequantized to fp32 inside."""
    matmul = torch.backends.cuda.matmul
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
        matmul.fp32_precision = "ieee"
        packed = undo.enter_context(bitsandbytes_internals.dequantized_to_fp32(network))
        for name, tensor in chain(network.named_parameters(), network.named_buffers()):
            if tensor in packed:
                continue
            if tensor.dtype in HALVES:
                undo.callback(setattr, tensor, "data", tensor.data)
                tensor.data = tensor.data.to(torch.float32)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.dtype != torch.float32:
                raise PartError(f"{name} is {tensor.dtype}")
        yield


# Leaving no trace


NUDGE = 0.02
"""Standard deviation of what stands in for weights that are all zero."""


@contextlib.contextmanager
def nudged(weights: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, trained weights that are all zero are small random numbers, the same every time. LoRA's B is zero at
    first, and hides A and all that the adapter does."""
    generator = torch.Generator().manual_seed(0)
    zeros = [weight for weight in weights if not weight.any()]
    with torch.no_grad():
        for weight in zeros:
            weight.copy_(NUDGE * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight in zeros:
                weight.zero_()


@contextlib.contextmanager
def without_trace(network: torch.nn.Module) -> Iterator[None]:
    """Inside, dropout is off; afterwards random numbers go on, buffers are, and the device's memory statistics begin,
    as if nothing had been computed."""
    numbers, state = random.getstate(), numpy.random.get_state()
    on_gpu = next(network.parameters()).device.type == "cuda"
    devices = [torch.cuda.current_device()] if on_gpu else []
    buffers = [(buffer, buffer.to("cpu", copy=True)) for buffer in network.buffers()]
    try:
        with torch.random.fork_rng(devices), dropout.off(), warnings.catch_warnings():
            # of reentrant checkpointing, where what is asked of the network needs no gradients
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            yield
    finally:
        random.setstate(numbers)
        numpy.random.set_state(state)
        with torch.no_grad():
            for buffer, before in buffers:
                if buffer.shape == before.shape:
                    buffer.copy_(before)
        drop_gradients(network)
    if on_gpu:
        torch_internals.free_workspaces()  # each lies in the middle of a large segment that was free when it was needed
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()  # a step of the Trainer's that did not fit is no outcome


def search(
    parts: Parts, losses: Sequence[Loss], measure: Callable[[Parts], Deviation]
) -> tuple[Parts | None, list[str]]:
    """The most of `parts` that agrees with the Trainer, or None; and a note for each part that was given up, with how
    far it was off beside what is left."""
    measure = functools.cache(measure)
    candidates = parts.fewer(losses)
    agreeing = next((rest for rest in candidates if measure(rest).is_rounding), None)
    if agreeing is None:
        return None, [f"the Trainer runs the steps, since no captured one is its: {measure(candidates[-1])}"]
    notes = []
    for name in parts.given_up(agreeing):
        restored: dict[str, Any] = {name: getattr(parts, name)}
        also = " and with it packing" if name == "attention" and parts.packing else ""
        notes.append(f"{name}{also} given up: {measure(replace(agreeing, **restored))}")
    return agreeing, notes
