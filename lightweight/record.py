"""The JSON that outlives a run: one entry a trial, beside pytest-benchmark's own rows in the same file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightweight import __version__, schema

if TYPE_CHECKING:  # a record is read without torch
    from lightweight.forecast.replay import Forecast
    from lightweight.methods import Method
    from lightweight.targets import Device
    from lightweight.trial import Outcome, Trial

BASELINE = "baseline"
"""The method that a model's others are held against."""

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "pytest", "pytest-benchmark")

Entry = dict[str, Any]
"""One trial as JSON. `step_seconds`, `train_loss`, `step_tokens`, `step_padded_tokens`: one number an optimizer step;
`*_bytes`, `*_seconds` in those units; `None` where there is nothing to say, or no finite number, which JSON does not
have. `tokens_per_step` are those of a full step, padding included. `tokens_per_second` counts the tokens of dialogues
(`steady_seconds_per_token`), `padded_tokens_per_second` all that were computed; in older records, which have no
`step_tokens`, `tokens_per_second` is `tokens_per_step` over the median step. `world_size` ranks trained the trial:
`tokens_per_second` is what they did together and `rank_tokens_per_second` what each did; `rank_peak_*` have an element
a rank where there are several, and other peaks are the largest. Keys that only some outcomes have: `reason`, `details`,
`requested_bytes`, `budget_bytes`, `diverged_at_step`, `failed_rank`. Keys that only some runs have: `test`, the pytest
node that ran the trial, and `shown_as`, the table that it belongs to beside the main one; `speedup`, a `Speedup` as
JSON; `worker`, the pytest-xdist worker that ran the trial, with `visible_gpu`, the number of its GPU.
`method_digest` tells methods of one name apart; records from before there were digests have None.
`weights_revision` is the hub's commit of the weights. `versions` has `cuda` beside packages: what torch was built
with."""

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

ONE_AFTER_THE_OTHER = "one after the other"
"""The pairing of a speedup whose two sides shared nothing of the machine's temper: its interval is wider."""

BASELINE_SHARES = ("model", "target", "device", "world_size", "weights", "corpus_digest")
"""What a trial has in common with the baseline that it is held against: network, card, data."""

SAME_CELL = (*BASELINE_SHARES, "method", "method_digest", "precision", "max_length", "tokens_per_step")
"""What two runs of a cell have in common: rates and memory can be compared."""

SAME_TRIAL = (*SAME_CELL, "seed", "planned_steps")
"""What two runs of a trial have in common, losses and step times included, and what tells the trials of a run apart."""

SAME_BUT_RANKS = tuple(key for key in SAME_TRIAL if key != "world_size")
"""A trial on one GPU and the same on several. These four are all the lists that say when entries are alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A stored run: its file, when it ended (ISO 8601, UTC), its entries, and what was forecast without training.
    `commit` is the code's, `is_dirty` whether it had changes that were not committed; None where nothing says so."""

    path: Path
    ended: str
    entries: Sequence[Entry]
    forecasts: Sequence[ForecastRow] = ()
    commit: str | None = None
    is_dirty: bool | None = None

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
    the share of the stored speedup that the gate asked for, if it did, and `verdict` what came of it. Where the time
    for pairs was over before the verdict was clear, or the ratio known as precisely as was wanted,
    `ended_after_seconds` is that time. Without pairs `reason` says why there is no number. `high` is None with a
    `ratio` where nothing bounds it, after a single pair.
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
    ended_after_seconds: float | None = None
    reason: str | None = None


class RecordError(ValueError):
    """A record that cannot be read. The message names the file and the mend, in one line that a terminal can show."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` on one line, without characters that steer a terminal, turn text around, or cannot be encoded."""
    return readable(" ".join(text.split()))


def readable(text: str) -> str:
    """`text` with those characters replaced, its lines kept."""
    return "".join(
        c if c in "\n\t" or not _UNREADABLE & {unicodedata.category(c), unicodedata.bidirectional(c)} else "\ufffd"
        for c in text
    )


