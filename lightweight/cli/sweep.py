"""Which learning rate is fair to each method? The same search with the same budget for all of them.

A comparison is as good as its baseline's rate. So each method gets as many trials, over the same range, on the same
examples, and is judged by the loss on examples that are held out of those to train on. What the corpus holds out is
never seen: it is left for the comparison.

Half of the trials are on a grid of equal factors from one end of the range to the other; each further one halves, as
factors, the wider gap beside the best so far. A trial that does not complete is a trial like any other, and no best.
One that the record holds from a search that was interrupted is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lightweight import corpus, files, methods, models, names, record, targets
from lightweight.child import failure, handle, helper, owner, reaper, worker
from lightweight.cli.terminal import leave_to_us, refuse, say, show, tell
from lightweight.corpus import How
from lightweight.methods import Method, MethodError
from lightweight.record import Entry
from lightweight.settings import Settings, how_read
from lightweight.targets import CPU, NATIVE, Device, Target
from lightweight.trial import Completed, Trial


class SweepError(ValueError):
    """A sweep that cannot be made. The message names what it is about and the mend."""


REFUSALS = (SweepError, corpus.CorpusError, models.ModelError, MethodError)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is searched: `budget` trials a method, with rates from `low` to `high`. Names are those of the command
    line."""

    model: str
    methods: Sequence[str]
    corpus: Path
    output: Path
    low: float
    high: float
    budget: int
    target: str | None = None
    weights: models.Weights | None = None
    epochs: int = 10
    max_steps: int | None = None
    reading: How = field(default_factory=How)
    settings: Settings = field(default_factory=Settings)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise SweepError(
                f"--learning-rate {self.low:g}..{self.high:g}: give two rates above 0, the lower one first"
            )
        if not 0 <= self.seed < 2**32:
            raise SweepError(f"--seed {self.seed}: give a number from 0 to {2**32 - 1}, which is what numpy takes")
        if self.budget < 3:
            raise SweepError(f"--budget {self.budget}: give at least 3 trials per method: both ends, and one between")


@dataclass(frozen=True)
class Tried:
    """A rate, and the loss that it came to on what was held out of the examples to train on; infinite where the trial
    did not complete."""

    rate: float
    loss: float


