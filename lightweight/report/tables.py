"""Which tables does the report have, and which columns? One table per question. A cell that ran out of memory is a row
like any other. The tables of speed are in `speed_tables`, columns that several tables have in `shared_columns`, what a
cell says in `words`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from lightweight.record import (
    Entry,
    ForecastRow,
    Run,
    baseline_of,
)
from lightweight.report import frontier as fitting
from lightweight.report import select, studies, words
from lightweight.report.select import cell_of, is_card, pace_of, planned, target_of
from lightweight.report.shared_columns import lengths, named, shares
from lightweight.report.speed import faster
from lightweight.report.speed_tables import ladder, peers, ranks, speedups
from lightweight.report.text_table import Column, Table, table
from lightweight.settings import changes
from lightweight.targets import size
from lightweight.verdict import noninferiority, power, seeds

NO_WORSE_NOTE = (
    "Losses in nats a token, means over seeds. In brackets the two-sided 90 % t-interval over seeds. Differences are "
    "from the baseline of the same seed. No worse: the whole interval is below the margin of {:g} nats. Elsewhere: "
    "plain English that is not from the corpus. Forgotten: how much its loss rose in training."
)


def tables(runs: Sequence[Run]) -> list[Table]:
    """Every table that has rows, results first."""
    entries = select.newest(runs)
    cells = select.main_cells(entries)
    every = [
        results(cells, among=entries, runs=runs),
        over_seeds(entries),
        losses(cells),
        data(entries),
        qualities(entries),
        answered(entries),
        speedups(cells, entries),
        memory_by_cause(cells, select.forecasts(runs)),
        *(ladder(rungs, number) for number, rungs in enumerate(select.ladders(entries))),
        peers(entries),
        ranks(entries),
        frontier(runs),
        history(runs),
        others(select.others(entries)),
    ]
    return [one for one in every if one.rows]


def _results(entries: Sequence[Entry], among: Sequence[Entry]) -> list[Column[Entry]]:
    return [
        *named(entries),
        ("outcome", "l", words.outcome),
        ("total", "r", words.total),
        ("step", "r", words.step),
        *shares(entries),
        ("speedup", "r", lambda entry: words.speedup(entry, pace_of(entry, among))),
        ("peak memory", "r", words.memory),
        ("forecast", "r", words.forecast),
        ("of baseline", "r", lambda entry: words.memory_ratio(entry, baseline_of(entry, entries))),
        ("held-out loss", "l", words.loss),
    ]


def _seed_and_worker(entries: Sequence[Entry]) -> list[Column[Entry]]:
    """The seed where there are several, and the worker where pytest-xdist had some."""
    columns: list[Column[Entry]] = []
    if len({entry.seed for entry in entries}) > 1:
        columns.append(("seed", "r", lambda entry: str(entry.seed)))
    if any(entry.worker is not None for entry in entries):
        columns.append(("worker", "l", _worker))
    return columns


def _worker(entry: Entry) -> str:
    """The pytest-xdist worker that ran the trial, and the number of its GPU."""
    return (entry.worker or "-") + ("" if entry.visible_gpu is None else f", GPU {entry.visible_gpu}")


def results(entries: Sequence[Entry], among: Sequence[Entry] | None = None, runs: Sequence[Run] = ()) -> Table:
    """One row a trial: how it ended, its time, memory and loss, and how they compare with its baseline; steps with the
    baseline's of its own run where one is `among` those. `runs` are what the entries come from, where that is known."""
    columns = [*_results(entries, among or entries), *lengths(entries), *_seed_and_worker(entries)]
    return table("results", "Every cell", columns, entries, entries, words.notes(entries, runs))


