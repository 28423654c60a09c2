"""How is a trial put into words? Its names, how it ended, its numbers with units and marks: the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightweight.record import INTERRUPTED, Entry, Run, baseline_of, one_line
from lightweight.report.select import method_of, several
from lightweight.report.speed import faster
from lightweight.report.studies import PAIRED, Study
from lightweight.settings import MAX_LENGTH, changes
from lightweight.targets import size
from lightweight.verdict.seeds import Estimate

RANDOM, EMULATED, HOST = "[r]", "[e]", "[h]"
"""Marks in the table, each explained below it where it occurs."""

UNKNOWN_RATE = "not known"


def method_among(entry: Entry, group: Sequence[Entry]) -> str:
    """The method, with what tells it apart where the group has several of that name."""
    namesakes = [other for other in group if other.method == entry.method and other.method_digest]
    if len({other.method_digest for other in namesakes}) < 2 or not entry.method_digest:
        return entry.method
    apart = apart_from(entry, namesakes)
    return f"{entry.method} {apart}" if apart.startswith("#") else f"{entry.method} ({apart})"


def apart_from(entry: Entry, namesakes: Sequence[Entry]) -> str:
    """What tells a method from others of its name: its learning rate, else the one that its TrainingArguments say, else
    the beginning of its digest."""

    def said(of: Entry) -> object:
        return (of.training_arguments or {}).get("learning_rate", "not set")

    digests = {other.method_digest for other in namesakes}
    if len(digests) == len({learning_rate(other) for other in namesakes}):
        return f"rate {learning_rate(entry)}"
    if len(digests) == len({said(other) for other in namesakes}):
        return f"learning_rate {said(entry)}"
    return f"#{(entry.method_digest or '')[:6]}"


def name_among(entry: Entry, group: Sequence[Entry]) -> str:
    """The method as `method_among` has it, with the seed where the group has several of it."""
    seeds = {other.seed for other in group if method_of(other) == method_of(entry)}
    return method_among(entry, group) + (f", seed {entry.seed}" if len(seeds) > 1 else "")


def timed_on(entry: Entry) -> str:
    """The card that ran the trial and gave it its times, and the one whose memory it was given where that is another:
    `NVIDIA H200 as t4`."""
    return several(entry.world_size, entry.device) + (f" as {entry.target}" if entry.emulated else "")


def marked_card(entry: Entry) -> str:
    """The card as `timed_on` has it, marked where another one is emulated."""
    return f"{timed_on(entry)} {EMULATED}" if entry.emulated else timed_on(entry)


def run_label(run: Run) -> str:
    """A run's name and when it ended, to the minute."""
    return f"{run.path.stem} {run.ended[:16].replace('T', ' ')}".strip()


def headline(entry: Entry) -> str:
    """One cell in a few words."""
    ended = outcome(entry)
    if entry.outcome == "completed":
        ended = ", ".join([ended, *_known(step(entry), memory(entry), loss(entry))])
    return f"{entry.model} x {entry.method} on {timed_on(entry)}: {ended}"


def summary(entry: Entry, run: Run) -> str:
    """A trial of one run in a few words."""
    if entry.outcome != "completed":
        return outcome(entry)
    words = _known(step(entry), speedup(entry, baseline_of(entry, run.entries)), memory(entry))
    if entry.heldout_loss_after is not None:
        words.append(f"loss {entry.heldout_loss_after:.3f}")
    return ", ".join(words)


def _known(*words: str) -> list[str]:
    return [word for word in words if word != "-"]


def ending(of: str) -> str:
    """An outcome, or a verdict of a forecast, in words."""
    return of.replace("_", " ")


def end_of(entry: Entry) -> str:
    """How the trial ended, in words: one that was interrupted has not crashed."""
    return "interrupted" if (entry.reason or "").startswith(INTERRUPTED) else ending(entry.outcome)


def outcome(entry: Entry) -> str:
    """How and where the trial ended, in words."""
    return f"{end_of(entry)} in {entry.phase}" if entry.phase else end_of(entry)


SETS_RATES = {"optimizer", "trainer", "callbacks"}
"""The author's code in a method that may train at other rates than its TrainingArguments say."""

USUAL_RATE = 5e-5
"""The Trainer's, where a method's TrainingArguments have none."""


