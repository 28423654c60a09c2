"""Which method fits which card, and how large a batch: forecasts as the answer to a person who has neither yet."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

from tabulate import tabulate

from lightweight import forecast
from lightweight.corpus import Corpus
from lightweight.forecast import Forecast, ForecastError
from lightweight.methods import Method
from lightweight.models import Model
from lightweight.record import Entry, seconds_per_token
from lightweight.targets import CONTEXT_BYTES, NATIVE, Capability, GiB, MiB, Target
from lightweight.trial import MAX_LENGTH, Trial

Row = dict[str, Any]
"""One model x method x target as JSON: `model`, `method`, `target`, `forecast_allocated_bytes`,
`forecast_reserved_bytes`, `budget_bytes`, `phase` and `verdict` as in Forecast, each of one GPU; `gpus`, how many share
the trial; `batch_size` in sequences a forward pass of one GPU, `max_length` in tokens a row; `bytes_by_cause`;
`chosen`, whether this is the method to take on this target; `reason` where something else than memory decides. Where
it was asked for: `max_batch`, the largest batch that fits, and `fewest_gpus`, the least number of GPUs on which this
one does, None where it does not even with one for every sequence of a step."""

EXTRAS = {"max_batch": "largest batch", "fewest_gpus": "fewest GPUs"}
"""What a row has only where it was asked for, and what its column is called."""

LARGEST_BATCH = 2**14
"""Where the search for the largest batch ends."""


def plan(
    models: Sequence[Model],
    methods: Sequence[Method],
    targets: Sequence[Target],
    *,
    batch_size: int | None = None,
    max_length: int = MAX_LENGTH,
    max_batch: bool = False,
    gpus: int = 1,
    fewest: bool = False,
    measured: Sequence[Entry] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for every model x method x target. Raises ForecastError and ModelError.

    `batch_size` is in sequences a forward pass on one GPU, a method's own where it is None. `gpus` share a trial; with
    `fewest` the least number of them that suffices is looked for as well. `measured` are entries of records, whose step
    times order the methods where they have all of them.
    """

    def trial_of(model: Model, method: Method, sequences: int, count: int) -> Trial:
        return Trial(
            model=model,
            method=method.with_batch(sequences),
            target=NATIVE,
            corpus=Corpus(train=(), heldout=(), digest=""),
            max_length=max_length,
            world_size=count,
        )

    @cache
    def traced(model: int, method: int, sequences: int, count: int, capability: Capability) -> forecast.Trace:
        trial = trial_of(models[model], methods[method], sequences, count)
        shared = f" on {count} GPUs" if count > 1 else ""
        progress(f"{trial.name}: tracing a batch of {sequences} x {max_length}{shared}")
        return forecast.trace(trial, capability)

    for model, method in product(models, methods):  # at once, and not after minutes of tracing others
        try:
            trial_of(model, method, batch_size or method.sequences_per_pass, gpus)
        except ValueError as error:
            raise ForecastError(str(error)) from error

    rows = []
    for i, model in enumerate(models):
        for target in targets:
            of_target = []
            for j, method in enumerate(methods):

                def found(sequences: int, count: int, i: int = i, j: int = j, target: Target = target) -> Forecast:
                    return forecast.within(traced(i, j, sequences, count, target.capability), target.budget_bytes)

                sequences = batch_size or method.sequences_per_pass
                trial = trial_of(model, method, sequences, gpus)
                row = _row(trial, target, found(sequences, trial.world_size))
                of_target.append(row)
                if max_batch:
                    least = -(-trial.world_size * sequences // trial.method.sequences_per_step)  # a sequence for each
                    fits = partial(_at_least, found, least, trial.world_size)
                    row["max_batch"] = 0 if row["reason"] else largest_batch(fits, sequences)
                if fewest:
                    fits = partial(found, sequences)
                    row["fewest_gpus"] = None if row["reason"] else fewest_gpus(fits, trial.method.sequences_per_step)
            _choose(of_target, dict(zip((m.name for m in methods), methods, strict=True)), measured)
            rows += of_target
    return rows


def largest_batch(fits: Callable[[int], Forecast], first: int) -> int:
    """The largest batch whose verdict is `fits`, 0 if none is.

    What a step holds grows with the batch almost in a straight line, so two forecasts point at the next to try; every
    other try halves what is left, in case the line is none. The answer and its successor are always forecast
    themselves.
    """
    low, high, guess = 0, LARGEST_BATCH + 1, first
    held: dict[int, int] = {}
    while high - low > 1:
        found = fits(guess)
        held[guess] = found.allocated_bytes
        low, high = (guess, high) if found.verdict == "fits" else (low, guess)
        if len(held) == 1:
            guess = 2 * low or high // 2
        elif len(held) % 2 or high > LARGEST_BATCH:
            near, far = sorted(held, key=lambda batch: abs(batch - (low or high)))[:2]
            slope = (held[near] - held[far]) / (near - far)
            room = (found.budget_bytes or 0) * (1 - forecast.MARGIN) - held[near]
            guess = int(near + room / max(slope, 1.0))
        else:
            guess = (low + high) // 2
        guess = max(low + 1, min(guess, high - 1))
    return low


def fewest_gpus(fits: Callable[[int], Forecast], sequences: int) -> int | None:
    """The least number of GPUs whose verdict is `fits`, up to one for each of the `sequences` of a step; None if none
    is. More GPUs hold no more each, so that every other forecast halves what is left."""
    counts = range(1, sequences + 1)
    index = bisect.bisect_left(counts, True, key=lambda count: fits(count).verdict == "fits")
    return counts[index] if index < len(counts) else None


def _at_least(found: Callable[[int, int], Forecast], least: int, count: int, sequences: int) -> Forecast:
    """What is found for `sequences`, or for the `least` that there can be."""
    return found(max(least, sequences), count)


def _row(trial: Trial, target: Target, found: Forecast) -> Row:
    reason = None
    if trial.method.uses_bf16 and not target.bf16:
        reason = f"computes in bf16, which {target.name} does not have"
    return {
        "model": trial.model.name,
        "method": trial.method.name,
        "target": target.name,
        "gpus": trial.world_size,
        "batch_size": trial.method.on_rank(trial.world_size).sequences_per_pass,
        "max_length": trial.max_length,
        "forecast_allocated_bytes": found.allocated_bytes,
        "forecast_reserved_bytes": found.reserved_bytes,
        "budget_bytes": found.budget_bytes,
        "context_bytes": CONTEXT_BYTES,
        "bytes_by_cause": found.by_cause,
        "parameters": found.parameters,
        "trainable_parameters": found.trainable_parameters,
        "phase": found.phase,
        "verdict": "does_not_fit" if reason else found.verdict,
        "reason": reason,
        "chosen": False,
    }


def _choose(rows: list[Row], methods: dict[str, Method], measured: Sequence[Entry]) -> None:
    """Mark the fastest of the methods that fit: by measured step times where every one of them has one, else by what
    is expected."""
    fitting = [row for row in rows if row["verdict"] == "fits"]
    completed = [
        entry
        for entry in measured
        if fitting and entry["model"] == fitting[0]["model"] and entry["outcome"] == "completed"
    ]
    found = zip(completed, seconds_per_token(*completed), strict=True)
    seconds = {entry["method"]: per_token for entry, per_token in found if per_token is not None}
    if all(row["method"] in seconds for row in fitting):
        fitting.sort(key=lambda row: seconds[row["method"]])
    else:
        fitting.sort(key=lambda row: methods[row["method"]].expected_cost)
    for row in fitting[:1]:
        row["chosen"] = True


def each_target_has_a_method(rows: Sequence[Row]) -> bool:
    """Whether for every model and target some method fits."""
    cells = {(row["model"], row["target"]) for row in rows}
    return cells == {(row["model"], row["target"]) for row in rows if row["chosen"]}


def table(rows: Sequence[Row]) -> str:
    """What a person reads: the peak of each method by cause, and each target's verdicts and choice."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        parts += [_causes(of_model), _verdicts(of_model)]
    return "\n\n".join(parts)


def _causes(rows: Sequence[Row]) -> str:
    """The bytes of every method, once for all targets with the same kernels."""
    causes = [cause for cause in forecast.CAUSES if cause != "gathered" or rows[0]["gpus"] > 1]
    peaks: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        sizes = [row["forecast_allocated_bytes"], *(row["bytes_by_cause"][cause] for cause in causes)]
        peaks.setdefault((row["method"], *sizes), []).append(row["target"])
    lines = [[method, *map(_size, sizes), ", ".join(targets)] for (method, *sizes), targets in peaks.items()]
    first = rows[0]
    title = (
        f"{first['model']}, {first['parameters'] / 1e6:,.0f} M parameters, rows of {first['max_length']} tokens: "
        f"allocated at the peak{' on each of ' + str(first['gpus']) + ' GPUs' if first['gpus'] > 1 else ''}"
    )
    headers = ["method", "peak", *causes, "with the kernels of"]
    aligned = ("left", *["right"] * (len(headers) - 2), "left")
    return f"{title}\n\n{tabulate(lines, headers, tablefmt='simple', disable_numparse=True, colalign=aligned)}"


def _verdicts(rows: Sequence[Row]) -> str:
    headers = ["target", "method", "batch", "verdict", "reserved", "budget", "margin", "peak in"]
    asked = {key: title for key, title in EXTRAS.items() if key in rows[0]}
    lines = []
    for row in rows:
        margin = 1 - row["forecast_reserved_bytes"] / row["budget_bytes"]
        where = f"out of memory in {row['phase']}" if row["verdict"] == "does_not_fit" else row["phase"]
        line = [
            row["target"],
            row["method"],
            str(row["batch_size"]),
            row["verdict"].replace("_", " ") + (" <- take this" if row["chosen"] else ""),
            _size(row["forecast_reserved_bytes"]),
            _size(row["budget_bytes"]),
            f"{margin:+.1%}",
            row["reason"] or where,
        ]
        lines.append([*line, *("none" if row[key] is None else str(row[key]) for key in asked)])
    aligned = ["left", "left", "right", "left", "right", "right", "right", "left", *["right"] * len(asked)]
    table = tabulate(lines, [*headers, *asked.values()], tablefmt="simple", disable_numparse=True, colalign=aligned)
    notes = [
        f"The budget is the card's memory less {CONTEXT_BYTES // MiB} MiB for a CUDA context; the margin is what of it "
        "the allocator would not reserve."
    ]
    if "fewest_gpus" in asked:
        notes.append(
            "Batch and bytes are those of one GPU; several share the sequences of a step and, by FSDP2, the network. "
            "What NCCL takes for itself is not counted. The fewest GPUs are sought up to one for every sequence of a "
            "step."
        )
    return "\n\n".join([table, *notes])


def _size(count: int) -> str:
    if count >= GiB:
        return f"{count / GiB:.2f} GiB"
    return f"{count / MiB:.0f} MiB" if count else "-"