def over_seeds(entries: Sequence[Entry]) -> Table:
    """One row a cell that several seeds have trained: means with their intervals, and pairs of the same seed."""
    columns: list[Column[studies.Study]] = [
        ("model", "l", lambda study: study.first.model),
        ("method", "l", lambda study: words.method_among(study.first, entries)),
        ("card", "l", lambda study: words.marked_card(study.first)),
        ("seeds", "r", words.seeds),
        ("steps", "r", lambda study: str(study.first.planned_steps or "-")),
        ("step", "r", lambda study: words.estimate(study.geometric_mean(words.step_ms), "{:.1f}", " ms")),
        *(
            (heading, side, lambda study: words.estimate(study.geometric_mean(words.percent_of_peak), "{:.1f}", " %"))
            for heading, side, _ in shares(entries)
        ),
        ("speedup", "r", lambda study: words.estimate(study.speedup, "{:.2f}", "x")),
        ("peak memory", "r", words.largest),
        ("held-out loss", "r", lambda study: words.estimate(study.mean(lambda e: e.heldout_loss_after), "{:.3f}")),
        ("over baseline", "r", lambda study: words.estimate(study.over_baseline, "{:+.3f}")),
    ]
    rows = studies.studies(entries)
    note = (
        "Means over seeds; of step, share of the peak and speedup geometric means. In brackets the two-sided 95 % "
        "t-interval over seeds, of geometric means that of the logarithm. "
        "Speedup and loss over baseline compare each seed with the baseline of the same seed. Peak memory: the largest."
    )
    without_pair = [f"{why}." for why in words.unpaired(rows, entries, ("speedup", "loss over baseline"))]
    shown = [study.first for study in rows]
    return table("seeds", "Over seeds", columns, rows, shown, [note, *without_pair, *words.notes(shown)])


def others(entries: Sequence[Entry]) -> Table:
    """The same of what is no main cell."""
    columns: list[Column[Entry]] = [
        *_results(entries, entries),
        ("steps", "r", lambda entry: str(entry.planned_steps or "-")),
        ("tokens a row", "r", lambda entry: str(entry.max_length or "-")),
        *_seed_and_worker(entries),
    ]
    return table("others", "Shorter trials, other shapes, and budgets made for a check", columns, entries, entries)


def brief(runs: Sequence[Run]) -> Table:
    """The cells of `results` in the columns that a README of 120 characters a line has room for. Only `write.into`
    writes it: a whole report has `results`."""
    entries = select.newest(runs)
    cells = select.main_cells(entries)
    columns: list[Column[Entry]] = [
        *named(cells)[:-1],
        ("card", "l", lambda cell: words.marked_card(cell).removeprefix(f"{cell.device} ")),  # a note names it
        ("outcome", "l", words.end_of),
        ("step", "r", words.step),
        *shares(cells),
        ("speedup", "r", lambda cell: words.times(_ratio(cell, entries))),
        ("peak", "r", words.memory),
    ]
    notes = [note for note in words.notes(cells, runs) if not note.startswith(words.RANDOM)]
    return table("brief", "Every cell in brief", columns, cells, cells, notes)


def _ratio(entry: Entry, among: Sequence[Entry]) -> float | None:
    gain = faster(entry, pace_of(entry, among))
    return gain.ratio if gain else None


def losses(entries: Sequence[Entry]) -> Table:
    """Training and held-out loss of every cell that has taken steps or was meant to."""

    def over_baseline(entry: Entry) -> str:
        baseline, after = baseline_of(entry, entries), entry.heldout_loss_after
        if baseline is None or baseline is entry or planned(baseline) != planned(entry):
            return "-"  # none, or after another number of steps
        than = baseline.heldout_loss_after
        return "-" if after is None or than is None else f"{after - than:+.3f}"

    columns: list[Column[Entry]] = [
        *named(entries),
        ("outcome", "l", words.outcome),
        ("steps", "r", lambda entry: str(len(entry.train_loss or ()))),
        ("training", "r", _training),
        ("first epoch", "r", lambda entry: _mean((entry.train_loss or ())[: _epoch(entry)])),
        ("last epoch", "r", lambda entry: _mean((entry.train_loss or ())[-_epoch(entry) :])),
        ("held out before", "r", lambda entry: _loss(entry.heldout_loss_before)),
        ("after", "r", lambda entry: _loss(entry.heldout_loss_after)),
        ("over baseline", "r", over_baseline),
    ]
    shown = [entry for entry in entries if entry.train_loss or entry.outcome != "completed"]
    note = "Training loss is the mean of an epoch's steps; training is device time, without start and saving."
    return table("loss", "Loss", columns, shown, shown, [note])


def _training(entry: Entry) -> str:
    """The time of all steps together."""
    return f"{sum(filter(None, entry.step_seconds)):.1f} s" if entry.step_seconds else "-"


