import json
import re
from pathlib import Path

import pytest

from lightweight import record
from lightweight.record import Run
from lightweight.report import report
from lightweight.report.report import ReportError

ROOT = Path(__file__).parents[2]
RECORDS = [ROOT / "experiments" / "records" / "h200-t4.json"]


def entry(**changes):
    """One entry as a GPU run writes it."""
    return {
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
        "reason": None,
        "budget_bytes": 14 * 2**30,
        "planned_steps": 6,
        "steps_per_epoch": 2,
        "max_length": 256,
        "tokens_per_step": 2048,
        "world_size": 1,
        "train_loss": [3.0, 2.9, 2.8, 2.7, 2.6, 2.5],
        "step_seconds": [0.3, 0.1, 0.1, 0.1, 0.1, 0.1],
        "steady_step_seconds": 0.1,
        "cold_seconds": 90.0,
        "peak_allocated_bytes": 4 * 2**30,
        "host_peak_bytes": 2**30,
        "forecast_allocated_bytes": 4 * 2**30,
        "forecast_reserved_bytes": 5 * 2**30,
        "forecast_verdict": "fits",
        "forecast_bytes_by_cause": {"weights": 3 * 2**30, "logits": 2**30},
        "heldout_loss_before": 3.0,
        "heldout_loss_after": 2.5,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0", "bitsandbytes": "0.50.2"},
        **changes,
    }


def stopped(**changes):
    """One entry of a trial that ran out of memory in its first step."""
    return entry(
        **{
            "outcome": "out_of_memory",
            "phase": "forward",
            "reason": "CUDA out of memory",
            "train_loss": [],
            "step_seconds": [],
            "steady_step_seconds": None,
            "heldout_loss_after": None,
            "forecast_verdict": "does_not_fit",
            "forecast_bytes_by_cause": {"weights": 20 * 2**30, "logits": 2**30},
            **changes,
        }
    )


def paired(ratio, low, high):
    """A speedup as a run stores it."""
    return {
        "baseline": "baseline",
        "log_ratios": [0.5] * 8,
        "ratio": ratio,
        "low": low,
        "high": high,
        "cap": 128,
        "pairing": "alternating",
        "steps_per_round": 4,
        "floor": None,
        "verdict": None,
        "reason": None,
    }


def run(*entries, ended="2026-01-02T03:04:05", name="run.json", forecasts=()):
    return Run(path=Path(name), ended=ended, entries=entries, forecasts=forecasts)


def forecast(model="opt-350m", method="baseline", target="t4", verdict="fits", gib=4):
    """What the plan says of one cell."""
    return {
        "model": model,
        "method": method,
        "target": target,
        "max_length": 256,
        "forecast_allocated_bytes": gib * 2**30,
        "forecast_reserved_bytes": gib * 2**30,
        "budget_bytes": 14 * 2**30,
        "bytes_by_cause": {"weights": gib * 2**30},
        "phase": "backward",
        "verdict": verdict,
    }


def rows(key, *runs):
    """A table of the report as one dict a row."""
    table = {table.key: table for table in report.tables(runs)}[key]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


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


def test_the_brief_table_has_the_cells_of_the_whole_one_in_120_columns():
    runs = [record.run(path) for path in RECORDS]
    made = {table.key: table for table in report.tables(runs)}
    brief = report.brief(runs)
    assert [list(row[:3]) for row in brief.rows] == [list(row[:3]) for row in made["results"].rows]
    assert [row[6] for row in brief.rows] == [row[7] for row in made["results"].rows]  # peak memory
    assert max(map(len, brief.text("markdown").splitlines())) <= 120
    assert "brief" not in made and report.RANDOM not in brief.text("markdown")


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


