"""What a record holds, made up: entries as a GPU run writes them, runs, forecasts, speedups."""

import re
from pathlib import Path
from typing import Any

from lightweight.record import Entry, ForecastRow, Run, Speedup
from lightweight.report import tables
from lightweight.targets import T4
from lightweight.trial import CAUSES, Forecast, ForecastVerdict


def entry(**changes) -> Entry:
    """One entry as a GPU run writes it."""
    usual: dict[str, Any] = {
        "model": "opt-350m",
        "method": "baseline",
        "target": "t4",
        "emulated": True,
        "weights": "pretrained",
        "precision": "fp32",
        "corpus_digest": "d",
        "seed": 0,
        "outcome": "completed",
        "phase": None,
        "steps": 6,
        "budget_bytes": 14 * 2**30,
        "planned_steps": 6,
        "steps_per_epoch": 2,
        "max_length": 256,
        "tokens_per_step": 2048,
        "world_size": 1,
        "train_loss": (3.0, 2.9, 2.8, 2.7, 2.6, 2.5),
        "step_seconds": (0.3, 0.1, 0.1, 0.1, 0.1, 0.1),
        "steady_step_seconds": 0.1,
        "cold_seconds": 90.0,
        "peak_allocated_bytes": 4 * 2**30,
        "peak_reserved_bytes": None,
        "average_allocated_bytes": None,
        "host_peak_bytes": 2**30,
        "forecast_allocated_bytes": 4 * 2**30,
        "forecast_reserved_bytes": 5 * 2**30,
        "forecast_verdict": "fits",
        "forecast_bytes_by_cause": {"weights": 3 * 2**30, "logits": 2**30},
        "heldout_loss_before": 3.0,
        "heldout_loss_after": 2.5,
        "device": "NVIDIA H200",
        "device_bytes": None,
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0", "bitsandbytes": "0.50.2"},
    }
    return Entry(**usual | changes)


def stopped(**changes) -> Entry:
    """One entry of a trial that ran out of memory in its first step."""
    usual: dict[str, Any] = {
        "outcome": "out_of_memory",
        "phase": "forward",
        "reason": "CUDA out of memory",
        "train_loss": (),
        "step_seconds": (),
        "steady_step_seconds": None,
        "heldout_loss_after": None,
        "forecast_verdict": "does_not_fit",
        "forecast_bytes_by_cause": {"weights": 20 * 2**30, "logits": 2**30},
    }
    return entry(**usual | changes)


def seeds(method: str, *losses: float, **changes) -> list[Entry]:
    """A method's entries of several seeds, held-out losses `losses` after training."""
    elsewhere = {"elsewhere_loss_before": 2.0, "elsewhere_loss_after": 2.25}
    return [
        entry(**{"method": method, "seed": seed, "heldout_loss_after": loss} | elsewhere | changes)
        for seed, loss in enumerate(losses)
    ]


def predicted(verdict: ForecastVerdict = "fits", reserved_bytes: int = 2**30, **changes) -> Forecast:
    """What a trial is forecast to take of a T4."""
    usual: dict[str, Any] = {"phase": "forward", "by_cause": dict.fromkeys(CAUSES, 0), "budget_bytes": T4.budget_bytes}
    usual |= {"allocated_bytes": reserved_bytes, "parameters": 1, "trainable_parameters": 1}
    return Forecast(**usual | {"verdict": verdict, "reserved_bytes": reserved_bytes} | changes)


def paired(ratio: float, low: float, high: float | None, **changes) -> Speedup:
    """A speedup as a run stores it."""
    usual: dict[str, Any] = {"baseline": "baseline", "log_ratios": (0.5,) * 8, "cap": 128, "steps_per_round": 4}
    return Speedup(**usual | {"ratio": ratio, "low": low, "high": high} | changes)


def run(*entries: Entry, ended="2026-01-02T03:04:05", name="run.json", forecasts=(), **more) -> Run:
    """A stored run of `entries`."""
    return Run(path=Path(name), ended=ended, entries=entries, forecasts=forecasts, **more)


def forecast(model="opt-350m", method="baseline", target="t4", verdict="fits", gib=4) -> ForecastRow:
    """What the plan says of one cell."""
    return ForecastRow(
        model=model,
        method=method,
        target=target,
        max_length=256,
        forecast_allocated_bytes=gib * 2**30,
        forecast_reserved_bytes=gib * 2**30,
        budget_bytes=14 * 2**30,
        bytes_by_cause={"weights": gib * 2**30},
        phase="backward",
        verdict=verdict,
    )


LADDER = [
    entry(
        method=method,
        planned_steps=4,
        steady_step_seconds=seconds,
        captured_step=step,
        adapter=adapter,
        test=f"experiments/test_captured_step.py::test_any_name[{method}]",
        shown_as="ladder",
    )
    for method, seconds, step, adapter in (
        ("baseline", 0.1, None, None),
        ("lora", 0.05, None, {"peft_type": "LORA"}),
        ("lora-loop", 0.04, {"packing": False, "graph": False}, {"peft_type": "LORA"}),
        ("lora-packing", 0.02, {"packing": True, "graph": False}, {"peft_type": "LORA"}),
    )
]


def rows(key: str, *runs: Run) -> list[dict[str, str]]:
    """A table of the report as one dict a row."""
    table = {table.key: table for table in tables.tables(runs)}[key]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def cells(entries: list[Entry], style="markdown") -> list[dict[str, str]]:
    """The table of results back as one dict a row."""
    lines = [line for line in tables.results(entries).text(style).splitlines() if line.startswith("|")]
    header, _, *parts = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in parts]
