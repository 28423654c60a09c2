"""Which method fits which card, and how large a batch: forecasts as the answer to a person who has neither yet."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from transformers import PretrainedConfig

from lightweight import models
from lightweight.corpus import Corpus, CorpusError, Long, LossOn, RowForm, Rows
from lightweight.forecast import calibration, corpus_rows, replay, step_time, tracer
from lightweight.forecast.calibration import Calibration
from lightweight.forecast.corpus_rows import CorpusRows
from lightweight.forecast.replay import Cause, Forecast, Verdict
from lightweight.forecast.step_time import Job, JobTime, StepTime
from lightweight.forecast.tracer import ForecastError
from lightweight.methods import Method
from lightweight.models import Model, ModelError
from lightweight.record import Entry, method_digest, said_of, seconds_per_token, versions
from lightweight.record.codec import plain
from lightweight.targets import CONTEXT_BYTES, NATIVE, Capability, Target
from lightweight.trial import MAX_LENGTH, Padding, Trial, pads_to_max

PlanVerdict = Verdict | Literal["cannot_be_forecast"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of every model x method x target.

    The sequences of a forward pass are a method's own, or, unless the question `keeps_passes`, the most that fit in
    more passes of the same optimizer step. `max_length` is in tokens a row. Without a `corpus` a forecast holds for
    rows of that length, and what else is said of rows changes nothing; with one, for the longest batch that its
    training rows can make in ten epochs. `gpus` share a trial. `max_batch` asks for the largest batch that fits as
    well, `longest_row` for the longest rows, whatever the corpus has, and `fewest_gpus` for the least number of GPUs
    that suffices. `job` is what is to be trained, and what it may take.
    """

    keeps_passes: bool = False
    max_length: int = MAX_LENGTH
    loss_on: LossOn = "all"
    long: Long = "cut"
    padding: Padding | None = None
    corpus: Corpus | None = None
    gpus: int = 1
    max_batch: bool = False
    longest_row: bool = False
    fewest_gpus: bool = False
    job: Job = field(default_factory=Job)


