"""What goes into a paper? One row a cell in the columns that were chosen, as LaTeX, CSV, Markdown or text, and in words
how it was measured.

A row is a cell with all its seeds: a number is their mean, in brackets its 95 % t-interval; of a time or a rate it is
the geometric mean with the interval of the logarithm. CSV has plain numbers, the
ends of an interval in columns of their own, and an empty field where there is nothing to say.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightweight.record import SAME_BASELINE, Entry, Run, one_line
from lightweight.report import select, studies, words
from lightweight.report.studies import Study
from lightweight.report.text_table import Column, Table, table
from lightweight.targets import GiB
from lightweight.verdict.seeds import Estimate

Form = Literal["terminal", "markdown", "latex", "csv"]


class ColumnError(ValueError):
    """A column that there is none of. The message names those that there are."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """A column of words, the same for all seeds of a cell."""

    heading: str
    of: Callable[[Study], str]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A column of numbers: `of` gives a cell's, in `unit`, and `form` writes one for a reader; `varies` says that seeds
    have one each, so that there is an interval."""

    heading: str
    unit: str
    form: str
    of: Callable[[Study], Estimate | float | None]
    varies: bool = True

    def text(self, study: Study) -> str:
        """The number as a person reads it, with its interval where it has one."""
        value = self.of(study)
        if value is None:
            return "-"
        return value.text(self.form) if isinstance(value, Estimate) else self.form.format(value)

    def fields(self, study: Study) -> list[str]:
        """The number and, where seeds vary, the ends of its interval, as CSV has them."""
        value = self.of(study)
        if not isinstance(value, Estimate):
            return ["" if value is None else repr(value), *[""] * 2 * self.varies]
        ends = (value.low, value.high) if math.isfinite(value.high) else (None, None)
        return ["" if one is None else repr(one) for one in (value.mean, *ends)]


def _tokens(entry: Entry) -> float | None:
    return entry.tokens_per_second if entry.step_tokens else None  # older records counted padding


def _forgotten(entry: Entry) -> float | None:
    before, after = entry.elsewhere_loss_before, entry.elsewhere_loss_after
    return None if before is None or after is None else after - before


def _peak(study: Study) -> float | None:
    """The largest of the seeds, in GiB; None where a trial of another kind has none."""
    peaks = [entry.peak_bytes for entry in study.completed if entry.peak_bytes]
    return max(peaks) / GiB if peaks else None


COLUMNS: Mapping[str, Word | Number] = {
    "model": Word(heading="model", of=lambda study: study.first.model),
    "method": Word(heading="method", of=lambda study: study.first.method),
    "card": Word(heading="card", of=lambda study: words.timed_on(study.first)),
    "length": Word(heading="tokens a row", of=lambda study: str(study.first.max_length or "-")),
    "outcome": Word(heading="outcome", of=lambda study: words.outcome(_worst(study))),
    "seeds": Word(heading="seeds", of=words.seeds),
    "rate": Word(heading="learning rate", of=lambda study: _rates(study)),
    "steps": Number(heading="steps", unit="", form="{:,}", of=lambda study: study.first.planned_steps, varies=False),
    "trainable": Number(
        heading="trainable",
        unit="M",
        form="{:,.6g}",
        of=lambda s: _millions(s.first.trainable_parameters),
        varies=False,
    ),
    "parameters": Number(
        heading="parameters", unit="M", form="{:,.1f}", of=lambda s: _millions(s.first.parameters), varies=False
    ),
    "peak": Number(heading="peak memory", unit="GiB", form="{:.2f}", of=_peak, varies=False),
    "step": Number(heading="step", unit="ms", form="{:.1f}", of=lambda study: study.geometric_mean(words.step_ms)),
    "tokens": Number(heading="tokens", unit="1/s", form="{:,.0f}", of=lambda study: study.geometric_mean(_tokens)),
    "share": Number(
        heading="of the card's peak",
        unit="%",
        form="{:.1f}",
        of=lambda study: study.geometric_mean(words.percent_of_peak),
    ),
    "speedup": Number(heading="speedup", unit="x", form="{:.2f}", of=lambda study: study.speedup),
    "total": Number(
        heading="total", unit="s", form="{:.1f}", of=lambda study: study.geometric_mean(lambda e: e.cold_seconds)
    ),
    "loss-before": Number(
        heading="loss before", unit="nats", form="{:.3f}", of=lambda s: s.mean(lambda e: e.heldout_loss_before)
    ),
    "loss": Number(
        heading="held-out loss", unit="nats", form="{:.3f}", of=lambda s: s.mean(lambda e: e.heldout_loss_after)
    ),
    "over-baseline": Number(heading="over baseline", unit="nats", form="{:+.3f}", of=lambda study: study.over_baseline),
    "task": Number(heading="answered right", unit="", form="{:.3f}", of=lambda study: study.answered),
    "forgotten": Number(heading="forgotten", unit="nats", form="{:+.3f}", of=lambda study: study.mean(_forgotten)),
    "note": Word(heading="note", of=lambda study: _data_note(study)),
}
"""The columns that there are, by the names that `--columns` takes."""

