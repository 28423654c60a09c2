"""A plan as a person reads it: what each method holds, which target it fits, and what to take."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from lightweight.forecast import time_table
from lightweight.forecast.plan_row import PlanRow
from lightweight.settings import changes
from lightweight.targets import CONTEXT_BYTES, MiB, size
from lightweight.trial import CAUSES

STEP = "passes x rows"
"""The column of what one GPU does in an optimizer step."""


def table(rows: Sequence[PlanRow]) -> str:
    """The peak of each method by cause, and each target's verdicts and choice, for every model."""
    parts: list[str | None] = []
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        parts += [_causes(of_model), _verdicts(of_model), time_table.table(of_model, STEP)]
    return "\n\n".join(part for part in parts if part)


def _causes(rows: Sequence[PlanRow]) -> str:
    """The bytes of every method, once for all targets with the same kernels."""
    known = [(row, row.forecast) for row in rows if row.forecast is not None]
    gpus = rows[0].question.gpus
    parameters = f", {known[0][1].parameters / 1e6:,.0f} M parameters" if known else ""
    of_corpus = rows[0].corpus_rows
    length = str(rows[0].question.max_length) if of_corpus is None else f"up to {of_corpus.width}"
    title = (
        f"{rows[0].model}{parameters}, rows of {length} tokens: "
        f"allocated at the peak{f' on each of {gpus} GPUs' if gpus > 1 else ''}"
    )
    if not known:
        return title
    causes = [cause for cause in CAUSES if cause != "gathered" or gpus > 1]
    paged = any(forecast.paged_bytes for _, forecast in known)
    peaks: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for row, forecast in known:
        sizes = [forecast.allocated_bytes, *(forecast.by_cause[cause] for cause in causes)]
        sizes += [forecast.paged_bytes] if paged else []
        key = row.method.name, _step(row), tuple(map(_size_or_dash, sizes))
        peaks.setdefault(key, []).append(row.target.name)
    order = list(dict.fromkeys(row.method.name for row, _ in known))
    lines = [
        [method, step, *sizes, ", ".join(targets)]
        for (method, step, sizes), targets in sorted(peaks.items(), key=lambda item: order.index(item[0][0]))
    ]
    headers = ["method", STEP, "peak", *causes, *(["paged"] if paged else []), "with the kernels of"]
    aligned = ("left", *["right"] * (len(headers) - 2), "left")
    table = tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
    return f"{title}\n\n{table}"


def _step(row: PlanRow) -> str:
    twice = f", {row.recomputed_layers} layers twice" if row.recomputed_layers else ""
    sharded = ", sharded" if row.placement == "sharded" else ""
    there = f", {row.offloaded_layers} layers on the host" if row.offloaded_layers else ""
    return f"{row.passes} x {row.batch_size}{twice}{there}{sharded}"


def _verdicts(rows: Sequence[PlanRow]) -> str:
    question = rows[0].question
    headers = ["target", "method", STEP, "verdict", "reserved", "budget", "margin", "peak in"]
    headers += ["largest batch"] * question.max_batch + ["longest row"] * question.longest_row
    headers += ["fewest GPUs"] * question.fewest_gpus
    lines = []
    for row in rows:
        reserved, margin, where = "-", "-", None
        budget = row.target.budget_bytes or 0
        if row.forecast is not None:
            reserved = _size_or_dash(row.forecast.reserved_bytes)
            margin = f"{1 - row.forecast.reserved_bytes / budget:+.1%}"
            where = f"{'out of memory in ' * (row.verdict == 'does_not_fit')}{row.forecast.phase}"
        line = [
            row.target.name,
            row.method.name,
            _step(row),
            row.verdict.replace("_", " ") + (" <- take this" if row.chosen else ""),
            reserved,
            _size_or_dash(budget),
            margin,
            row.reason or where,
        ]
        lines.append(
            line
            + [_number_or_none(row.max_batch)] * question.max_batch
            + [_number_or_none(row.longest_row)] * question.longest_row
            + [_number_or_none(row.fewest_gpus)] * question.fewest_gpus
        )
    aligned = ["left", "left", "right", "left", "right", "right", "right", "left", *["right"] * (len(headers) - 8)]
    table = tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
    return "\n\n".join([table, *_notes(rows)])


def _notes(rows: Sequence[PlanRow]) -> list[str]:
    notes = [
        f"The budget is the card's memory less {CONTEXT_BYTES // MiB} MiB for a CUDA context; the margin is the part "
        "of it that the allocator would not reserve."
    ]
    corpus, of_model = rows[0].question.corpus, rows[0].corpus_rows
    if corpus is not None and of_model is not None:
        origin = f" ({corpus.origin})" if corpus.origin is not None else ""
        notes.append(f"The corpus{origin}: {of_model}. Forecasts hold for the longest batch that these can make.")
    said = changes((row.method.name, (row.asked or row.method).changed) for row in rows)
    notes += [] if said is None else [said]
    devices = {row.target.name: row.measured_on for row in rows if row.measured_on}
    notes += [f"{target}: the fastest by step times measured on {device}." for target, device in devices.items()]
    if any(row.forecast and row.forecast.paged_bytes for row in rows):
        notes.append(
            "Paged optimizer state is in no peak and no verdict: it is in managed memory, on the card while there is "
            "room, else on the host."
        )
    if rows[0].question.fewest_gpus:
        notes.append(
            "Passes, rows and bytes are those of one GPU; several share the sequences of a step and, by FSDP2, the "
            "network. What NCCL takes for itself is not counted. The fewest GPUs are sought up to one for every "
            "sequence of a step."
        )
    return notes


def _size_or_dash(count: int) -> str:
    return size(count) if count else "-"


def _number_or_none(count: int | None) -> str:
    return "none" if count is None else str(count)
