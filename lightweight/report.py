"""What a person reads: one table from saved entries, out-of-memory cells as rows like any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from lightweight import no_worse
from lightweight.record import BASELINE, Entry
from lightweight.targets import GiB, MiB

Format = Literal["terminal", "markdown"]

COLUMNS = (
    "model",
    "method",
    "target",
    "outcome",
    "total",
    "step",
    "speedup",
    "peak memory",
    "forecast",
    "of baseline",
    "held-out loss",
)

NO_WORSE_COLUMNS = (
    "model",
    "method",
    "seeds",
    "held-out loss",
    "over baseline",
    "no worse?",
    "loss elsewhere",
    "forgotten",
)

RANDOM, EMULATED, HOST = "[r]", "[e]", "[h]"
"""Marks in the table, each explained below it where it occurs."""

NO_WORSE_NOTE = (
    "Losses in nats a token, means over seeds. In brackets the two-sided 90 % t-interval over seeds, differences taken "
    f"from the baseline of the same seed; no worse: all of it below the margin of {no_worse.MARGIN} nats. Elsewhere: "
    "plain English that is not from the corpus; forgotten: how much its loss rose in training."
)

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


class ReportError(ValueError):
    """A report that cannot be written. The message names the file and the mend."""


def table(entries: Sequence[Entry], style: Format) -> str:
    """All entries as one table, with the notes its marks need. Speedups are per token, over that model's baseline."""
    rows = [_row(entry, baseline_of(entry, entries)) for entry in entries]
    headers: tuple[str, ...] = COLUMNS
    if any("worker" in entry for entry in entries):
        headers = (*headers, "worker")
        rows = [[*row, _worker(entry)] for row, entry in zip(rows, entries, strict=True)]
    if style == "markdown":
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [
        tabulate(
            rows,
            headers=headers,
            tablefmt="github" if style == "markdown" else "simple",
            disable_numparse=True,
            colalign=("left",) * 4 + ("right",) * 6 + ("left",) * (len(headers) - 10),
        )
    ]
    lines += notes(entries)
    return ("\n\n" if style == "markdown" else "\n").join(lines)


def no_worse_rows(entries: Sequence[Entry]) -> list[list[str]]:
    """One row a method that several seeds have trained, under NO_WORSE_COLUMNS; none where no method has been."""
    return [
        [
            " ".join(found.model.split()),
            " ".join(found.method.split()),
            f"{len(found.entries)}" + (f", {found.failed} failed" if found.failed else ""),
            _before_and_after(found.heldout),
            "-" if found.difference is None else str(found.difference),
            found.verdict or "-",
            _before_and_after(found.elsewhere),
            "-" if found.forgotten is None else str(found.forgotten),
        ]
        for found in no_worse.compare(entries)
    ]


def no_worse_table(entries: Sequence[Entry], style: Format) -> str:
    """Whether any method does worse than its baseline on trained weights; empty where no method has several seeds."""
    rows = no_worse_rows(entries)
    if not rows:
        return ""
    if style == "markdown":
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    shown = tabulate(
        rows,
        headers=NO_WORSE_COLUMNS,
        tablefmt="github" if style == "markdown" else "simple",
        disable_numparse=True,
        colalign=("left", "left") + ("right",) * 3 + ("left",) + ("right",) * 2,
    )
    return ("\n\n" if style == "markdown" else "\n").join([shown, NO_WORSE_NOTE])


def notes(entries: Sequence[Entry]) -> list[str]:
    """What a reader must know beside the table: on what it was measured, and what random weights cannot say."""
    lines = []
    for device in dict.fromkeys(entry["device"] for entry in entries):
        of_device = [entry for entry in entries if entry["device"] == device]
        installed = of_device[0]["versions"]
        packages = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
        lines.append(f"Measured on {device}; {packages}.")
        if any(entry["emulated"] for entry in of_device):
            lines.append(f"{EMULATED} Emulated: torch's allocator is capped at the bytes the target has.")
        if all(entry["peak_allocated_bytes"] is None for entry in of_device):
            lines.append(
                f"{HOST} No GPU: the whole process's memory on the host, libraries included. "
                "The forecast is what torch would allocate on a GPU."
            )
    if any(entry["weights"] == "random" for entry in entries):
        lines.append(
            f"{RANDOM} Random weights: speed and memory are as with trained ones; the loss says nothing of quality."
        )
    return lines