def rates(low: float, high: float, budget: int, loss_of: Callable[[float], float]) -> list[Tried]:
    """The search: `budget` different rates from `low` to `high`, in the order in which they were tried."""
    on_grid = max(3, -(-budget // 2))
    factor = (high / low) ** (1 / (on_grid - 1))
    tried: list[Tried] = []
    for number in range(budget):
        rate = low * factor**number if number < on_grid else _between(tried)
        rate = float(f"{rate:.4g}")  # as one types it
        if all(rate != other.rate for other in tried):
            tried.append(Tried(rate, loss_of(rate)))
    return tried


def _between(tried: Sequence[Tried]) -> float:
    """The middle, as factors, of the wider gap beside the best, towards the better neighbour where both are as wide."""
    by_rate = sorted(tried, key=lambda one: one.rate)
    at = by_rate.index(best(tried) or by_rate[len(by_rate) // 2])
    beside = [by_rate[other] for other in (at - 1, at + 1) if 0 <= other < len(by_rate)]
    apart = [(round(abs(math.log(other.rate / by_rate[at].rate)), 2), -other.loss, other.rate) for other in beside]
    return math.sqrt(by_rate[at].rate * max(apart)[2])


def best(tried: Sequence[Tried]) -> Tried | None:
    """The one with the least loss, None where none completed."""
    completed = [one for one in tried if math.isfinite(one.loss)]
    return min(completed, key=lambda one: one.loss, default=None)


@dataclass(frozen=True)
class Found:
    """What a method's search came to: its best rate, None where no trial completed or the rate made no difference to
    the best ones, and that in a line."""

    rate: float | None
    told: str


def run(sweep: Sweep, progress: Callable[[str], None] = lambda text: None) -> Iterator[Found]:
    """Search, and keep what was found in `sweep.output` after every trial; what, of each method. Goes on from what an
    interrupted search has left there. Raises SweepError, or what else REFUSALS names."""
    before = _before(sweep.output)
    examples = corpus.without_heldout(corpus.load(sweep.corpus, sweep.reading, progress), sweep.corpus)
    on_gpu = torch.cuda.is_available()
    try:
        named = sweep.settings.applied([methods.named(name) for name in dict.fromkeys(sweep.methods)])
        names.refuse_namesakes("method", named)
    except ValueError as error:
        raise SweepError(str(error)) from error
    try:
        model = models.find(models.named(sweep.model), sweep.weights)[0]
        with reaper.own.temporary_folder() as scratch:
            device = Device(name=f"{platform.machine()} CPU")
            if on_gpu:
                device = helper.call_within(helper.SILENCE_SECONDS, worker.describe_device, scratch, 0)
            target = _target(sweep.target, device, on_gpu)
            trials = {method.name: _trial(sweep, model, method, target, examples, on_gpu) for method in named}
            if not model.is_loadable:
                progress(f"{model.name}: writing its weights")
                model = _written(model, scratch, sweep.seed)
            search = _Search(sweep, device, scratch, progress, before)
            for trial in trials.values():
                yield search.of(replace(trial, model=model))
            search.end()
    except handle.ChildError as error:
        raise SweepError(f"sweep: {error}") from error


def _written(model: models.Model, scratch: Path, seed: int) -> models.Model:
    """`model` with random weights in `scratch`. Raises SweepError where they have no room there, and ChildError."""
    try:
        return helper.call_within(helper.SILENCE_SECONDS, models.write, scratch, model, scratch / "weights", seed)
    except Exception as error:
        if isinstance(error, handle.ChildError) or (full := failure.full_disk(error, scratch)) is None:
            raise
        raise SweepError(f"sweep: the weights of {model.name} cannot be written: {full}") from error


class _Search:
    """The search of one method after the other, and its record, in which the trials of `before` stay until the end."""

    def __init__(
        self,
        sweep: Sweep,
        device: Device,
        scratch: Path,
        progress: Callable[[str], None],
        before: Sequence[Entry] = (),
    ) -> None:
        self._sweep, self._device, self._scratch, self._progress = sweep, device, scratch, progress
        self._before = list(before)
        self._entries: list[Entry] = []
        self._found: dict[str, dict[str, Any]] = {}

    def of(self, trial: Trial) -> Found:
        """Search for the rate of the method of `trial`."""
        name = trial.method.name

        def loss_of(rate: float) -> float:
            wanted = at_rate(trial, rate)
            entry = self._take(wanted) or self._run(wanted)
            self._entries.append(entry)
            self._store()
            loss = entry.heldout_loss_after
            return math.inf if entry.outcome != "completed" or loss is None else loss

        tried = rates(self._sweep.low, self._sweep.high, self._sweep.budget, loss_of)
        found = best(tried)
        completed = sum(math.isfinite(one.loss) for one in tried)
        said = f"{name}: {completed} of {len(tried)} trials completed"
        if found is None:
            return Found(None, record.one_line(f"{said}: no rate was found: {self._entries[-1].reason}"))
        alike = [f"{one.rate:g}" for one in sorted(tried, key=lambda one: one.rate) if one.loss == found.loss]
        if len(alike) > 1:
            same = f"no rate was found: the loss is {found.loss:.4f} to the last bit at {', '.join(alike)}"
            return Found(None, f"{said}: {same}: its optimizer may not use learning_rate, or they are too low")
        ends = {min(one.rate for one in tried), max(one.rate for one in tried)}
        is_at_end = found.rate in ends
        self._found[name] = {"learning_rate": found.rate, "loss": found.loss, "is_at_end": is_at_end}
        self._store()
        told = f"{said}: {found.rate:g}, held-out loss {found.loss:.4f}"
        return Found(found.rate, told + ", at an end of the range: widen it" * is_at_end)

    def end(self) -> None:
        """Leave in the record what this search has asked for alone."""
        self._before = []
        self._store()

    def _take(self, trial: Trial) -> Entry | None:
        """The entry of `trial` from before, if it ended as it would again: under the same settings, on the same device,
        by the same versions."""
        settings = json.loads(json.dumps(record.settings(trial)))
        for entry in self._before:
            stored, installed = entry.stored or {}, entry.versions or {}
            is_same = all(stored.get(key) == value for key, value in settings.items())
            is_here = (
                entry.device == self._device.name and record.versions_of(trial.method).items() <= installed.items()
            )
            if is_same and is_here and entry.outcome != "crashed":
                self._before.remove(entry)
                return entry
        return None

    def _run(self, trial: Trial) -> Entry:
        self._progress(f"{trial.name} at {trial.method.training_arguments['learning_rate']:g}")
        folder = self._scratch / f"trial-{len(self._entries)}"
        folder.mkdir()
        with owner.Child(trial, folder) as child:
            outcome = child.finish()
        if isinstance(outcome, Completed):
            self._progress("")
        return record.entry(trial, outcome, self._device, None)

    def _store(self) -> None:
        """Write the record, whole or not at all."""
        sweep = self._sweep
        searched = {"low": sweep.low, "high": sweep.high, "budget": sweep.budget, "found": self._found}
        content = record.document([*self._entries, *self._before]) | {
            "datetime": datetime.now(UTC).isoformat(),
            "sweep": searched,
        }
        try:
            files.write(sweep.output, json.dumps(content, indent=1))
        except OSError as error:
            raise SweepError(f"--output {sweep.output}: cannot be written ({error.strerror})") from error


def _before(output: Path) -> list[Entry]:
    """What a search has left in `output`; nothing where that is not there. Raises SweepError for what is no sweep's."""
    if not output.exists():
        return []
    try:
        entries = record.load(output).entries
        if "sweep" in json.loads(output.read_text("utf-8")):
            return [*entries]
    except (OSError, ValueError):  # no record at all
        pass
    raise SweepError(f"--output {output}: already exists, and no sweep wrote it: give another name")


def at_rate(trial: Trial, rate: float) -> Trial:
    """`trial` with its method at `rate`, whatever the method says itself."""
    changed: Mapping[str, Any] = {**trial.method.changed, "learning_rate": rate}
    return replace(trial, method=replace(trial.method.with_learning_rate(rate), changed=changed))


def _target(name: str | None, device: Device, on_gpu: bool) -> Target:
    if name is None or not on_gpu:
        if name is not None:
            raise SweepError(f"--target {name}: a target caps a GPU's memory, and CUDA finds no GPU here")
        return NATIVE.on(device) if on_gpu else CPU
    return targets.named(name).on(device)


def _trial(
    sweep: Sweep, model: models.Model, method: Method, target: Target, examples: corpus.Corpus, on_gpu: bool
) -> Trial:
    try:
        return Trial(
            model=model,
            method=method,
            target=target,
            corpus=examples,
            seed=sweep.seed,
            epochs=sweep.epochs,
            max_steps=sweep.max_steps,
            device_index=0 if on_gpu else None,
            **sweep.settings.rows,
        )
    except ValueError as error:
        raise SweepError(str(error)) from error


def command(options: argparse.Namespace) -> int:
    """Search as `options` ask, and print what was found of each method; the exit status, 1 where one has no rate."""
    leave_to_us()
    asked = {part.name: getattr(options, part.name) for part in fields(Sweep) if hasattr(options, part.name)}
    asked |= {"methods": options.method, "reading": how_read(lambda name: getattr(options, name))}
    is_complete = True
    try:
        with files.alone(options.output):
            for found in run(Sweep(**asked), progress=show):
                show("")
                say(found.told)
                is_complete &= found.rate is not None
    except files.LockedError as error:
        return refuse(SweepError(f"--output {options.output}: process {error.process} searches there: wait for it"))
    except REFUSALS as error:
        return refuse(error)
    except KeyboardInterrupt:
        tell(f"interrupted: the finished trials are in {options.output}, and the same command goes on from there")
        return 130
    print(f"{options.output}: take the rates with --learning-rate {shlex.quote(str(options.output))}")
    return 0 if is_complete else 1