def test_into_replaces_what_stands_between_the_marks_of_every_table(tmp_path):
    readme = tmp_path / "README.md"
    (begin, end), (memory_begin, memory_end) = report.marks("results"), report.marks("memory")
    readme.write_text(f"before\n{begin}\nold\n{end}\nbetween\n{memory_begin}{memory_end}\nafter\n")
    for method in ("baseline", "lora"):
        report.into(readme, [run(entry(method=method))])
    made = {table.key: table.text("markdown") for table in report.tables([run(entry(method="lora"))])}
    results, memory = made["results"], made["memory"]
    assert "lora" in results and "weights" in memory
    assert readme.read_text() == (
        f"before\n{begin}\n\n{results}\n\n{end}\nbetween\n{memory_begin}\n\n{memory}\n\n{memory_end}\nafter\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


BEGIN, END = report.marks("results")


@pytest.mark.parametrize("content", [None, "", BEGIN, f"{END} {BEGIN}", f"{BEGIN} " * 2])
def test_a_file_without_the_marks_is_told(tmp_path, content):
    readme = tmp_path / "README.md"
    if content is not None:
        readme.write_text(content)
    with pytest.raises(ReportError, match=r"README\.md") as raised:
        report.into(readme, [run(entry())])
    assert "\n" not in str(raised.value)
    assert content is None or readme.read_text() == content


def test_a_file_that_cannot_be_written_is_told_and_left_alone(tmp_path):
    with pytest.raises(ReportError, match=r"nowhere/report\.html: cannot be written"):
        report.write(tmp_path / "nowhere" / "report.html", "new")


def seeds(method, *losses, **changes):
    """A method's entries of several seeds, held-out losses `losses` after training."""
    return [
        entry(method=method, seed=seed, heldout_loss_after=loss, elsewhere_loss_before=2.0, elsewhere_loss_after=2.25)
        | changes
        for seed, loss in enumerate(losses)
    ]


def test_methods_of_several_seeds_are_held_against_the_baseline():
    entries = seeds("baseline", 2.5, 2.7) + seeds("lo|ra", 2.51, 2.70) + seeds("qlora", 3.0, 3.1, outcome="crashed")
    text = report.qualities(entries).text("markdown")
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
    assert "no worse" in report.qualities(entries).text("terminal")


def test_without_several_seeds_or_on_random_weights_nothing_is_said_of_quality():
    assert not report.qualities([entry(seed=0), entry(seed=0, method="lora")]).rows
    assert not report.qualities(seeds("baseline", 2.5, 2.7, weights="random")).rows
    assert not report.qualities(record.load(RECORDS)).rows


def test_entries_survive_json():
    assert report.table(json.loads(json.dumps([entry()])), "markdown") == report.table([entry()], "markdown")


def test_the_answer_comes_first_and_names_every_cell():
    neo = [stopped(model="gpt-neo-1.3b"), entry(model="gpt-neo-1.3b", method="qlora", weights="random")]
    lora = entry(method="lora", speedup=paired(1.7, 1.6, 1.8), peak_allocated_bytes=2 * 2**30, heldout_loss_after=2.4)
    found = [str(finding) for finding in report.findings([run(entry(), lora, *neo)])]
    assert found[0] == "lora trains opt-350m 1.7 times as fast as baseline on NVIDIA H200 as t4."
    assert found[1] == "4 cells: 3 completed, 1 out of memory."
    assert found[2] == (
        "opt-350m on NVIDIA H200 as t4: baseline completes in 1.50 min within 4.00 GiB, held-out loss 3.00 to 2.50; "
        "lora is 1.70x as fast with 0.50 of the memory, held-out loss 3.00 to 2.40."
    )
    assert found[3].startswith("gpt-neo-1.3b on NVIDIA H200 as t4: baseline runs out of memory in forward")
    assert "rightly for all 4 cells" in found[5]
    assert "says nothing of quality" in found[-1]
    assert report.text([run(entry(), lora, *neo)], "markdown").startswith(f"- {found[0]}")


def test_the_answer_names_what_trains_where_the_baseline_cannot():
    neo = [stopped(), entry(method="qlora"), entry(method="qlora-captured"), stopped(method="lora")]
    assert str(report.findings([run(*neo)])[0]) == (
        "qlora and qlora-captured train opt-350m on NVIDIA H200 as t4, where baseline runs out of memory."
    )
    assert str(report.findings([run(stopped(), stopped(method="lora"))])[0]) == "2 cells: 2 out of memory."
    slower = entry(method="qlora", steady_step_seconds=0.2)
    assert str(report.findings([run(entry(), slower)])[0]) == "2 cells: 2 completed.", "slower is not fast"


def test_a_step_is_held_against_the_baseline_of_its_own_run(tmp_path):
    """The same card steps at another pace on another host, and a run may have only a short baseline."""
    for name, day, entries in (
        ("old", 1, [entry(steady_step_seconds=0.3)]),
        ("new", 2, [entry(steady_step_seconds=0.2, planned_steps=3), entry(method="lora")]),
    ):
        stored = {"datetime": f"2026-01-0{day}", "outcomes": [record_entry(e) for e in entries]}
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
    runs = [record.run(tmp_path / f"{name}.json") for name in ("new", "old")]
    found = {row["method"]: row["speedup"] for row in rows("results", *runs)}
    assert found == {"baseline": "1.00x", "lora": "2.00x"}
    assert [row["speedup"] for row in rows("speedup", *runs)] == ["2.00x"]
    assert str(report.findings(runs)[0]) == "lora trains opt-350m 2.0 times as fast as baseline on NVIDIA H200 as t4."


def record_entry(e):
    """An entry with every key that a stored record must have."""
    return dict.fromkeys(record.KEYS) | {"steps": 6} | e


def test_losses_after_unlike_numbers_of_steps_are_not_compared():
    short = entry(method="lora", planned_steps=3, heldout_loss_after=2.9)
    assert [row["over baseline"] for row in rows("loss", run(entry(), short))] == ["-", "-"]
    assert [row["over baseline"] for row in rows("loss", run(entry(), short | {"planned_steps": 6}))] == ["-", "+0.400"]
    assert "3.00 to 2.90 after 3 steps" in report.text([run(entry(), short)], "terminal")


def test_whether_a_method_is_no_worse_is_among_the_findings():
    found = [str(line) for line in report.findings([run(*seeds("baseline", 2.5, 2.7), *seeds("lora", 2.51, 2.70))])]
    assert (
        "Over baseline's held-out loss on opt-350m, means of seeds: lora no worse, +0.005 [-0.027, +0.037] nats."
        in found
    )


def test_a_wrong_forecast_is_named():
    wrong = stopped(forecast_verdict="fits")
    (line,) = [str(finding) for finding in report.findings([run(wrong)]) if "forecast" in str(finding)]
    assert line.startswith("The forecast was wrong about opt-350m x baseline on t4")


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
    text = report.text([run(*seeds, *loras)], "terminal")
    assert "lora is 2.00x as fast (2.00 to 2.00 over 2 seeds)" in text and "seed 1" not in text
    failed = report.text([run(*seeds, loras[0], stopped(method="lora", seed=1))], "terminal")
    assert "lora, seed 1 runs out of memory" in failed


def test_no_cell_is_missing_from_the_tables():
    short = entry(model="opt-350m", method="fp32-check", planned_steps=1)
    capped = entry(method="lora", target="opt-350m x lora: too little")
    made = report.tables([run(entry(), stopped(method="lora"), short, capped, *LADDER)])
    shown = [e for table in made if table.key in ("results", "others", "ladder-0") for e in table.entries]
    assert len(shown) == 8 == len({id(e) for e in shown})


def test_a_short_trial_is_told_where_it_is_the_control_of_one_that_ran_out_of_memory():
    told = report.main_cells(
        [stopped(), entry(target="native", planned_steps=1), entry(method="lora", planned_steps=1)]
    )
    assert [(e["method"], e["target"]) for e in told] == [("baseline", "t4"), ("baseline", "native")]


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
        "ladder-0", run(LADDER[0], stopped(method="lora", test=LADDER[1]["test"], shown_as="ladder"), *LADDER[2:])
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
    assert not report.main_cells(of)


def test_frontier_puts_what_was_measured_before_what_was_forecast():
    plan = run(ended="", forecasts=[forecast(verdict="does_not_fit"), forecast(target="l4"), forecast(method="lora")])
    found = rows("frontier", run(entry(), stopped(method="qlora")), plan)
    by_method = {row["method"]: row for row in found}
    assert (by_method["baseline"]["t4"], by_method["baseline"]["l4"]) == ("fits", "fits (forecast)")
    assert by_method["lora"]["t4"] == "fits (forecast)"
    assert (by_method["qlora"]["t4"], by_method["qlora"]["l4"]) == ("out of memory", "-")
    assert list(found[0])[2:] == ["t4", "l4"], "the smallest card first"


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
    assert not [table for table in report.tables([new]) if table.key == "history"]
    part = run(entry(), ended="2026-01-03T00:00:00", name="part.json")
    assert [row["method"] for row in rows("results", old, part)] == ["baseline", "lora"], "in the order they came"


def test_text_from_a_record_is_text_in_markdown():
    hostile = "<img src=x> ](http://evil) `code` \\| a\u202eb"
    line = next(line for line in report.text([run(entry(method=hostile))], "markdown").splitlines() if "evil" in line)
    assert "<img" not in line and "](http" not in line


def test_trials_over_several_gpus_stand_beside_the_one_on_one():
    """And are held against the baseline of as many GPUs, not of one."""
    rates = {"tokens_per_second": 20_480.0, "rank_tokens_per_second": 20_480.0}
    two = {
        "world_size": 2,
        "steady_step_seconds": 0.1 / 1.5,
        "tokens_per_second": 30_720.0,
        "rank_tokens_per_second": 15_360.0,
        "rank_peak_allocated_bytes": [3 * 2**30, 2 * 2**30],
    }
    failed = {"method": "qlora", "failed_rank": 1, "rank_peak_allocated_bytes": [None, 2**30]}
    entries = [entry(**rates), entry(**two), stopped(**two | failed)]
    one, shared, stopped_on_one_rank = report.ranks(entries).rows
    assert one[2] == "NVIDIA H200 as t4 [e]" and shared[2] == "2 x NVIDIA H200 as t4 [e]"
    assert shared[4:8] == ["30,720", "15,360", "1.50x", "3.00 GiB, 2.00 GiB"]
    assert stopped_on_one_rank[3] == "out of memory in forward, rank 1"
    assert stopped_on_one_rank[4:8] == ["-", "-", "-", "-, 1.00 GiB"], "one step is no rate"
    untold = entries[2] | {"peak_allocated_bytes": None, "host_peak_bytes": 2**33}
    assert report.memory(untold) == "1.00 GiB", "of the rank that could tell, not of the host"
    assert report.baseline_of(entries[2], entries) is entries[1]
    assert report.ranks(entries[:1]).rows == []
    assert list(report.places([run(*entries)])[("opt-350m", "baseline")]) == ["t4", "2 x t4"]
    assert report.room("2 x t4") == 2 * report.room("t4")


RECORDS_FOLDER = ROOT / "experiments" / "records"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        (
            "h200-t4",
            "lora trains opt-350m 1.7 times as fast as baseline on NVIDIA H200 as t4; qlora trains gpt-neo-1.3b on "
            "NVIDIA H200 as t4, where baseline runs out of memory.",
        ),
        (
            "h200-no-worse",
            "lora-captured-lr0.002 trains smollm2-135m 12.1 times as fast as baseline (11.2 to 13.2 over 3 seeds) on "
            "NVIDIA H200 as t4, and is no worse.",
        ),
        (
            "h100-ladder",
            "Change by change, lora-graph takes a step of opt-350m 12.7 times as fast as baseline on "
            "NVIDIA H100 80GB HBM3 as t4.",
        ),
        (
            "h200-peers-opt-350m",
            "lora-bf16-captured trains opt-350m on NVIDIA H200 8.2 times as fast as lora-bf16-peft and "
            "9.2 times as fast as lora-bf16-unsloth.",
        ),
    ],
)
def test_the_title_answers_the_question_of_the_record(name, answer):
    assert str(report.findings([record.run(RECORDS_FOLDER / f"{name}.json")])[0]) == answer


