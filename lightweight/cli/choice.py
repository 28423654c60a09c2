"""Which method does a job take if none was given? And which one instead of one that ran out of memory?

By forecast: of what fits, the one that is expected to be the fastest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lightweight import methods, targets
from lightweight.child import helper, reaper
from lightweight.cli.job import Job, JobError, NothingFitsError
from lightweight.cli.output import Interrupted
from lightweight.cli.terminal import say
from lightweight.corpus import Corpus
from lightweight.forecast import calibration, placing, plan, plan_row, plan_search, replay, step_time, tracer
from lightweight.forecast.step_time import StepTime
from lightweight.methods import Method
from lightweight.models import Model, ModelError
from lightweight.targets import Device, Target, size
from lightweight.training import ranks
from lightweight.trial import Forecast, Trial


class Choice(NamedTuple):
    """The method of a job, and what its steps are forecast to take; None where nobody knows."""

    method: Method
    step: StepTime | None = None


def choose(
    job: Job,
    model: Model,
    target: Target,
    device: Device,
    before: Interrupted | None,
    progress: Callable[[str], None],
    read: Corpus | None = None,
) -> Choice:
    """The method of a job that was given none, which is told in one line, with as many rows a pass as fit: of those
    that `read`, its corpus, gives, else of the longest there may be. Raises NothingFitsError and JobError."""
    if before is not None and before.method is not None:
        if before.method not in methods.METHODS:  # it was imported from where only its name says
            raise JobError(
                f"--resume: the job in {before.place} is of method {before.method}, which is none of the suite's: give "
                "it with --method"
            )
        say(f"method {before.method}: what the interrupted job was trained with")
        method = _as_forecast(job.settings.apply(methods.named(before.method), ranks.world_size()))
        stored = before.settings.get("captured_step") or {}
        planned = _with_stored_passes(method, before.training_arguments)
        return Choice(planned.recomputing(stored.get("recompute", 0)).offloading(stored.get("offload", 0)))
    if device.total_bytes is None and target.total_bytes is None:
        if model.weights == "random" and job.settings.fits(methods.BASELINE):
            say("method baseline: no GPU or --target, so no forecast; random weights leave adapters nothing to adapt")
            return Choice(job.settings.apply(methods.BASELINE, ranks.world_size()))
        say("method lora: no GPU or --target, so no forecast; it trains the fewest weights, and in fp32 on a CPU")
        return Choice(job.settings.apply(methods.LORA, ranks.world_size()))
    rows = _forecasts(job, model, target, device, (), progress, read)
    row = next((row for row in rows if row.chosen), None)
    budget = rows[0].target.budget_bytes or 0
    if row is None or row.forecast is None:
        known = [(row.forecast.reserved_bytes, row.method.name) for row in rows if row.forecast is not None]
        if not known:
            raise NothingFitsError(f"model {job.model}: no method can be forecast: {rows[0].reason}: give --method")
        least, name = min(known, key=operator.itemgetter(0))
        raise NothingFitsError(
            f"model {job.model}: no method is forecast to fit {size(budget)}: {name} takes least, "
            f"{size(least)}: take a smaller --batch-size or --max-length, or more memory"
        )
    fitting = [row.method.name for row in rows if row.verdict == "fits"]
    where = "" if device.total_bytes else ", but it is trained on this CPU, which has no such budget"
    method = _as_forecast(job.settings.apply(methods.named(row.method.name), ranks.world_size()))
    chosen = method.with_passes(row.accumulation)
    passes = "" if chosen == method else f" in {row.passes} passes of {row.batch_size} rows a step"
    passes += f", {row.recomputed_layers} layers computed twice" if row.recomputed_layers else ""
    passes += f", the activations of {row.offloaded_layers} layers on the host" if row.offloaded_layers else ""
    chosen = chosen.recomputing(row.recomputed_layers).offloading(row.offloaded_layers)
    say(
        f"method {method.name}{passes}: {size(row.forecast.reserved_bytes)} of {target.name}'s {size(budget)} "
        f"by forecast, expected to be the fastest of what fits ({', '.join(fitting)}){_check(method)}{where}"
    )
    return Choice(chosen, row.step)


def placed(
    trial: Trial, job: Job, before: Interrupted | None, device: Device, progress: Callable[[str], None]
) -> Trial:
    """A job's trial with its network where the command line, or the interrupted job, says; else where it is forecast to
    fit, which is told in one line."""
    said = job.settings.placement or (before and before.settings.get("placement"))
    if trial.world_size == 1 or trial.method.captured_step is not None or trial.device_index is None or said:
        return replace(trial, placement=said or "replicated")

    def forecast(of: Trial) -> Forecast:
        # A forecast of one of several ranks plays that it is one, which a process that is one cannot.
        with reaper.own.temporary_folder() as folder:
            return replay.of_trial(helper.call(tracer.trace_on, folder, of, device), of, device)

    progress(f"{trial.name}: forecasting where its network fits")
    try:
        found = placing.placed(trial, forecast)
    except tracer.ForecastError as error:
        say(f"replicated on {trial.world_size} GPUs, without a forecast ({error})")
        return trial
    finally:
        progress("")
    say(f"{found.placement} on {trial.world_size} GPUs, by forecast")
    return found


def timed(trial: Trial, device: Device, progress: Callable[[str], None]) -> StepTime | None:
    """What a step of a trial whose method was given is forecast to take; None where nobody knows."""
    if device.total_bytes is None or targets.rates(device.name) is None or trial.world_size > 1:
        return None
    progress(f"{trial.name}: tracing a step")
    try:
        traced = tracer.trace_on(trial, device)
    except (tracer.ForecastError, ModelError):  # no forecast is no reason not to train
        return None
    finally:
        progress("")
    return step_time.forecast(traced, trial, device.name, calibration.stored())


def _as_forecast(method: Method) -> Method:
    """`method`, its step not compiled, however long the job: what a compiler makes of it is not forecast."""
    step = method.captured_step
    return method if step is None else replace(method, step=replace(step, compile=False))


def _check(method: Method) -> str:
    """What a captured step is subject to, in words."""
    if method.captured_step is None:
        return ""
    stock = method.name.removesuffix("-captured")
    return f"; its steps are captured if they agree with the Trainer's (--method {stock} trains without capturing)"


def _with_stored_passes(method: Method, stored: Mapping[str, Any]) -> Method:
    """`method` with those passes that a job of its stored arguments was planned with."""
    wanted = stored.get("per_device_train_batch_size", 8), stored.get("gradient_accumulation_steps", 1)
    for planned in (method, *plan_search.smaller_passes(method, ranks.world_size())):
        on_rank = planned.on_rank(ranks.world_size())
        if (on_rank.sequences_per_pass, on_rank.passes_per_step) == wanted:
            return planned
    return method


def _forecasts(
    job: Job,
    model: Model,
    target: Target,
    device: Device,
    without: Sequence[str],
    progress: Callable[[str], None],
    read: Corpus | None = None,
) -> list[plan_row.PlanRow]:
    """A row for each method that a plan lists and that has what is set, but those called `without`; captured ones where
    there is a GPU."""
    candidates = [
        job.settings.apply(method, ranks.world_size())
        for method in methods.PLANNED
        if method.name not in without
        and job.settings.fits(method)
        and (device.total_bytes is not None or method.captured_step is None)
    ]
    if target.total_bytes is None:  # the card as it is
        target = replace(target, total_bytes=device.total_bytes)
    if device.total_bytes is not None:  # as fast as the card at hand is, whosever memory it has
        target = replace(target, card=device.name)
    question = plan_row.PlanOptions(
        keeps_passes=job.settings.keeps_passes,
        gpus=ranks.world_size(),
        placement=job.settings.placement,
        corpus=read,
        **job.settings.rows,
    )
    try:
        if ranks.world_size() == 1:
            return plan.plan([model], candidates, [target], question, progress=progress)
        # A forecast of one of several ranks plays that it is one, which a process that is one cannot.
        with reaper.own.temporary_folder() as folder:
            return helper.call(plan.plan, folder, [model], candidates, [target], question)
    finally:
        progress("")


def instead(trial: Trial, job: Job, device: Device, progress: Callable[[str], None]) -> str:
    """What to try where `trial` ran out of memory."""
    smaller = "take a smaller --batch-size or --max-length"
    if device.total_bytes is None and trial.target.total_bytes is None:
        return f"{smaller}, or a method that trains less"
    try:
        rows = _forecasts(job, trial.model, trial.target, device, (trial.method.name,), progress, trial.corpus)
    except tracer.ForecastError as error:
        return f"{smaller} ({error})"
    row = next((row for row in rows if row.chosen), None)
    if row is None or row.forecast is None:
        return f"no other method is forecast to fit: {smaller}"
    batch = ""
    if row.accumulation != job.settings.apply(methods.named(row.method.name), ranks.world_size()).passes_per_step:
        if row.question.gpus > 1:
            return smaller
        batch = f" --batch-size {row.batch_size}"
    return f"--method {row.method.name}{batch} is forecast to fit, with {size(row.forecast.reserved_bytes)}"