def learning_rate(entry: Entry) -> str:
    """The highest learning rate of a trial, of several groups of weights each one's. Where it was not measured, as in
    older records, it is what TrainingArguments say, unless code of the method's own may have set another."""
    rates = sorted({rate for rate in entry.learning_rates or () if rate is not None})
    said = entry.training_arguments
    if not rates and said is not None and not SETS_RATES & (entry.own_code or {}).keys():
        rate = said.get("learning_rate", USUAL_RATE)
        rates = [float(rate)] if isinstance(rate, int | float) else []
    return " and ".join(f"{rate:.4g}" for rate in rates) or UNKNOWN_RATE


def duration(seconds: float | None) -> str:
    """Seconds, or minutes where they are many."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.2f} min"


def total(entry: Entry) -> str:
    """The whole job of a trial that completed."""
    return duration(entry.cold_seconds) if entry.outcome == "completed" else "-"


def step(entry: Entry) -> str:
    """The steady step of a trial that completed."""
    return milliseconds(entry.steady_step_seconds if entry.outcome == "completed" else None)


def share_of_peak(entry: Entry) -> str:
    """The share of its card's peak that a trial reached."""
    share = entry.share_of_peak
    return "-" if share is None else f"{share:.1%}"


def percent_of_peak(entry: Entry) -> float | None:
    """The share of its card's peak that a trial reached, in percent."""
    return None if entry.share_of_peak is None else entry.share_of_peak * 100


def step_ms(entry: Entry) -> float | None:
    """The steady step in milliseconds."""
    return None if entry.steady_step_seconds is None else entry.steady_step_seconds * 1000


def estimate(of: Estimate | None, form: str, unit: str = "") -> str:
    """A mean over seeds with its interval, each number as `form` writes it."""
    return "-" if of is None else of.text(form) + unit


def seeds(study: Study) -> str:
    """How many seeds there are, and how many of them did not complete."""
    failed = len(study.entries) - len(study.completed)
    return f"{len(study.entries)}" + f", {failed} did not complete" * bool(failed)


def largest(study: Study) -> str:
    """The largest peak of a cell's seeds that completed."""
    return memory(max(study.completed or [study.first], key=lambda entry: entry.peak_bytes or 0))


def milliseconds(seconds: float | None) -> str:
    """Seconds of a step."""
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def times(ratio: float | None) -> str:
    """How many times as fast."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def speedup(entry: Entry, baseline: Entry | None) -> str:
    """The ratio in words, with its interval where it has one, or why there is none."""
    if gain := faster(entry, baseline):
        ends = f" [{gain.interval[0]:.2f}, {gain.interval[1]:.2f}]" if gain.interval else ""
        return f"{times(gain.ratio)}{ends}"
    return _without_baseline(entry, baseline)


def _without_baseline(entry: Entry, baseline: Entry | None) -> str:
    if entry.outcome == "completed" and baseline is not None and baseline.outcome != "completed":
        return f"baseline {end_of(baseline)}"
    return "-"


def memory(entry: Entry) -> str:
    """The peak allocated on the GPU, else the host's, which is marked."""
    if entry.peak_bytes is None:
        return "-"
    return size(entry.peak_bytes) if entry.gpu_peak_bytes else f"{size(entry.peak_bytes)} {HOST}"


def memory_ratio(entry: Entry, baseline: Entry | None) -> str:
    """The peak as a share of the baseline's, or why there is none."""
    share = entry.memory_share(baseline)
    return _without_baseline(entry, baseline) if share is None else f"{share:.2f}"


def forecast(entry: Entry) -> str:
    """The forecast peak, and how far it is from the measured one where that is a whole training's."""
    if entry.forecast_allocated_bytes is None:
        return "-"
    error = forecast_error(entry)
    return size(entry.forecast_allocated_bytes) + ("" if error is None else f" ({error:+.1%})")


def forecast_error(entry: Entry) -> float | None:
    """How far the forecast peak is from the measured one, as a share of it; None where that is not a whole
    training's."""
    if entry.outcome != "completed" or not entry.peak_allocated_bytes or entry.forecast_allocated_bytes is None:
        return None
    return entry.forecast_allocated_bytes / entry.peak_allocated_bytes - 1


def loss(entry: Entry) -> str:
    """Held-out loss before and after training in nats a token, marked where weights are random."""
    before, after = entry.heldout_loss_before, entry.heldout_loss_after
    if before is None or after is None:
        return "-"
    return before_and_after((before, after)) + (f" {RANDOM}" if entry.weights == "random" else "")


def before_and_after(losses: tuple[float, float] | None) -> str:
    """Two losses, in nats a token."""
    return "-" if losses is None else f"{losses[0]:.3f} -> {losses[1]:.3f}"