ANY_BATCH = Question()
"""Each method's own rows, or the most that fit, on one GPU."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """The answer for one model x method x target, each named as a user names it.

    `forecast` is of one of the GPUs that share the trial, with `method` as it takes the passes that are advised, and as
    it was `asked` about, where those are others; None where nothing can be forecast. `reason` says why there is none,
    or what else than memory keeps the method off the card. `chosen` is the method to take on this target, `measured_on`
    the device whose step times say so, None where it is expected. `corpus_rows` are what the question's corpus gives
    the model. Where the question asks for them, and there is a forecast: `max_batch`, the largest batch that fits, in
    sequences a pass of one GPU, 0 if none does; `longest_row`, the tokens of the longest rows that fit, to `ROW_STEP`,
    with as few of them in a pass as there can be and every layer of a captured step computed again; and `fewest_gpus`,
    the least number of GPUs on which this batch does, None where it does not even with one for every sequence of a
    step. `step` and `job` are what those take, None where no calibration says so.
    """

    model: str
    method: Method
    target: Target
    question: Question
    forecast: Forecast | None = None
    reason: str | None = None
    max_batch: int | None = None
    longest_row: int | None = None
    fewest_gpus: int | None = None
    chosen: bool = False
    measured_on: str | None = None
    corpus_rows: CorpusRows | None = None
    asked: Method | None = None
    step: StepTime | None = None
    job: JobTime | None = None

    @property
    def verdict(self) -> PlanVerdict:
        """As in Forecast, but where something else than memory decides."""
        if self.forecast is None:
            return "cannot_be_forecast"
        return "does_not_fit" if self.reason else self.forecast.verdict

    @property
    def batch_size(self) -> int:
        """Sequences of a forward pass on one GPU."""
        return self.method.on_rank(self.question.gpus).sequences_per_pass

    @property
    def passes(self) -> int:
        """Forward passes of an optimizer step on one GPU."""
        return self.method.on_rank(self.question.gpus).passes_per_step

    @property
    def accumulation(self) -> int:
        """The `gradient_accumulation_steps` that give every GPU its `passes`."""
        return self.method.passes_per_step

    @property
    def recomputed_layers(self) -> int:
        """Layers that a captured step computes again in the backward pass."""
        return _recomputed(self.method)

    def as_json(self) -> dict[str, Any]:
        """What `lightweight plan --format json` writes of it: what the forecast says is None where there is none, and
        what was not asked for is left out."""
        forecast, question = self.forecast, self.question
        row = {
            "model": self.model,
            "method": self.method.name,
            "target": self.target.name,
            "gpus": question.gpus,
            "batch_size": self.batch_size,
            "passes": self.passes,
            "accumulation": self.accumulation,
            "recomputed_layers": self.recomputed_layers,
            "max_length": question.max_length,
            "budget_bytes": self.target.budget_bytes,
            "context_bytes": CONTEXT_BYTES,
            "measured_on": self.measured_on,
            "chosen": self.chosen,
            "forecast_allocated_bytes": forecast and forecast.allocated_bytes,
            "forecast_reserved_bytes": forecast and forecast.reserved_bytes,
            "bytes_by_cause": forecast.by_cause if forecast else {},
            "paged_bytes": forecast and forecast.paged_bytes,
            "parameters": forecast and forecast.parameters,
            "trainable_parameters": forecast and forecast.trainable_parameters,
            "phase": forecast and forecast.phase,
            "verdict": self.verdict,
            "reason": self.reason,
            **step_time.as_json(self.step, self.job),
            **self._made_under(),
        }
        row |= {"max_batch": self.max_batch} if question.max_batch else {}
        row |= {"longest_row": self.longest_row} if question.longest_row else {}
        return row | ({"fewest_gpus": self.fewest_gpus} if question.fewest_gpus else {})

    def _made_under(self) -> dict[str, Any]:
        """What tells an unlike forecast of the same name, and which packages this one is of."""
        question, method = self.question, self.asked or self.method
        under: dict[str, Any] = {"method_digest": method_digest(method), "settings": said_of(method)}
        under["changed"] = plain(method.changed) or None
        if question.corpus is not None and self.corpus_rows is not None:
            under |= {"corpus_digest": question.corpus.digest, **self.corpus_rows.as_json()}
            under |= {"loss_on": question.loss_on, "long": question.long}
            under["padding"] = "max" if pads_to_max(question.padding, question.corpus) else "longest"
        others = () if method.library == "peft" else (method.library,)
        return under | {"versions": versions(*others)}


LARGEST_BATCH = 2**14
"""Where the search for the largest batch ends."""

LONGEST_ROW = 2**20
"""Where the search for the longest row ends, in tokens, for a model that does not say how many it takes."""

ROW_STEP = 256
"""In what tokens it is sought."""

LASTING: tuple[Cause, ...] = ("weights", "quantization state", "optimizer")
"""What every pass of a step holds, however few its sequences."""


_Key = tuple[int, int, int, int, Capability]
"""What tells the traces of a cell apart."""


def _key(method: Method, gpus: int, target: Target) -> _Key:
    return method.sequences_per_pass, method.passes_per_step, _recomputed(method), gpus, target.capability


def _recomputed(method: Method) -> int:
    return 0 if method.captured_step is None else method.captured_step.recompute


@dataclass(eq=False, kw_only=True)
class _Cell:
    """One model x method of a question, and its traces, each of which is made once. `config` is the model's, or why it
    has none; `corpus_rows` what the corpus gives it, None without one."""

    model: Model
    config: PretrainedConfig | ModelError | CorpusError
    corpus_rows: CorpusRows | None
    method: Method
    question: Question
    progress: Callable[[str], None]
    calibrations: Sequence[Calibration] = ()
    _traces: dict[_Key, replay.Trace] = field(default_factory=dict)

    def trial(self, method: Method, gpus: int) -> Trial:
        """Raises ValueError where a step has fewer sequences than `gpus`."""
        step = method.captured_step
        if step is not None and step.compile is None:  # as train takes it: what a compiler makes is not forecast
            method = replace(method, step=replace(step, compile=False))
        trial = Trial(
            model=self.model,
            method=method,
            target=NATIVE,
            corpus=self.question.corpus or Corpus(train=(), heldout=(), digest=""),
            max_length=self.question.max_length,
            loss_on=self.question.loss_on,
            long=self.question.long,
            padding=self.question.padding,
            world_size=gpus,
        )
        return trial.with_rows(None if self.corpus_rows is None else self.corpus_rows.count)

    def refusal(self) -> str | None:
        """Why this cannot be forecast, as far as it is known before minutes of tracing."""
        if isinstance(self.config, ValueError):
            return str(self.config)
        try:
            trial = self.trial(self.method, self.question.gpus)
        except ValueError as error:
            return str(error)
        return tracer.refusal(trial, self.config, self._rows)

    @property
    def _rows(self) -> Rows | None:
        return None if self.corpus_rows is None else self.corpus_rows.rows

    def forecast(self, method: Method, gpus: int, target: Target) -> Forecast:
        """What `method`, this one with other passes, takes of each of `gpus`. Raises ForecastError."""
        recomputed = _recomputed(method)
        key = _key(method, gpus, target)
        if key not in self._traces:
            trial = self.trial(method, gpus)
            rows = trial.method.on_rank(gpus).sequences_per_pass
            shared = f" on {gpus} GPUs" if gpus > 1 else ""
            longest = self.corpus_rows.width if self.corpus_rows is not None else self.question.max_length
            twice = f", {recomputed} layers computed twice" if recomputed else ""
            self.progress(f"{trial.name}: tracing a batch of {rows} x {longest}{shared}{twice}")
            self._traces[key] = tracer.trace(trial, target.capability, self._rows)
        return replay.within(self._traces[key], target.budget_bytes)

    def timed(self, row: PlanRow) -> PlanRow:
        """The row with what a step of its method takes, and the job."""
        gpus, target, job = self.question.gpus, row.target, self.question.job
        trace = self._traces[_key(row.method, gpus, target)]
        trial = self.trial(row.method, gpus)
        if self.corpus_rows is not None and not trial.pads_to_max:
            trial = replace(trial, max_length=self.corpus_rows.width)
        step = step_time.forecast(trace, trial, target.card, self.calibrations) if target.card else None
        steps = job.steps(trial.method.sequences_per_step, trial.max_length, trial.rows)
        return replace(row, step=step, job=JobTime.of(step, steps, job) if step and steps else None)

    def advised(self, gpus: int, target: Target) -> tuple[Method, Forecast]:
        """The method with the most sequences a pass that fit, of the same optimizer step, and its forecast: its own
        where they fit, where nothing does, or where the question keeps them. Where the fewest do not fit either, a
        captured step computes as few layers as suffice again. Raises ForecastError."""
        own = self.forecast(self.method, gpus, target)
        lasting = sum(own.by_cause[cause] for cause in LASTING)
        if own.verdict == "fits" or lasting > (target.budget_bytes or lasting):
            return self.method, own
        smaller = [] if self.question.keeps_passes else smaller_passes(self.method, gpus)
        index = bisect.bisect_left(
            smaller, True, key=lambda method: self.forecast(method, gpus, target).verdict == "fits"
        )
        if index < len(smaller):
            return smaller[index], self.forecast(smaller[index], gpus, target)
        return self._recomputing(smaller[-1] if smaller else self.method, gpus, target) or (self.method, own)

    def _recomputing(self, method: Method, gpus: int, target: Target) -> tuple[Method, Forecast] | None:
        """`method` with the fewest layers computed again that let it fit, and its forecast; None where none do. Raises
        ForecastError."""
        layers = getattr(self.config, "num_hidden_layers", None)
        if method.captured_step is None or not isinstance(layers, int) or target.budget_bytes is None:
            return None

        def with_layers(count: int) -> Forecast:
            return self.forecast(method.recomputing(count), gpus, target)

        if with_layers(0).allocated_bytes < target.budget_bytes * (1 - replay.MARGIN):
            return None  # what does not fit is the check, which keeps nothing as it is
        count = fewest_layers(with_layers, layers)
        return None if count is None else (method.recomputing(count), with_layers(count))


def plan(
    models: Sequence[Model],
    methods: Sequence[Method],
    targets: Sequence[Target],
    question: Question = ANY_BATCH,
    *,
    measured: Sequence[Entry] = (),
    calibrations: Sequence[Calibration] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    failed: Callable[[ForecastError], None] = lambda error: None,
) -> list[PlanRow]:
    """A row for every model x method x target. Raises ModelError where no model has a configuration, CorpusError where
    the corpus gives a model no row, and ForecastError where nothing can be forecast for another reason and that is
    known before anything is traced.

    `measured` are entries of records, whose step times order the methods where they have all of them. `calibrations`
    are what time is forecast with, those of the package where none are given. `failed` is told
    of what makes a method's row `cannot_be_forecast` while it is traced.
    """
    known = [_known(model, question, progress) for model in models]
    calibrations = calibration.stored() if calibrations is None else calibrations
    cells = {
        (i, j): _Cell(
            model=model,
            config=known[i][0],
            corpus_rows=known[i][1],
            method=method,
            question=question,
            progress=progress,
            calibrations=calibrations,
        )
        for i, model in enumerate(models)
        for j, method in enumerate(methods)
    }
    reasons = {key: reason for key, cell in cells.items() if (reason := cell.refusal()) is not None}
    if cells and len(reasons) == len(cells):
        (first, reason), *_ = reasons.items()
        config, _ = known[0]
        if isinstance(config, ValueError):
            raise config
        raise ForecastError(f"{cells[first].model.name} x {cells[first].method.name}: {reason}")

    def row(key: tuple[int, int], target: Target) -> PlanRow:
        cell = cells[key]
        if key not in reasons:
            try:
                return _row(cell, target)
            except ForecastError as error:  # on one card as on any other
                failed(error)
                reasons[key] = str(error).removeprefix(f"{cell.model.name} x {cell.method.name}: ")
        return _row_without(cell, target, reasons[key])

    return [
        answer
        for i, _ in enumerate(models)
        for target in targets
        for answer in with_choice([row((i, j), target) for j, _ in enumerate(methods)], measured)
    ]


def _known(
    model: Model, question: Question, progress: Callable[[str], None]
) -> tuple[PretrainedConfig | ModelError | CorpusError, CorpusRows | None]:
    """The configuration of `model`, or why it cannot be forecast, which is no matter of the other models; and the rows
    that the question's corpus gives it."""
    try:
        config = models.configuration(model)
        if question.corpus is None:
            return config, None
        form = RowForm(question.max_length, question.loss_on, question.long)
        padded = pads_to_max(question.padding, question.corpus)
        return config, corpus_rows.of_model(question.corpus, model, form, pads_to_max=padded, progress=progress)
    except (ModelError, CorpusError) as error:
        return error, None


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