def test_the_card_that_was_timed_stands_wherever_a_time_does():
    pairs = {"speedup": paired(1.7, 1.6, 1.8)}
    cells_ = [entry(), entry(method="lora", **pairs), entry(target="native", emulated=False), *LADDER]
    for table in report.tables([run(*cells_)]):
        if table.key in ("results", "loss", "speedup", "others"):
            assert "card" in table.columns
            assert {row[table.columns.index("card")] for row in table.rows} <= {"NVIDIA H200 as t4 [e]", "NVIDIA H200"}
        elif table.key.startswith("ladder"):
            assert "on NVIDIA H200 as t4" in table.title
    assert report.timed_on(entry(emulated=False, device="Tesla T4")) == "Tesla T4"
    assert report.timed_on(entry(world_size=2)) == "2 x NVIDIA H200 as t4"


def test_over_seeds_the_mean_is_told_with_its_spread_never_the_luckiest():
    baselines = [entry(seed=seed) for seed in range(3)]
    loras = [entry(method="lora", seed=seed, steady_step_seconds=0.1 / gain) for seed, gain in enumerate((2, 4, 8))]
    found = [str(finding) for finding in report.findings([run(*baselines, *loras)])]
    assert found[0] == (
        "lora trains opt-350m 4.0 times as fast as baseline (2.0 to 8.0 over 3 seeds) on NVIDIA H200 as t4, "
        "and is no worse."
    )
    assert "lora is 4.00x as fast (2.00 to 8.00 over 3 seeds)" in found[3]


