import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from samples import LADDER, cells, entry, forecast, rows, run, seeds, stopped

from lightweight import record
from lightweight.report import frontier, select, speed_tables, tables, words, write
from lightweight.report.findings import findings
from lightweight.verdict import noninferiority

RECORDS = Path(__file__).parents[2] / "experiments" / "records"
RECORD = RECORDS / "h200-t4.json"


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


def test_a_trial_that_was_interrupted_has_not_crashed():
    ended = entry(outcome="crashed", phase="start", reason="interrupted by SIGTERM", steady_step_seconds=None)
    assert cells([ended])[0]["outcome"] == "interrupted in start"


@pytest.mark.parametrize("path", [RECORD, RECORD.with_name("h100-t4.json")], ids=lambda path: path.stem)
def test_the_brief_table_has_the_cells_of_the_whole_one_in_120_columns(path):
    """Also where the record has shares of the card's peak. Which card it was is in a note."""
    runs = [record.load(path)]
    made = {table.key: table for table in tables.tables(runs)}
    brief = tables.brief(runs)
    whole, peak = made["results"], made["results"].columns.index("peak memory")
    assert [list(row[:2]) for row in brief.rows] == [list(row[:2]) for row in whole.rows]
    assert all(long[2].endswith(row[2]) for row, long in zip(brief.rows, whole.rows, strict=True))
    assert [row[-1] for row in brief.rows] == [row[peak] for row in whole.rows]
    assert all(f"Measured on {entry.device}" in " ".join(brief.notes) for entry in brief.entries if entry)
    assert max(map(len, brief.text("markdown").splitlines())) <= 120
    assert "brief" not in made and words.RANDOM not in brief.text("markdown")


def test_methods_of_several_seeds_are_held_against_the_baseline():
    entries = seeds("baseline", 2.5, 2.7) + seeds("lo|ra", 2.51, 2.70) + seeds("qlora", 3.0, 3.1, outcome="crashed")
    text = tables.qualities(entries).text("markdown")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()[2:5]]
    assert rows == [
        ["opt-350m", "baseline", "2", "3.000 -> 2.600", "-", "-", "2.000 -> 2.250", "+0.250 [+0.250, +0.250]"],
        [
            *("opt-350m", r"lo\|ra", "2", "3.000 -> 2.605", "+0.005 [-0.027, +0.037]", "no worse"),
            *("2.000 -> 2.250", "+0.250 [+0.250, +0.250]"),
        ],
        ["opt-350m", "qlora", "2, 2 failed", "-", "-", "inconclusive", "-", "-"],
    ]
    assert tables.NO_WORSE_NOTE.format(0.05) in text
    assert "no worse" in tables.qualities(entries).text("terminal")


def test_a_margin_above_what_the_baseline_gained_is_told_under_the_table():
    """A method that learns nothing is no worse then. The baseline went from 3.000 to 2.975."""
    entries = [of for method in ("baseline", "lora", "dora") for of in seeds(method, 2.97, 2.98)]
    said = noninferiority.too_wide(0.05, fmean(of.heldout_loss_before - of.heldout_loss_after for of in entries[:2]))
    made = tables.qualities(entries)
    assert [row[5] for row in made.rows] == ["-", "no worse", "no worse"]
    assert made.notes[1:] == [f"opt-350m x lora and dora: {said}."]
    assert "larger than the 0.025 nats that the baseline gained" in made.text("terminal")
    assert len(tables.qualities(entries, margin=0.02).notes) == 1
    other = [replace(of, corpus_digest="other") for of in [*seeds("baseline", 2.6, 2.7), *seeds("lora", 2.6, 2.7)]]
    assert tables.qualities([*entries, *other]).notes == made.notes


