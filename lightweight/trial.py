"""What is tried, what is forecast of it, and how it ended: a Trial goes into a child process, an Outcome comes out.

All are plain frozen data; those two cross the process boundary whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from lightweight import training_arguments
from lightweight.corpus import Corpus, Long, LossOn, RowForm
from lightweight.methods import Method
from lightweight.models import Model
from lightweight.settings import MAX_LENGTH, Placement
from lightweight.targets import Target

Padding = Literal["longest", "max"]
"""How long the rows of a batch are made: as its longest, as the Trainer's usual collator does; or `max_length`."""

Phase = Literal["start", "build", "evaluate", "capture", "train", "forward", "backward", "optimizer", "save"]
"""Where in a trial something happened. Forward, backward and optimizer are parts of train; gradient clipping counts as
backward, since the Trainer has no boundary before it. Capture is the preparation of a captured step, whose parts
have no boundary that the host sees."""


Cause = Literal[
    "weights", "quantization state", "gradients", "optimizer", "activations", "logits", "gathered", "workspace"
]
"""What memory is held for. `gathered` is what ranks gather from each other and reduce among them, a layer at a time:
its whole weights, and the buffers of both ways."""

CAUSES: tuple[Cause, ...] = get_args(Cause)

ForecastVerdict = Literal["fits", "does_not_fit", "too_close_to_call"]