def _epoch(entry: Entry) -> int:
    """Steps of an epoch, or all of them where the record does not say."""
    return entry.steps_per_epoch or len(entry.train_loss or ()) or 1


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _loss(fmean(known)) if known else "-"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def data(entries: Sequence[Entry]) -> Table:
    """One row for what each model made of each corpus: how long its examples are, in tokens. They are counted up to
    powers of two, and so a median is told as a bound."""
    shown = select.of_data(entries)
    columns: list[Column[Entry]] = [
        ("model", "l", lambda entry: entry.model),
        ("corpus", "l", lambda entry: f"{entry.corpus_format or entry.trained_on or '-'} {entry.corpus_digest[:8]}"),
        ("examples", "r", lambda entry: f"{sum((entry.example_tokens or {}).values()):,}"),
        ("skipped", "r", lambda entry: "-" if entry.corpus_skipped is None else f"{entry.corpus_skipped:,}"),
        ("half are up to", "r", lambda entry: _bound(entry, 0.5)),
        ("the longest", "r", lambda entry: _bound(entry, 1.0)),
        ("tokens a row", "r", lambda entry: str(entry.max_length or "-")),
        ("cut", "r", lambda entry: "-" if entry.truncated_sequences is None else f"{entry.truncated_sequences:,}"),
    ]
    note = "Tokens of whole training examples. Cut: rows that lack a part of their example."
    return table("data", "What was trained on", columns, shown, shown, [note])


def _bound(entry: Entry, share: float) -> str:
    """Up to how many tokens at least `share` of the examples have."""
    lengths = select.lengths_of(entry)
    total, so_far = sum(count for _, count in lengths), 0
    for bound, count in lengths:
        so_far += count
        if so_far >= share * total:
            return f"{bound:,}"
    return "-"


def qualities(entries: Sequence[Entry], margin: float = noninferiority.MARGIN) -> Table:
    """Whether a method that several seeds have trained on real weights does worse than its baseline, by more than
    `margin` nats a token, and what it forgot."""
    columns: list[Column[noninferiority.Quality]] = [
        ("model", "l", lambda quality: quality.model),
        ("method", "l", lambda quality: words.method_among(quality.entries[0], entries)),
        ("seeds", "r", lambda quality: f"{len(quality.entries)}" + f", {quality.failed} failed" * bool(quality.failed)),
        ("held-out loss", "r", lambda quality: words.before_and_after(quality.heldout)),
        ("over baseline", "r", lambda quality: str(quality.difference or "-")),
        ("no worse?", "l", _conclusion),
        ("elsewhere", "r", lambda quality: words.before_and_after(quality.elsewhere)),
        ("forgotten", "r", lambda quality: str(quality.forgotten or "-")),
    ]
    rows = noninferiority.qualities(entries, margin)
    notes = [NO_WORSE_NOTE.format(margin)]
    compared: dict[tuple[str, str], list[str]] = {}  # by model and what is said of its margin
    for quality in rows:
        if quality.too_wide is not None:
            named = compared.setdefault((quality.model, quality.too_wide), [])
            named.append(words.method_among(quality.entries[0], entries))
    notes += [f"{model} x {' and '.join(methods)}: {said}." for (model, said), methods in compared.items()]
    return table("no-worse", "No worse?", columns, rows, [None] * len(rows), notes)


def _conclusion(quality: noninferiority.Quality) -> str:
    """What is concluded, and how many more seeds would decide where that is nothing."""
    if quality.conclusion != "inconclusive" or quality.failed:
        return quality.conclusion or "-"
    more = power.more_seeds(quality.differences, quality.margin)
    return "inconclusive" + (f", {more} more seed{'s' * (more > 1)}" if more else "")


def answered(entries: Sequence[Entry]) -> Table:
    """How many of a task's questions each cell answers right, before training and after."""
    shown = [entry for entry in entries if entry.task_questions and entry.task_matches_before is not None]

    def share(count: int | None, entry: Entry) -> str:
        return "-" if count is None else seeds.share(count, entry.task_questions or 1).text("{:.3f}")

    columns: list[Column[Entry]] = [
        *named(entries),
        ("seed", "r", lambda entry: str(entry.seed)),
        ("outcome", "l", words.outcome),
        ("task", "l", lambda entry: (entry.task_digest or "")[:8]),
        ("questions", "r", lambda entry: str(entry.task_questions)),
        ("before", "r", lambda entry: share(entry.task_matches_before, entry)),
        ("after", "r", lambda entry: share(entry.task_matches_after, entry)),
    ]
    note = "The share of questions whose greedy answer is exactly the right one, in brackets Wilson's 95 % interval."
    return table("task", "Answered right", columns, shown, shown, [note])


