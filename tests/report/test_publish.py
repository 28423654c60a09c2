"""One table for a paper: what is in a row, how each form writes it, and what is said of how it was measured."""

import csv
import io
import json
import math
import re
import shutil
import subprocess

import pytest
from samples import LADDER, entry, run, seeds, stopped

from lightweight.__main__ import main
from lightweight.record import document
from lightweight.report import publish

LORA = {"trainable_parameters": 1_500_000, "training_arguments": {"learning_rate": 1e-4}}
SEEDED = [*seeds("baseline", 2.5, 2.7, training_arguments={}), *seeds("lora", 2.51, 2.73, **LORA)]


def fields(*entries, columns=publish.DEFAULT):
    """The rows of the CSV as dicts."""
    return list(csv.DictReader(io.StringIO(publish.published([run(*entries)], "csv", columns))))


def test_a_row_is_a_cell_with_its_seeds_and_csv_has_the_ends_of_intervals_in_columns():
    of_baseline, of_lora = fields(*SEEDED)
    assert (of_lora["method"], of_lora["seeds"], of_lora["trainable (M)"]) == ("lora", "2", "1.5")
    assert float(of_lora["loss (nats)"]) == pytest.approx(2.62)
    assert float(of_lora["over-baseline (nats)"]) == pytest.approx(0.02)
    half = 12.7062 * math.hypot(0.01 - 0.02, 0.03 - 0.02) / math.sqrt(2)  # Student's t of one degree of freedom
    assert float(of_lora["over-baseline low (nats)"]) == pytest.approx(0.02 - half, abs=1e-4)
    assert float(of_lora["over-baseline high (nats)"]) == pytest.approx(0.02 + half, abs=1e-4)
    assert of_baseline["over-baseline (nats)"] == of_baseline["trainable (M)"] == ""
    assert float(of_baseline["forgotten (nats)"]) == 0.25
    assert "trainable low (M)" not in of_baseline and "peak low (GiB)" not in of_baseline


def test_rows_of_several_lengths_and_peers_alone_are_told():
    short, long = entry(max_length=256), entry(max_length=8192, corpus_digest="of longer rows")
    assert [row["length"] for row in fields(short, long)] == ["256", "8192"]
    assert "tokens a row" in publish.published([run(short, long)], "markdown")
    assert "tokens a row" not in publish.published([run(short)], "markdown")
    alone = publish.published([run(entry(shown_as="peers", method="lora-captured"))], "latex")
    assert "peers and ladders have tables of their own" in alone


def test_one_seed_has_no_interval_and_what_did_not_complete_is_a_row():
    one, failed = fields(entry(), stopped(method="lora"), columns=("method", "outcome", "loss", "step"))
    assert (one["loss (nats)"], one["loss low (nats)"]) == ("2.5", "")
    assert (failed["outcome"], failed["loss (nats)"], failed["step (ms)"]) == ("out of memory in forward", "", "")
    text = publish.published([run(entry(), stopped(method="lora"))], "markdown", ("method", "outcome", "loss"))
    assert re.search(r"\| lora +\| out of memory in forward +\| +- \|", text)


def test_times_and_rates_are_geometric_means_with_intervals_above_zero():
    times = [
        entry(seed=seed, steady_step_seconds=of, cold_seconds=100 * of, tokens_per_second=1 / of, step_tokens=(4,) * 6)
        for seed, of in enumerate((0.2, 0.4))
    ]
    (row,) = fields(*times, columns=("step", "tokens", "total"))
    assert float(row["step (ms)"]) == pytest.approx(1000 * math.sqrt(0.08))
    assert all(
        float(row[f"{name} low ({unit})"]) > 0 for name, unit in (("step", "ms"), ("tokens", "1/s"), ("total", "s"))
    )
    text = publish.published([run(*times)], "markdown", ("step",))
    assert "Times, tokens a second and ratios are geometric means, with the intervals of their logarithms" in text
    assert "geometric" not in publish.published([run(*times)], "markdown", ("loss",))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"planned_steps": 12, "tokens_per_step": 1024},
            "it has 12 steps, 1024 tokens a step, and its baseline 6 steps, 2048",
        ),
        ({"corpus_digest": "another"}, "no baseline of its model is here, on its card and corpus"),
        ({"seed": 3}, "it has seed 3, and its baseline seed 0"),
    ],
)
def test_why_a_method_is_not_held_against_its_baseline_is_said_where_that_is_shown(changes, why):
    of_run = run(entry(), entry(**{"method": "mine", "adapter": {}} | changes))
    told = publish.published([of_run], "markdown", ("method", "speedup", "over-baseline"))
    assert f"No speedup and over-baseline of opt-350m x mine: {why}" in told
    assert "No speedup of opt-350m" in publish.published([of_run], "markdown", ("method", "speedup"))
    assert "No speedup" not in publish.published([of_run], "markdown", ("method", "loss"))
    paired = publish.published([run(entry(), entry(method="mine"))], "markdown", ("method", "speedup"))
    assert "No speedup" not in paired
    failed = publish.published([run(stopped(), entry(method="mine"))], "markdown", ("method", "speedup"))
    assert "No speedup of opt-350m x mine: its baseline ended as out of memory in forward" in failed