def pads_to_max(padding: Padding | None, corpus: Corpus) -> bool:
    """Whether rows of `corpus` are all made as long as one may be: those of pairs where nothing is said, as in the
    original scripts."""
    return (padding or ("max" if corpus.kind == "pairs" else "longest")) == "max"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One Model x Method x Target x Corpus x seed.

    Attributes:
        model: What is trained.
        method: How.
        target: The card whose memory the trial is given.
        corpus: What it is trained on.
        seed: The seed of all random numbers.
        epochs: Passes over the training examples.
        max_steps: Optimizer steps, instead of `epochs`.
        max_length: The longest row, in tokens.
        loss_on: Which of the assistant's turns the loss is on.
        long: What is done with a conversation that is longer than a row.
        padding: None is "max" for pairs, as in the original scripts, and "longest" for anything else.
        rows: How many rows the training examples became; None until they are encoded.
        device_index: The number of the first GPU, among those that this session sees; None trains on the CPU.
        world_size: Ranks that train together, each a process with a GPU of its own from `device_index` on. They divide
            the batches of one rank among them.
        placement: Whether each rank holds the network or a part of it.
        threads: CPU threads of each rank; None is torch's own number.

    Raises:
        ValueError: For bf16 on a target without it, more ranks than a step has sequences, a sharded captured step, and
            rows too short for a prompt and an answer.
        MethodError: For TrainingArguments that the method's steps do not support. It is a ValueError.
    """

    model: Model
    method: Method
    target: Target
    corpus: Corpus
    seed: int = 0
    epochs: int = 10
    max_steps: int | None = None
    max_length: int = MAX_LENGTH
    loss_on: LossOn = "all"
    long: Long = "cut"
    padding: Padding | None = None
    rows: int | None = None
    device_index: int | None = None
    world_size: int = 1
    placement: Placement = "replicated"
    threads: int | None = None

    def __post_init__(self) -> None:
        assert self.row_form  # which refuses rows that are too short
        if not 1 <= self.world_size <= self.method.sequences_per_step:
            raise ValueError(
                f"method {self.method.name} trains {self.method.sequences_per_step} sequences a step, which "
                f"{self.world_size} ranks cannot share: take 1 to {self.method.sequences_per_step}, or larger batches"
            )
        if self.is_sharded and self.method.captured_step is not None:
            raise ValueError(
                f"method {self.method.name}: a captured step has the whole network on every rank: leave out "
                f"--placement sharded, or take {self.method.name.removesuffix('-captured')}"
            )
        if self.world_size > 1 and self.corpus.task is not None:
            raise ValueError("a task is asked on one GPU: leave out --task, or --gpus-per-trial")
        if self.world_size > 1 and self.method.library != "peft":
            raise ValueError(f"method {self.method.name}: {self.method.library} trains on one GPU: leave it out")
        if self.method.uses_bf16 and not self.target.bf16:
            raise ValueError(
                f"method {self.method.name} computes in bf16, which target {self.target.name} does not have: "
                "use fp16 there, or another target"
            )
        if self.world_size > 1 and (own := self.method.not_for_ranks):
            raise ValueError(
                f"method {self.method.name}: with its own {', '.join(own)} several ranks may train differently from "
                "one: train it on one GPU"
            )
        training_arguments.check(self.method, self.target, self.world_size)

    @property
    def row_form(self) -> RowForm:
        """How examples become rows."""
        return RowForm(self.max_length, self.loss_on, self.long)

    @property
    def pads_to_max(self) -> bool:
        """Whether every row of a batch is made `max_length` tokens long."""
        return pads_to_max(self.padding, self.corpus)

    def with_rows(self, rows: int | None) -> Trial:
        """The trial, knowing how many rows its training examples became; None where that is not known yet."""
        return self if rows in (None, self.rows) else replace(self, rows=rows)

    @property
    def running_method(self) -> Method:
        """The method as each of this trial's ranks, its device and its target run it."""
        method = self.method.on_cpu() if self.device_index is None else self.method.on_gpu(bf16=self.target.bf16)
        return (method.to_be_sharded() if self.is_sharded else method).on_rank(self.world_size)

    @property
    def is_sharded(self) -> bool:
        """Whether each of several ranks holds a part of the network, by FSDP2, and not all of it."""
        return self.world_size > 1 and self.placement == "sharded"

    @property
    def name(self) -> str:
        """Model x method, as a person says it."""
        return f"{self.model.name} x {self.method.name}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens one full optimizer step sees at most, padding included."""
        return self.method.sequences_per_step * self.max_length

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows; the last one of a pass may see fewer sequences."""
        return -(-(self.rows or len(self.corpus.train)) // self.method.sequences_per_step)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole job."""
        return self.epochs * self.steps_per_epoch if self.max_steps is None else self.max_steps

    @property
    def rounds(self) -> int:
        """Rounds of the whole job; a round is an epoch, or what `max_steps` leaves of one."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def can_learn(self) -> bool:
        """Whether losses say something: an adapter on random weights has nothing to adapt."""
        return self.model.weights == "pretrained" or (self.method.adapter is None and not self.method.transform)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """How much memory and time training takes, and whether it fits a budget.

    Attributes:
        allocated_bytes: The peak, as `torch.cuda.max_memory_allocated` counts it.
        reserved_bytes: The peak, as `max_memory_reserved` counts it: under the budget if it fits, without a budget if
            not.
        phase: Where it runs out of memory, else where the peak is.
        by_cause: What `allocated_bytes` consists of.
        verdict: Whether it fits.
        budget_bytes: What the allocator may reserve; None without a limit.
        parameters: All parameters.
        trainable_parameters: Parameters that are trained.
        paged_bytes: What a paged optimizer keeps in managed memory, on the card while there is room, else on the host.
            It is in no peak and no verdict.
        host_bytes: What is pinned in the host's memory instead of the card's: activations and an embedding.
        step_seconds: The time of an optimizer step; None without a calibration or data sheet.
        is_calibrated: Whether the calibration is one of the same card.
    """

    allocated_bytes: int
    reserved_bytes: int
    phase: Phase
    by_cause: dict[Cause, int]
    verdict: ForecastVerdict
    budget_bytes: int | None
    parameters: int
    trainable_parameters: int
    paged_bytes: int = 0
    host_bytes: int = 0
    step_seconds: float | None = None
    is_calibrated: bool = False


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What a trial has measured so far. None means that there is nothing to measure.

    Of several ranks, peaks, averages and `*_bytes` are the largest of all ranks. Seconds are those of rank 0, except
    for `cpu_seconds`, which are added up.

    Attributes:
        train_loss: The training loss of each optimizer step, in nats per token.
        step_seconds: The device time of each step, in seconds, from the end of the step before, so nothing between
            steps is lost. On a CPU it is wall time.
        step_tokens: The tokens of each step's dialogues, of all ranks together.
        step_padded_tokens: The tokens that each step computed, with padding, of all ranks together.
        learning_rates: The highest learning rate that each of the optimizer's groups of weights had in any step.
        cpu_seconds: Processor time of all rounds together, in seconds.
        heldout_loss_before: Cross-entropy of the held-out answers before training, in nats per token.
        heldout_loss_after: The same after training.
        elsewhere_loss_before: Cross-entropy of the corpus's text from elsewhere before training, in nats per token.
        elsewhere_loss_after: The same after training.
        task_matches_before: Questions of the task that were answered exactly right before training.
        task_matches_after: The same after training.
        peak_allocated_bytes: The peak allocated in training, without building and evaluating.
        peak_reserved_bytes: The peak reserved in training.
        average_allocated_bytes: The mean, over steps, of what was allocated at the end of the step.
        average_reserved_bytes: The same of what was reserved.
        rank_peak_allocated_bytes: The peak allocated on each rank.
        rank_peak_reserved_bytes: The peak reserved on each rank.
        process_bytes: What the process held on the GPU at most, by NVML.
        host_peak_bytes: What the process held in the host's memory at most.
        saved_bytes: The size of what was saved.
        trainable_parameters: Parameters that are trained.
        parameters: All parameters.
        flop_per_token: Multiplications and additions that training on a token needs (`models.flop_per_token`).
        training_rows: Rows that were made of the training examples.
        example_tokens: Training examples by length: how many have up to so many tokens, by powers of two.
        truncated_sequences: Rows that lack a part of their example.
        split_examples: Training examples that became several rows.
        dropped_examples: Training examples that became none.
        adapted_layers: The names of the layers with an adapter.
        base_quantization: How the weights are really quantized, by the method or by their checkpoint.
        captured: Whether a captured step ran as CUDA graphs; None for the Trainer's steps.
        compiled: Whether torch.compile compiled it.
        capture_note: Which of its parts were switched off, and why.
        data_note: How the rows and learning rates of a method with its own code differ from those of other methods.
        phase_seconds: Time by phase, in seconds, without waiting for the next request.
    """

    train_loss: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    step_tokens: tuple[int, ...] = ()
    step_padded_tokens: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()
    cpu_seconds: float = 0.0
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    elsewhere_loss_before: float | None = None
    elsewhere_loss_after: float | None = None
    task_matches_before: int | None = None
    task_matches_after: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    average_allocated_bytes: int | None = None
    average_reserved_bytes: int | None = None
    rank_peak_allocated_bytes: tuple[int | None, ...] = ()
    rank_peak_reserved_bytes: tuple[int | None, ...] = ()
    process_bytes: int | None = None
    host_peak_bytes: int | None = None
    saved_bytes: int | None = None
    trainable_parameters: int | None = None
    parameters: int | None = None
    flop_per_token: float | None = None
    training_rows: int | None = None
    example_tokens: dict[str, int] | None = None
    truncated_sequences: int | None = None
    split_examples: int | None = None
    dropped_examples: int | None = None
    adapted_layers: tuple[str, ...] = ()
    base_quantization: str | None = None
    captured: bool | None = None
    compiled: bool | None = None
    capture_note: str | None = None
    data_note: str | None = None
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def cold_seconds(self) -> float:
        """The whole job: the child's start, build, training and saving, without the held-out evaluations."""
        return sum(seconds for phase, seconds in self.phase_seconds.items() if phase != "evaluate")


