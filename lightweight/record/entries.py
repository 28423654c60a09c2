"""What does a record hold? A trial and how it ended, a forecast, a speedup, the run they are of: frozen data.

Their fields are called as in the JSON, and bytes, seconds and tokens are in the names. `None` stands where there is
nothing to say, or no finite number, which JSON does not have. A field without a default is one that every record has.
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

    `log_ratios` has the natural logarithm of each pair's ratio; `ratio`, `low` and `high` are their geometric mean and
    its 95 % t-interval; `cap` is how many pairs there could have been at most. `pairing` is 'alternating', on a CPU
    'sharing a core', or 'one after the other' where both did not fit on the device at once, which is weaker. `floor` is
    the share of the stored speedup that the gate asked for, if it did, and `verdict` what came of it. Where the time
    for pairs was over before the verdict was clear, or the ratio known as precisely as was wanted,
    `ended_after_seconds` is that time. Without pairs `reason` says why there is no number. `high` is None with a
    `ratio` where nothing bounds it, after a single pair.
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

    What was tried: `model` and its `weights`, from `weights_file` where they were stored in fewer bits,
    `weights_revision` the hub's commit of them, or how random ones were drawn; `method`, told from others of its name
    by `method_digest`, with its settings as peft and transformers write them, `own_code` the functions and classes of
    its author by field, each with its import path and the SHA-256 of its source, and in `changed` those that the
    command line has changed; the card whose memory it got, `target`, and whether another one gave it its times,
    `emulated`; the data, `corpus_digest` and `elsewhere_digest`, with `task_questions` of a task, `task_digest`, read
    from the format `corpus_format` with `corpus_skipped` rows left out and `heldout_examples` held out, the others
    `trained_on` as pairs, conversations or texts, in rows of at most `max_length` tokens, the loss on `loss_on` of the
    assistant's turns, a `long` conversation cut, split or dropped, batches with the `padding` to their longest row or
    to `max_length`;
    `tokens_per_step` in a full step at most, padding included, for `planned_steps` optimizer steps. `world_size` ranks
    trained it together, and several had the `placement` of the network: replicated, all of it on each, or sharded.

    How it ended: `outcome`, in which `phase` and for what `reason`, with `details` such as a traceback. Out of memory
    has `requested_bytes`, a trial that diverged `diverged_at_step`, one of several ranks `failed_rank`.

    What was measured, as in `trial.Measurements`: `train_loss`, `step_seconds`, `step_tokens` and `step_padded_tokens`
    have one number an optimizer step; losses are in nats a token; `rank_peak_*` has an element a rank where there are
    several, and other peaks are the largest. `steady_step_seconds` is the median step after the first epoch.
    `data_note` says how the rows that reached the network differ from those of every other method, if they do.
    `tokens_per_second` counts the tokens of dialogues and `padded_tokens_per_second` all that were computed, of all
    ranks together, `rank_tokens_per_second` what each did; in records without `step_tokens`, `tokens_per_second` is
    `tokens_per_step` over the median step. `cold_seconds` is the whole job without held-out evaluations.

    `forecast_*` is what was forecast of it, `forecast_seconds` of all its steps together, `budget_bytes` the limit that
    was in force, `versions` the packages with `cuda`, what torch was built with. Only some runs have `worker`, the
    pytest-xdist worker that ran the trial, with `visible_gpu`, the number of its GPU; `test`, the pytest node that ran
    it, with `shown_as`, the table that it belongs to beside the main one; and `speedup`.

    Two fields are no keys of the JSON: `run` is when the run ended that it was read from, and `stored` all that the
    file says of it, keys included that this version does not know. They are None for what was not read from a file.
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
        """Whether its training losses are on a scale of its own; held-out losses never are."""
        own, arguments = self.own_code or {}, self.training_arguments or {}
        return bool({"compute_loss", "trainer"} & own.keys() or arguments.get("label_smoothing_factor"))

    @property
    def gpu_peak_bytes(self) -> int | None:
        """The peak allocated on the GPU, of the fullest rank: what ended before it could tell has none."""
        peaks = [self.peak_allocated_bytes, *(self.rank_peak_allocated_bytes or ())]
        return max((peak for peak in peaks if peak), default=None)

    @property
    def peak_bytes(self) -> int | None:
        """The peak allocated on the GPU, or where there is none of the whole process on the host; None for what ended
        on a GPU before it could tell."""
        return self.gpu_peak_bytes or (self.host_peak_bytes if self.device_bytes is None else None)

    @property
    def share_of_peak(self) -> float | None:
        """The arithmetic that training on its tokens needs, over what its cards could have done meanwhile by their data
        sheet; None where one of both is not known."""
        rates = targets.rates(self.device)
        if rates is None or not self.flop_per_token or not self.tokens_per_second or self.outcome != "completed":
            return None
        rate = rates.of(FORMATS.get(self.precision or "fp32", "float16"))
        return self.flop_per_token * self.tokens_per_second / (rate * self.world_size)

    def memory_share(self, baseline: Entry | None) -> float | None:
        """The peak as a share of that of `baseline`; None unless both completed and have one."""
        if baseline is None or self.outcome != "completed" or baseline.outcome != "completed":
            return None
        peak, of = self.peak_bytes, baseline.peak_bytes
        return peak / of if peak and of else None

    def times_as_fast(self, baseline: Entry) -> float | None:
        """How many times as fast as in `baseline` a token is, None where one of both has no steps."""
        of_this, of_baseline = seconds_per_token(self, baseline)
        return of_baseline / of_this if of_this and of_baseline else None


@dataclass(frozen=True, kw_only=True)
class ForecastRow:
    """What was forecast of one model x method x target and not trained: an element of a record's `forecasts`, and of
    what `lightweight plan --format json` writes.

    `forecast_allocated_bytes` and `forecast_reserved_bytes` are the peak of one GPU, by cause in `bytes_by_cause`, met
    in `phase`; `budget_bytes` is what the target has. `gpus` share the trial, with `placement` as in an `Entry`, in
    rows of `max_length` tokens, each in `passes` of `batch_size` sequences a step; `paged_bytes` are optimizer state
    that is in no peak.

    A plan also says what it was made under: the method by its `method_digest` and, in `settings`, by what its author
    said, with those in `changed` that the command line has; of a corpus, `corpus_digest`, how its rows are made, as in
    an `Entry`, and `longest_row`, the tokens of the longest; the network by its `parameters`; and `versions` of
    packages, as in an `Entry`.
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
    """What `lightweight plan` could not forecast, and for what `reason`."""

    model: Name
    method: Name
    target: Name
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stored run: its file, when it ended (ISO 8601, UTC), its entries, what was forecast without training, and what
    a plan could not forecast.
    `commit` is the code's, `is_dirty` whether it had changes that were not committed; None where nothing says so.
    `command` are the arguments by which pytest trains the same again, in its root; none where nothing says so."""

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
    """What a token takes in each of `entries`, in seconds, so that they compare: of the tokens really seen where all of
    them know these, else, as in older records, the median step over a full step's tokens, padding included. None for
    one that has no steps."""
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
    """The mean training loss over the first and over the last epoch, in nats a token; over the first and the last tenth
    of the steps where there are not two epochs. One step's loss is that of its few pairs. None where a loss is no
    number, or there is none."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not known or len(known) < len(losses):
        return None
    count = steps_per_epoch if len(known) >= 2 * steps_per_epoch else max(1, len(known) // 10)
    return statistics.fmean(known[:count]), statistics.fmean(known[-count:])
