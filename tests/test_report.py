import json
import re
from pathlib import Path

import pytest

from lightweight import record, report
from lightweight.report import ReportError

ROOT = Path(__file__).parent.parent
RECORDS = [ROOT / "experiments" / "records" / "h200-t4.json"]


def entry(**changes):
    """One entry as a GPU run writes it."""
    return {
        "model": "opt-350m",
        "method": "baseline",
        "target": "t4",
        "emulated": True,
        "weights": "pretrained",
        "corpus_digest": "d",
        "seed": 0,
        "outcome": "completed",
        "phase": None,
        "tokens_per_step": 2048,
        "steady_step_seconds": 0.1,
        "cold_seconds": 90.0,
        "peak_allocated_bytes": 4 * 2**30,
        "host_peak_bytes": 2**30,
        "forecast_allocated_bytes": 4 * 2**30,
        "heldout_loss_before": 3.0,
        "heldout_loss_after": 2.5,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0", "bitsandbytes": "0.50.2"},
        **changes,
    }


def cells(entries, style="markdown"):
    """The table back as one dict a row."""
    lines = [line for line in report.table(entries, style).splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_forecast_stands_beside_the_measured_peak_with_its_error():
    assert cells([entry(forecast_allocated_bytes=round(4.04 * 2**30))])[0]["forecast"] == "4.04 GiB (+1.0%)"
    stopped = entry(outcome="out_of_memory", phase="forward", steady_step_seconds=None)
    assert cells([stopped])[0]["forecast"] == "4.00 GiB", "what was held when memory ran out is no peak"
    assert cells([entry(forecast_allocated_bytes=None)])[0]["forecast"] == "-"


def test_a_cell_without_step_times_has_no_speedup():
    untimed = entry(method="lora", steady_step_seconds=None)
    assert [row["speedup"] for row in cells([entry(), untimed])] == ["1.00x", "-"]
    assert cells([entry(steady_step_seconds=None), entry(method="lora")])[1]["speedup"] == "-"


def test_speedup_and_memory_are_over_the_models_own_baseline():
    lora = entry(method="lora", steady_step_seconds=0.04, peak_allocated_bytes=3 * 2**30, cold_seconds=30.0)
    other = entry(model="gpt-neo-1.3b", steady_step_seconds=9.0)
    first, second, third = cells([entry(), lora, other])
    assert (first["speedup"], first["of baseline"], first["total"]) == ("1.00x", "1.00", "1.50 min")
    assert (second["speedup"], second["of baseline"], second["total"]) == ("2.50x", "0.75", "30.0 s")
    assert (second["step"], second["peak memory"]) == ("40.0 ms", "3.00 GiB")
    assert third["speedup"] == "1.00x"
    assert first["held-out loss"] == "3.000 -> 2.500"


def test_speedup_is_per_token():
    half = entry(method="small-steps", steady_step_seconds=0.05, tokens_per_step=1024)
    assert cells([entry(), half])[1]["speedup"] == "1.00x"


def test_out_of_memory_is_a_row_and_never_a_ratio():
    out = entry(outcome="out_of_memory", phase="backward", steady_step_seconds=None, heldout_loss_after=None)
    qlora = entry(method="qlora")
    first, second = cells([out, qlora])
    assert first["outcome"] == "out of memory in backward"
    assert {first[column] for column in ("total", "step", "speedup", "of baseline", "held-out loss")} == {"-"}
    assert first["peak memory"] == "4.00 GiB"
    assert second["speedup"] == second["of baseline"] == "baseline out of memory"


@pytest.mark.parametrize("key", ["target", "device", "weights", "corpus_digest"])
def test_a_baseline_under_other_conditions_is_no_baseline(key):
    lora = entry(method="lora", **{key: "other"})
    assert cells([entry(), lora])[1]["speedup"] == "-"


@pytest.mark.parametrize("outcome", ["diverged", "crashed", "timed_out"])
def test_every_other_failure_is_a_row_too(outcome):
    row = cells([entry(outcome=outcome, steady_step_seconds=None)])[0]
    assert row["outcome"] == outcome.replace("_", " ")
    assert row["speedup"] == "-"


def test_marks_are_explained_only_where_they_occur():
    plain = report.table([entry(emulated=False)], "terminal")
    assert "[" not in plain
    marked = report.table([entry(weights="random", peak_allocated_bytes=None)], "terminal")
    for mark in (report.EMULATED, report.RANDOM, report.HOST):
        assert marked.count(mark) == 2  # in the row and in the note
    assert "Measured on NVIDIA H200; torch 2.11.0, transformers 5.17.0, peft 0.21.0, bitsandbytes 0.50.2." in marked


def test_text_that_would_break_a_markdown_table_does_not():
    row = cells([entry(model="a|b\nc")])
    assert len(row) == 1
    assert row[0]["model"] == r"a\|b c"


def test_the_readmes_table_is_that_of_the_committed_records():
    text = (ROOT / "README.md").read_text("utf-8")
    between = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert between == report.table(record.load(RECORDS), "markdown").strip()


def test_the_committed_record_holds_the_answer():
    """The original's four runs, on a real GPU, under a T4's budget."""
    found = {(e["model"], e["method"]): e for e in record.load(RECORDS) if e["target"] == "t4"}
    assert found["opt-350m", "baseline"]["outcome"] == "completed"
    assert found["opt-350m", "lora"]["outcome"] == "completed"
    assert found["gpt-neo-1.3b", "baseline"]["outcome"] == "out_of_memory"
    assert found["gpt-neo-1.3b", "qlora"]["outcome"] == "completed"
    assert found["gpt-neo-1.3b", "qlora"]["peak_reserved_bytes"] <= found["gpt-neo-1.3b", "qlora"]["budget_bytes"]
    forecast = {cell: e["forecast_verdict"] == "fits" for cell, e in found.items()}
    assert forecast == {cell: e["outcome"] == "completed" for cell, e in found.items()}
    assert all(e["device_bytes"] and e["steps"] in (0, 130) for e in found.values())


def test_into_replaces_what_stands_between_the_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into(readme, "new")
    report.into(readme, "newer")
    assert readme.read_text() == f"before\n{report.BEGIN}\n\nnewer\n\n{report.END}\nafter\n"


@pytest.mark.parametrize("content", [None, "", report.BEGIN, f"{report.END} {report.BEGIN}", f"{report.BEGIN} " * 2])
def test_a_file_without_the_marks_is_told(tmp_path, content):
    readme = tmp_path / "README.md"
    if content is not None:
        readme.write_text(content)
    with pytest.raises(ReportError, match=r"README\.md") as raised:
        report.into(readme, "new")
    assert "\n" not in str(raised.value)
    assert content is None or readme.read_text() == content


def seeds(method, *losses, **changes):
    """A method's entries of several seeds, held-out losses `losses` after training."""
    return [
        entry(method=method, seed=seed, heldout_loss_after=loss, elsewhere_loss_before=2.0, elsewhere_loss_after=2.25)
        | changes
        for seed, loss in enumerate(losses)
    ]


def test_methods_of_several_seeds_are_held_against_the_baseline():
    entries = seeds("baseline", 2.5, 2.7) + seeds("lo|ra", 2.51, 2.70) + seeds("qlora", 3.0, 3.1, outcome="crashed")
    text = report.no_worse_table(entries, "markdown")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()[2:5]]
    assert rows == [
        ["opt-350m", "baseline", "2", "3.000 -> 2.600", "-", "-", "2.000 -> 2.250", "+0.250 [+0.250, +0.250]"],
        [
            *("opt-350m", r"lo\|ra", "2", "3.000 -> 2.605", "+0.005 [-0.027, +0.037]", "no worse"),
            *("2.000 -> 2.250", "+0.250 [+0.250, +0.250]"),
        ],
        ["opt-350m", "qlora", "2, 2 failed", "-", "-", "not shown", "-", "-"],
    ]
    assert report.NO_WORSE_NOTE in text
    assert "no worse" in report.no_worse_table(entries, "terminal")


def test_without_several_seeds_or_on_random_weights_nothing_is_said_of_quality():
    assert report.no_worse_table([entry(seed=0), entry(seed=0, method="lora")], "markdown") == ""
    assert report.no_worse_table(seeds("baseline", 2.5, 2.7, weights="random"), "markdown") == ""
    assert report.no_worse_table(record.load(RECORDS), "terminal") == ""


def test_entries_survive_json():
    assert report.table(json.loads(json.dumps([entry()])), "markdown") == report.table([entry()], "markdown")