LARGEST = (
    *("peak_allocated_bytes", "peak_reserved_bytes", "average_allocated_bytes", "average_reserved_bytes"),
    *("process_bytes", "host_peak_bytes"),
)
"""What is of that rank which has most of it, of those that measured it before they ended."""


@dataclass(frozen=True, kw_only=True)
class Completed:
    """The whole job was done and its result saved."""

    kind: ClassVar[str] = "completed"
    measured: Measurements


@dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """torch's own OutOfMemoryError on the trial's device, with the allocator's `num_ooms` at 1 or more; or the host's
    memory did not suffice, as `reason` then says with the limit that was in force.

    `requested_bytes` is what the failed allocation asked for, to the rounding of torch's message. `rank` is the one it
    happened on, of several.
    """

    kind: ClassVar[str] = "out_of_memory"
    phase: Phase
    requested_bytes: int | None
    budget_bytes: int
    reason: str
    measured: Measurements
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """A training loss that is not a finite number, at optimizer step `step` (from 1)."""

    kind: ClassVar[str] = "diverged"
    step: int
    reason: str
    measured: Measurements


@dataclass(frozen=True, kw_only=True)
class Crashed:
    """Any other end: an exception, a CUDA error, a signal. `details` holds the traceback or the child's last words.
    `rank` is the one that began it, of several."""

    kind: ClassVar[str] = "crashed"
    phase: Phase
    reason: str
    details: str
    measured: Measurements
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class TimedOut:
    """The child reported nothing for `silent_seconds` and was killed. `details` holds its last words, and where each
    rank then was; `rank` is the one that the others waited for, of several."""

    kind: ClassVar[str] = "timed_out"
    phase: Phase
    silent_seconds: float
    reason: str
    details: str
    measured: Measurements
    rank: int | None = None


Outcome = Completed | OutOfMemory | Diverged | Crashed | TimedOut
"""How a trial ended; `kind` is its name in a record."""


def of_all_ranks(measured: Sequence[Measurements]) -> Measurements:
    """One trial's measurements from those of its ranks, in their order."""
    first, *others = measured
    if not others:
        return first
    values_of = {name: [value for one in measured if (value := getattr(one, name)) is not None] for name in LARGEST}
    largest = {name: max(values) for name, values in values_of.items() if values}
    return replace(
        first,
        **largest,
        cpu_seconds=sum(one.cpu_seconds for one in measured),
        rank_peak_allocated_bytes=tuple(one.peak_allocated_bytes for one in measured),
        rank_peak_reserved_bytes=tuple(one.peak_reserved_bytes for one in measured),
    )
