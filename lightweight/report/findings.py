"""What is the answer? The report's sentences: what fits, what runs out of memory, how many times as fast, what loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightweight.record import BASELINE, SAME_METHOD, Entry, ForecastRow, Run, baseline_of, one_line
from lightweight.report import select
from lightweight.report.select import cell_of, is_card, planned, target_of
from lightweight.report.speed import pace, step_ratio
from lightweight.report.words import duration, end_of, forecast_error, method_among, name_among, timed_on
from lightweight.targets import size
from lightweight.verdict import noninferiority


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence of the answer: what it is about, and what was found of it, in parts."""

    about: str = ""
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return one_line(f"{self.about}{': ' if self.about else ''}{'; '.join(self.parts)}.")


def findings(runs: Sequence[Run]) -> list[Finding]:
    """The answer: what fits, what runs out of memory, how many times as fast, and what became of the loss."""
    entries = select.newest(runs)
    cells = select.main_cells(entries)
    answer = [*_in_all(cells, entries), *_climbed(entries), *_picked(entries), *_no_worse(entries)]
    several_lengths = len({cell.max_length for cell in cells}) > 1
    answer += [_about(group, entries, several_lengths) for group in select.groups(cells)]
    answer += [*_agreement(cells), *_forecast_only(runs)]
    if any(cell.weights == "random" for cell in cells):
        words = "Weights are random: speed and memory are as with trained ones, and the loss says nothing about quality"
        answer.append(Finding(parts=(words,)))
    if not answer and entries:  # of tables that answer by themselves: peers, say
        return [_counted(entries, "trial")]
    return answer or [Finding(parts=("No trial and no forecast is in these records",))]


def _in_all(cells: Sequence[Entry], entries: Sequence[Entry]) -> list[Finding]:
    """The answer in a sentence, and how many cells ended how."""
    if not cells:
        return []
    in_all = _counted(cells, "cell")
    answer = [*_fastest(cells, entries), *_rescued(cells)]
    return [Finding(parts=tuple(answer)), in_all] if answer else [in_all]


def _counted(entries: Sequence[Entry], noun: str) -> Finding:
    """How many of them ended how."""
    ends = [end_of(entry) for entry in entries]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in sorted(dict.fromkeys(ends), key=_badness))
    return Finding(about=f"{len(entries)} {noun}{'s' * (len(entries) > 1)}", parts=(counts,))


def _badness(end: str) -> int:
    return ["completed", "out of memory"].index(end) if end in ("completed", "out of memory") else 2


def _fastest(cells: Sequence[Entry], entries: Sequence[Entry]) -> list[str]:
    """The method that gained most on its baseline, if any did, and whether it was shown to be no worse. Where some were
    shown, the fastest of those: a method that costs quality is no answer."""
    methods = SAME_METHOD.groups(cell for cell in cells if cell.method != BASELINE)
    paces = [gain for seeds in methods if (gain := pace(seeds, entries)) and gain.ratio > 1]
    qualities = noninferiority.qualities(entries)
    conclusions = {
        id(entry): "inconclusive" if quality.conclusion == "no worse" and quality.too_wide else quality.conclusion
        for quality in qualities
        for entry in quality.entries
    }
    shown = [gain for gain in paces if conclusions.get(id(gain.entries[0])) == "no worse"]
    fastest = max(shown or paces, key=lambda gain: gain.ratio, default=None)
    if fastest is None:
        return []
    first = fastest.entries[0]
    conclusion = conclusions.get(id(first))
    words = {"no worse": ", and is no worse", "worse": ", and is worse", "inconclusive": ", and no worse is not shown"}
    return [
        f"{method_among(first, cells)} trains {first.model} {fastest.text} on {timed_on(first)}"
        + (words[conclusion] if conclusion else "")
    ]


def _rescued(cells: Sequence[Entry]) -> list[str]:
    """Where baseline runs out of memory, and what trains instead."""
    sentences = []
    for group in select.groups(cells):
        ends = {cell.method: cell.outcome for cell in group}
        instead = [method for method, end in ends.items() if end == "completed"]
        if ends.get(BASELINE) == "out_of_memory" and instead:
            first = group[0]
            sentences.append(
                f"{' and '.join(instead)} train{'s' * (len(instead) == 1)} {first.model} on {timed_on(first)}, "
                "where baseline runs out of memory"
            )
    return sentences


def _climbed(entries: Sequence[Entry]) -> list[Finding]:
    """What each ladder comes to, from its bottom to its fastest rung."""
    climbs = []
    for first, *rungs in select.ladders(entries):
        gains = [(gain, rung) for rung in rungs if (gain := step_ratio(first, rung))]
        if gains:
            gain, best = max(gains, key=lambda pair: pair[0])
            words = f"{best.method} takes a step of {first.model} {gain:.1f} times as fast as {first.method}"
            climbs.append(Finding(parts=(f"Change by change, {words} on {timed_on(first)}",)))
    return climbs


def _picked(entries: Sequence[Entry]) -> list[Finding]:
    """The fastest of what a user could pick for a model, beside the others."""
    picks = []
    for alike in select.groups(select.peers(entries)):
        timed = [
            (peer.steady_step_seconds / peer.tokens_per_step, peer)
            for peer in alike
            if peer.outcome == "completed" and peer.steady_step_seconds and peer.tokens_per_step
        ]
        if len(timed) < 2:
            continue
        _, fastest = min(timed, key=lambda pair: pair[0])
        others = [peer for _, peer in timed if peer is not fastest]
        words = " and ".join(
            f"{ratio:.1f} times as fast as {other.method}" for other in others if (ratio := step_ratio(other, fastest))
        )
        picks.append(Finding(parts=(f"{fastest.method} trains {fastest.model} on {timed_on(fastest)} {words}",)))
    return picks