GEOMETRIC = {"step", "tokens", "share", "total", "speedup"}
"""Those with geometric means over seeds."""

DEFAULT = (
    *("model", "method", "card", "length", "outcome", "seeds", "rate", "trainable", "peak", "step", "tokens"),
    *("share", "loss", "over-baseline", "forgotten", "note"),
)
"""The columns where nobody chooses. CSV has the numbers alone, and so has all of them; elsewhere the card, the
length and the outcome stand where rows differ in them, the rate where it differs between methods of one name, a number
where any row has one, and the note below."""


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _rates(study: Study) -> str:
    """The learning rates of its seeds."""
    return ", ".join(dict.fromkeys(map(words.learning_rate, study.entries)))


def _data_note(study: Study) -> str:
    """How what the method trained on differs from what the others did, in any of its seeds; nothing where it does
    not."""
    return "; ".join(dict.fromkeys(entry.data_note for entry in study.entries if entry.data_note))


def _worst(study: Study) -> Entry:
    """A seed that did not complete, if any did not."""
    return next((entry for entry in study.entries if entry.outcome != "completed"), study.first)


def chosen(text: str | None) -> tuple[str, ...] | None:
    """The columns that `text` names, with commas between them; None where it is None. Raises ColumnError."""
    if text is None:
        return None
    named = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in named if name not in COLUMNS]:
        raise ColumnError(f"--columns: there is no {unknown[0]!r}: choose from {', '.join(COLUMNS)}")
    return named


def published(runs: Sequence[Run], form: Form, columns: Sequence[str] | None = None) -> str:
    """The cells of `runs`, those of a report's results, in `columns`, the default where there are none, with how they
    were measured; CSV has the numbers alone."""
    if form == "csv":
        return _csv(_rows(runs), columns or DEFAULT)
    shown = tabled(runs, columns)
    return _latex(shown) if form == "latex" else f"{shown.text(form)}\n"


def _rows(runs: Sequence[Run]) -> list[Study]:
    return studies.studies(select.main_cells(select.newest(runs)), least=1)


def _of_first(of: Callable[[Entry], str]) -> Callable[[Study], str]:
    return lambda study: of(study.first)


TELLING: Mapping[str, Callable[[Study], str]] = {
    "rate": lambda study: f"rate {_rates(study)}",
    **{
        {"planned_steps": "steps", "max_length": "length"}.get(key, key): _of_first(of)
        for key, of in words.CONDITIONS.items()
        if key != "seed"
    },
    "corpus": lambda study: f"corpus {study.first.corpus_digest[:6]}",
    "card": lambda study: f"on {words.timed_on(study.first)}",
}
"""What tells rows of one model and method apart, by the column that shows it where there is one."""


