"""What is asked of a plan, and what is a row of its answer?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lightweight.corpus import Corpus, Long, LossOn
from lightweight.forecast import step_time
from lightweight.forecast.corpus_rows import CorpusRows
from lightweight.forecast.step_time import JobLimits, JobTime, StepTime
from lightweight.methods import Method
from lightweight.record import method_digest, said_of, versions_of
from lightweight.record.codec import plain
from lightweight.settings import Placement
from lightweight.targets import CONTEXT_BYTES, Target
from lightweight.trial import MAX_LENGTH, Forecast, ForecastVerdict, Padding, pads_to_max

PlanVerdict = ForecastVerdict | Literal["cannot_be_forecast"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is asked of every model x method x target.

    The sequences of a forward pass are a method's own, or, unless the question `keeps_passes`, the most that fit in
    more passes of the same optimizer step. `max_length` is in tokens a row. Without a `corpus` a forecast holds for
    rows of that length, and what else is said of rows changes nothing; with one, for the longest batch that its
    training rows can make in ten epochs. `gpus` share a trial, with the `placement` of the network that is said, or
    None. `max_batch` asks for the largest batch that fits as
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
    placement: Placement | None = None
    max_batch: bool = False
    longest_row: bool = False
    fewest_gpus: bool = False
    job: JobLimits = field(default_factory=JobLimits)


ANY_BATCH = PlanOptions()
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
    step. `step` and `job` are what those take, None where no calibration says so. `placement` is what the forecast is
    of, None for one GPU.
    """

    model: str
    method: Method
    target: Target
    question: PlanOptions
    forecast: Forecast | None = None
    reason: str | None = None
    max_batch: int | None = None
    longest_row: int | None = None
    fewest_gpus: int | None = None
    chosen: bool = False
    measured_on: str | None = None
    placement: Placement | None = None
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
        return recomputed_layers(self.method)

    @property
    def offloaded_layers(self) -> int:
        """Layers whose activations a captured step has on the host."""
        return offloaded_layers(self.method)

    def as_json(self) -> dict[str, Any]:
        """What `lightweight plan --format json` writes of it: what the forecast says is None where there is none, and
        what was not asked for is left out."""
        forecast, question = self.forecast, self.question
        row = {
            "model": self.model,
            "method": self.method.name,
            "target": self.target.name,
            "gpus": question.gpus,
            **({"placement": self.placement} if self.placement else {}),
            "batch_size": self.batch_size,
            "passes": self.passes,
            "accumulation": self.accumulation,
            "recomputed_layers": self.recomputed_layers,
            "offloaded_layers": self.offloaded_layers,
            "max_length": question.max_length,
            "budget_bytes": self.target.budget_bytes,
            "context_bytes": CONTEXT_BYTES,
            "measured_on": self.measured_on,
            "chosen": self.chosen,
            "forecast_allocated_bytes": forecast and forecast.allocated_bytes,
            "forecast_reserved_bytes": forecast and forecast.reserved_bytes,
            "bytes_by_cause": forecast.by_cause if forecast else {},
            "paged_bytes": forecast and forecast.paged_bytes,
            "host_bytes": forecast and forecast.host_bytes,
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
        return under | {"versions": versions_of(method)}


def recomputed_layers(method: Method) -> int:
    """Layers that its step computes again in the backward pass, where it is captured."""
    return 0 if method.captured_step is None else method.captured_step.recompute


def offloaded_layers(method: Method) -> int:
    """Layers whose activations its step has on the host, where it is captured."""
    return 0 if method.captured_step is None else method.captured_step.offload
