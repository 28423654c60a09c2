"""What is stored of a trial and of a forecast? Their entries, and the JSON of a run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import TYPE_CHECKING, Any

from lightweight import __version__, importable, reached
from lightweight.record import codec
from lightweight.record.codec import as_json
from lightweight.record.entries import Entry, ForecastRow

if TYPE_CHECKING:  # a record is read without torch
    from lightweight.methods import Method
    from lightweight.targets import Device
    from lightweight.trial import Forecast, Outcome, Trial

SCHEMA = 1
"""The number of what a record's JSON looks like: one more whenever a key goes or gets another meaning, and
`reading.completed` then says what the former one meant. Records from before there were numbers have none."""

DISTRIBUTION = "lightweight-llm"
"""What is installed to have this package."""

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "pytest", "pytest-benchmark")


def document(entries: Iterable[Entry], forecasts: Iterable[ForecastRow] | None = None) -> dict[str, Any]:
    """The keys that lightweight adds to a run's JSON; without `forecasts` if there are none."""
    content: dict[str, Any] = {"schema": SCHEMA, "outcomes": [as_json(entry) for entry in entries]}
    return content if forecasts is None else content | {"forecasts": [as_json(row) for row in forecasts]}


def settings(trial: Trial) -> dict[str, Any]:
    """A trial's settings as JSON: the keys of its entry that are known before it runs."""
    method = trial.running_method
    return {
        "model": trial.model.name,
        "method": method.name,
        "method_digest": method_digest(trial.method),
        "changed": codec.plain(trial.method.changed) or None,
        "target": trial.target.name,
        "weights": trial.model.weights,
        "weights_file": trial.model.weights_file,
        "weights_revision": trial.model.weights_revision,
        "precision": method.precision,
        "weights_dtype": method.weights_dtype,
        "adapter": None if method.adapter is None else codec.plain(method.adapter.to_dict()),
        "quantization": None if method.quantization is None else codec.plain(method.quantization.to_dict()),
        "training_arguments": codec.plain(method.training_arguments),
        "library": method.library,
        "own_code": own_code(method),
        "captured_step": None
        if method.captured_step is None
        else codec.plain(dataclasses.asdict(method.captured_step)),
        "corpus_digest": trial.corpus.digest,
        "elsewhere_digest": trial.corpus.elsewhere_digest,
        "task_digest": trial.corpus.task and trial.corpus.task.digest,
        "task_questions": trial.corpus.task and len(trial.corpus.task.questions),
        "corpus_format": trial.corpus.origin and trial.corpus.origin.format,
        "corpus_skipped": trial.corpus.origin and trial.corpus.origin.skipped,
        "heldout_examples": len(trial.corpus.heldout),
        "seed": trial.seed,
        "planned_steps": trial.steps,
        "steps_per_epoch": trial.steps_per_epoch,
        "max_length": trial.max_length,
        "trained_on": trial.corpus.kind,
        "loss_on": trial.loss_on,
        "long": trial.long,
        "padding": "max" if trial.pads_to_max else "longest",
        "tokens_per_step": trial.tokens_per_step,
        "world_size": trial.world_size,
        "placement": trial.placement if trial.world_size > 1 else None,
    }


def entry(trial: Trial, outcome: Outcome, device: Device, forecast: Forecast | None) -> Entry:
    """The entry of a trial that ended with `outcome` on `device`. `forecast` is None if it could not be made."""
    measured = codec.plain(dataclasses.asdict(outcome.measured))
    trial = trial.with_rows(outcome.measured.training_rows)
    on_gpu = trial.device_index is not None
    seconds = outcome.measured.step_seconds
    steady = steady_step_seconds(seconds, trial.steps_per_epoch)
    tokens_per_second, padded_tokens_per_second = (
        1 / per_token if (per_token := steady_seconds_per_token(seconds, tokens, trial.steps_per_epoch)) else None
        for tokens in (outcome.measured.step_tokens, outcome.measured.step_padded_tokens)
    )
    values = {
        **settings(trial),
        "emulated": on_gpu and trial.target.emulated_on(device.name),
        "outcome": outcome.kind,
        "phase": getattr(outcome, "phase", None),
        "reason": getattr(outcome, "reason", None),
        "details": getattr(outcome, "details", None),
        "requested_bytes": getattr(outcome, "requested_bytes", None),
        "budget_bytes": trial.target.budget_bytes if on_gpu else None,
        "diverged_at_step": getattr(outcome, "step", None),
        "steps": len(measured["step_seconds"]),
        **measured,
        "steady_step_seconds": steady,
        "tokens_per_second": tokens_per_second,
        "padded_tokens_per_second": padded_tokens_per_second,
        "rank_tokens_per_second": tokens_per_second and tokens_per_second / trial.world_size,
        "failed_rank": getattr(outcome, "rank", None),
        "cold_seconds": outcome.measured.cold_seconds,
        "forecast_allocated_bytes": forecast and forecast.allocated_bytes,
        "forecast_reserved_bytes": forecast and forecast.reserved_bytes,
        "forecast_verdict": forecast and forecast.verdict,
        "forecast_phase": forecast and forecast.phase,
        "forecast_bytes_by_cause": forecast and dict(forecast.by_cause),
        "forecast_seconds": forecast and forecast.step_seconds and forecast.step_seconds * trial.steps,
        "device": device.name,
        "device_bytes": device.total_bytes,
        "device_driver": device.driver,
        "versions": versions_of(trial.method),
    }
    return codec.entry_of(values)