def test_a_method_that_is_worse_is_not_the_answer_where_another_is_not():
    fast = seeds("fast-and-worse", 3.0, 3.2, steady_step_seconds=0.01)
    good = seeds("good", 2.5, 2.7, steady_step_seconds=0.05)
    found = report.findings([run(*seeds("baseline", 2.5, 2.7), *fast, *good)])
    assert str(found[0]).startswith("good trains opt-350m 2.0 times as fast as baseline (2.0 to 2.0 over 2 seeds)")
    only = str(report.findings([run(*seeds("baseline", 2.5, 2.7), *fast)])[0])
    assert only.startswith("fast-and-worse ") and only.endswith("and is worse.")


def test_numbers_are_not_read_from_words():
    """A ratio is what was measured, not what two decimals of it are."""
    lora = entry(method="lora", steady_step_seconds=0.0333)
    assert report.faster(lora, entry()).ratio == pytest.approx(0.1 / 0.0333, rel=1e-12)
    assert report.memory_share(entry(peak_allocated_bytes=1), entry(peak_allocated_bytes=3)) == 1 / 3
    assert report.faster(stopped(), entry()) is None
    assert report.faster(entry(), stopped()) is None
    assert report.faster(entry(speedup=paired(1.23456, 1.1, 1.3)), None).ratio == 1.23456


