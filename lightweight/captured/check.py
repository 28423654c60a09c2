"""Which parts may the captured step have, and still be the Trainer's step?

Both compute loss and gradients of the job's own first passes, and of its longest and fullest rows. In half precision a
good deal passes for rounding, so there both are compared in fp32 where that can be had.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import Trainer

from lightweight.captured import agreement, flash, probes, temporary
from lightweight.captured.agreement import Deviation, Expected, Gradients, Tolerance
from lightweight.captured.epochs import Epochs
from lightweight.captured.packing import Buffers
from lightweight.captured.parts import Loss, PartError, Parts
from lightweight.captured.passes import NOTHING
from lightweight.captured.reference import Reference
from lightweight.captured.sample import Sample
from lightweight.captured.step import Step
from lightweight.internals import torch as torch_internals
from lightweight.models import first_line
from lightweight.training import ranks
from lightweight.trial import Trial


class Check:
    """Compares a job's `step` with the Trainer's. `expect` comes first, while the network is still the Trainer's, then
    `search`; both within `temporary.without_trace`."""

    def __init__(self, trial: Trial, trainer: Trainer, step: Step, epochs: Epochs) -> None:
        self._method, self._step, self._epochs = trial.running_method, step, epochs
        self._network, self._passes = step.passes.network, step.passes
        self._precision = self._coarsest()
        self._reference = Reference(trainer, halves=self._precision == "fp16")
        self._names = temporary.trained(self._network)
        self._full = NOTHING
        self._taken_on: Parts | None = None
        self._expected: list[Expected] = []
        self._both: dict[Expected, tuple[Expected, Expected] | None] = {}  # in half precision and in fp32
        self._notes: list[str] = []
        self._chaos: float | None = None  # how far half precision moves the Trainer's own gradient, if too far

    def draws_the_same(self) -> bool:
        """Whether the Trainer draws the rows that the epochs have."""
        return self._reference.draws([numbers for passes in self._epochs.first_epoch for numbers in passes])

    def expect(self) -> None:
        """Have the Trainer compute what is compared, and make the step's optimizer, which holds the weights as they
        are trained: in fp32 in the place of halves where the Trainer can."""
        begin, rows = self._epochs.samples()
        with self._theirs():
            self._expected = [Expected(*self._reference.gradients(begin), self._allowed)]
        temporary.free_unused(self._step.device)  # what stays is not to lie in the middle of what does not
        self._step.make_optimizer()
        if self._is_half:
            with self._theirs():
                exact = self._reference.in_fp32(rows)
            if exact is not None:
                allowed = agreement.TOLERANCES["fp32 on a GPU"]
                self._expected.append(Expected(rows, exact, allowed, in_fp32=True))
                return
            self._step.optimizer.withdraw()
        with self._theirs():
            self._expected.append(Expected(*self._reference.gradients(rows), self._allowed))
        self._step.make_optimizer()

    @contextlib.contextmanager
    def _theirs(self) -> Iterator[None]:
        """In which the Trainer computes what is expected."""
        with self._passes.as_the_trainers(), temporary.nudged(self._names):
            yield

    def search(self, parts: Parts, losses: Sequence[Loss]) -> tuple[Parts | None, list[str]]:
        """Take on as many of `parts` as leave the step the Trainer's, with `losses` tried in order. Those, and notes of
        what others were off; None, and what the Trainer expects left as it was, where nothing agrees."""
        self._full = parts
        temporary.free_unused(self._step.device)  # as in `expect`: weights that are joined move
        with temporary.nudged(self._names):
            agreeing, notes = agreement.search(parts, losses, self._deviation)
        if self._chaos is not None and agreeing is not None:
            moved = f"{self._precision} moves the Trainer's own gradient by {self._chaos:.0e}"
            notes = [f"compared in fp32: {moved}", *notes]
        if cut := [each.sample.tokens for each in self._expected if each.sample.tokens is not None]:
            notes = [f"compared over the last {min(cut)} tokens of a row, for which there was memory", *notes]
        notes = [*self._notes, *notes]
        self._use(agreeing or NOTHING)
        self._expected.clear()
        self._both.clear()
        if agreeing is None:
            self._step.optimizer.withdraw()
        return agreeing, notes

    @property
    def _allowed(self) -> Tolerance:
        """What rounding may amount to."""
        return agreement.TOLERANCES[self._precision]

    @property
    def _is_half(self) -> bool:
        return self._precision in ("fp16", "bf16")

    def _coarsest(self) -> str:
        """The coarsest arithmetic of the step, a key of `agreement.TOLERANCES`; of the weights as they are now."""
        method = self._method
        dtypes = {parameter.dtype for parameter in self._passes.model.parameters()}
        dtypes.add(getattr(method.quantization, "bnb_4bit_compute_dtype", None))
        if method.precision == "bf16" or torch.bfloat16 in dtypes:
            return "bf16"
        if method.precision == "fp16" or torch.float16 in dtypes:
            return "fp16"
        if self._step.device.type != "cuda":
            return "fp32"
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32 on a GPU"

    def _use(self, parts: Parts) -> None:
        """Compute steps with `parts` from now on. Raises what `Passes.use` raises."""
        if parts == self._taken_on:
            return
        self._taken_on = None
        self._passes.use(parts, self._allowed)
        self._epochs.lay_out(parts)
        self._taken_on = parts

    # How far is it off?

    def _deviation(self, parts: Parts) -> Deviation:
        """How far a step with `parts` is from the Trainer's, over the samples; the first that is too far."""

        def take_on() -> None:
            self._use(parts)
            if parts.packing:
                self._check_dialogues_are_apart()
                probes.check_positions(self._network, self._passes.autocast)
            early, late = self._epochs.ends(parts)
            if early < late:
                probes.check_rows_are_apart(self._passes.model, self._passes.autocast, (early, late), self._allowed)

        off = Deviation(error=self._problem_of(take_on, asked_for=parts == self._full))
        for expected in self._expected:
            if off.is_rounding:
                off = self._deviation_from(expected, parts)
        if off.is_rounding and parts.attention:
            off = replace(off, error=self._problem_of(flash.check_met, asked_for=False))
        if not off.is_rounding and flash.has_run_ours():
            with flash.left_to_torch() as keep:
                otherwise = self._deviation(parts)
                if otherwise.is_rounding:
                    keep()
                    self._notes.append(f"attention left to torch's kernels: {off}")
                    return otherwise
        return off

    def _deviation_from(self, expected: Expected, parts: Parts) -> Deviation:
        ours, problem = self._computed(expected, parts)
        if ours is None:
            return Deviation(error=problem)
        chaotic = expected.in_fp32 and self._chaos is not None
        allowed = agreement.CHAOTIC if chaotic else expected.allowed
        off = agreement.deviation(ours, expected.gradients, self._names, allowed)
        if off.is_rounding or expected.in_fp32 or not self._is_half:
            return off
        return self._beyond_rounding(expected, ours, parts) or off

    def _beyond_rounding(self, expected: Expected, ours: Gradients, parts: Parts) -> Deviation | None:
        """How far a step with `parts` is from the Trainer's where both are computed in fp32, since `ours` in half
        precision are too far from what is `expected`. None where they cannot be, and where the Trainer's halves are not
        too far from its own fp32 as well."""
        if expected not in self._both:
            self._use(NOTHING)
            with self._passes.as_the_trainers():
                self._both[expected] = self._in_both(expected)
            self._use(parts)
        both = self._both[expected]
        if both is None:
            return None
        halves, exact = both
        if halves is not expected:  # of fewer dialogues
            fewer, _ = self._computed(halves, parts)
            if fewer is None:
                return None
            ours = fewer
        theirs, own = (
            agreement.deviation(each, exact.gradients, self._names, expected.allowed)
            for each in (halves.gradients, ours)
        )
        # two gradients that both are nothing but rounding still are of one size, more or less
        if theirs.is_rounding or own.gradient > 10 * theirs.gradient or own.loss > 10 * theirs.loss + own.allowed.loss:
            return None
        self._chaos = theirs.gradient
        return self._deviation_from(exact, parts)

    def _in_both(self, expected: Expected) -> tuple[Expected, Expected] | None:
        """What the Trainer makes of as many of the `expected` dialogues as there is memory for in fp32, in half
        precision and in fp32; None where there is none."""
        sample = expected.sample
        while (exact := self._reference.in_fp32(sample)) is None:
            if sample.size == 1:
                return None
            sample = sample.first(sample.size // 2)
        if sample is not expected.sample:
            expected = Expected(*self._reference.gradients(sample), expected.allowed)
        return expected, Expected(sample, exact, agreement.CHAOTIC, in_fp32=True)

    # The step's own side

    def _computed(self, expected: Expected, parts: Parts) -> tuple[Gradients | None, str | None]:
        """All ranks' loss and gradients of a sample by a step with `parts`, in the arithmetic of what is `expected`; or
        None, and what keeps any of them from it, in one line."""
        own: list[Gradients] = []

        def compute() -> None:
            with self._passes.fp32() if expected.in_fp32 else contextlib.nullcontext():
                own.append(self._sampled(expected.sample, expected.gradients.scale))
                temporary.drop_gradients(self._network)  # before weights are halves again

        problem = self._problem_of(compute, asked_for=parts == self._full and not expected.in_fp32)
        return (None, problem) if problem else (own[0].over_ranks(self._names), None)

    def _sampled(self, sample: Sample, scale: float) -> Gradients:
        """This rank's share of the step's loss and gradients of `sample`."""
        epochs = copy.copy(self._epochs)
        epochs.rows = sample.of_each(epochs.rows)
        layout, shape = epochs.laid_out(sample, self._step.parts)
        buffers = Buffers(shape, self._step.device)
        buffers.fill(layout, epochs.rows)
        return self._step.gradients(buffers, scale)

    def _check_dialogues_are_apart(self) -> None:
        """Raise PartError where what shares a row is not apart, by the row with the most dialogues."""
        fullest = self._epochs.fullest_row()
        if fullest is None:
            return
        layout, shape = fullest
        buffers = Buffers(shape, self._step.device)
        buffers.fill(layout, self._epochs.rows)
        own = buffers.dialogues[0, 0] == layout.rows[0][1]
        embeddings = self._passes.model.get_input_embeddings()
        probes.check_dialogues_are_apart(self._network, embeddings, lambda: self._passes.logits(buffers, 0)[0], own)

    def _problem_of(self, act: Callable[[], None], *, asked_for: bool) -> str | None:
        """What keeps any rank from `act`, in one line. Raises torch.OutOfMemoryError where what acts was `asked_for`:
        training would run out of memory as well, since it holds more."""
        problem = None
        try:
            with torch_internals.no_hooks_left():
                act()
        except torch.OutOfMemoryError:
            if asked_for:
                raise
            problem = "out of memory"
        except PartError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001  of any kind: the part is switched off, and the note says why
            problem = f"its step fails ({type(error).__name__}: {first_line(error)[:160]})"
        temporary.drop_gradients(self._network)
        (any_failed,) = ranks.any_says(problem is not None, device=self._step.device)
        return problem or ("another rank cannot" if any_failed else None)
