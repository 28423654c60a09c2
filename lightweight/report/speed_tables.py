"""How fast, where does it come from, and what else is there? Speedups, ladders, other libraries, several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightweight.record import BASELINE, SAME_BASELINE, SAME_BUT_RANKS, SAME_BUT_SCALE, Entry
from lightweight.report import select, words
from lightweight.report.select import pace_of
from lightweight.report.shared_columns import named, shares
from lightweight.report.speed import faster, products_seconds, step_ratio
from lightweight.report.text_table import Column, Table, table
from lightweight.targets import size


def speedups(entries: Sequence[Entry], among: Sequence[Entry] = ()) -> Table:
    """How many times as fast as its baseline every cell is, and how that is known."""
    of_baseline = partial(pace_of, entries=among or entries)

    def end(which: int) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            gain = faster(entry, of_baseline(entry))
            return f"{gain.interval[which]:.2f}" if gain and gain.interval else "-"

        return cell

    def ratio(entry: Entry) -> str:
        gain = faster(entry, of_baseline(entry))
        return words.times(gain.ratio) if gain else words.speedup(entry, of_baseline(entry))

    def known(entry: Entry) -> str:
        gain = faster(entry, of_baseline(entry))
        if gain and gain.interval and entry.speedup:
            return f"{len(entry.speedup.log_ratios)} pairs of rounds, {entry.speedup.pairing}"
        return "steady steps of both" if gain else (entry.speedup and entry.speedup.reason) or "no ratio"

    columns: list[Column[Entry]] = [
        *named(entries),
        ("outcome", "l", words.outcome),
        ("speedup", "r", ratio),
        ("low", "r", end(0)),
        ("high", "r", end(1)),
        ("from", "l", known),
    ]
    shown = [e for e in entries if e.method != BASELINE and (e.speedup is not None or of_baseline(e) is not None)]
    notes = [
        "Low and high are the ends of the 95 % interval of a ratio measured in pairs of alternating rounds."
    ] * bool(shown)
    return table("speedup", "Speedup over the baseline, per token", columns, shown, shown, notes)


def ladder(rungs: Sequence[Entry], number: int = 0) -> Table:
    """Where the speed came from: one change after the other, and what each bought."""
    first, last = rungs[0], rungs[-1]
    columns: list[Column[tuple[Entry | None, Entry]]] = [
        ("rung", "l", lambda step: step[1].method),
        ("what changed", "l", lambda step: change(*step)),
        ("outcome", "l", lambda step: words.outcome(step[1])),
        ("step", "r", lambda step: words.step(step[1])),
        *((heading, side, lambda step, cell=cell: cell(step[1])) for heading, side, cell in shares(rungs)),
        ("bought", "r", lambda step: words.times(step_ratio(*step))),
        ("in all", "r", lambda step: words.times(step_ratio(first, step[1]))),
        ("peak memory", "r", lambda step: words.memory(step[1])),
    ]
    climbed = f"{first.method} to {last.method}"
    return table(
        f"ladder-{number}",
        f"Where the speed comes from: {first.model} on {words.timed_on(first)}, {climbed}",
        columns,
        list(zip([None, *rungs], rungs, strict=False)),
        rungs,
        ["Steps are medians after the first epoch, compared per token."],
    )


def change(below: Entry | None, rung: Entry) -> str:
    """What one rung does differently from the one below it, in the record's own words."""
    if below is None:
        return "the bottom"
    changes = []
    for key in ("weights_dtype", "quantization", "adapter"):
        was, now = getattr(below, key), getattr(rung, key)
        if was != now:
            changes.append(f"{key.replace('_', ' ')} {_setting(was)} -> {_setting(now)}")
    for key in ("training_arguments", "captured_step"):
        was, now = getattr(below, key), getattr(rung, key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            for name in dict.fromkeys([*was, *now]):
                if was.get(name) != now.get(name):
                    changes.append(f"{name.replace('_', ' ')} {_setting(was.get(name))} -> {_setting(now.get(name))}")
        elif was != now:
            changes.append("the Trainer's step -> a loop of its own" if was is None else f"{key} {_setting(now)}")
    return ", ".join(changes) or "nothing"


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return str(value.get("peft_type") or value.get("quant_method") or "set").lower()
    return "none" if value is None else "set" if isinstance(value, list) else str(value)


def peers(entries: Sequence[Entry]) -> Table:
    """What a user could pick: the same rows, weights and adapter through each library and the captured step."""
    shown = select.peers(entries)

    def by(peer: Entry) -> str:
        library = peer.library or "peft"
        version = (peer.versions or {}).get(library) or ""
        return "the captured step" if peer.captured_step else f"{library} {version}".strip()

    def as_fast(peer: Entry) -> str:
        alike = [other for other in shown if SAME_BASELINE.holds(other, peer)]
        slowest = max(alike, key=lambda other: other.steady_step_seconds or 0.0)
        return words.times(step_ratio(slowest, peer) if len(alike) > 1 else None)

    columns: list[Column[Entry]] = [
        *named(shown),
        ("by", "l", by),
        ("outcome", "l", words.outcome),
        ("step", "r", words.step),
        *shares(shown),
        ("as fast", "r", as_fast),
        ("products alone", "r", lambda peer: words.milliseconds(products_seconds(peer))),
        ("peak memory", "r", words.memory),
        ("total", "r", lambda peer: words.duration(peer.cold_seconds or None)),
    ]
    note = (
        "As fast: against the slowest of a model. Products alone: 4 x parameters x tokens FLOP at the rate of a "
        "large product on the same kind of card. Total: from the child's start to the saved adapter, with its "
        "imports where a library needs a fresh interpreter."
    )
    return table("peers", "What a user could pick instead", columns, shown, shown, [note])


def ranks(entries: Sequence[Entry]) -> Table:
    """Trials over several GPUs beside the same ones on one: tokens a second, and what each GPU held."""
    rows: list[tuple[Entry, Entry | None]] = []  # each with the same on one GPU
    for entry in [entry for entry in entries if entry.world_size > 1]:
        alike = SAME_BUT_SCALE if "scale" in (entry.changed or {}) else SAME_BUT_RANKS
        on_one = [other for other in entries if other.world_size == 1 and alike.holds(other, entry)]
        for shown in (*on_one, entry):
            if not any(shown is other for other, _ in rows):
                rows.append((shown, on_one[0] if on_one else None))

    def rate(entry: Entry) -> float | None:
        return entry.tokens_per_second if entry.outcome == "completed" else None

    def gained(row: tuple[Entry, Entry | None]) -> str:
        entry, one = row
        return words.times(entry.times_as_fast(one) if rate(entry) and one else None)

    def peaks(entry: Entry) -> str:
        each = entry.rank_peak_allocated_bytes or [entry.peak_allocated_bytes]
        return ", ".join("-" if peak is None else size(peak) for peak in each)

    def network(entry: Entry) -> str:
        scale = (entry.changed or {}).get("scale")
        return ", ".join(str(said) for said in (entry.placement, scale and f"scale {scale}") if said) or "-"

    columns: list[Column[tuple[Entry, Entry | None]]] = [
        *((heading, side, _first(cell)) for heading, side, cell in named(entries)),
        ("outcome", "l", _first(lambda e: words.outcome(e) + f", rank {e.failed_rank}" * (e.failed_rank is not None))),
        ("tokens/s", "r", _first(lambda entry: _rate(rate(entry)))),
        *((heading, side, _first(cell)) for heading, side, cell in shares(entries)),
        ("a GPU", "r", _first(lambda entry: _rate(entry.rank_tokens_per_second if rate(entry) else None))),
        ("of one GPU", "r", gained),
        ("peak of each", "r", _first(peaks)),
        ("network", "l", _first(network)),
        ("forecast", "r", _first(words.forecast)),
        ("held-out loss", "l", _first(words.loss)),
    ]
    note = (
        "Each GPU holds the network (replicated, by DistributedDataParallel or a captured step) or a part of it "
        "(sharded, by FSDP2). A step has as many sequences as on one GPU, or with scale batch as many for each GPU."
    )
    return table("ranks", "Several GPUs for one trial", columns, rows, [entry for entry, _ in rows], [note])


def _first(cell: Callable[[Entry], str]) -> Callable[[tuple[Entry, Entry | None]], str]:
    """What a row has that begins with a trial, in that trial's column."""
    return lambda row: cell(row[0])


def _rate(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:,.0f}"