def into(readme: Path, text: str) -> None:
    """Replace what stands between the result marks of `readme`. Raises ReportError."""
    try:
        before, rest = readme.read_text("utf-8").split(BEGIN)
        _, after = rest.split(END)
    except OSError as error:
        raise ReportError(f"report {readme}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ReportError(f"report {readme}: needs the lines '{BEGIN}' and '{END}' once each") from error
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")


def baseline_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The baseline of `entry`'s model on the same target and device."""
    same = ("model", "target", "device", "weights", "corpus_digest")
    found = (e for e in entries if e["method"] == BASELINE and all(e[key] == entry[key] for key in same))
    return next(found, None)


def _row(entry: Entry, baseline: Entry | None) -> list[str]:
    return [
        " ".join(entry["model"].split()),
        " ".join(entry["method"].split()),
        f"{entry['target']} {EMULATED}" if entry["emulated"] else entry["target"],
        _outcome(entry),
        _duration(entry["cold_seconds"]) if entry["outcome"] == "completed" else "-",
        _step(entry["steady_step_seconds"]) if entry["outcome"] == "completed" else "-",
        speedup(entry, baseline),
        memory(entry),
        _forecast(entry),
        memory_ratio(entry, baseline),
        loss(entry),
    ]


def _worker(entry: Entry) -> str:
    """The pytest-xdist worker that ran the trial, and the number of its GPU."""
    gpu = entry.get("visible_gpu")
    return f"{entry.get('worker', '-')}" + ("" if gpu is None else f", GPU {gpu}")


def _outcome(entry: Entry) -> str:
    outcome = entry["outcome"].replace("_", " ")
    return f"{outcome} in {entry['phase']}" if entry["phase"] else outcome


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.2f} min"


def _step(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def speedup(entry: Entry, baseline: Entry | None) -> str:
    """From pairs of rounds, with its interval, where there are any, else from the steady steps of both cells."""
    paired = entry.get("speedup")
    if paired and paired["ratio"] is not None:
        return f"{paired['ratio']:.2f}x [{paired['low']:.2f}, {paired['high']:.2f}]"
    if entry["outcome"] != "completed" or baseline is None:
        return "-"
    if baseline["outcome"] != "completed":
        return f"baseline {baseline['outcome'].replace('_', ' ')}"
    if entry["steady_step_seconds"] is None or baseline["steady_step_seconds"] is None:
        return "-"
    per_token = entry["steady_step_seconds"] / entry["tokens_per_step"]
    return f"{baseline['steady_step_seconds'] / baseline['tokens_per_step'] / per_token:.2f}x"


def _peak_bytes(entry: Entry) -> int | None:
    peak: int | None = entry["peak_allocated_bytes"] or entry["host_peak_bytes"]
    return peak


def memory(entry: Entry) -> str:
    peak = _peak_bytes(entry)
    if peak is None:
        return "-"
    return _size(peak) if entry["peak_allocated_bytes"] else f"{_size(peak)} {HOST}"


def _forecast(entry: Entry) -> str:
    """The forecast peak, and how far it is from the measured one where that is a whole training's."""
    forecast, measured = entry["forecast_allocated_bytes"], entry["peak_allocated_bytes"]
    if forecast is None:
        return "-"
    if measured is None or entry["outcome"] != "completed":
        return _size(forecast)
    return f"{_size(forecast)} ({forecast / measured - 1:+.1%})"


def _size(count: int) -> str:
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:.0f} MiB"


def memory_ratio(entry: Entry, baseline: Entry | None) -> str:
    if entry["outcome"] != "completed" or baseline is None:
        return "-"
    if baseline["outcome"] != "completed":
        return f"baseline {baseline['outcome'].replace('_', ' ')}"
    peak, of = _peak_bytes(entry), _peak_bytes(baseline)
    return f"{peak / of:.2f}" if peak and of else "-"


def _before_and_after(losses: tuple[float, float] | None) -> str:
    return "-" if losses is None else f"{losses[0]:.3f} -> {losses[1]:.3f}"


def loss(entry: Entry) -> str:
    before, after = entry["heldout_loss_before"], entry["heldout_loss_after"]
    if before is None or after is None:
        return "-"
    return f"{before:.3f} -> {after:.3f}" + (f" {RANDOM}" if entry["weights"] == "random" else "")