def largest_batch(fits: Callable[[int], Forecast], first: int, most: int = LARGEST_BATCH) -> int:
    """The largest batch whose verdict is `fits`, up to the `most`, 0 if none is. `first` is what is tried first.

    What a step holds grows with the batch almost in a straight line, so two forecasts point at the next to try; every
    other try halves what is left, in case the line is none. The answer and its successor are always forecast
    themselves.
    """
    low, high, guess = 0, most + 1, min(first, most)
    held: dict[int, int] = {}
    while high - low > 1:
        forecast = fits(guess)
        held[guess] = forecast.allocated_bytes
        low, high = (guess, high) if forecast.verdict == "fits" else (low, guess)
        if len(held) == 1:
            guess = 2 * low or high // 2
        elif len(held) % 2 or high > most:
            near, far = sorted(held, key=lambda batch: abs(batch - (low or high)))[:2]
            slope = (held[near] - held[far]) / (near - far)
            room = (forecast.budget_bytes or 0) * (1 - replay.MARGIN) - held[near]
            guess = int(near + room / max(slope, 1.0))
        else:
            guess = (low + high) // 2
        guess = max(low + 1, min(guess, high - 1))
    return low


def fewest_layers(fits: Callable[[int], Forecast], layers: int) -> int | None:
    """The fewest layers to compute again, of `layers`, whose verdict is `fits`, None where not even all of them.

    What they free is a straight line but for its ends, which points at the next number to try; the answer and the one
    below it are always forecast themselves.
    """
    low, high = 0, layers
    held = {count: fits(count).allocated_bytes for count in (low, high)}
    if fits(high).verdict != "fits":
        return None
    while high - low > 1:
        each = (held[low] - held[high]) / (high - low)
        room = (fits(high).budget_bytes or 0) * (1 - replay.MARGIN) - held[high]
        guess = max(low + 1, min(high - int(room / max(each, 1.0)), high - 1))
        forecast = fits(guess)
        held[guess] = forecast.allocated_bytes
        low, high = (low, guess) if forecast.verdict == "fits" else (guess, high)
    return high