def trained_otherwise(entries: Sequence[Entry]) -> list[str]:
    """How what the methods of `entries` trained on, or at which rates, differs from what all others did."""
    told = ((f"{entry.model} x {entry.method}", entry.data_note) for entry in entries if entry.data_note)
    return [one_line(f"Not trained like the others: {whose}: {note}") for whose, note in dict.fromkeys(told)]


CONDITIONS: Mapping[str, Callable[[Entry], str]] = {
    "seed": lambda entry: f"seed {entry.seed}",
    "planned_steps": lambda entry: f"{entry.planned_steps or '?'} steps",
    "tokens_per_step": lambda entry: f"{entry.tokens_per_step or '?'} tokens a step",
    "max_length": lambda entry: f"rows of {entry.max_length or '?'} tokens",
    "elsewhere_digest": lambda entry: f"text from elsewhere {(entry.elsewhere_digest or 'none')[:6]}",
    "loss_on": lambda entry: f"--loss-on {entry.loss_on}",
    "long": lambda entry: f"--long {entry.long}",
    "padding": lambda entry: f"--padding {entry.padding}",
}
"""What a trial must share with the baseline that it is held against, beside model, card and corpus."""


def unpaired(rows: Sequence[Study], entries: Sequence[Entry], numbers: Sequence[str]) -> list[str]:
    """Why cells of `entries` have none of those `numbers` that hold each seed against the baseline of the same seed."""
    told = [
        f"No {' and '.join(numbers)} of {entry.model} x {entry.method}: {why}"
        for study in rows
        if not study.is_baseline
        for entry, pair in zip(study.entries, study.baselines, strict=True)
        if entry.outcome == "completed" and (why := _why_unpaired(entry, pair, entries))
    ]
    return list(dict.fromkeys(map(one_line, told))) if numbers else []


def _why_unpaired(entry: Entry, pair: Entry | None, entries: Sequence[Entry]) -> str | None:
    if pair is not None:
        return None if pair.outcome == "completed" else f"its baseline ended as {outcome(pair)}"
    nearest = baseline_of(entry, entries)
    if nearest is None:
        return "no baseline of its model is here, on its card and corpus"
    differing = [key for key in PAIRED.differing(entry, nearest) if key in CONDITIONS]
    own, of_baseline = (", ".join(CONDITIONS[key](of) for key in differing) for of in (entry, nearest))
    return f"it has {own}, and its baseline {of_baseline}"


def notes(entries: Sequence[Entry], runs: Sequence[Run] = ()) -> list[str]:
    """What a reader must know beside the table: on what it was measured, and what random weights cannot say."""
    said = changes((entry.method, entry.changed) for entry in entries)
    lines = [] if said is None else [said]
    lines += [f"{each}." for each in trained_otherwise(entries)]
    if scales := dict.fromkeys(entry.method for entry in entries if entry.has_own_loss):
        lines.append(one_line(f"Training losses on a scale of their own, unlike held-out ones: {', '.join(scales)}."))
    lengths = sorted({entry.max_length for entry in entries if entry.max_length})
    if lengths not in ([], [MAX_LENGTH]):
        lines.append(f"Rows of at most {' and '.join(map(str, lengths))} tokens.")
    forms = {(entry.loss_on, entry.long) for entry in entries} - {("all", "cut")}
    lines += [f"Conversations: --loss-on {loss_on} --long {long}." for loss_on, long in sorted(forms)]
    unclean = [run for run in runs if run.is_dirty and run.entries]
    if unclean:
        names = ", ".join(f"{run.name} (after commit {(run.commit or 'unknown')[:7]})" for run in unclean)
        lines.append(f"Measured with uncommitted changes to the code: {names}.")
    for device in dict.fromkeys(entry.device for entry in entries):
        of_device = [entry for entry in entries if entry.device == device]
        installed = of_device[0].versions or {}
        packages = ", ".join(
            f"{name} {installed.get(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")
        )
        lines.append(f"Measured on {device}; {packages}.")
        if any(entry.emulated for entry in of_device):
            lines.append(
                f"{EMULATED} Emulated: times are those of {device}; "
                "torch's allocator is capped at the bytes the target has."
            )
        if all(entry.peak_allocated_bytes is None for entry in of_device):
            lines.append(
                f"{HOST} No GPU: the whole process's memory on the host, libraries included. "
                "The forecast is what torch would allocate on a GPU."
            )
    if any(entry.weights == "random" for entry in entries):
        lines.append(
            f"{RANDOM} Random weights: speed and memory are as with trained ones; the loss says nothing about quality."
        )
    return lines