def test_rungs_of_a_ladder_are_no_rows():
    assert [row["method"] for row in fields(entry(), *LADDER[1:])] == ["baseline"]


def test_tokens_that_older_records_counted_with_padding_are_not_shown():
    (old,) = fields(entry(tokens_per_second=9.0), columns=("tokens",))
    (new,) = fields(entry(tokens_per_second=9.0, step_tokens=(4,) * 6), columns=("tokens",))
    assert (old["tokens (1/s)"], new["tokens (1/s)"]) == ("", "9.0")


NASTY = r"a&b%c$d#e_f{g}h~i^j\k<l>[m]*"


def test_whatever_a_name_holds_is_text_in_latex():
    made = publish.latex(NASTY)
    plain = made
    for character, written in publish.LATEX.items():
        plain = plain.replace(written, "") if character != "\\" else plain
    plain = plain.replace(publish.LATEX["\\"], "")
    assert plain == "abcdefghijklm"
    for character in "&%$#_{}":
        assert f"\\{character}" in made
    table = publish.published([run(entry(model=NASTY, method="[x]"))], "latex", ("method", "model", "loss"))
    row = table.partition("\\midrule\n")[2].splitlines()[0]
    assert row.startswith("{[}x{]} & a\\&b")  # not the distance to the row before
    assert row.endswith(r" & 2.500 \\")
    assert r"95\%" not in table and "seeds" in table


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX here; the escapes are tested above")
def test_latex_compiles(tmp_path):
    table = publish.published([run(*SEEDED, entry(model=NASTY))], "latex")
    head = r"\documentclass{article}\usepackage{booktabs}\usepackage[T1]{fontenc}\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}\n{table}\n\\end{{document}}\n", "utf-8")
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_braces_and_rows_of_latex_are_balanced():
    table = publish.published([run(*SEEDED, entry(model=NASTY))], "latex")
    bare = re.sub(r"\\[\\{}]", "", table)
    assert bare.count("{") == bare.count("}")
    inside = table.partition("\\midrule")[2].partition("\\bottomrule")[0].strip().splitlines()
    head = table.partition("\\toprule\n")[2].splitlines()[0]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in inside} == {head.count("&")} != {0}


def test_a_card_and_an_outcome_are_told_where_rows_differ_in_them():
    def headings(*entries):
        first = publish.published([run(*entries)], "markdown").partition("\n")[0]
        return [heading.strip() for heading in first.split("|")]

    assert not {"card", "outcome"} & {*headings(entry(), entry(method="lora"))}
    assert "card" in headings(entry(), entry(device="another"))
    assert "outcome" in headings(entry(), stopped(method="lora"))


def test_a_method_that_trained_on_other_rows_is_told_in_every_form():
    note = "40 of 80 rows did not reach it"
    of_run = run(entry(), entry(method="half", data_note=note))
    for form in ("terminal", "markdown", "latex"):
        assert f"Not trained like the others: opt-350m x half: {note}" in publish.published([of_run], form)
    assert [row["note"] for row in fields(*of_run.entries)] == ["", note]


def test_a_number_that_no_row_has_is_no_column_unless_somebody_asks():
    assert "forgotten" not in publish.published([run(entry())], "markdown")
    told = entry(elsewhere_digest="e", elsewhere_loss_before=3.0, elsewhere_loss_after=3.5)
    assert "forgotten (nats)" in publish.published([run(told)], "markdown")
    assert "forgotten (nats)" in publish.published([run(entry())], "markdown", ("forgotten",))


def test_csv_holds_no_formula():
    (row,) = fields(entry(method="=1+1"), columns=("method",))
    assert row["method"] == "'=1+1"


