"""Which methods fit which cards? `lightweight plan MODEL`, without a GPU or the weights."""

from __future__ import annotations

import argparse
import json
import traceback
from dataclasses import fields

from lightweight import corpus, methods, models, names, record, targets
from lightweight.cli import data
from lightweight.cli.terminal import refuse, show
from lightweight.forecast import calibration, plan, plan_choice, plan_row, plan_table, step_time, tracer
from lightweight.settings import how_read


def command(options: argparse.Namespace) -> int:
    """Forecast every model x method x target, and print the table or JSON; the exit status, 1 where nothing fits."""
    try:
        wanted_models = [models.named(name) for name in dict.fromkeys(options.models)]
        cards = [target.name for target in targets.TARGETS.values() if target.total_bytes]
        wanted_targets = [targets.named(name) for name in dict.fromkeys(options.target or cards)]
        measured = [entry for path in options.record for entry in record.load(path).entries]
        named = [methods.named(name) for name in dict.fromkeys(options.method or ())] or methods.PLANNED
        wanted_methods = options.settings.applied(named)
        for model in wanted_models:
            record.check_searched(options.settings.learning_rate, model.name, *wanted_methods)
        names.refuse_namesakes("method", wanted_methods)
        how = how_read(lambda name: getattr(options, name))
        read = data.read_if_named(options.corpus, how, show)
        calibrations = [*map(calibration.load, options.calibration), *calibration.stored()]
    except ValueError as error:
        return refuse(error)
    try:
        question = plan_row.Question(
            keeps_passes=options.settings.keeps_passes,
            gpus=options.gpus or 1,
            corpus=read,
            max_batch=options.max_batch,
            longest_row=options.max_length_that_fits,
            fewest_gpus=options.gpus is not None,
            job=step_time.Job(**{part.name: getattr(options, part.name) for part in fields(step_time.Job)}),
            **options.settings.rows,
        )
        rows = plan.plan(
            wanted_models,
            wanted_methods,
            wanted_targets,
            question,
            measured=measured,
            calibrations=calibrations,
            progress=show,
            failed=_show_traceback if options.traceback else lambda error: None,
        )
    except (tracer.ForecastError, models.ModelError, corpus.CorpusError) as error:
        return refuse(error)
    finally:
        show("")
    is_json = options.format == "json"
    print(json.dumps([row.as_json() for row in rows], indent=1) if is_json else plan_table.table(rows))
    if options.target:
        return 0 if plan_choice.each_target_has_a_method(rows) else 1
    return 0 if any(row.chosen for row in rows) else 1


def _show_traceback(error: Exception) -> None:
    show("")
    traceback.print_exception(error)
