"""Which method fits which card, and how large a batch: forecasts as the answer to a person who has neither yet."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from transformers import PretrainedConfig

from lightweight import models
from lightweight.corpus import Corpus, CorpusError, RowForm, Rows
from lightweight.forecast import calibration, corpus_rows, placing, replay, step_time, tracer
from lightweight.forecast.calibration import Calibration
from lightweight.forecast.corpus_rows import CorpusRows
from lightweight.forecast.plan_choice import with_choice
from lightweight.forecast.plan_row import ANY_BATCH, PlanOptions, PlanRow, offloaded_layers, recomputed_layers
from lightweight.forecast.plan_search import fewest_gpus, fewest_layers, largest_batch, smaller_passes
from lightweight.forecast.step_time import JobTime
from lightweight.forecast.tracer import ForecastError
from lightweight.methods import Method
from lightweight.models import Model, ModelError
from lightweight.record import Entry
from lightweight.settings import Placement
from lightweight.targets import NATIVE, Capability, Target
from lightweight.trial import Cause, Forecast, Trial, pads_to_max

LONGEST_ROW = 2**20
"""Where the search for the longest row ends, in tokens, for a model that does not say how many it takes."""

ROW_STEP = 256
"""In what tokens it is sought."""

LASTING: tuple[Cause, ...] = ("weights", "quantization state", "optimizer")
"""What every pass of a step holds, however few its sequences."""


_Key = tuple[int, int, int, int, int, Placement, Capability]
"""What tells the traces of a cell apart."""


def _key(trial: Trial, target: Target) -> _Key:
    method = trial.method
    passes = method.sequences_per_pass, method.passes_per_step
    return (
        *passes,
        recomputed_layers(method),
        offloaded_layers(method),
        trial.world_size,
        trial.placement,
        target.capability,
    )


@dataclass(eq=False, kw_only=True)
class _Cell:
    """One model x method of a question, and its traces, each of which is made once. `config` is the model's, or why it
    has none; `corpus_rows` what the corpus gives it, None without one."""

    model: Model
    config: PretrainedConfig | ModelError | CorpusError
    corpus_rows: CorpusRows | None
    method: Method
    question: PlanOptions
    progress: Callable[[str], None]
    calibrations: Sequence[Calibration] = ()
    _traces: dict[_Key, replay.Trace] = field(default_factory=dict)

    def trial(self, method: Method, gpus: int) -> Trial:
        """With its network replicated, unless it is said to be sharded. Raises ValueError where a step has fewer
        sequences than `gpus`."""
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
            placement=self.question.placement or "replicated",
        )
        return trial.with_rows(None if self.corpus_rows is None else self.corpus_rows.count)

    def refusal(self, capability: Capability) -> str | None:
        """Why this cannot be forecast on cards of this `capability`, as far as it is known before minutes of
        tracing."""
        if isinstance(self.config, ValueError):
            return str(self.config)
        try:
            trial = self.trial(self.method, self.question.gpus)
        except ValueError as error:
            return str(error)
        return tracer.refusal(trial, self.config, capability, self._rows)

    @property
    def _rows(self) -> Rows | None:
        return None if self.corpus_rows is None else self.corpus_rows.rows

    def forecast(self, method: Method, gpus: int, target: Target) -> Forecast:
        """What `method`, this one with other passes, takes of each of `gpus`. Raises ForecastError."""
        return self._forecast(self.placed(method, gpus, target), target)

    def placed(self, method: Method, gpus: int, target: Target) -> Trial:
        """The trial of `method`, its network where it is said to be, else where it fits. Raises ForecastError."""
        trial = self.trial(method, gpus)
        return trial if self.question.placement else placing.placed(trial, lambda of: self._forecast(of, target))

    def _forecast(self, trial: Trial, target: Target) -> Forecast:
        key = _key(trial, target)
        if key not in self._traces:
            gpus, recomputed, offloaded = (
                trial.world_size,
                recomputed_layers(trial.method),
                offloaded_layers(trial.method),
            )
            rows = trial.method.on_rank(gpus).sequences_per_pass
            shared = f" on {gpus} GPUs, {trial.placement}" if gpus > 1 else ""
            longest = self.corpus_rows.width if self.corpus_rows is not None else self.question.max_length
            twice = f", {recomputed} layers computed twice" if recomputed else ""
            there = f", {offloaded} layers' activations on the host" if offloaded else ""
            self.progress(f"{trial.name}: tracing a batch of {rows} x {longest}{shared}{twice}{there}")
            self._traces[key] = tracer.trace(trial, target.capability, self._rows)
        return replay.within(self._traces[key], target.budget_bytes)

    def timed(self, row: PlanRow) -> PlanRow:
        """The row with what a step of its method takes, and the job."""
        gpus, target, job = self.question.gpus, row.target, self.question.job
        trial = self.placed(row.method, gpus, target)
        trace = self._traces[_key(trial, target)]
        row = replace(row, placement=trial.placement if gpus > 1 else None)
        if self.corpus_rows is not None and not trial.pads_to_max:
            trial = replace(trial, max_length=self.corpus_rows.width)
        step = step_time.forecast(trace, trial, target.card, self.calibrations) if target.card else None
        steps = job.steps(trial.method.sequences_per_step, trial.max_length, trial.rows)
        return replace(row, step=step, job=JobTime.of(step, steps, job) if step and steps else None)

    def advised(self, gpus: int, target: Target) -> tuple[Method, Forecast]:
        """The method with the most sequences a pass that fit, of the same optimizer step, and its forecast: its own
        where they fit, where nothing does, or where the question keeps them. Where the fewest do not fit either, a
        captured step computes as few layers as suffice again; where not even all do, it has the activations of as few
        as suffice on the host instead. Raises ForecastError."""
        own = self.forecast(self.method, gpus, target)
        lasting = sum(own.by_cause[cause] for cause in LASTING) - self._embedding_bytes
        if own.verdict == "fits" or lasting > (target.budget_bytes or lasting):
            return self.method, own
        smaller = [] if self.question.keeps_passes else smaller_passes(self.method, gpus)
        index = bisect.bisect_left(
            smaller, True, key=lambda method: self.forecast(method, gpus, target).verdict == "fits"
        )
        if index < len(smaller):
            return smaller[index], self.forecast(smaller[index], gpus, target)
        fewest = smaller[-1] if smaller else self.method
        return self._with_less(fewest, gpus, target) or (self.method, own)

    @property
    def _embedding_bytes(self) -> int:
        """What a captured step may have on the host of what every pass holds."""
        if self.method.captured_step is None or not isinstance(self.config, PretrainedConfig):
            return 0
        text = self.config.get_text_config()
        return int(getattr(text, "vocab_size", 0) * getattr(text, "hidden_size", 0) * 4)

    def _with_less(self, method: Method, gpus: int, target: Target) -> tuple[Method, Forecast] | None:
        """`method` with the fewest layers computed again that let it fit, else with the activations of the fewest on
        the host, else with the fewest computed again whose inputs alone are there; and its forecast. None where nothing
        does. Raises ForecastError."""
        layers = getattr(self.config, "num_hidden_layers", None)
        if method.captured_step is None or not isinstance(layers, int) or target.budget_bytes is None:
            return None

        def of(changed: Method) -> Forecast:
            return self.forecast(changed, gpus, target)

        if of(method).allocated_bytes < target.budget_bytes * (1 - replay.MARGIN):
            return None  # what does not fit is the check, which keeps nothing as it is
        for with_layers in (method.recomputing, method.offloading, method.offloading(layers).recomputing):
            count = fewest_layers(lambda count, changed=with_layers: of(changed(count)), layers)  # type: ignore[misc]
            if count is not None:
                return with_layers(count), of(with_layers(count))
        return None


def plan(
    models: Sequence[Model],
    methods: Sequence[Method],
    targets: Sequence[Target],
    question: PlanOptions = ANY_BATCH,
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
    capabilities = dict.fromkeys(target.capability for target in targets)
    reasons = {
        (key, capability): reason
        for key, cell in cells.items()
        for capability in capabilities
        if (reason := cell.refusal(capability)) is not None
    }
    if cells and len(reasons) == len(cells) * len(capabilities):
        ((first, _), reason), *_ = reasons.items()
        config, _ = known[0]
        if isinstance(config, ValueError):
            raise config
        raise ForecastError(f"{cells[first].model.name} x {cells[first].method.name}: {reason}")

    def row(key: tuple[int, int], target: Target) -> PlanRow:
        cell, of_its_kind = cells[key], (key, target.capability)
        if of_its_kind not in reasons:
            try:
                return _row(cell, target)
            except ForecastError as error:  # on one card as on any other of its kind
                failed(error)
                reasons[of_its_kind] = str(error).removeprefix(f"{cell.model.name} x {cell.method.name}: ")
        return _row_without(cell, target, reasons[of_its_kind])

    return [
        answer
        for i, _ in enumerate(models)
        for target in targets
        for answer in with_choice([row((i, j), target) for j, _ in enumerate(methods)], measured)
    ]


def _known(
    model: Model, question: PlanOptions, progress: Callable[[str], None]
) -> tuple[PretrainedConfig | ModelError | CorpusError, CorpusRows | None]:
    """The configuration of `model`, or why it cannot be forecast, which is no matter of the other models; and the rows
    that the question's corpus gives it."""
    try:
        config = models.configuration(model)
        if question.corpus is None:
            return config, None
        form = RowForm(question.max_length, question.loss_on, question.long)
        padded = pads_to_max(question.padding, question.corpus)
        found = corpus_rows.of_model(question.corpus, model, form, pads_to_max=padded, progress=progress)
        if found.rows is not None:  # how long they may be is asked of each row of the plan
            models.check_rows(model, config, longest=0, largest=max(int(row["input_ids"].max()) for row in found.rows))
        return config, found
    except (ModelError, CorpusError) as error:
        return error, None


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
