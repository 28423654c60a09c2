"""Which method is taken of those that fit? The fastest: as measured, else as forecast, else as expected."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lightweight.forecast.plan_row import PlanRow
from lightweight.record import Entry, method_digest, seconds_per_token
from lightweight.targets import is_card


def with_choice(rows: Sequence[PlanRow], measured: Sequence[Entry]) -> list[PlanRow]:
    """The rows of one model and target, with the fastest of the methods that fit chosen: by measured step times where
    one device has those of all of them, else by what is expected."""
    fitting = [row for row in rows if row.verdict == "fits" and not (row.job and row.job.too_much)]
    if not fitting:
        return list(rows)
    device, seconds = _measured(fitting, measured)
    if device is not None:
        fastest = min(fitting, key=lambda row: seconds[row.method.name])
    elif steps := [row.step for row in fitting if row.step is not None and row.step.is_calibrated]:
        fastest = min(fitting, key=_seconds_per_token if len(steps) == len(fitting) else _expected)
    else:
        fastest = min(fitting, key=_expected)
    return [replace(row, chosen=row is fastest, measured_on=device if row.verdict == "fits" else None) for row in rows]


def _expected(row: PlanRow) -> tuple[float, ...]:
    return (*row.method.expected_cost, row.passes)


def _seconds_per_token(row: PlanRow) -> float:
    assert row.step is not None
    return 1 / row.step.tokens_per_second


def _measured(fitting: Sequence[PlanRow], measured: Sequence[Entry]) -> tuple[str | None, dict[str, float]]:
    """The device that all of `fitting` were measured on, and the median seconds a token of each there, by method: the
    target's own card before others, and of others the one measured last."""
    of_devices: dict[str, list[Entry]] = {}
    for entry in measured:
        if entry.outcome == "completed" and any(_is_of(entry, row) for row in fitting):
            of_devices[entry.device] = [*of_devices.pop(entry.device, []), entry]  # the newest comes last
    seconds = {device: _median_seconds(entries) for device, entries in of_devices.items()}
    whole = [device for device, of_device in seconds.items() if all(row.method.name in of_device for row in fitting)]
    if not whole:
        return None, {}
    card = fitting[0].target.card
    device = max(whole, key=lambda name: (card is not None and is_card(card, name), whole.index(name)))
    return device, seconds[device]


def _median_seconds(entries: Sequence[Entry]) -> dict[str, float]:
    """The median seconds a token of each method that was timed in `entries`."""
    by_method: dict[str, list[float]] = defaultdict(list)
    for entry, per_token in zip(entries, seconds_per_token(*entries), strict=True):
        if per_token is not None:
            by_method[entry.method].append(per_token)
    return {method: statistics.median(values) for method, values in by_method.items()}


def _is_of(entry: Entry, row: PlanRow) -> bool:
    """Whether a stored trial is what `row` is about: its method, as its target computes it, on whatever GPU and under
    whatever budget."""
    arguments = entry.training_arguments or {}
    rows, passes = arguments.get("per_device_train_batch_size", 8), arguments.get("gradient_accumulation_steps", 1)
    computes = row.method.on_gpu(bf16=row.target.bf16)
    is_of_method = entry.method == row.method.name and entry.method_digest in (None, method_digest(row.method))
    is_computed_so = (entry.weights_dtype, entry.precision) == (computes.weights_dtype, computes.precision)
    shape = entry.world_size, entry.max_length, rows, passes
    is_of_shape = shape == (row.question.gpus, row.question.max_length, row.batch_size, row.passes)
    on_gpu = entry.device_bytes is not None
    return entry.model == row.model and is_of_method and is_computed_so and is_of_shape and on_gpu


def each_target_has_a_method(rows: Sequence[PlanRow]) -> bool:
    """Whether for every model and target some method fits."""
    return {(row.model, row.target) for row in rows} == {(row.model, row.target) for row in rows if row.chosen}