def fewest_gpus(fits: Callable[[int], Forecast], sequences: int) -> int | None:
    """The least number of GPUs whose verdict is `fits`, up to one for each of the `sequences` of a step; None if none
    is. More GPUs hold no more each, so that every other forecast halves what is left."""
    counts = range(1, sequences + 1)
    index = bisect.bisect_left(counts, True, key=lambda count: fits(count).verdict == "fits")
    return counts[index] if index < len(counts) else None


def _row(cell: _Cell, target: Target) -> PlanRow:
    """The row of what can be forecast. Raises ForecastError."""
    question = cell.question
    answer = partial(PlanRow, model=cell.model.name, target=target, question=question, corpus_rows=cell.corpus_rows)
    if cell.method.uses_bf16 and not target.bf16:
        reason = f"computes in bf16, which {target.name} does not have"
        forecast = cell.forecast(cell.method, question.gpus, target)
        return answer(method=cell.method, forecast=forecast, reason=reason, max_batch=0 if question.max_batch else None)
    method, forecast = cell.advised(question.gpus, target)
    row = cell.timed(answer(method=method, forecast=forecast, asked=cell.method))
    if question.max_batch:
        row = replace(row, max_batch=largest_batch(partial(_with_batch, cell, target), row.batch_size))
    if question.longest_row:
        row = replace(row, longest_row=_longest_row(cell, target))
    return replace(row, fewest_gpus=_fewest(cell, target, forecast)) if question.fewest_gpus else row