def memory_by_cause(entries: Sequence[Entry], untrained: Sequence[ForecastRow] = ()) -> Table:
    """Peak memory measured beside the forecast of it, by what it is for, under the target's limit."""
    causes = list(dict.fromkeys(cause for entry in entries for cause in entry.forecast_bytes_by_cause or {}))
    causes = causes or list(dict.fromkeys(cause for row in untrained for cause in row.bytes_by_cause))

    def of_trial(heading: str, cell: Callable[[Entry], str]) -> Callable[[Entry | ForecastRow], str]:
        """A trial's cell; a forecast's is the one below that is called so."""
        return lambda one: cell(one) if isinstance(one, Entry) else of_forecast[heading](one)

    of_forecast: dict[str, Callable[[ForecastRow], str]] = {
        "method": lambda row: row.method,
        "card": target_of,
        "outcome": lambda row: f"forecast: {words.ending(row.verdict)}",
        "measured": lambda row: "-",
        "forecast": lambda row: size(row.forecast_allocated_bytes),
    }

    def of_cause(cause: str) -> Column[Entry | ForecastRow]:
        return (cause, "r", lambda one: _size(_by_cause(one).get(cause)))

    columns: list[Column[Entry | ForecastRow]] = [
        ("model", "l", lambda one: one.model),
        ("method", "l", of_trial("method", lambda entry: words.method_among(entry, entries))),
        ("card", "l", of_trial("card", words.marked_card)),
        ("outcome", "l", of_trial("outcome", words.outcome)),
        ("limit", "r", lambda one: _size(one.budget_bytes)),
        ("measured", "r", of_trial("measured", words.memory)),
        ("forecast", "r", of_trial("forecast", words.forecast)),
        *map(of_cause, causes),
    ]
    trained = [entry for entry in entries if entry.forecast_bytes_by_cause or entry.peak_allocated_bytes]
    measured = {cell_of(entry) for entry in entries}
    only_forecast = [row for row in untrained if cell_of(row) not in measured and is_card(row.target)]
    rows: list[Entry | ForecastRow] = [*trained, *only_forecast]
    notes = ["A cell that ran out of memory has no peak. Causes are those of the forecast."] * bool(rows)
    said = changes((row.method, row.changed) for row in only_forecast)
    notes += [] if said is None else [said]
    return table("memory", "Peak memory by cause", columns, rows, [*trained, *[None] * len(only_forecast)], notes)


def _by_cause(one: Entry | ForecastRow) -> Mapping[str, int]:
    return (one.forecast_bytes_by_cause or {}) if isinstance(one, Entry) else one.bytes_by_cause


def _size(count: int | None) -> str:
    return size(count) if count else "-"


def frontier(runs: Sequence[Run]) -> Table:
    """Model x method x card: fits or not."""
    by_method = fitting.places(runs)
    columns = fitting.cards(by_method)
    return Table(
        key="frontier",
        title="The frontier: what fits which card",
        columns=["model", "method", *columns],
        aligned="ll" + "l" * len(columns),
        rows=[[*names, *(of[card].text if card in of else "-" for card in columns)] for names, of in by_method.items()],
        entries=[next((place.entry for place in of.values() if place.entry), None) for of in by_method.values()],
    )


def history(runs: Sequence[Run]) -> Table:
    """Every cell that more than one run has, run beside run."""
    entries = select.newest(runs)
    trends = {id(entry): select.trend(entry, runs) for entry in entries if is_card(entry.target)}
    shown = [entry for entry in entries if len(trends.get(id(entry), ())) > 1]

    def of_run(run: Run) -> Column[Entry]:
        def cell(entry: Entry) -> str:
            return next((words.summary(then, run) for other, then in trends[id(entry)] if other is run), "-")

        return (words.run_label(run), "l", cell)

    columns = [*named(entries), *(of_run(run) for run in select.by_age(runs) if run.entries)]
    return table("history", "History", columns, shown, shown)
