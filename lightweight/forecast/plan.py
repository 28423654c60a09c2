"""Which method fits which card, and how large a batch: forecasts as the answer to a person who has neither yet."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tabulate import tabulate
from transformers import PretrainedConfig

from lightweight import models
from lightweight.corpus import Corpus
from lightweight.forecast import replay, tracer
from lightweight.forecast.replay import Cause, Forecast
from lightweight.forecast.tracer import ForecastError
from lightweight.methods import Method
from lightweight.models import Model, ModelError
from lightweight.record import Entry, method_digest, seconds_per_token
from lightweight.targets import CONTEXT_BYTES, NATIVE, Capability, MiB, Target, size
from lightweight.trial import MAX_LENGTH, Trial

PlanRow = dict[str, Any]
"""One model x method x target as JSON: `model`, `method`, `target`, `forecast_allocated_bytes`,
`forecast_reserved_bytes`, `budget_bytes`, `phase` and `verdict` as in Forecast, each of one GPU; `gpus`, how many share
the trial; `passes` of `batch_size` sequences are an optimizer step of one GPU, and `accumulation` is the
`gradient_accumulation_steps` that make it so; `max_length` in tokens a row; `bytes_by_cause` and `paged_bytes`;
`chosen`, whether this is the method to take on this target, and `measured_on` the device whose step times say so, None
where it is expected; `reason` where something else than memory decides. Where that is why nothing can be forecast, the
verdict is `cannot_be_forecast`, and what would have been is None. Where it was asked for: `max_batch`, the largest
batch that fits, and `fewest_gpus`, the least number of GPUs on which this one does, None where it does not even with
one for every sequence of a step."""

EXTRAS = {"max_batch": "largest batch", "fewest_gpus": "fewest GPUs"}
"""What a row has only where it was asked for, and what its column is called."""

LARGEST_BATCH = 2**14
"""Where the search for the largest batch ends."""

LASTING: tuple[Cause, ...] = ("weights", "quantization state", "optimizer")
"""What every pass of a step holds, however few its sequences."""


@dataclass(eq=False, kw_only=True)
class _Cell:
    """One model x method, and its traces, each of which is made once. `config` is the model's, or why it has none;
    `is_given` says that the sequences of a pass were asked for, and are not to be changed."""

    model: Model
    config: PretrainedConfig | ModelError
    method: Method
    max_length: int
    is_given: bool
    progress: Callable[[str], None]
    _traces: dict[tuple[int, int, int, Capability], replay.Trace] = field(default_factory=dict)

    def trial(self, method: Method, gpus: int) -> Trial:
        """Raises ValueError where a step has fewer sequences than `gpus`."""
        return Trial(
            model=self.model,
            method=method,
            target=NATIVE,
            corpus=Corpus(train=(), heldout=(), digest=""),
            max_length=self.max_length,
            world_size=gpus,
        )

    def refusal(self, gpus: int) -> str | None:
        """Why this cannot be forecast, as far as it is known before minutes of tracing."""
        if isinstance(self.config, ModelError):
            return str(self.config)
        try:
            trial = self.trial(self.method, gpus)
        except ValueError as error:
            return str(error)
        return tracer.refusal(trial, self.config)

    def forecast(self, method: Method, gpus: int, target: Target) -> Forecast:
        """What `method`, this one with other passes, takes of each of `gpus`. Raises ForecastError."""
        key = method.sequences_per_pass, method.passes_per_step, gpus, target.capability
        if key not in self._traces:
            trial = self.trial(method, gpus)
            rows = trial.method.on_rank(gpus).sequences_per_pass
            shared = f" on {gpus} GPUs" if gpus > 1 else ""
            self.progress(f"{trial.name}: tracing a batch of {rows} x {self.max_length}{shared}")
            self._traces[key] = tracer.trace(trial, target.capability)
        return replay.within(self._traces[key], target.budget_bytes)

    def advised(self, gpus: int, target: Target) -> tuple[Method, Forecast]:
        """The method with the most sequences a pass that fit, of the same optimizer step, and its forecast: its own
        where they fit, or where nothing does. Raises ForecastError."""
        own = self.forecast(self.method, gpus, target)
        lasting = sum(own.by_cause[cause] for cause in LASTING)
        if own.verdict == "fits" or self.is_given or lasting > (target.budget_bytes or lasting):
            return self.method, own
        smaller = smaller_passes(self.method, gpus)
        index = bisect.bisect_left(
            smaller, True, key=lambda method: self.forecast(method, gpus, target).verdict == "fits"
        )
        if index == len(smaller):
            return self.method, own
        return smaller[index], self.forecast(smaller[index], gpus, target)


def plan(  # noqa: PLR0913  the options of one command
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
    failed: Callable[[ForecastError], None] = lambda error: None,
) -> list[PlanRow]:
    """A row for every model x method x target. Raises ModelError where no model has a configuration, and ForecastError
    where nothing can be forecast for another reason and that is known before anything is traced.

    `batch_size` is in sequences a forward pass on one GPU. Where it is None, it is a method's own, or the most that fit
    in more passes of the same optimizer step. `gpus` share a trial; with `fewest` the least number of them that
    suffices is looked for as well. `measured` are entries of records, whose step times order the methods where they
    have all of them. `failed` is told of what makes a method's row `cannot_be_forecast` while it is traced.
    """
    configs = [_configuration(model) for model in models]
    cells = {
        (i, j): _Cell(
            model=model,
            config=configs[i],
            method=method if batch_size is None else method.with_batch(batch_size),
            max_length=max_length,
            is_given=batch_size is not None,
            progress=progress,
        )
        for i, model in enumerate(models)
        for j, method in enumerate(methods)
    }
    reasons = {key: reason for key, cell in cells.items() if (reason := cell.refusal(gpus)) is not None}
    if cells and len(reasons) == len(cells):
        (first, reason), *_ = reasons.items()
        if isinstance(configs[0], ModelError):
            raise configs[0]
        raise ForecastError(f"{cells[first].model.name} x {cells[first].method.name}: {reason}")

    rows = []
    for i, _ in enumerate(models):
        for target in targets:
            of_target: list[tuple[PlanRow, Method]] = []
            for j, _ in enumerate(methods):
                cell, row = cells[i, j], None
                try:
                    if (i, j) not in reasons:
                        row, method = _row(cell, target, gpus, max_batch=max_batch, fewest=fewest)
                except ForecastError as error:  # on one card as on any other
                    failed(error)
                    reasons[i, j] = str(error).removeprefix(f"{cell.model.name} x {cell.method.name}: ")
                if row is None:
                    row, method = _row_without(cell, target, gpus, reasons[i, j]), cell.method
                    row |= {key: None for key, asked in zip(EXTRAS, (max_batch, fewest), strict=True) if asked}
                of_target.append((row, method))
            _choose(of_target, target, measured)
            rows += [row for row, _ in of_target]
    return rows


def _configuration(model: Model) -> PretrainedConfig | ModelError:
    """The configuration of `model`, or why there is none: that is no matter of the other models."""
    try:
        return models.configuration(model)
    except ModelError as error:
        return error


def smaller_passes(method: Method, gpus: int) -> list[Method]:
    """The method with fewer and fewer sequences in a pass on each of `gpus`, and as many in a step as before."""
    methods, rows = [], method.on_rank(gpus).sequences_per_pass
    for passes in range(method.passes_per_step + 1, method.sequences_per_step + 1):
        if method.sequences_per_step % passes == 0:
            smaller = method.with_passes(passes)
            if (fewer := smaller.on_rank(gpus).sequences_per_pass) < rows:
                methods.append(smaller)
                rows = fewer
    return methods


def largest_batch(fits: Callable[[int], Forecast], first: int) -> int:
    """The largest batch whose verdict is `fits`, 0 if none is.

    What a step holds grows with the batch almost in a straight line, so two forecasts point at the next to try; every
    other try halves what is left, in case the line is none. The answer and its successor are always forecast
    themselves.
    """
    low, high, guess = 0, LARGEST_BATCH + 1, first
    held: dict[int, int] = {}
    while high - low > 1:
        forecast = fits(guess)
        held[guess] = forecast.allocated_bytes
        low, high = (guess, high) if forecast.verdict == "fits" else (low, guess)
        if len(held) == 1:
            guess = 2 * low or high // 2
        elif len(held) % 2 or high > LARGEST_BATCH:
            near, far = sorted(held, key=lambda batch: abs(batch - (low or high)))[:2]
            slope = (held[near] - held[far]) / (near - far)
            room = (forecast.budget_bytes or 0) * (1 - replay.MARGIN) - held[near]
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


def _row(cell: _Cell, target: Target, gpus: int, *, max_batch: bool, fewest: bool) -> tuple[PlanRow, Method]:
    """A row, and the method with the passes it is about. Raises ForecastError."""
    reason = None
    if cell.method.uses_bf16 and not target.bf16:
        reason = f"computes in bf16, which {target.name} does not have"
        method, forecast = cell.method, cell.forecast(cell.method, gpus, target)
    else:
        method, forecast = cell.advised(gpus, target)
    row = _shape(cell, method, target, gpus) | {
        "forecast_allocated_bytes": forecast.allocated_bytes,
        "forecast_reserved_bytes": forecast.reserved_bytes,
        "bytes_by_cause": forecast.by_cause,
        "paged_bytes": forecast.paged_bytes,
        "parameters": forecast.parameters,
        "trainable_parameters": forecast.trainable_parameters,
        "phase": forecast.phase,
        "verdict": "does_not_fit" if reason else forecast.verdict,
        "reason": reason,
    }
    if max_batch:
        row["max_batch"] = 0 if reason else largest_batch(partial(_with_batch, cell, gpus, target), row["batch_size"])
    if fewest:
        row["fewest_gpus"] = None if reason else _fewest(cell, target, gpus, forecast)
    return row, method


def _row_without(cell: _Cell, target: Target, gpus: int, reason: str) -> PlanRow:
    """The row of what cannot be forecast."""
    unknown = ("forecast_allocated_bytes", "forecast_reserved_bytes", "paged_bytes", "parameters")
    return {
        **_shape(cell, cell.method, target, gpus),
        **dict.fromkeys((*unknown, "trainable_parameters", "phase")),
        "bytes_by_cause": {},
        "verdict": "cannot_be_forecast",
        "reason": reason,
    }


def _shape(cell: _Cell, method: Method, target: Target, gpus: int) -> PlanRow:
    on_rank = method.on_rank(gpus)
    return {
        "model": cell.model.name,
        "method": method.name,
        "target": target.name,
        "gpus": gpus,
        "batch_size": on_rank.sequences_per_pass,
        "passes": on_rank.passes_per_step,
        "accumulation": method.passes_per_step,
        "max_length": cell.max_length,
        "budget_bytes": target.budget_bytes,
        "context_bytes": CONTEXT_BYTES,
        "measured_on": None,
        "chosen": False,
    }


def _with_batch(cell: _Cell, gpus: int, target: Target, sequences: int) -> Forecast:
    """The forecast of a pass of `sequences`, or of the least that give each of `gpus` one in a step."""
    least = -(-gpus // cell.method.passes_per_step)
    return cell.forecast(cell.method.with_batch(max(least, sequences)), gpus, target)


def _fewest(cell: _Cell, target: Target, gpus: int, forecast: Forecast) -> int | None:
    """The fewest GPUs that suffice; as many as were asked about, where others cannot be forecast."""
    try:
        return fewest_gpus(lambda count: cell.advised(count, target)[1], cell.method.sequences_per_step)
    except ForecastError:
        return gpus if forecast.verdict == "fits" else None


def _choose(rows: Sequence[tuple[PlanRow, Method]], target: Target, measured: Sequence[Entry]) -> None:
    """Mark the fastest of the methods that fit: by measured step times where one device has those of all of them, else
    by what is expected."""
    fitting = [(row, method) for row, method in rows if row["verdict"] == "fits"]
    if not fitting:
        return
    device, seconds = _measured(fitting, target, measured)
    for row, _ in fitting:
        row["measured_on"] = device
    if device is not None:
        fastest = min(fitting, key=lambda pair: seconds[pair[0]["method"]])
    else:
        fastest = min(fitting, key=lambda pair: (*pair[1].expected_cost, pair[0]["passes"]))
    fastest[0]["chosen"] = True


def _measured(
    fitting: Sequence[tuple[PlanRow, Method]], target: Target, measured: Sequence[Entry]
) -> tuple[str | None, dict[str, float]]:
    """The device that all of `fitting` were measured on, and the median seconds a token of each there, by method: the
    target's own card before others, and of others the one measured last."""
    of_devices: dict[str, list[Entry]] = {}
    for entry in measured:
        if entry.outcome == "completed" and any(_is_of(entry, *pair, target) for pair in fitting):
            of_devices[entry.device] = [*of_devices.pop(entry.device, []), entry]  # the newest comes last
    seconds = {device: _median_seconds(entries) for device, entries in of_devices.items()}
    whole = [device for device, of_device in seconds.items() if all(row["method"] in of_device for row, _ in fitting)]
    if not whole:
        return None, {}
    device = max(whole, key=lambda name: (target.card is not None and target.card in name, whole.index(name)))
    return device, seconds[device]