def _no_worse(entries: Sequence[Entry]) -> list[Finding]:
    """Which methods were shown to be no worse than baseline on real weights, which worse, and which neither; and where
    the margin shows nothing."""
    findings = []
    qualities = [quality for quality in noninferiority.qualities(entries) if quality.conclusion]
    for model in dict.fromkeys(quality.model for quality in qualities):
        of_model = [quality for quality in qualities if quality.model == model]
        parts = [
            f"{method_among(quality.entries[0], entries)} {quality.conclusion}"
            + (f", {quality.difference} nats" if quality.difference else "")
            for quality in of_model
        ]
        parts += dict.fromkeys(quality.too_wide for quality in of_model if quality.too_wide)
        findings.append(Finding(about=f"Over baseline's held-out loss on {model}, means of seeds", parts=tuple(parts)))
    return findings


def _about(group: Sequence[Entry], entries: Sequence[Entry], several_lengths: bool) -> Finding:
    """What the cells of a model on a target do."""
    first, parts = group[0], []
    for cell in select.one_seed(group):
        if cell.outcome != "completed":
            parts.append(f"{name_among(cell, group)} {_failure(cell)}")
        else:
            parts.append(f"{method_among(cell, group)} {_success(cell, group, entries)}")
    rows = f" in rows of {first.max_length}" if several_lengths else ""
    return Finding(about=f"{first.model} on {timed_on(first)}{rows}", parts=tuple(parts))


def _failure(cell: Entry) -> str:
    """How a cell ended that did not complete."""
    verbs = {"out_of_memory": "runs out of memory", "timed_out": "times out"}
    verb = verbs.get(cell.outcome, end_of(cell))
    return f"{verb} in {cell.phase}" if cell.phase else verb


def _success(cell: Entry, group: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """How a cell that completed compares with its baseline, over its seeds in `group`."""
    parts = []
    seeds = select.seeds_of(cell, group)
    baseline, gain = baseline_of(cell, group), pace(seeds, entries)
    if baseline is not None and cell.method != BASELINE and gain:
        share = cell.memory_share(baseline)
        held = f" with {share:.2f} of the memory" if share is not None and cell.peak_allocated_bytes else ""
        spread = f" ({gain.low:.2f} to {gain.high:.2f} over {len(seeds)} seeds)" if len(seeds) > 1 else ""
        parts.append(f"is {gain.ratio:.2f}x as fast{spread}{held}")
    else:
        total = f" in {duration(cell.cold_seconds)}" if cell.cold_seconds else ""
        peak = f" within {size(cell.peak_allocated_bytes)}" if cell.peak_allocated_bytes else ""
        parts.append(f"completes{total}{peak}")
    before = [seed.heldout_loss_before for seed in seeds if seed.heldout_loss_before is not None]
    after = [seed.heldout_loss_after for seed in seeds if seed.heldout_loss_after is not None]
    if len(before) == len(after) == len(seeds):
        shorter = baseline is not None and planned(cell) != planned(baseline)
        mean = "mean " * (len(seeds) > 1)
        steps = f" after {planned(cell)} steps" * shorter
        parts.append(f"{mean}held-out loss {fmean(before):.2f} to {fmean(after):.2f}{steps}")
    return ", ".join(parts)


def _agreement(cells: Sequence[Entry]) -> list[Finding]:
    """Whether the forecasts were right, where there was memory to run out of."""
    ends = {"fits": "completed", "does_not_fit": "out_of_memory"}
    limited = [(cell, end) for cell in cells if cell.budget_bytes and (end := ends.get(cell.forecast_verdict or ""))]
    if not limited:
        return []
    wrong = [cell for cell, end in limited if end != cell.outcome and cell.outcome in ends.values()]
    errors = [abs(error) for cell in cells if (error := forecast_error(cell)) is not None]
    within = f"; their peaks are within {max(errors):.1%}" if errors else ""
    if wrong:
        names = ", ".join(f"{cell.model} x {cell.method} on {target_of(cell)}" for cell in wrong)
        return [Finding(parts=(f"The forecast was wrong about {names}{within}",))]
    return [
        Finding(
            parts=(f"Whether they fit was forecast correctly for all {len(limited)} cells with a memory limit{within}",)
        )
    ]


def _forecast_only(runs: Sequence[Run]) -> list[Finding]:
    """What was forecast and not trained: for each model and method, the cards it fits and those it does not."""
    trained = {cell_of(entry) for entry in select.newest(runs)}
    rows = [row for row in select.forecasts(runs) if is_card(row.target) and cell_of(row) not in trained]
    words = {"fits": "fits", "does_not_fit": "does not fit", "too_close_to_call": "is too close to call on"}
    return [
        Finding(
            about=f"{model}, forecast",
            parts=tuple(
                f"{method} {words[verdict]} {', '.join(map(target_of, of_verdict))}"
                for method, of_method in _by(of_model, "method").items()
                for verdict, of_verdict in _by(of_method, "verdict").items()
            ),
        )
        for model, of_model in _by(rows, "model").items()
    ]


def _by(rows: Iterable[ForecastRow], key: str) -> dict[str, list[ForecastRow]]:
    groups: dict[str, list[ForecastRow]] = {}
    for row in rows:
        groups.setdefault(getattr(row, key), []).append(row)
    return groups