def _row_without(cell: _Cell, target: Target, reason: str) -> PlanRow:
    """The row of what cannot be forecast."""
    return PlanRow(
        model=cell.model.name,
        method=cell.method,
        target=target,
        question=cell.question,
        reason=reason,
        corpus_rows=cell.corpus_rows,
    )


def _with_batch(cell: _Cell, target: Target, sequences: int) -> Forecast:
    """The forecast of a pass of `sequences`, or of the least that give each GPU one in a step."""
    gpus = cell.question.gpus
    least = -(-gpus // cell.method.passes_per_step)
    return cell.forecast(cell.method.with_batch(max(least, sequences)), gpus, target)


def _longest_row(cell: _Cell, target: Target) -> int:
    """The tokens of the longest rows that fit. Raises ForecastError."""
    gpus = cell.question.gpus
    assert isinstance(cell.config, PretrainedConfig)
    *_, method = cell.method, *smaller_passes(cell.method, gpus)
    method = method.recomputing(getattr(cell.config, "num_hidden_layers", 0))
    most = (models.longest_row(cell.config) or LONGEST_ROW) // ROW_STEP

    def of_length(steps: int) -> Forecast:
        question = replace(cell.question, max_length=steps * ROW_STEP, corpus=None)
        longer = _Cell(
            model=cell.model,
            config=cell.config,
            corpus_rows=None,
            method=cell.method,
            question=question,
            progress=cell.progress,
        )
        return longer.forecast(method, gpus, target)

    return ROW_STEP * largest_batch(of_length, max(1, cell.question.max_length // ROW_STEP), most)


def _fewest(cell: _Cell, target: Target, forecast: Forecast) -> int | None:
    """The fewest GPUs that suffice; as many as were asked about, where others cannot be forecast."""
    try:
        return fewest_gpus(lambda count: cell.advised(count, target)[1], cell.method.sequences_per_step)
    except ForecastError:
        return cell.question.gpus if forecast.verdict == "fits" else None


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
    device = max(whole, key=lambda name: (card is not None and card in name, whole.index(name)))
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