def test_over_seeds_means_have_intervals_and_pairs_are_of_the_same_seed():
    first = [entry(seed=seed, heldout_loss_after=2.5 + seed, steady_step_seconds=0.1 * 2**seed) for seed in range(3)]
    loras = [
        replace(one, method="lora", heldout_loss_after=one.heldout_loss_after + extra, steady_step_seconds=step / 2)
        for one, extra in zip(first, (0.0, 0.2, 0.1), strict=True)
        for step in [one.steady_step_seconds]
    ]
    of_baseline, of_lora = rows("seeds", run(*first, *loras))
    assert (of_baseline["seeds"], of_baseline["speedup"], of_baseline["over baseline"]) == ("3", "-", "-")
    assert of_baseline["held-out loss"] == "3.500 [1.016, 5.984]"  # t 4.3027 x 1 / sqrt(3)
    assert of_lora["over baseline"] == "+0.100 [-0.148, +0.348]"
    assert of_lora["speedup"] == "2.00 [2.00, 2.00]x"  # whatever a seed's pace was
    unpaired = rows("seeds", run(*first[:2], *loras))[1]
    told = tables.over_seeds([*first[:1], *loras]).text("markdown")
    assert "No speedup and loss over baseline of opt-350m x lora: it has seed 2, and its baseline seed 0." in told
    assert (unpaired["over baseline"], unpaired["speedup"]) == ("-", "-")
    failed = rows("seeds", run(*first, *loras[:2], stopped(method="lora", seed=2)))[1]
    assert (failed["seeds"], failed["over baseline"]) == ("3, 1 did not complete", "+0.100 [-1.171, +1.371]")
    assert "seeds" not in {table.key for table in tables.tables([run(first[0], loras[0])])}


def test_a_table_over_seeds_says_on_what_it_was_measured():
    """It also stands alone, in a page that `report --into` writes."""
    emulated = [replace(entry(seed=seed), emulated=True, changed={"learning_rate": 1e-3}) for seed in range(2)]
    notes = tables.over_seeds(emulated).notes
    assert any("Emulated" in note for note in notes)
    assert any("--learning-rate 0.001" in note for note in notes)


def test_without_several_seeds_or_on_random_weights_nothing_is_said_of_quality():
    assert not tables.qualities([entry(seed=0), entry(seed=0, method="lora")]).rows
    assert not tables.qualities(seeds("baseline", 2.5, 2.7, weights="random")).rows
    assert not tables.qualities(record.load(RECORD).entries).rows


def test_a_step_is_held_against_the_baseline_of_its_own_run(tmp_path):
    """The same card steps at another pace on another host, and a run may have only a short baseline."""
    for name, day, entries in (
        ("old", 1, [entry(steady_step_seconds=0.3)]),
        ("new", 2, [entry(steady_step_seconds=0.2, planned_steps=3), entry(method="lora")]),
    ):
        stored = record.document(entries) | {"datetime": f"2026-01-0{day}"}
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
    runs = [record.load(tmp_path / f"{name}.json") for name in ("new", "old")]
    found = {row["method"]: row["speedup"] for row in rows("results", *runs)}
    assert found == {"baseline": "1.00x", "lora": "2.00x"}
    assert [row["speedup"] for row in rows("speedup", *runs)] == ["2.00x"]
    assert str(findings(runs)[0]) == "lora trains opt-350m 2.0 times as fast as baseline on NVIDIA H200 as t4."


def test_losses_after_unlike_numbers_of_steps_are_not_compared():
    short = entry(method="lora", planned_steps=3, heldout_loss_after=2.9)
    assert [row["over baseline"] for row in rows("loss", run(entry(), short))] == ["-", "-"]
    assert [row["over baseline"] for row in rows("loss", run(entry(), replace(short, planned_steps=6)))] == [
        "-",
        "+0.400",
    ]
    assert "3.00 to 2.90 after 3 steps" in write.text([run(entry(), short)], "terminal")


def test_several_seeds_are_told_apart_and_each_held_against_its_own_baseline():
    seeds = [entry(seed=seed, steady_step_seconds=0.1 * (seed + 1)) for seed in (0, 1)]
    loras = [entry(method="lora", seed=seed, steady_step_seconds=0.05 * (seed + 1)) for seed in (0, 1)]
    found = rows("results", run(*seeds, *loras))
    assert [(row["method"], row["seed"], row["speedup"]) for row in found] == [
        ("baseline", "0", "1.00x"),
        ("baseline", "1", "1.00x"),
        ("lora", "0", "2.00x"),
        ("lora", "1", "2.00x"),
    ]
    text = write.text([run(*seeds, *loras)], "terminal")
    assert "lora is 2.00x as fast (2.00 to 2.00 over 2 seeds)" in text and "seed 1" not in text
    failed = write.text([run(*seeds, loras[0], stopped(method="lora", seed=1))], "terminal")
    assert "lora, seed 1 runs out of memory" in failed