def test_how_it_was_measured_is_said_of_the_columns_that_are_shown():
    said = publish.published([run(*SEEDED)], "terminal", ("method", "loss", "forgotten"))
    assert "seeds 0, 1" in said and "learning rates baseline 5e-05, lora 0.0001" in said
    assert "Held-out loss is the mean cross-entropy" in said and "Forgotten is how much" in said
    assert "Peak memory" not in said and "95% Student t-intervals" in said
    assert "torch 2.11.0" in said
    assert "Student" not in publish.published([run(entry())], "terminal", ("loss",))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training_arguments": {}}, "5e-05"),
        ({"training_arguments": None}, "not known"),
        ({"training_arguments": {"learning_rate": 0.003}, "own_code": {"compute_loss": {}}}, "0.003"),
        # as recorded before rates were: at 0.02, and at ten times what is said
        ({"training_arguments": {}, "own_code": {"optimizer": [{}, {"lr": 0.02}]}}, "not known"),
        ({"training_arguments": {"learning_rate": 0.003}, "own_code": {"trainer": {}}}, "not known"),
        ({"own_code": {"optimizer": {}}, "learning_rates": (0.02, 0.02)}, "0.02"),
        ({"own_code": {"optimizer": {}}, "learning_rates": (0.0032, 0.0002)}, "0.0002 and 0.0032"),
    ],
)
def test_the_rate_that_is_stated_is_the_one_that_was_trained_at_or_none(changes, told):
    (row,) = fields(entry(method="mine", **changes), columns=("rate",))
    assert row["rate"] == told
    text = publish.published([run(entry(method="mine", **changes))], "markdown", ("method", "loss"))
    assert f"highest learning rates mine {told}. " in text


def test_rows_of_one_name_are_told_apart_by_what_differs_between_them():
    def names(*entries, columns=("method", "loss")):
        return [row["method"] for row in fields(*entries, columns=columns)]

    swept = [
        entry(method="lora", method_digest=digest, training_arguments={"learning_rate": rate})
        for digest, rate in (("a" * 64, 1e-5), ("b" * 64, 1e-3))
    ]
    assert names(*swept) == ["lora (rate 1e-05)", "lora (rate 0.001)"]
    assert names(*swept, columns=("method", "rate")) == ["lora", "lora"]
    assert [row["rate"] for row in fields(*swept)] == ["1e-05", "0.001"]
    assert "| learning rate" in publish.published([run(*swept)], "markdown")
    assert "| learning rate" not in publish.published([run(swept[0])], "markdown")
    longer = entry(
        method="lora", method_digest="b" * 64, training_arguments={"learning_rate": 1e-3}, tokens_per_step=512
    )
    assert names(swept[0], longer) == [
        "lora (rate 1e-05, 2048 tokens a step)",
        "lora (rate 0.001, 512 tokens a step)",
    ]
    alike = [entry(method="lora", method_digest=digest * 64, training_arguments={}) for digest in "ab"]
    assert names(*alike) == ["lora (#aaaaaa)", "lora (#bbbbbb)"]
    own = {"method": "mine", "own_code": {"optimizer": {}}}  # from before rates were recorded
    set_ = [entry(**own, method_digest=each, training_arguments={"learning_rate": rate}) for each, rate in ("a1", "b2")]
    assert names(*set_) == ["mine (learning_rate 1)", "mine (learning_rate 2)"]
    assert names(entry(), *swept[:1]) == ["baseline", "lora"]
    assert names(entry(), entry(loss_on="last")) == ["baseline (--loss-on all)", "baseline (--loss-on last)"]
    assert names(entry(), entry(precision="fp16")) == ["baseline", "baseline"]


def test_the_command_line_writes_the_chosen_columns(tmp_path, capsys):
    stored = tmp_path / "run.json"
    stored.write_text(json.dumps(document(SEEDED)), "utf-8")
    assert main(["report", str(stored), "--columns", "method,loss", "-o", str(tmp_path / "t.tex")]) == 0
    assert r"\begin{tabular}{lr}" in (tmp_path / "t.tex").read_text("utf-8")
    assert main(["report", str(stored), "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("model,method,card,length,outcome,seeds,")
    assert main(["report", str(stored), "--format", "markdown", "--columns", "method"]) == 0
    assert capsys.readouterr().out.startswith("| method")
    assert main(["report", str(stored), "--columns", "method,los"]) == 2
    assert "--columns: there is no 'los': choose from model, " in capsys.readouterr().err
    assert main(["report", str(stored), "--columns", "loss", "--format", "html"]) == 2


def test_a_task_has_wilsons_interval_and_of_several_seeds_students_where_it_is_wider():
    asked = {"task_digest": "q", "task_questions": 10}
    (one,) = fields(entry(task_matches_after=8, **asked), columns=("task",))
    assert (float(one["task"]), float(one["task low"]), float(one["task high"])) == pytest.approx(
        (0.8, 0.4902, 0.9433), abs=1e-4
    )
    for counts, interval in (
        ((6, 8, 10), (0.8 - 4.3027 * 0.2 / math.sqrt(3), 1)),
        ((8, 8, 8), (0.4902, 0.9433)),
        ((0, 0), (0, 0.2775)),
    ):
        two = [entry(task_matches_after=count, seed=seed, **asked) for seed, count in enumerate(counts)]
        (several,) = fields(*two, columns=("task",))
        assert float(several["task"]) == pytest.approx(sum(counts) / len(counts) / 10)
        assert (float(several["task low"]), float(several["task high"])) == pytest.approx(interval, abs=1e-4)
    assert "Wilson" in publish.published([run(*two)], "terminal", ("task",))
