"""What does a record hold? A trial and how it ended, a forecast, a speedup, and the run that they belong to: frozen
data.

Fields have the names of the JSON's keys, with bytes, seconds and tokens in the name. None means that there is no value,
or no finite one, because JSON has none. Every record has the fields without a default.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightweight import targets
from lightweight.schema import (
    NO_KEY,
    Amount,
    AtLeast1,
    Count,
    Ending,
    ForecastVerdict,
    GateVerdict,
    LogRatio,
    Long,
    Loss,
    LossOn,
    Name,
    Padding,
    Pairing,
    Pairs,
    Phase,
    Placement,
    Positive,
    Precision,
    Ratio,
    Settings,
    Share,
    ShownAs,
    TrainedOn,
    Weights,
)

INTERRUPTED = "interrupted by "
"""How the reason of a trial begins that Ctrl-C or a signal to its session ended: it says nothing of the trial."""

BASELINE = "baseline"
"""The method that a model's others are held against."""

ONE_AFTER_THE_OTHER: Pairing = "one after the other"
"""The pairing of a speedup whose two sides shared nothing of the machine's temper: its interval is wider."""

ONLY_WITH = "only with"
"""In the metadata of a field: its key is left out of the JSON where the field of that name has nothing to say."""


FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What `precision` says, as torch calls it."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times as fast as `baseline` a cell is per token, measured in pairs of alternating rounds.

    Attributes:
        baseline: The name of the method that it is compared with.
        log_ratios: The natural logarithm of each pair's ratio.
        ratio: Their geometric mean; None without pairs.
        low: Where the 95 % t-interval of `ratio` begins.
        high: Where it ends. None after a single pair, which has no upper bound.
        cap: The largest number of pairs that was allowed.
        pairing: 'alternating', on a CPU 'sharing a core', or 'one after the other' if both did not fit on the device at
            once. The last is weaker: its interval is wider.
        steps_per_round: Optimizer steps of one round.
        floor: The share of the stored speedup that the gate asked for; None if it did not ask.
        verdict: What the gate decided.
        ended_after_seconds: The time for pairs, if it was over before the verdict or the ratio was clear.
        reason: Why there are no pairs.
    """

    baseline: Name
    log_ratios: tuple[LogRatio, ...] = ()
    ratio: Ratio | None = None
    low: Amount | None = None
    high: Ratio | None = None
    cap: Pairs
    pairing: Pairing = "alternating"
    steps_per_round: AtLeast1
    floor: Share | None = None
    verdict: GateVerdict | None = None
    ended_after_seconds: Amount | None = None
    reason: str | None = None

    @property
    def is_in_turn(self) -> bool:
        """Whether its two sides were measured one after the other."""
        return self.pairing == ONE_AFTER_THE_OTHER


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One trial and how it ended: an element of a record's `outcomes`.

    Sizes are in bytes, times in seconds, losses in nats per token. None means that there is nothing to say, or that an
    older record does not say it.

    Attributes:
        model: The model's name.
        method: The method's name.
        method_digest: SHA-256 of the method's settings. It tells methods of one name apart.
        changed: Settings that the command line, or a test, has changed.
        target: The card whose memory the trial was given.
        weights: 'pretrained' or 'random'.
        weights_file: The file of the weights, if they were stored in fewer bits than they are used in.
        weights_revision: The hub's commit of the weights, or how random ones were drawn.
        precision: The number format of matrix products.
        weights_dtype: The number format of unquantized weights.
        adapter: The adapter's settings, as peft writes them.
        quantization: The quantization's settings, as transformers writes them.
        training_arguments: The TrainingArguments that the method sets.
        library: 'peft', or the library that was used instead, such as 'unsloth'.
        own_code: The author's functions and classes by field: import path, and SHA-256 of the source.
        captured_step: The settings of the captured step; None for the Trainer's.
        corpus_digest: SHA-256 of the corpus.
        elsewhere_digest: SHA-256 of the plain text that forgetting is measured on.
        task_digest: SHA-256 of the task's questions.
        task_questions: How many questions the task has.
        corpus_format: The format that the corpus was read as.
        corpus_skipped: Rows of the corpus that were left out.
        heldout_examples: Examples that were held out.
        seed: The seed of the trial.
        planned_steps: Optimizer steps of the whole job.
        steps_per_epoch: Optimizer steps of one epoch.
        max_length: The longest row, in tokens.
        trained_on: 'pairs', 'conversations' or 'texts'.
        loss_on: Which of the assistant's turns the loss was on: 'all' or the 'last'.
        long: What was done with a conversation longer than a row: 'cut', 'split' or 'drop'.
        padding: Rows of a batch were padded to the 'longest' of them, or to `max_length` ('max').
        tokens_per_step: Tokens of a full step at most, padding included.
        world_size: Ranks that trained together.
        placement: Of several ranks: 'replicated' (each held the network) or 'sharded' (each held a part).

        emulated: Whether another card than `target` gave the times.
        outcome: How the trial ended: 'completed', 'out_of_memory', 'diverged', 'crashed' or 'timed_out'.
        phase: Where it ended, if it did not complete.
        reason: Why, in one line.
        details: More on that, such as a traceback.
        requested_bytes: What the allocation asked for that ran out of memory.
        budget_bytes: The limit on the allocator.
        diverged_at_step: The step whose loss was not finite, counted from 1.
        steps: Optimizer steps that were done.

        train_loss: The training loss of each step.
        step_seconds: The device time of each step, from the end of the step before.
        step_tokens: The tokens of each step, without padding, of all ranks.
        step_padded_tokens: The tokens that each step computed, with padding, of all ranks.
        learning_rates: The highest learning rate that each of the optimizer's groups of weights had in any step. What
            an optimizer makes of it is its own.
        cpu_seconds: Processor time of all rounds together.
        heldout_loss_before: Held-out loss before training.
        heldout_loss_after: Held-out loss after training.
        elsewhere_loss_before: The loss on plain text from elsewhere before training.
        elsewhere_loss_after: The same after training. By how much it rose is forgetting.
        task_matches_before: Questions answered exactly right before training.
        task_matches_after: Questions answered exactly right after training.
        peak_allocated_bytes: The peak that torch allocated in training; of several ranks the largest, as below.
        peak_reserved_bytes: The peak that torch reserved in training.
        average_allocated_bytes: The mean, over steps, of what was allocated at the end of the step.
        average_reserved_bytes: The same of what was reserved.
        rank_peak_allocated_bytes: The peak allocated on each of several ranks.
        rank_peak_reserved_bytes: The peak reserved on each of several ranks.
        process_bytes: What the process held on the GPU at most, by NVML.
        host_peak_bytes: What the process held in the host's memory at most.
        saved_bytes: The size of what was saved.
        trainable_parameters: Parameters that are trained.
        parameters: All parameters.
        flop_per_token: Multiplications and additions that training on a token needs.
        training_rows: Rows that were made of the training examples.
        truncated_sequences: How many of these rows lack a part of their example.
        example_tokens: Training examples by length: how many have up to so many tokens, by powers of two.
        split_examples: Training examples that became several rows.
        dropped_examples: Training examples that became none.
        adapted_layers: The names of the layers with an adapter.
        base_quantization: How the weights were really quantized.
        captured: Whether the steps ran as CUDA graphs; None for the Trainer's steps.
        compiled: Whether torch.compile compiled them.
        capture_note: Which parts of the captured step were switched off, and why.
        data_note: How the rows that reached the network, or the learning rates, differ from those of other methods.
        phase_seconds: Time by phase, without waiting for requests.

        steady_step_seconds: The median step after the first epoch.
        tokens_per_second: Tokens without padding, of all ranks together. In records without `step_tokens` it is
            `tokens_per_step` over the median step.
        padded_tokens_per_second: Tokens that were computed, of all ranks together.
        rank_tokens_per_second: Tokens without padding, of each rank.
        failed_rank: The rank, of several, that ended the trial.
        cold_seconds: The whole job, without held-out evaluations.

        forecast_allocated_bytes: The forecast peak of what torch allocates.
        forecast_reserved_bytes: The forecast peak of what torch reserves.
        forecast_verdict: 'fits', 'does_not_fit' or 'too_close_to_call'.
        forecast_phase: The phase of the forecast peak.
        forecast_bytes_by_cause: The forecast allocated peak by cause.
        forecast_seconds: The forecast time of all steps together.

        device: The device's name.
        device_bytes: Its memory; None for a CPU.
        device_driver: Its driver's version.
        versions: Versions of packages, and of CUDA as torch was built with it.

        worker: The pytest-xdist worker that ran the trial.
        visible_gpu: The number of that worker's GPU.
        test: The pytest node that ran the trial.
        shown_as: The table it is shown in beside the main one: 'ladder' or 'peers'.
        speedup: How many times as fast as its baseline the cell is.

        run: When the run ended that it was read from. Not a key of the JSON.
        stored: All that the file says of it, with keys that this version does not know. Not a key of the JSON.
    """

    model: Name
    method: Name
    method_digest: str | None = None
    changed: Settings | None = field(default=None, metadata={ONLY_WITH: "changed"})
    target: Name
    weights: Weights
    weights_file: str | None = None
    weights_revision: str | None = None
    precision: Precision | None
    weights_dtype: str | None = None
    adapter: Settings | None = None
    quantization: Settings | None = None
    training_arguments: Settings | None = None
    library: str | None = None
    own_code: Settings | None = field(default=None, metadata={ONLY_WITH: "own_code"})
    captured_step: Settings | None = None
    corpus_digest: Name
    elsewhere_digest: str | None = None
    task_digest: str | None = None
    task_questions: AtLeast1 | None = None
    corpus_format: str | None = None
    corpus_skipped: Count | None = None
    heldout_examples: Count | None = None
    seed: Count | None
    planned_steps: Count | None = None
    steps_per_epoch: AtLeast1 | None = None
    max_length: AtLeast1 | None = None
    trained_on: TrainedOn = "pairs"
    loss_on: LossOn = "all"
    long: Long = "cut"
    padding: Padding = "max"
    tokens_per_step: AtLeast1 | None
    world_size: AtLeast1
    placement: Placement | None = field(default=None, metadata={ONLY_WITH: "placement"})

    emulated: bool | None
    outcome: Ending
    phase: Phase | None
    reason: str | None = None
    details: str | None = None
    requested_bytes: Count | None = None
    budget_bytes: Count | None = None
    diverged_at_step: Count | None = None
    steps: Count

    train_loss: tuple[Loss | None, ...] | None
    step_seconds: tuple[Amount | None, ...] | None
    step_tokens: tuple[Count, ...] | None = None
    step_padded_tokens: tuple[Count, ...] | None = None
    learning_rates: tuple[Amount | None, ...] | None = None
    cpu_seconds: Amount | None = None
    heldout_loss_before: Loss | None
    heldout_loss_after: Loss | None
    elsewhere_loss_before: Loss | None = None
    elsewhere_loss_after: Loss | None = None
    task_matches_before: Count | None = None
    task_matches_after: Count | None = None
    peak_allocated_bytes: Count | None
    peak_reserved_bytes: Count | None
    average_allocated_bytes: Count | None
    average_reserved_bytes: Count | None = None
    rank_peak_allocated_bytes: tuple[Count | None, ...] | None = None
    rank_peak_reserved_bytes: tuple[Count | None, ...] | None = None
    process_bytes: Count | None = None
    host_peak_bytes: Count | None
    saved_bytes: Count | None = None
    trainable_parameters: Count | None = None
    parameters: Count | None = None
    flop_per_token: Amount | None = None
    training_rows: Count | None = None
    truncated_sequences: Count | None = None
    example_tokens: Mapping[str, Count] | None = None
    split_examples: Count | None = None
    dropped_examples: Count | None = None
    adapted_layers: tuple[str, ...] | None = None
    base_quantization: str | None = None
    captured: bool | None = None
    compiled: bool | None = None
    capture_note: str | None = None
    data_note: str | None = field(default=None, metadata={ONLY_WITH: "data_note"})
    phase_seconds: Mapping[str, Amount] | None = None

    steady_step_seconds: Positive | None
    tokens_per_second: Positive | None = None
    padded_tokens_per_second: Amount | None = None
    rank_tokens_per_second: Amount | None = None
    failed_rank: Count | None = None
    cold_seconds: Amount | None

    forecast_allocated_bytes: Count | None
    forecast_reserved_bytes: Count | None
    forecast_verdict: ForecastVerdict | None
    forecast_phase: Phase | None = None
    forecast_bytes_by_cause: Mapping[str, Count] | None = None
    forecast_seconds: Amount | None = None

    device: Name
    device_bytes: Count | None
    device_driver: str | None = None
    versions: Mapping[str, str | None] | None

    worker: str | None = field(default=None, metadata={ONLY_WITH: "worker"})
    visible_gpu: str | None = field(default=None, metadata={ONLY_WITH: "worker"})
    test: str | None = field(default=None, metadata={ONLY_WITH: "test"})
    shown_as: ShownAs | None = field(default=None, metadata={ONLY_WITH: "test"})
    speedup: Speedup | None = field(default=None, metadata={ONLY_WITH: "speedup"})

    run: str | None = field(default=None, metadata={NO_KEY: True})
    stored: Mapping[str, Any] | None = field(default=None, metadata={NO_KEY: True}, repr=False, compare=False)

    @property
    def has_own_loss(self) -> bool:
        """Whether its training losses are on another scale than those of other methods. Held-out losses never are."""
        own, arguments = self.own_code or {}, self.training_arguments or {}
        return bool({"compute_loss", "trainer"} & own.keys() or arguments.get("label_smoothing_factor"))

    @property
    def gpu_peak_bytes(self) -> int | None:
        """The peak allocated on the GPU, of the rank with the largest; None if the trial ended before it could
        report."""
        peaks = [self.peak_allocated_bytes, *(self.rank_peak_allocated_bytes or ())]
        return max((peak for peak in peaks if peak), default=None)

    @property
    def peak_bytes(self) -> int | None:
        """The peak allocated on the GPU, or, on a machine without one, of the process on the host. None if a trial on a
        GPU ended before it could report."""
        return self.gpu_peak_bytes or (self.host_peak_bytes if self.device_bytes is None else None)

    @property
    def share_of_peak(self) -> float | None:
        """Model FLOP utilization: the FLOP that training on its tokens needs, over what its cards could do in that time
        by their data sheet. None if either is not known."""
        rates = targets.rates(self.device)
        if rates is None or not self.flop_per_token or not self.tokens_per_second or self.outcome != "completed":
            return None
        rate = rates.of(FORMATS.get(self.precision or "fp32", "float16"))
        return self.flop_per_token * self.tokens_per_second / (rate * self.world_size)

    def memory_share(self, baseline: Entry | None) -> float | None:
        """The peak as a share of `baseline`'s; None unless both completed and have one."""
        if baseline is None or self.outcome != "completed" or baseline.outcome != "completed":
            return None
        peak, of = self.peak_bytes, baseline.peak_bytes
        return peak / of if peak and of else None

    def times_as_fast(self, baseline: Entry) -> float | None:
        """How many times as fast as `baseline` it is per token; None if one of both has no steps."""
        of_this, of_baseline = seconds_per_token(self, baseline)
        return of_baseline / of_this if of_this and of_baseline else None


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    """What was forecast of one model x method x target without training: an element of a record's `forecasts`, and of
    what `lightweight plan --format json` writes.

    Fields that an `Entry` has too mean the same.

    Attributes:
        model: The model's name.
        method: The method's name.
        target: The card, or amount of memory.
        max_length: The longest row, in tokens.
        tokens_per_step: Tokens of a full step at most, padding included.
        forecast_allocated_bytes: The peak that torch would allocate on one GPU.
        forecast_reserved_bytes: The peak that torch would reserve on one GPU.
        budget_bytes: What the target has for the allocator.
        bytes_by_cause: The allocated peak by cause.
        phase: The phase of the peak.
        verdict: 'fits', 'does_not_fit' or 'too_close_to_call'.
        gpus: GPUs that share the trial.
        placement: 'replicated' or 'sharded', for several GPUs.
        world_size: Ranks that train together.
        batch_size: Sequences of one forward pass.
        passes: Forward passes of one optimizer step.
        paged_bytes: Paged optimizer state, which is not part of the peaks.
        method_digest: SHA-256 of the method's settings.
        settings: The settings that the method's author gave.
        changed: Those that the command line, or a test, has changed.
        corpus_digest: SHA-256 of the corpus, if one was given.
        loss_on: Which of the assistant's turns the loss is on.
        long: What is done with conversations that are longer than a row.
        padding: How rows are padded.
        longest_row: The tokens of the corpus's longest row.
        parameters: All parameters.
        trainable_parameters: Parameters that are trained.
        versions: Versions of packages, and of CUDA as torch was built with it.
    """

    model: Name
    method: Name
    target: Name
    max_length: AtLeast1 | None
    tokens_per_step: AtLeast1 | None = None
    forecast_allocated_bytes: Count
    forecast_reserved_bytes: Count
    budget_bytes: Count | None
    bytes_by_cause: Mapping[str, Count]
    phase: Phase | None
    verdict: ForecastVerdict
    gpus: AtLeast1 | None = field(default=None, metadata={ONLY_WITH: "gpus"})
    placement: Placement | None = field(default=None, metadata={ONLY_WITH: "placement"})
    world_size: AtLeast1 | None = field(default=None, metadata={ONLY_WITH: "world_size"})
    batch_size: AtLeast1 | None = field(default=None, metadata={ONLY_WITH: "batch_size"})
    passes: AtLeast1 | None = field(default=None, metadata={ONLY_WITH: "passes"})
    paged_bytes: Count | None = field(default=None, metadata={ONLY_WITH: "paged_bytes"})
    method_digest: str | None = field(default=None, metadata={ONLY_WITH: "method_digest"})
    settings: Settings | None = field(default=None, metadata={ONLY_WITH: "settings"})
    changed: Settings | None = field(default=None, metadata={ONLY_WITH: "changed"})
    corpus_digest: str | None = field(default=None, metadata={ONLY_WITH: "corpus_digest"})
    loss_on: LossOn | None = field(default=None, metadata={ONLY_WITH: "loss_on"})
    long: Long | None = field(default=None, metadata={ONLY_WITH: "long"})
    padding: Padding | None = field(default=None, metadata={ONLY_WITH: "padding"})
    longest_row: AtLeast1 | None = field(default=None, metadata={ONLY_WITH: "longest_row"})
    parameters: Count | None = field(default=None, metadata={ONLY_WITH: "parameters"})
    trainable_parameters: Count | None = field(default=None, metadata={ONLY_WITH: "trainable_parameters"})
    versions: Mapping[str, str | None] | None = field(default=None, metadata={ONLY_WITH: "versions"})


