from dataclasses import replace
from pathlib import Path

import pytest
from samples import entry, paired, run, seeds, stopped

from lightweight import record
from lightweight.report import write
from lightweight.report.findings import findings

RECORDS = Path(__file__).parents[2] / "experiments" / "records"


def test_the_answer_comes_first_and_names_every_cell():
    neo = [stopped(model="gpt-neo-1.3b"), entry(model="gpt-neo-1.3b", method="qlora", weights="random")]
    lora = entry(method="lora", speedup=paired(1.7, 1.6, 1.8), peak_allocated_bytes=2 * 2**30, heldout_loss_after=2.4)
    found = [str(finding) for finding in findings([run(entry(), lora, *neo)])]
    assert found[0] == "lora trains opt-350m 1.7 times as fast as baseline on NVIDIA H200 as t4."
    assert found[1] == "4 cells: 3 completed, 1 out of memory."
    assert found[2] == (
        "opt-350m on NVIDIA H200 as t4: baseline completes in 1.50 min within 4.00 GiB, held-out loss 3.00 to 2.50; "
        "lora is 1.70x as fast with 0.50 of the memory, held-out loss 3.00 to 2.40."
    )
    assert found[3].startswith("gpt-neo-1.3b on NVIDIA H200 as t4: baseline runs out of memory in forward")
    assert "correctly for all 4 cells" in found[5]
    assert "says nothing about quality" in found[-1]
    assert write.text([run(entry(), lora, *neo)], "markdown").startswith(f"- {found[0]}")


def test_rows_of_several_lengths_are_told_apart():
    short, long = entry(max_length=256), entry(max_length=8192, corpus_digest="of longer rows")
    found = [str(finding) for finding in findings([run(short, long)])]
    assert [line.partition(": ")[0] for line in found[1:3]] == [
        f"opt-350m on NVIDIA H200 as t4 in rows of {length}" for length in (256, 8192)
    ]
    page = write.text([run(short, long)], "markdown")
    assert "tokens a row |" in page.partition("### Loss")[0]
    assert "tokens a row |" not in write.text([run(short)], "markdown").partition("### Loss")[0]


def test_peers_alone_have_a_table_and_are_counted():
    alone = entry(shown_as="peers", captured_step={"packing": True})
    page = write.text([run(alone)], "markdown")
    assert "No trial" not in page
    assert "What a user could pick instead" in page
    assert "1.00x" not in page
    assert page.startswith("- 1 trial: 1 completed.")
    assert "1 trial: 1 completed." in write.rendered([run(alone)], "html")


def test_the_answer_names_what_trains_where_the_baseline_cannot():
    neo = [stopped(), entry(method="qlora"), entry(method="qlora-captured"), stopped(method="lora")]
    assert str(findings([run(*neo)])[0]) == (
        "qlora and qlora-captured train opt-350m on NVIDIA H200 as t4, where baseline runs out of memory."
    )
    assert str(findings([run(stopped(), stopped(method="lora"))])[0]) == "2 cells: 2 out of memory."
    slower = entry(method="qlora", steady_step_seconds=0.2)
    assert str(findings([run(entry(), slower)])[0]) == "2 cells: 2 completed.", "slower is not fast"


def test_whether_a_method_is_no_worse_is_among_the_findings():
    found = [str(line) for line in findings([run(*seeds("baseline", 2.5, 2.7), *seeds("lora", 2.51, 2.70))])]
    assert (
        "Over baseline's held-out loss on opt-350m, means of seeds: lora no worse, +0.005 [-0.027, +0.037] nats."
        in found
    )


def test_no_worse_within_a_margin_above_what_the_baseline_gained_is_no_answer():
    loras = [replace(of, steady_step_seconds=0.05) for of in seeds("lora", 2.97, 2.98)]
    first, *others = [str(finding) for finding in findings([run(*seeds("baseline", 2.97, 2.98), *loras)])]
    assert first.endswith(", and no worse is not shown.")
    (of_loss,) = [line for line in others if line.startswith("Over baseline's held-out loss on opt-350m")]
    assert "lora no worse, " in of_loss and "larger than the 0.025 nats that the baseline gained in training" in of_loss


def test_a_wrong_forecast_is_named():
    wrong = stopped(forecast_verdict="fits")
    (line,) = [str(finding) for finding in findings([run(wrong)]) if "forecast" in str(finding)]
    assert line.startswith("The forecast was wrong about opt-350m x baseline on t4")


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
    assert str(findings([record.load(RECORDS / f"{name}.json")])[0]) == answer


def test_over_seeds_the_mean_is_told_with_its_spread_never_the_luckiest():
    baselines = [entry(seed=seed) for seed in range(3)]
    loras = [entry(method="lora", seed=seed, steady_step_seconds=0.1 / gain) for seed, gain in enumerate((2, 4, 8))]
    found = [str(finding) for finding in findings([run(*baselines, *loras)])]
    assert found[0] == (
        "lora trains opt-350m 4.0 times as fast as baseline (2.0 to 8.0 over 3 seeds) on NVIDIA H200 as t4, "
        "and is no worse."
    )
    assert "lora is 4.00x as fast (2.00 to 8.00 over 3 seeds)" in found[3]


def test_a_method_that_is_worse_is_not_the_answer_where_another_is_not():
    fast = seeds("fast-and-worse", 3.0, 3.2, steady_step_seconds=0.01)
    good = seeds("good", 2.5, 2.7, steady_step_seconds=0.05)
    found = findings([run(*seeds("baseline", 2.5, 2.7), *fast, *good)])
    assert str(found[0]).startswith("good trains opt-350m 2.0 times as fast as baseline (2.0 to 2.0 over 2 seeds)")
    only = str(findings([run(*seeds("baseline", 2.5, 2.7), *fast)])[0])
    assert only.startswith("fast-and-worse ") and only.endswith("and is worse.")


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_record_alone_has_a_page_and_an_answer(path):
    run_of = record.load(path)
    assert findings([run_of])
    assert "<html" in write.rendered([run_of], "html")


def test_a_trial_that_was_interrupted_is_counted_as_that():
    entries = [
        entry(),
        entry(method="lora", outcome="crashed", phase="train", reason="interrupted by KeyboardInterrupt"),
    ]
    told = " ".join(str(each) for each in findings([run(*entries)]))
    assert "lora interrupted in train" in told and "crashed" not in told
