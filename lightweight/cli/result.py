"""What becomes of trained weights: a folder with all that belongs beside them, in its place."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lightweight import models, record
from lightweight.cli.model_card import model_card
from lightweight.cli.output import RECORD_NAME, Output
from lightweight.cli.terminal import say
from lightweight.models import Model
from lightweight.targets import Device
from lightweight.training import ranks
from lightweight.trial import Completed, Measurements, Trial


def finish(
    trial: Trial, outcome: Completed, device: Device, output: Output, forecast_seconds: float | None = None
) -> None:
    """Complete the saved weights with all that belongs to them, and put them into their place. `forecast_seconds` is
    what the steps were forecast to take."""
    entry = replace(record.entry(trial, outcome, device, None), forecast_seconds=forecast_seconds)
    with output.completing() as result:
        (result / "training_args.bin").unlink(missing_ok=True)  # pickled, and full of this machine's paths
        models.load_tokenizer(trial.model).save_pretrained(result)
        base = base_name(trial.model)
        adapter = result / "adapter_config.json"
        if adapter.exists():  # peft wrote where the weights lay here, which may be a folder that goes now
            config = json.loads(adapter.read_text("utf-8")) | {"base_model_name_or_path": base}
            adapter.write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
        (result / RECORD_NAME).write_text(json.dumps(record.document([entry]), indent=1), "utf-8")
        on_hub = trial.model.weights == "pretrained" and not Path(base).is_absolute()
        model_card(entry, base if on_hub else None).save(result / "README.md")  # in the place of the one peft wrote
        if output.runs.is_dir() and not output.runs.is_symlink():
            _copy(output.runs, result / output.runs.name)
    output.publish()
    say(_closing_line(trial, outcome.measured, output))


def _copy(folder: Path, to: Path) -> None:
    """Raises OSError, which names what could not be copied: shutil's own has a list of all, and no number."""
    try:
        shutil.copytree(folder, to, symlinks=True)
    except shutil.Error as error:
        _, place, why = error.args[0][0]
        raise OSError(errno.EIO, str(why), str(place)) from error


def _closing_line(trial: Trial, measured: Measurements, output: Output) -> str:
    first, last = record.training_loss(measured.train_loss, trial.steps_per_epoch) or (math.nan, math.nan)
    return (
        f"{trial.name}: {len(measured.train_loss)} steps, training loss {first:.4f} -> {last:.4f}, "
        f"held out {measured.heldout_loss_before:.4f} -> {measured.heldout_loss_after:.4f}; saved in {output.folder}"
    )


def publish_finished(entry: Mapping[str, Any], output: Output) -> Completed:
    """What the interrupted job had finished, now in its place; `entry` is its record's, as JSON."""
    ranks.of_first(output.publish)
    names = {field.name for field in fields(Measurements)}
    say(f"nothing is left to train: the interrupted job had finished; saved in {output.folder}")
    return Completed(measured=Measurements(**{name: value for name, value in entry.items() if name in names}))


def base_name(model: Model) -> str:
    """What finds the base model again: its id on the hub, its folder, or its name here."""
    if model.source is None:
        return model.name
    folder = Path(model.source)
    return str(folder.resolve()) if folder.is_dir() else model.source