def test_ladder_says_what_changed_and_what_it_bought():
    found = rows("ladder-0", run(*LADDER))
    assert [row["what changed"] for row in found] == [
        "the bottom",
        "adapter none -> lora",
        "the Trainer's step -> a loop of its own",
        "packing off -> on",
    ]
    assert [row["bought"] for row in found] == ["-", "2.00x", "1.25x", "2.00x"]
    assert found[-1]["in all"] == "5.00x"
    broken = rows(
        "ladder-0", run(LADDER[0], stopped(method="lora", test=LADDER[1].test, shown_as="ladder"), *LADDER[2:])
    )
    assert (broken[1]["outcome"], broken[1]["bought"], broken[2]["bought"]) == ("out of memory in forward", "-", "-")


def test_peers_stand_beside_each_other_and_are_no_cells_of_the_suites_own():
    same = {
        "shown_as": "peers",
        "device": "NVIDIA H100 80GB HBM3",
        "parameters": 1_100_048_384,
        "tokens_per_step": 2048,
    }
    of = [
        entry(method="stock", library="peft", versions={"peft": "1.0"}, steady_step_seconds=0.2, **same),
        entry(method="theirs", library="unsloth", versions={"unsloth": "2.0"}, steady_step_seconds=0.1, **same),
        entry(method="ours", library="peft", captured_step={"lean": True}, steady_step_seconds=0.04, **same),
        stopped(method="large", library="peft", versions=None, **same),
    ]
    found = rows("peers", run(*of))
    assert [row["by"] for row in found] == ["peft 1.0", "unsloth 2.0", "the captured step", "peft"]
    assert [row["as fast"] for row in found] == ["1.00x", "2.00x", "5.00x", "-"]
    assert {row["products alone"] for row in found} == {"12.3 ms"}
    assert found[-1]["outcome"].startswith("out of memory")
    assert not select.main_cells(of)


def test_frontier_puts_what_was_measured_before_what_was_forecast():
    plan = run(ended="", forecasts=[forecast(verdict="does_not_fit"), forecast(target="l4"), forecast(method="lora")])
    found = rows("frontier", run(entry(), stopped(method="qlora")), plan)
    by_method = {row["method"]: row for row in found}
    assert (by_method["baseline"]["t4"], by_method["baseline"]["l4"]) == ("fits", "fits (forecast)")
    assert by_method["lora"]["t4"] == "fits (forecast)"
    assert (by_method["qlora"]["t4"], by_method["qlora"]["l4"]) == ("out of memory", "-")
    assert list(found[0])[2:] == ["t4", "l4"], "the smallest card first"


def test_what_was_set_of_a_forecast_is_a_line_below_it():
    changed = replace(forecast(method="lora"), changed={"lora_rank": 16, "lora_layers": ["q_proj", "v_proj"]})
    table = tables.memory_by_cause([], [forecast(), changed])
    assert table.notes[-1] == "Set from outside the method: lora (--lora-rank 16 --lora-layers q_proj,v_proj)."
    assert len(tables.memory_by_cause([], [forecast()]).notes) == 1