def forecast_row(trial: Trial, forecast: Forecast) -> ForecastRow:
    """The forecast of a trial that is not trained."""
    return ForecastRow(
        model=trial.model.name,
        method=trial.method.name,
        target=trial.target.name,
        max_length=trial.max_length,
        tokens_per_step=trial.tokens_per_step,
        forecast_allocated_bytes=forecast.allocated_bytes,
        forecast_reserved_bytes=forecast.reserved_bytes,
        budget_bytes=forecast.budget_bytes,
        bytes_by_cause=dict(forecast.by_cause.items()),
        phase=forecast.phase,
        verdict=forecast.verdict,
    )


def steady_step_seconds(step_seconds: tuple[float, ...], steps_per_epoch: int) -> float | None:
    """The median step after the first epoch, in seconds; of all steps if there is only one epoch. Libraries still warm
    up in the first epoch. None without steps."""
    steady = step_seconds[steps_per_epoch:] or step_seconds
    return statistics.median(steady) if steady else None


def steady_seconds_per_token(
    step_seconds: Sequence[float], step_tokens: Sequence[int], steps_per_epoch: int
) -> float | None:
    """Seconds per token: the median, over whole epochs after the first, of an epoch's seconds over its tokens. So every
    trial of a corpus is measured on the same tokens, however they are divided into steps.

    Without such an epoch it is over all steps after the first epoch, or within the first epoch over all steps but the
    first. None if the tokens of a step are not known.
    """
    if len(step_tokens) != len(step_seconds) or not all(step_tokens):
        return None
    steps = list(zip(step_seconds, step_tokens, strict=True))
    steady = steps[steps_per_epoch:] or steps[1:] or steps
    whole = [steady[start : start + steps_per_epoch] for start in range(0, len(steady), steps_per_epoch)]
    epochs = [epoch for epoch in whole if len(epoch) == steps_per_epoch and len(steps) > steps_per_epoch] or [steady]
    rates = [sum(seconds for seconds, _ in epoch) / sum(tokens for _, tokens in epoch) for epoch in epochs if epoch]
    return statistics.median(rates) if rates else None


def versions(*others: str) -> dict[str, str | None]:
    """Installed versions of the packages that a result depends on, and of `others`. `cuda` is the version that torch
    was built with; None if this process has not imported torch."""
    torch: Any = sys.modules.get("torch")
    installed: dict[str, str | None] = {"lightweight": __version__, "cuda": torch and torch.version.cuda}
    for package in (*PACKAGES, *others):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def versions_of(method: Method) -> dict[str, str | None]:
    """Those of `versions`, and of what else is installed that `method` needs: its library, what its `optim` is of, and
    what its author's modules import."""
    from lightweight.training_arguments import OPTIM_NEEDS

    optim = str(method.training_arguments.get("optim", ""))
    needed = {package for package, parts in OPTIM_NEEDS.items() if any(part in optim for part in parts)}
    needed |= reached.packages(tuple(method.own_code.values())) if method.own_code else set()
    owners = _owners() if needed else {}
    known = {*PACKAGES, DISTRIBUTION}
    others = {owner for package in needed for owner in owners.get(package, ()) if owner.lower() not in known}
    return versions(*([] if method.library == "peft" else [method.library]), *sorted(others))


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """What has to be installed for a package to be imported, by the package's name."""
    return packages_distributions()


def method_digest(method: Method) -> str:
    """SHA-256 of what the author of `method` said, in hexadecimal. It tells methods of one name apart."""
    return digest(said_of(method))


def said_of(method: Method) -> dict[str, Any]:
    """What the author of `method` said, as JSON.

    The name is left out, and so is every value that is the library's default. So a new version of peft or transformers,
    which writes more keys or its own version into a config, does not make it another method.
    """
    said = {
        "adapter": _said(method.adapter),
        "quantization": _said(method.quantization),
        "weights_dtype": method.weights_dtype,
        "training_arguments": codec.plain(method.training_arguments),
        "captured_step": _said(method.captured_step),
        "library": method.library,
    }
    own = own_code(method)
    return said if own is None else said | {"own_code": own}


def own_code(method: Method) -> dict[str, Any] | None:
    """The author's code in `method` by field: import paths, and SHA-256 of the source unless an installed package has
    it. None if there is no such code."""
    return {name: importable.described(value) for name, value in method.own_code.items()} or None


WRITTEN_BY_PEFT = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision")
"""What peft puts into a config, of itself and of the network it found."""


def _said(config: Any) -> Any:
    """The class of a config and those of its values that are not its default; None for None."""
    if config is None:
        return None
    if hasattr(config, "to_diff_dict"):  # transformers' quantization configs
        values = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    else:
        names = [field.name for field in dataclasses.fields(config) if field.name not in WRITTEN_BY_PEFT]
        default = _default_of(config)
        values = {name: getattr(config, name) for name in names if getattr(config, name) != default.get(name)}
    return {"class": type(config).__name__, **{key: codec.plain(value) for key, value in values.items()}}


def _default_of(config: Any) -> dict[str, Any]:
    """What the config's class has where nobody says anything; nothing where it must be told something."""
    try:
        return dict(vars(type(config)()))
    except (TypeError, ValueError):
        return {}


def digest(value: Any) -> str:
    """SHA-256 of `value`, which is plain JSON, in hexadecimal."""
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True))  # where an object lies is no setting
    return hashlib.sha256(text.encode()).hexdigest()