def _median_seconds(entries: Sequence[Entry]) -> dict[str, float]:
    """The median seconds a token of each method that was timed in `entries`."""
    by_method: dict[str, list[float]] = defaultdict(list)
    for entry, per_token in zip(entries, seconds_per_token(*entries), strict=True):
        if per_token is not None:
            by_method[entry.method].append(per_token)
    return {method: statistics.median(values) for method, values in by_method.items()}


def _is_of(entry: Entry, row: PlanRow, method: Method, target: Target) -> bool:
    """Whether a stored trial is what `row` is about: `method`, as `target` computes it, on whatever GPU and under
    whatever budget."""
    arguments = entry.training_arguments or {}
    rows, passes = arguments.get("per_device_train_batch_size", 8), arguments.get("gradient_accumulation_steps", 1)
    computes = method.on_gpu(bf16=target.bf16)
    is_of_method = entry.method == row["method"] and entry.method_digest in (None, method_digest(method))
    is_computed_so = (entry.weights_dtype, entry.precision) == (computes.weights_dtype, computes.precision)
    shape = entry.world_size, entry.max_length, rows, passes
    is_of_shape = shape == (row["gpus"], row["max_length"], row["batch_size"], row["passes"])
    on_gpu = entry.device_bytes is not None
    return entry.model == row["model"] and is_of_method and is_computed_so and is_of_shape and on_gpu