def test_history_puts_runs_side_by_side_and_tells_the_newest():
    old = run(entry(steady_step_seconds=0.2), entry(method="lora"), ended="2026-01-01T00:00:00", name="old.json")
    new = run(entry(), stopped(method="lora"), ended="2026-01-02T00:00:00", name="new.json")
    for runs in ([old, new], [new, old]):
        found = rows("history", *runs)
        assert list(found[0])[3:] == ["old 2026-01-01 00:00", "new 2026-01-02 00:00"]
        assert (
            found[0]["old 2026-01-01 00:00"].startswith("200.0 ms") and "100.0 ms" in found[0]["new 2026-01-02 00:00"]
        )
        assert found[1]["new 2026-01-02 00:00"] == "out of memory in forward"
        assert [row["outcome"] for row in rows("results", *runs)] == ["completed", "out of memory in forward"]
    assert not [table for table in tables.tables([new]) if table.key == "history"]
    part = run(entry(), ended="2026-01-03T00:00:00", name="part.json")
    assert [row["method"] for row in rows("results", old, part)] == ["baseline", "lora"], "in the order they came"


def test_trials_over_several_gpus_stand_beside_the_one_on_one():
    """And are held against the baseline of as many GPUs, not of one."""
    rates = {"tokens_per_second": 20_480.0, "rank_tokens_per_second": 20_480.0}
    two = {
        "world_size": 2,
        "steady_step_seconds": 0.1 / 1.5,
        "tokens_per_second": 30_720.0,
        "rank_tokens_per_second": 15_360.0,
        "rank_peak_allocated_bytes": (3 * 2**30, 2 * 2**30),
    }
    failed = {"method": "qlora", "failed_rank": 1, "rank_peak_allocated_bytes": (None, 2**30)}
    entries = [entry(**rates), entry(**two), stopped(**two | failed)]
    one, shared, stopped_on_one_rank = speed_tables.ranks(entries).rows
    assert one[2] == "NVIDIA H200 as t4 [e]" and shared[2] == "2 x NVIDIA H200 as t4 [e]"
    assert shared[4:8] == ["30,720", "15,360", "1.50x", "3.00 GiB, 2.00 GiB"]
    assert stopped_on_one_rank[3] == "out of memory in forward, rank 1"
    assert stopped_on_one_rank[4:8] == ["-", "-", "-", "-, 1.00 GiB"], "one step is no rate"
    assert [row[8] for row in (one, shared)] == ["-", "-"], "in records that do not say"
    grown = {
        "changed": {"scale": "batch"},
        "tokens_per_step": 4096,
        "method_digest": "2" * 64,
        "placement": "replicated",
    }
    weak = entry(**two | grown | {"tokens_per_second": 38_912.0, "steady_step_seconds": 0.1 / 0.95})
    _, told = tables.ranks([entry(**rates), weak]).rows
    assert (told[6], told[8]) == ("1.90x", "replicated, scale batch")
    other = entry(**rates, adapter={"r": 64})
    assert [row[6] for row in tables.ranks([other, weak]).rows] == ["-"], "of another adapter"
    untold = replace(entries[2], peak_allocated_bytes=None, host_peak_bytes=2**33)
    assert words.memory(untold) == "1.00 GiB", "of the rank that could tell, not of the host"
    assert record.baseline_of(entries[2], entries) is entries[1]
    assert speed_tables.ranks(entries[:1]).rows == []
    assert list(frontier.places([run(*entries)])[("opt-350m", "baseline")]) == ["t4", "2 x t4"]
    single = frontier.card_bytes("t4")
    assert single is not None and frontier.card_bytes("2 x t4") == 2 * single


def test_methods_of_one_name_are_both_there_and_told_apart():
    two = [
        entry(method="lora", method_digest=digest * 64, tokens_per_step=tokens, planned_steps=steps)
        for digest, tokens, steps in (("a", 2048, 6), ("b", 16384, 2))
    ]
    found = rows("results", run(entry(), *two))
    assert [row["method"] for row in found] == ["baseline", "lora #aaaaaa", "lora #bbbbbb"]
    text = write.text([run(entry(), *two)], "terminal")
    assert "lora #aaaaaa is" in text and "lora #bbbbbb is" in text


def test_a_number_of_one_is_no_switch():
    below, rung = (
        entry(captured_step={"lean": lean, "rows": rows_}, training_arguments={"warmup": None})
        for lean, rows_ in ((False, 8), (True, 1))
    )
    assert speed_tables.change(below, rung) == "lean off -> on, rows 8 -> 1"
    assert speed_tables.change(rung, below) == "lean on -> off, rows 1 -> 8"