def _namesakes(rows: Sequence[Study]) -> list[list[Study]]:
    """The rows of each model and method."""
    names: dict[tuple[str, str], list[Study]] = {}
    for study in rows:
        names.setdefault((study.first.model, study.first.method), []).append(study)
    return list(names.values())


def _of(rows: Sequence[Study], columns: Sequence[str]) -> dict[str, Word | Number]:
    """Those `columns` by name, in which a method has with it what tells it from its namesakes among `rows` and no other
    of them shows."""
    names = {}
    for namesakes in _namesakes(rows):
        differing = {key: of for key, of in TELLING.items() if len({of(study) for study in namesakes}) > 1}
        first = [study.first for study in namesakes]
        for study in namesakes:
            marks = [of(study) for key, of in differing.items() if key not in columns]
            marks += [words.apart_from(study.first, first)] * (
                len({entry.method_digest for entry in first}) > 1 and not differing
            )
            names[id(study)] = study.first.method + (f" ({', '.join(marks)})" if marks else "")
    method = Word(heading="method", of=lambda study: names[id(study)])
    return {name: method if name == "method" else COLUMNS[name] for name in columns}


def _usual(rows: Sequence[Study]) -> Sequence[str]:
    """Those of DEFAULT that say something of `rows`, beside how they were measured."""
    tells = {
        "card": len({words.timed_on(entry) for study in rows for entry in study.entries}) > 1,
        "length": len({study.first.max_length for study in rows}) > 1,
        "rate": any(len(set(map(_rates, namesakes))) > 1 for namesakes in _namesakes(rows)),
        "outcome": any(len(study.completed) < len(study.entries) for study in rows),
        "note": False,
    }
    numbers = [(name, of) for name in DEFAULT if isinstance(of := COLUMNS[name], Number)]
    tells |= {name: not rows or any(of.of(study) is not None for study in rows) for name, of in numbers}
    return [name for name in DEFAULT if tells.get(name, True)]


def tabled(runs: Sequence[Run], columns: Sequence[str] | None = None) -> Table:
    """The same as a table, how it was measured as its note."""
    rows = _rows(runs)
    columns = _usual(rows) if columns is None else columns

    def column(of: Word | Number) -> Column[Study]:
        if isinstance(of, Word):
            return of.heading, "l", of.of
        return f"{of.heading} ({of.unit})" if of.unit else of.heading, "r", of.text

    first = [study.first for study in rows]
    return table(
        "published", "Published", [*map(column, _of(rows, columns).values())], rows, first, [measured(rows, columns)]
    )


def _csv(rows: Sequence[Study], columns: Sequence[str]) -> str:
    """A field a number, its unit in the heading, those of its interval beside it."""
    written = io.StringIO()
    out = csv.writer(written, lineterminator="\n")
    headings: list[str] = []
    of_name = _of(rows, columns)
    for name, of in of_name.items():
        unit = f" ({of.unit})" if isinstance(of, Number) and of.unit else ""
        headings += [name + unit] + [f"{name} {end}{unit}" for end in ("low", "high")] * (
            isinstance(of, Number) and of.varies
        )
    out.writerow(headings)
    for study in rows:
        fields: list[str] = []
        for of in of_name.values():
            fields += [_no_formula(one_line(of.of(study)))] if isinstance(of, Word) else of.fields(study)
        out.writerow(fields)
    return written.getvalue()


def _no_formula(text: str) -> str:
    """`text` as text: what a spreadsheet would take for a formula is quoted."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # after a row's end it would be the distance to the next one
    "]": "{]}",
    "*": "{*}",  # and this would forbid a break there
}
"""What stands for something else in LaTeX's text, and how it is written there."""


def latex(text: str) -> str:
    """`text` as text, whatever stands in it."""
    return "".join(LATEX.get(character, character) for character in one_line(text))