@dataclass(frozen=True, kw_only=True)
class NoForecast:
    """A cell that `lightweight plan` could not forecast, and the `reason`."""

    model: Name
    method: Name
    target: Name
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stored run.

    Attributes:
        path: Its file.
        ended: When it ended: ISO 8601, UTC.
        entries: Its trials.
        forecasts: What was forecast without training.
        unforecast: What a plan could not forecast.
        commit: The code's commit.
        is_dirty: Whether the code had uncommitted changes.
        command: The arguments with which pytest, in its root, trains the same again; empty if not known.
    """

    path: Path
    ended: str
    entries: Sequence[Entry]
    forecasts: Sequence[ForecastRow] = ()
    unforecast: Sequence[NoForecast] = ()
    commit: str | None = None
    is_dirty: bool | None = None
    command: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


def seconds_per_token(*entries: Entry) -> tuple[float | None, ...]:
    """The seconds per token of each of `entries`, comparable with each other. They count tokens without padding if all
    entries have these; else, as in older records, the median step over the tokens of a full step, padding included.
    None for an entry without steps."""
    timed = [entry for entry in entries if entry.steady_step_seconds is not None]
    if all(entry.step_tokens and entry.tokens_per_second for entry in timed):
        return tuple(
            1 / rate if entry.steady_step_seconds is not None and (rate := entry.tokens_per_second) else None
            for entry in entries
        )
    return tuple(
        steady / tokens
        if (steady := entry.steady_step_seconds) is not None and (tokens := entry.tokens_per_step)
        else None
        for entry in entries
    )


def training_loss(losses: Sequence[float | None], steps_per_epoch: int) -> tuple[float, float] | None:
    """The mean training loss over the first and over the last epoch, in nats per token; with less than two epochs, over
    the first and last tenth of the steps, because one step's loss is that of few examples. None if a loss is not
    finite, or there is none."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not known or len(known) < len(losses):
        return None
    count = steps_per_epoch if len(known) >= 2 * steps_per_epoch else max(1, len(known) // 10)
    return statistics.fmean(known[:count]), statistics.fmean(known[-count:])