def test_an_interval_without_an_upper_end_is_told():
    assert report.speedup(entry(method="lora", speedup=paired(1.7, 0.0, None)), entry()) == "1.70x [0.00, inf]"


def test_pairs_of_an_old_record_that_were_measured_one_after_the_other_get_a_wider_interval():
    old = paired(1.649, 1.64, 1.65) | {"pairing": "one after the other"}
    low, high = report.faster(entry(method="lora", speedup=old), entry()).interval
    assert low < 1.3 and high > 2.0


def test_methods_of_one_name_are_both_there_and_told_apart():
    two = [
        entry(method="lora", method_digest=digest * 64, tokens_per_step=tokens, planned_steps=steps)
        for digest, tokens, steps in (("a", 2048, 6), ("b", 16384, 2))
    ]
    found = rows("results", run(entry(), *two))
    assert [row["method"] for row in found] == ["baseline", "lora #aaaaaa", "lora #bbbbbb"]
    text = report.text([run(entry(), *two)], "terminal")
    assert "lora #aaaaaa is" in text and "lora #bbbbbb is" in text


def test_a_newer_run_replaces_an_older_one_whose_digests_nobody_knew():
    old = run(entry(method="lora", method_digest=None), ended="2026-01-01", name="old.json")
    new = run(entry(method="lora", method_digest="a" * 64), ended="2026-01-02", name="new.json")
    other = run(entry(method="lora", method_digest="b" * 64), ended="2026-01-03", name="other.json")
    assert [e["method_digest"] for e in report.newest([old, new])] == ["a" * 64]
    assert [e["method_digest"] for e in report.newest([new, other])] == ["a" * 64, "b" * 64]
    assert len(report.trend(new.entries[0], [old, new, other])) == 2