_UNREADABLE = {"Cc", "Cs", "Cn", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def settings(trial: Trial) -> Entry:
    """What a trial is: those parts of its record that are known before it runs."""
    method = trial.running_method
    return {
        "model": trial.model.name,
        "method": method.name,
        "method_digest": method_digest(trial.method),
        "target": trial.target.name,
        "weights": trial.model.weights,
        "weights_file": trial.model.weights_file,
        "weights_revision": weights_revision(trial.model.location),
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
    """Installed versions of what a result depends on, and of `others`; of CUDA that which torch was built with, where
    this process has torch."""
    torch: Any = sys.modules.get("torch")
    found: dict[str, str | None] = {"lightweight": __version__, "cuda": torch and torch.version.cuda}
    for package in (*PACKAGES, *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def method_digest(method: Method) -> str:
    """What tells `method` from others of its name: SHA-256 over what its author said, in hexadecimal.

    Left out are the name, and whatever has the library's own default: a new version of peft or transformers that writes
    another setting, or its own version, into a config does not make it another method."""
    said = {
        "adapter": _said(method.adapter),
        "quantization": _said(method.quantization),
        "weights_dtype": method.weights_dtype,
        "training_arguments": _plain(method.training_arguments),
        "captured_step": _said(method.captured_step),
        "library": method.library,
    }
    return _digest(said)


def weights_revision(location: str | None) -> str | None:
    """The hub's commit of weights that were loaded from its cache, `.../snapshots/COMMIT`; None for others."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", location or "")
    return found and found[1]


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
    return {"class": type(config).__name__, **{key: _plain(value) for key, value in values.items()}}


def _default_of(config: Any) -> dict[str, Any]:
    """What the config's class has where nobody says anything; nothing where it must be told something."""
    try:
        return dict(vars(type(config)()))
    except (TypeError, ValueError):
        return {}


def _digest(value: Any) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, sort_keys=True))  # where an object lies is no setting
    return hashlib.sha256(text.encode()).hexdigest()


def differing(one: Entry, other: Entry, keys: Sequence[str]) -> list[str]:
    """Which of `keys` two entries differ in. A digest that one of them does not have says nothing."""
    return [
        key
        for key in keys
        if one.get(key) != other.get(key) and not (key == "method_digest" and None in (one.get(key), other.get(key)))
    ]


def are_alike(one: Entry, other: Entry, keys: Sequence[str]) -> bool:
    """Whether two entries have `keys`, one of the lists above, in common."""
    return not differing(one, other, keys)


def grouped(entries: Iterable[Entry], keys: Sequence[str]) -> list[list[Entry]]:
    """`entries` in groups of those that have all of `keys` in common, in the order of their first."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        found.setdefault(tuple(repr(entry.get(key)) for key in keys), []).append(entry)
    return list(found.values())


def add_speedup(entries: Iterable[Entry], of: Entry, speedup: Speedup) -> None:
    """Put `speedup` into that one of `entries` which is the trial `of`."""
    for entry in entries:
        if are_alike(entry, of, SAME_TRIAL):
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
    commit = checked.get("commit_info")
    commit = commit if isinstance(commit, dict) else {}
    return Run(
        path=path,
        ended=(ended := _text_or_none(checked.get("datetime")) or ""),
        entries=[entry | {"run": ended} for entry in checked["outcomes"]],
        forecasts=checked["forecasts"],
        commit=None if commit.get("id") == "unknown" else _text_or_none(commit.get("id")),
        is_dirty=commit["dirty"] if isinstance(commit.get("dirty"), bool) else None,
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
    outcomes = [_completed_keys(entry) for entry in found["outcomes"]]
    forecasts = found.get("forecasts") or []
    if not isinstance(forecasts, list):
        raise RecordError(f"record {path}: has no list as 'forecasts': store the run again")
    forecasts = [row for row in forecasts if not _is_no_forecast(row)]
    for index, entry in enumerate(outcomes):
        if fault := schema.fault_of_outcome(entry, KEYS):
            raise RecordError(f"record {path}: outcome {index} {fault}: store the run again")
    for index, row in enumerate(forecasts):
        if fault := schema.fault_of_forecast(row, FORECAST_KEYS):
            raise RecordError(
                f"record {path}: forecast {index} {fault}: give what `lightweight plan --format json` wrote"
            )
    _tell_namesakes_apart(outcomes)
    return found | {"outcomes": outcomes, "forecasts": forecasts}


FORMER_TESTS = {"::test_a_rung_": "ladder", "::test_a_peer_": "peers"}
"""What the tests were called whose cells belong to a table of their own, before records said which."""


def _completed_keys(entry: Any) -> Any:
    """An entry with what records did not say at first: they were of one GPU, and a test's name said the table."""
    if not isinstance(entry, dict):
        return entry
    test = str(entry.get("test"))
    shown_as = next((table for name, table in FORMER_TESTS.items() if name in test), None)
    return {"world_size": 1, "shown_as": shown_as, "method_digest": None} | entry


def _is_no_forecast(found: Any) -> bool:
    """A plan also has rows that say why there is no forecast."""
    return isinstance(found, dict) and found.get("verdict") == "cannot_be_forecast"


def _tell_namesakes_apart(entries: Sequence[Entry]) -> None:
    """Methods of one name in one run, from before there were digests, get those of the settings that it stored."""
    settings = ("adapter", "quantization", "weights_dtype", "training_arguments", "captured_step", "library")
    unknown = [entry for entry in entries if entry["method_digest"] is None]
    for namesakes in grouped(unknown, [*BASELINE_SHARES, "method"]):
        digests = [_digest({key: entry.get(key) for key in settings}) for entry in namesakes]
        if len(set(digests)) > 1:
            for entry, digest in zip(namesakes, digests, strict=True):
                entry["method_digest"] = digest


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _plain(value: Any) -> Any:
    """`value` in JSON's own types, which are also all that pytest-xdist carries between processes."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case set() | frozenset():
            return sorted((_plain(item) for item in value), key=str)
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case Enum():
            return _plain(value.value)
        case str() | int() | float() | None:
            return value
    return str(value)
