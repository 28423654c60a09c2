"""The JSON that outlives a run: one entry a trial, beside pytest-benchmark's own rows in the same file."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight import __version__

if TYPE_CHECKING:  # a record is read without torch
    from lightweight.forecast import Forecast
    from lightweight.targets import Device
    from lightweight.trial import Outcome, Trial

BASELINE = "baseline"
"""The method that a model's others are held against."""

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "pytest", "pytest-benchmark")

Entry = dict[str, Any]
"""One trial as JSON. `step_seconds`, `train_loss`, `step_tokens`, `step_padded_tokens`: one number an optimizer step;
`*_bytes`, `*_seconds` in those units; `None` where there is nothing to say, or no finite number, which JSON does not
have. `tokens_per_step` are those of a full step, padding included. `tokens_per_second` counts the tokens of dialogues
(`steady_seconds_per_token`), `padded_tokens_per_second` all that were computed; in older records, which have no
`step_tokens`, `tokens_per_second` is `tokens_per_step` over the median step. `world_size` ranks trained the trial:
`tokens_per_second` is what they did together and `rank_tokens_per_second` what each did; `rank_peak_*` have an element
a rank where there are several, and other peaks are the largest. Keys that only some outcomes have: `reason`, `details`,
`requested_bytes`, `budget_bytes`, `diverged_at_step`, `failed_rank`. Keys that only some runs have: `test`, the pytest
node that ran the trial; `speedup`, a `Speedup` as JSON; `worker`, the pytest-xdist worker that ran the trial, with
`visible_gpu`, the number of its GPU."""

ForecastRow = dict[str, Any]
"""What was forecast of one model x method x target and not trained, as JSON: the rows of `lightweight plan --format
json`, and of a run's `forecasts`. Both have `FORECAST_KEYS`."""

KEYS = (
    *("model", "method", "target", "emulated", "weights", "precision", "corpus_digest", "seed", "outcome", "phase"),
    *("steps", "tokens_per_step", "train_loss", "step_seconds", "steady_step_seconds", "cold_seconds"),
    *("heldout_loss_before", "heldout_loss_after", "peak_allocated_bytes", "peak_reserved_bytes"),
    *("average_allocated_bytes", "host_peak_bytes", "forecast_allocated_bytes", "forecast_reserved_bytes"),
    *("forecast_verdict", "device", "device_bytes", "versions", "world_size"),
)
"""What every entry has, and what a reader of records may rely on."""

FORECAST_KEYS = (
    *("model", "method", "target", "max_length", "forecast_allocated_bytes", "forecast_reserved_bytes"),
    *("budget_bytes", "bytes_by_cause", "phase", "verdict"),
)