def test_old_records_say_ladders_and_peers_by_their_tests():
    for name, key in (("h100-ladder", "ladder-0"), ("h100-peers", "peers")):
        run_ = record.run(RECORDS_FOLDER / f"{name}.json")
        assert any(table.key == key for table in report.tables([run_]))
        assert not report.main_cells(run_.entries)


def test_a_number_of_one_is_no_switch():
    below, rung = (
        {"captured_step": {"lean": lean, "rows": rows_}, "training_arguments": {"warmup": None}}
        for lean, rows_ in ((False, 8), (True, 1))
    )
    assert report.change(below, rung) == "lean off -> on, rows 8 -> 1"
    assert report.change(rung, below) == "lean on -> off, rows 1 -> 8"


def test_a_tree_that_was_not_clean_is_told():
    clean, dirty = (
        Run(path=Path("run.json"), ended="2026", entries=[entry()], commit="abcdef123456", is_dirty=is_dirty)
        for is_dirty in (False, True)
    )
    line = "Measured with changes to the code that were not committed: run.json (after commit abcdef1)."
    assert line in report.text([dirty], "terminal") and line not in report.text([clean], "terminal")


@pytest.mark.parametrize("name", [".", "/", "folder", "folder/.", "/dev/null", "x" * 300 + ".html"])
def test_what_no_report_can_be_written_to_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReportError, match=r"^report ") as raised:
        report.write(Path(name), "new")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and not any((tmp_path / "folder").iterdir())


def test_a_link_that_somebody_planted_is_not_followed(tmp_path):
    """Neither under the name that a temporary file had once, nor under any that can be foreseen, nor the report's."""
    precious, report_ = tmp_path / "precious", tmp_path / "r.html"
    precious.write_text("precious")
    for name in (".r.html.writing", "r.html"):
        (tmp_path / name).symlink_to(precious)
    report.write(report_, "new")
    assert (precious.read_text(), report_.read_text(), report_.is_symlink()) == ("precious", "new", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".r.html.writing", "precious", "r.html"]


def test_a_report_can_be_read_by_whom_other_files_can_be(tmp_path):
    other = tmp_path / "other"
    other.write_text("")
    report.write(tmp_path / "new.md", "new")
    assert (tmp_path / "new.md").stat().st_mode == other.stat().st_mode
    other.chmod(0o640)
    report.write(other, "new")
    assert other.stat().st_mode & 0o777 == 0o640