def each_target_has_a_method(rows: Sequence[PlanRow]) -> bool:
    """Whether for every model and target some method fits."""
    cells = {(row["model"], row["target"]) for row in rows}
    return cells == {(row["model"], row["target"]) for row in rows if row["chosen"]}


def table(rows: Sequence[PlanRow]) -> str:
    """What a person reads: the peak of each method by cause, and each target's verdicts and choice."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        parts += [_causes(of_model), _verdicts(of_model)]
    return "\n\n".join(parts)


def _causes(rows: Sequence[PlanRow]) -> str:
    """The bytes of every method, once for all targets with the same kernels."""
    known = [row for row in rows if row["verdict"] != "cannot_be_forecast"]
    first = rows[0]
    parameters = f", {known[0]['parameters'] / 1e6:,.0f} M parameters" if known else ""
    title = (
        f"{first['model']}{parameters}, rows of {first['max_length']} tokens: "
        f"allocated at the peak{' on each of ' + str(first['gpus']) + ' GPUs' if first['gpus'] > 1 else ''}"
    )
    if not known:
        return title
    causes = [cause for cause in replay.CAUSES if cause != "gathered" or first["gpus"] > 1]
    paged = any(row["paged_bytes"] for row in known)
    peaks: dict[tuple[Any, ...], list[str]] = {}
    for row in known:
        sizes = [row["forecast_allocated_bytes"], *(row["bytes_by_cause"][cause] for cause in causes)]
        key = row["method"], _step(row), *sizes, *([row["paged_bytes"]] if paged else [])
        peaks.setdefault(key, []).append(row["target"])
    order = list(dict.fromkeys(row["method"] for row in known))
    lines = [
        [method, step, *map(_size_or_dash, sizes), ", ".join(targets)]
        for (method, step, *sizes), targets in sorted(peaks.items(), key=lambda item: order.index(item[0][0]))
    ]
    headers = ["method", STEP, "peak", *causes, *(["paged"] if paged else []), "with the kernels of"]
    aligned = ("left", *["right"] * (len(headers) - 2), "left")
    table = tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
    return f"{title}\n\n{table}"


STEP = "passes x rows"
"""The column of what one GPU does in an optimizer step."""


def _step(row: PlanRow) -> str:
    return f"{row['passes']} x {row['batch_size']}"


def _verdicts(rows: Sequence[PlanRow]) -> str:
    headers = ["target", "method", STEP, "verdict", "reserved", "budget", "margin", "peak in"]
    asked = {key: title for key, title in EXTRAS.items() if key in rows[0]}
    lines = []
    for row in rows:
        reserved, margin = "-", "-"
        if row["forecast_reserved_bytes"] is not None:
            reserved = _size_or_dash(row["forecast_reserved_bytes"])
            margin = f"{1 - row['forecast_reserved_bytes'] / row['budget_bytes']:+.1%}"
        where = f"out of memory in {row['phase']}" if row["verdict"] == "does_not_fit" else row["phase"]
        line = [
            row["target"],
            row["method"],
            _step(row),
            row["verdict"].replace("_", " ") + (" <- take this" if row["chosen"] else ""),
            reserved,
            _size_or_dash(row["budget_bytes"]),
            margin,
            row["reason"] or where,
        ]
        lines.append([*line, *("none" if row[key] is None else str(row[key]) for key in asked)])
    aligned = ["left", "left", "right", "left", "right", "right", "right", "left", *["right"] * len(asked)]
    table = tabulate(lines, [*headers, *asked.values()], tablefmt="simple", disable_numparse=True, colalign=aligned)
    return "\n\n".join([table, *_notes(rows)])


def _notes(rows: Sequence[PlanRow]) -> list[str]:
    notes = [
        f"The budget is the card's memory less {CONTEXT_BYTES // MiB} MiB for a CUDA context; the margin is what of it "
        "the allocator would not reserve."
    ]
    devices = {row["target"]: row["measured_on"] for row in rows if row["measured_on"]}
    notes += [f"{target}: the fastest by step times measured on {device}." for target, device in devices.items()]
    if any(row["paged_bytes"] for row in rows):
        notes.append(
            "Paged optimizer state is in no peak and no verdict: it lies in managed memory, on the card as far as "
            "there is room and else on the host."
        )
    if "fewest_gpus" in rows[0]:
        notes.append(
            "Passes, rows and bytes are those of one GPU; several share the sequences of a step and, by FSDP2, the "
            "network. What NCCL takes for itself is not counted. The fewest GPUs are sought up to one for every "
            "sequence of a step."
        )
    return notes


def _size_or_dash(count: int) -> str:
    return size(count) if count else "-"