SERIES = ("train_loss", "step_seconds", "step_tokens", "step_padded_tokens", "rank_peak_allocated_bytes")
TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "method", "target", "corpus_digest", "outcome", "device"), str),
    **dict.fromkeys(SERIES, (list, type(None))),
    **dict.fromkeys(("versions", "forecast_bytes_by_cause"), (dict, type(None))),
    **dict.fromkeys(("phase", "reason", "test"), (str, type(None))),
}
NUMBERS = (
    *("peak_allocated_bytes", "host_peak_bytes", "budget_bytes", "device_bytes", "requested_bytes"),
    *("forecast_allocated_bytes", "forecast_reserved_bytes", "planned_steps", "steps_per_epoch"),
    *(
        "heldout_loss_before",
        "heldout_loss_after",
        "elsewhere_loss_before",
        "elsewhere_loss_after",
        "cold_seconds",
        "steady_step_seconds",
        "tokens_per_step",
        "world_size",
        "tokens_per_second",
        "padded_tokens_per_second",
        "rank_tokens_per_second",
    ),
)
DIVISORS = ("steady_step_seconds", "tokens_per_step", "tokens_per_second")
"""What a reader of records computes with: lists of numbers, the types of values, those that are numbers or None, and
those of them that something is divided by. Keys that only some runs have may be missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A stored run: its file, when it ended (ISO 8601, UTC), its entries, and what was forecast without training."""

    path: Path
    ended: str
    entries: Sequence[Entry]
    forecasts: Sequence[ForecastRow] = ()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times as fast as `baseline` a cell is per token, measured in pairs of alternating rounds.

    `log_ratios` has the natural logarithm of each pair's ratio; `ratio`, `low` and `high` are their geometric mean and
    its 95 % t-interval; `cap` is how many pairs there could have been at most. `pairing` is 'alternating', on a CPU
    'sharing a core', or 'one after the other' where both did not fit on the device at once, which is weaker. `floor` is
    the share of the stored speedup that the gate asked for, if it did, and `verdict` what came of it. Without pairs
    `reason` says why there is no number.
    """

    baseline: str
    log_ratios: tuple[float, ...] = ()
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    cap: int
    pairing: str = "alternating"
    steps_per_round: int
    floor: float | None = None
    verdict: str | None = None
    reason: str | None = None


class RecordError(ValueError):
    """A record that cannot be read. The message names the file and the mend."""


def settings(trial: Trial) -> Entry:
    """What a trial is: those parts of its record that are known before it runs."""
    method = trial.running_method
    return {
        "model": trial.model.name,
        "method": method.name,
        "target": trial.target.name,
        "weights": trial.model.weights,
        "weights_file": trial.model.weights_file,
        "precision": method.precision,
        "weights_dtype": method.weights_dtype,
        "adapter": None if method.adapter is None else _plain(method.adapter.to_dict()),
        "quantization": None if method.quantization is None else _plain(method.quantization.to_dict()),
        "training_arguments": _plain(method.training_arguments),
        "library": method.library,
        "captured_step": None if method.captured_step is None else _plain(dataclasses.asdict(method.captured_step)),
        "corpus_digest": trial.corpus.digest,
        "elsewhere_digest": trial.corpus.elsewhere_digest,
        "seed": trial.seed,
        "planned_steps": trial.steps,
        "steps_per_epoch": trial.steps_per_epoch,
        "max_length": trial.max_length,
        "tokens_per_step": trial.tokens_per_step,
        "world_size": trial.world_size,
    }


def entry(trial: Trial, outcome: Outcome, device: Device, forecast: Forecast | None) -> Entry:
    """The record of one trial, how it ended on `device`, and what was forecast of it, `None` where nothing could be."""
    measured = _plain(dataclasses.asdict(outcome.measured))
    on_gpu = trial.device_index is not None
    seconds = outcome.measured.step_seconds
    steady = steady_step_seconds(seconds, trial.steps_per_epoch)
    tokens_per_second, padded_tokens_per_second = (
        1 / per_token if (per_token := steady_seconds_per_token(seconds, tokens, trial.steps_per_epoch)) else None
        for tokens in (outcome.measured.step_tokens, outcome.measured.step_padded_tokens)
    )
    return {
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
        "device": device.name,
        "device_bytes": device.total_bytes,
        "device_driver": device.driver,
        "versions": versions() if trial.method.library == "peft" else versions(trial.method.library),
    }


def forecast_row(trial: Trial, forecast: Forecast) -> ForecastRow:
    """What was forecast of a trial that need not be run."""
    return {
        "model": trial.model.name,
        "method": trial.method.name,
        "target": trial.target.name,
        "max_length": trial.max_length,
        "tokens_per_step": trial.tokens_per_step,
        "forecast_allocated_bytes": forecast.allocated_bytes,
        "forecast_reserved_bytes": forecast.reserved_bytes,
        "budget_bytes": forecast.budget_bytes,
        "bytes_by_cause": dict(forecast.by_cause),
        "phase": forecast.phase,
        "verdict": forecast.verdict,
    }


def steady_step_seconds(step_seconds: tuple[float, ...], steps_per_epoch: int) -> float | None:
    """The median step, in seconds, after the first epoch, in which libraries still warm up, where there is a second
    one."""
    steady = step_seconds[steps_per_epoch:] or step_seconds
    return statistics.median(steady) if steady else None


def steady_seconds_per_token(
    step_seconds: Sequence[float], step_tokens: Sequence[int], steps_per_epoch: int
) -> float | None:
    """Seconds of a token: the median over whole epochs after the first one, in which libraries still warm up, of an
    epoch's seconds over its tokens. So every trial of a corpus is measured on the same tokens, however they are dealt
    to steps, and a short last step counts as what it is.

    Where no whole epoch comes after the first, it is over all that does, and within the first over all but its first
    step. None where the tokens of a step are not known.
    """
    if len(step_tokens) != len(step_seconds) or not all(step_tokens):
        return None
    steps = list(zip(step_seconds, step_tokens, strict=True))
    steady = steps[steps_per_epoch:] or steps[1:] or steps
    whole = [steady[start : start + steps_per_epoch] for start in range(0, len(steady), steps_per_epoch)]
    epochs = [epoch for epoch in whole if len(epoch) == steps_per_epoch and len(steps) > steps_per_epoch] or [steady]
    rates = [sum(seconds for seconds, _ in epoch) / sum(tokens for _, tokens in epoch) for epoch in epochs if epoch]
    return statistics.median(rates) if rates else None


def seconds_per_token(*entries: Entry) -> tuple[float | None, ...]:
    """What a token takes in each of `entries`, in seconds, so that they compare: of the tokens really seen where all of
    them know these, else, as in older records, the median step over a full step's tokens, padding included. None for
    one that has no steps."""
    timed = [entry for entry in entries if entry["steady_step_seconds"] is not None]
    if all(entry.get("step_tokens") and entry.get("tokens_per_second") for entry in timed):
        return tuple(1 / entry["tokens_per_second"] if entry in timed else None for entry in entries)
    return tuple(
        steady / tokens
        if (steady := entry["steady_step_seconds"]) is not None and (tokens := entry["tokens_per_step"])
        else None
        for entry in entries
    )


def times_as_fast(entry: Entry, baseline: Entry) -> float | None:
    """How many times as fast as `baseline` a token is in `entry`, None where one of both has no steps."""
    of_entry, of_baseline = seconds_per_token(entry, baseline)
    return of_baseline / of_entry if of_entry and of_baseline else None


def training_loss(losses: Sequence[float | None], steps_per_epoch: int) -> tuple[float, float] | None:
    """The mean training loss over the first and over the last epoch, in nats a token; over the first and the last tenth
    of the steps where there are not two epochs. One step's loss is that of its few pairs. None where a loss is no
    number, or there is none."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if not known or len(known) < len(losses):
        return None
    count = steps_per_epoch if len(known) >= 2 * steps_per_epoch else max(1, len(known) // 10)
    return statistics.fmean(known[:count]), statistics.fmean(known[-count:])


def versions(*others: str) -> dict[str, str | None]:
    """Installed versions of what a result depends on, and of `others`."""
    found: dict[str, str | None] = {"lightweight": __version__}
    for package in (*PACKAGES, *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


SAME_TRIAL = (
    *(
        "model",
        "method",
        "target",
        "weights",
        "corpus_digest",
        "seed",
        "planned_steps",
        "max_length",
        "tokens_per_step",
        "world_size",
    ),
    "device",
)
"""What tells the trials of one run apart."""


def add_speedup(entries: Iterable[Entry], of: Entry, speedup: Speedup) -> None:
    """Put `speedup` into that one of `entries` which is the trial `of`."""
    for entry in entries:
        if all(entry.get(key) == of.get(key) for key in SAME_TRIAL):
            entry["speedup"] = _plain(dataclasses.asdict(speedup))
            return


def load(paths: Iterable[Path]) -> list[Entry]:
    """The entries of all records at `paths`, in order. Raises RecordError."""
    entries: list[Entry] = []
    for path in paths:
        entries += document(path)["outcomes"]
    return entries


def run(path: Path) -> Run:
    """The run stored at `path`, or the forecasts that `lightweight plan --format json` stored there. Raises
    RecordError."""
    found = _json(path)
    if isinstance(found, list) and found:
        found = {"outcomes": [], "forecasts": found}
    checked = _checked(path, found)
    return Run(
        path=path,
        ended=(ended := str(checked.get("datetime") or "")),
        entries=[entry | {"run": ended} for entry in checked["outcomes"]],
        forecasts=checked["forecasts"],
    )


def document(path: Path) -> dict[str, Any]:
    """The whole JSON of the record at `path`, its `outcomes` and `forecasts` checked. Raises RecordError."""
    return _checked(path, _json(path))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecordError(f"record {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"record {path}: is not JSON ({error}): store the run again") from error


def _checked(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("outcomes"), list):
        raise RecordError(
            f"record {path}: has no 'outcomes': give a file that `pytest experiments --benchmark-json` wrote"
        )
    for index, entry in enumerate(found["outcomes"]):
        where = f"record {path}: outcome {index}"
        if not isinstance(entry, dict):
            raise RecordError(f"{where} is no object: store the run again")
        entry.setdefault("world_size", 1)  # of a run before there were others
        if missing := [key for key in KEYS if key not in entry]:
            raise RecordError(f"{where} has no {missing[0]!r}: store the run again")
        wrong = [key for key, types in TYPES.items() if not isinstance(entry.get(key), types)]
        wrong += [key for key in NUMBERS if not _is_number(entry.get(key))]
        wrong += [key for key in DIVISORS if not wrong and entry.get(key) is not None and entry[key] <= 0]
        wrong += [key for key in SERIES if not wrong and not all(map(_is_number, entry.get(key) or ()))]
        if not wrong and not all(map(_is_number, (entry.get("forecast_bytes_by_cause") or {}).values())):
            wrong.append("forecast_bytes_by_cause")
        if wrong:
            raise RecordError(f"{where} has {_brief(entry[wrong[0]])} as {wrong[0]!r}: store the run again")
        if not _is_speedup(entry.get("speedup")):
            raise RecordError(f"{where} has no sound 'speedup': store the run again")
    found["forecasts"] = found.get("forecasts") or []
    if isinstance(found["forecasts"], list):  # a plan also has rows that say why there is no forecast
        found["forecasts"] = [row for row in found["forecasts"] if not _is_no_forecast(row)]
    if not isinstance(found["forecasts"], list) or not all(map(_is_forecast, found["forecasts"])):
        raise RecordError(
            f"record {path}: has forecasts that are none: give what `lightweight plan --format json` wrote"
        )
    return found


def _brief(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:60]}..."


def _is_number(found: Any) -> bool:
    """Whether `found` is None or a number that can be computed with."""
    try:
        return found is None or (isinstance(found, int | float) and math.isfinite(float(found)))
    except OverflowError:
        return False


def _is_no_forecast(found: Any) -> bool:
    return isinstance(found, dict) and found.get("verdict") == "cannot_be_forecast"


def _is_forecast(found: Any) -> bool:
    """Whether `found` is what `forecast_row` or the plan wrote."""
    if not isinstance(found, dict) or not set(FORECAST_KEYS) <= set(found):
        return False
    by_cause = found["bytes_by_cause"]
    names = all(isinstance(found[key], str) for key in ("model", "method", "target", "verdict"))
    sizes = [found[key] for key in ("forecast_allocated_bytes", "forecast_reserved_bytes")]
    numbers = [*sizes, *by_cause.values()] if isinstance(by_cause, dict) else ["none"]
    optional = [found["budget_bytes"], found["max_length"]]
    return names and None not in numbers and all(map(_is_number, [*numbers, *optional]))


def _is_speedup(found: Any) -> bool:
    """Whether `found` is what `add_speedup` wrote, or nothing."""
    if found is None:
        return True
    if not isinstance(found, dict) or not {field.name for field in dataclasses.fields(Speedup)} <= set(found):
        return False
    numbers, cap = found["log_ratios"], found["cap"]
    whole = isinstance(numbers, list) and all(isinstance(number, float) and _is_number(number) for number in numbers)
    told = [found[key] for key in ("ratio", "low", "high")]
    whole = whole and all(map(_is_number, told)) and (None not in told or found["ratio"] is None)
    return whole and isinstance(cap, int) and cap >= max(8, len(numbers)) and cap % 4 == 0


def _plain(value: Any) -> Any:
    """`value` in JSON's own types, which are also all that pytest-xdist carries between processes."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted(_plain(item) for item in value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case Enum():
            return _plain(value.value)
        case str() | int() | float() | None:
            return value
    return str(value)