def _latex(shown: Table) -> str:
    """A table of booktabs, its note as the caption."""
    (note,) = shown.notes
    lines = [
        r"% needs \usepackage{booktabs} and \usepackage[T1]{fontenc}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{shown.aligned}}}",
        r"\toprule",
        " & ".join(map(latex, shown.columns)) + r" \\",
        r"\midrule",
        *(" & ".join(map(latex, row)) + r" \\" for row in shown.rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{latex(note)}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


# How it was measured, in words


def measured(rows: Sequence[Study], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """How the cells of `rows` were measured, as `columns` need it: what was trained on what, what each number is, and
    with which versions."""
    if not rows:
        return "No cell is in these records; peers and ladders have tables of their own in Markdown and HTML."
    entries = [entry for study in rows for entry in study.entries]
    parts = [_trained(group) for group in SAME_BASELINE.but("model").groups(entries)]
    parts += [sentence for names, sentence in SAID if set(names) & set(columns)]
    parts += words.unpaired(rows, entries, [name for name in ("speedup", "over-baseline") if name in columns])
    parts += words.trained_otherwise(entries)
    if any(len(study.completed) > 1 for study in rows):
        parts.append("Numbers are means over seeds, in brackets their two-sided 95% Student t-intervals")
        if GEOMETRIC & set(columns):
            parts.append(
                "Times, tokens a second and ratios are geometric means, with the intervals of their logarithms"
            )
    if any(entry.weights == "random" for entry in entries):
        parts.append("Random weights: losses show that training works and say nothing about quality")
    installed = {
        f"{package} {version}": None for e in entries for package, version in (e.versions or {}).items() if version
    }
    return ". ".join([*parts, f"Versions: {', '.join(installed)}" if installed else "Versions are not known"]) + "."


SAID = (
    (
        ("step", "tokens", "speedup"),
        "Step is the median device time of an optimizer step after the first epoch, with HF Trainer or a step that was "
        "shown to be its equal; tokens are those of the examples, without padding",
    ),
    (
        ("share",),
        "Of the card's peak is model FLOP utilization (MFU): the FLOP that training needs over the card's dense rate "
        "for the number format",
    ),
    (("speedup",), "Speedup is per token against the baseline of the same seed"),
    (("peak",), "Peak memory is what torch allocated on the GPU at most (without one, the process on the host)"),
    (
        ("loss", "loss-before", "over-baseline"),
        "Held-out loss is the mean cross-entropy of a token of the answers held out, computed by the suite from the "
        "logits in fp32, the same for every method",
    ),
    (("over-baseline",), "Over baseline is the difference from the baseline of the same seed"),
    (
        ("task",),
        "Answered right is the share of the task's questions whose greedy answer is exactly the right one, with "
        "Wilson's 95% interval where Student's over seeds is not wider",
    ),
    (("forgotten",), "Forgotten is how much the loss on plain text that is not of the corpus rose"),
)
"""What is said of a number where one of its columns is shown."""


def _trained(entries: Sequence[Entry]) -> str:
    """What the trials of one card and corpus have in common, and where they differ."""
    first = entries[0]

    def every(of: Callable[[Entry], object]) -> str:
        return "/".join(map(str, dict.fromkeys(of(entry) for entry in entries)))

    seeds = sorted({entry.seed for entry in entries if entry.seed is not None})
    rates = dict.fromkeys(f"{entry.method} {words.learning_rate(entry)}" for entry in entries)
    return (
        f"Trained on {words.timed_on(first)} ({first.weights} weights) on a corpus of {first.trained_on} with SHA-256 "
        f"{first.corpus_digest[:12]}, {every(lambda e: e.planned_steps or '?')} optimizer steps of at most "
        f"{every(lambda e: e.tokens_per_step or '?')} tokens with padding, rows of at most "
        f"{every(lambda e: e.max_length or '?')} tokens, seeds {', '.join(map(str, seeds)) or '?'}; highest learning "
        f"rates {', '.join(rates)}"
    )
