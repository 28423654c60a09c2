"""End to end: pytest runs pytest, children train. One file of cells, on a model that trains in a second."""

import fnmatch
import json
import math
import re
import shutil
import tempfile
import tomllib
from pathlib import Path

import matplotlib.figure  # noqa: F401  pytester unloads what its runs import, and this cannot be imported twice
import pytest

from conftest import MICRO, turns
from lightweight.child import helper
from lightweight.child.process import CAN_PIN
from lightweight.session import speedups
from lightweight.targets import Device

pytestmark = pytest.mark.usefixtures("without_gpu")

ROOT = Path(__file__).parent.parent

CELLS = f"""
    import pytest
    from lightweight.models import Model

    MICRO = Model(name="micro", architecture={MICRO.architecture!r})

    @pytest.mark.parametrize("method", ["baseline", "lora"])
    def test_cell(train, method):
        outcome = train(MICRO, method)
        assert outcome.kind == "completed", outcome.reason
"""

OUT_OF_MEMORY = """
    '''A child that ends as one does on a GPU; a CPU has no allocator that could.'''
    import pytest
    from lightweight.child import worker
    from lightweight.trial import Measurements, OutOfMemory

    def run(connection, trial, folder, started, *_):
        connection.send(worker.Ready(Measurements()))
        assert connection.recv() == "round"
        measured = Measurements(peak_allocated_bytes=90, peak_reserved_bytes=99, phase_seconds={"train": 0.1})
        connection.send(
            OutOfMemory(phase="backward", requested_bytes=20, budget_bytes=100, reason="no room", measured=measured)
        )
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """Somebody's project that loads the plugin, with a corpus of 12 pairs: two steps an epoch."""
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    pytester.makeini("[pytest]\naddopts = -p no:randomly\n")  # cells in their order, also where that plugin is there
    (pytester.path / "corpus.json").write_text(json.dumps(turns(12)), "utf-8")
    return pytester


def run_json(project: pytest.Pytester, *arguments: str):
    result = project.runpytest("--benchmark-json=out.json", "--epochs=3", *arguments)
    return result, json.loads((project.path / "out.json").read_text())


def test_cells_are_trained_timed_shown_and_recorded(project, tmp_path, monkeypatch):
    project.makepyfile(CELLS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result, document = run_json(project, "--report=report.html")
    result.assert_outcomes(passed=2)
    assert [(e["model"], e["method"], e["outcome"]) for e in document["outcomes"]] == [
        ("micro", "baseline", "completed"),
        ("micro", "lora", "completed"),
    ]
    for entry, row in zip(document["outcomes"], document["benchmarks"], strict=True):
        assert entry["target"] == "cpu"
        assert entry["test"].endswith(f"::test_cell[{entry['method']}]")
        assert (entry["steps"], entry["weights"], entry["precision"]) == (6, "random", "fp32")
        assert len(entry["train_loss"]) == len(entry["step_seconds"]) == 6
        assert entry["cold_seconds"] > sum(entry["step_seconds"])
        assert row["stats"]["rounds"] == 3
        assert row["group"] == "micro on cpu"
        assert len(row["extra_info"]["device_seconds"]) == 3
        # a round is what the child measured, and little more
        assert row["stats"]["total"] == pytest.approx(sum(row["extra_info"]["device_seconds"]), rel=0.5)
    assert document["machine_info"]["gpu"] is None
    assert document["machine_info"]["glibc_tunables"] == "glibc.malloc.hugetlb=1"  # of the children
    assert "node" not in document["machine_info"]
    result.stdout.fnmatch_lines(
        [
            "micro x baseline: step 2 of 6, loss *",
            "micro x baseline: step 6 of 6, loss *",
            "micro x baseline: completed .*",
            "model * method * card * outcome *",
            "micro * baseline * completed * 1.00x *",
            "micro * lora * completed *",
            "report: report.html",
            "*benchmark 'micro on cpu': 2 tests*",
        ]
    )
    page = (project.path / "report.html").read_text("utf-8")
    assert "2 cells: 2 completed." in page and page.count("<figure") >= 3
    assert not list(tmp_path.glob("lightweight-*"))


def test_what_was_only_forecast_is_in_the_report(project):
    project.makepyfile(
        CELLS.partition("    @pytest")[0]
        + """
    def test_fits(forecast_of):
        from lightweight.targets import T4
        assert forecast_of(MICRO, "lora", target=T4).verdict == "fits"
    """
    )
    project.runpytest("--report=report.md").assert_outcomes(passed=1)
    assert "micro, forecast: lora fits t4." in (project.path / "report.md").read_text("utf-8")


def test_a_report_that_cannot_be_written_is_told_and_fails_the_session(project):
    project.makepyfile(CELLS)
    (project.path / "report.html").mkdir()
    result = project.runpytest("--report=report.html", "--epochs=1", "-k", "lora", "--benchmark-disable")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --report report.html: cannot be written (it is a folder: name a file *"])
    assert "micro" not in result.stdout.str(), "nothing is trained for what cannot be kept"


def test_with_benchmarks_disabled_the_whole_job_is_still_trained(project):
    project.makepyfile(CELLS)
    result = project.runpytest("--benchmark-disable", "--epochs=2", "-k", "lora")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["micro x lora: step 4 of 4, loss *", "micro * lora * completed *"])


def test_a_run_whose_only_cell_ends_out_of_memory_is_recorded(project):
    project.makepyfile(children=OUT_OF_MEMORY)
    project.makepyfile(
        CELLS.replace('"baseline", ', "").replace(
            'assert outcome.kind == "completed", outcome.reason', 'assert outcome.kind == "out_of_memory"'
        )
        + """
    @pytest.fixture(autouse=True)
    def child(monkeypatch):
        import children
        from lightweight.child import worker
        monkeypatch.setattr(worker, "run", children.run)
    """
    )
    project.syspathinsert()
    result, document = run_json(project, "--benchmark-autosave")
    result.assert_outcomes(passed=1)
    (entry,) = document["outcomes"]
    assert (entry["outcome"], entry["phase"], entry["requested_bytes"]) == ("out_of_memory", "backward", 20)
    (row,) = document["benchmarks"]
    assert row["stats"]["rounds"] == 1
    assert row["name"].endswith("[out of memory]")
    assert row["fullname"].endswith("test_cell[lora]")
    result.stdout.fnmatch_lines(["micro * lora * out of memory in backward *"])
    assert list(project.path.glob(".benchmarks/*/0001_*.json"))


def test_a_child_killed_in_a_round_costs_its_cell_and_nothing_else(project):
    project.makepyfile(
        CELLS
        + """
    @pytest.fixture(autouse=True)
    def killer(monkeypatch, request):
        import multiprocessing, os, signal
        from lightweight.plugin import Laboratory

        def kill(laboratory, trial, step, loss):
            if trial.method.name == "baseline" and step == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

        monkeypatch.setattr(Laboratory, "_show_step", kill)
    """
    )
    result, document = run_json(project)
    result.assert_outcomes(passed=1, failed=1)
    crashed, completed = document["outcomes"]
    assert (crashed["outcome"], completed["outcome"]) == ("crashed", "completed")
    assert crashed["reason"].startswith("killed by SIGKILL")
    assert (crashed["steps"], crashed["planned_steps"]) == (2, 6)  # the round before it is kept
    assert [row["stats"]["rounds"] for row in document["benchmarks"]] == [1, 3]
    result.stdout.fnmatch_lines(
        ["*killed by SIGKILL*", "micro * baseline * crashed in train *", "micro * lora * completed *"]
    )


def test_what_did_not_complete_is_not_ranked_among_what_did(project):
    """It is in a table of its own, in seconds, whatever it took until it ended."""
    project.makepyfile(
        CELLS
        + """
    @pytest.fixture(autouse=True)
    def killer(monkeypatch):
        from lightweight.child import owner
        begin = owner.Child.round

        def round(child):
            if child.trial.method.name == "baseline" and child.outcome is None:
                import os, signal
                os.kill(child.pids[0], signal.SIGKILL)
            return begin(child)

        monkeypatch.setattr(owner.Child, "round", round)
    """
    )
    result, _ = run_json(project)
    result.assert_outcomes(passed=1, failed=1)
    tables = re.split(r"-+ benchmark (?='micro)", result.stdout.str())[1:]
    ranked, ended = (table.partition("Legend")[0] for table in tables)
    assert "lora" in ranked and "baseline" not in ranked
    assert ended.startswith("'micro on ") and "crashed, timed until then'" in ended and "lora" not in ended
    assert "test_cell[baseline] [crashed]" in ended and "time in s)" in ended
    assert "inf" not in ranked.partition("[lora]")[2].partition("\n")[0] + ended.partition("crashed]")[2]


def test_an_outcome_is_looked_up_not_trained_twice(project):
    project.makepyfile(
        CELLS
        + """
    def test_before_in_the_file_but_after_in_time(outcome_of):
        assert outcome_of(MICRO, "lora").kind == "completed"

    def test_other_changes_are_another_trial(outcome_of):
        assert len(outcome_of(MICRO, "lora", max_steps=1).measured.train_loss) == 1

    def test_a_part_of_a_corpus_is_another_corpus(outcome_of, laboratory):
        from dataclasses import replace

        part = replace(laboratory.corpus, train=laboratory.corpus.train[:1])
        assert part.train[0].messages[0].content not in repr(part)
        assert outcome_of(MICRO, "lora", max_steps=1, corpus=part).measured.training_rows == 1
    """
    )
    result, document = run_json(project)
    result.assert_outcomes(passed=5)
    steps = [(e["method"], e["steps"]) for e in document["outcomes"]]
    assert steps == [("baseline", 6), ("lora", 6), ("lora", 1), ("lora", 1)]
    assert len(document["benchmarks"]) == 2


def test_models_and_methods_come_from_the_command_line(project, micro):
    project.makepyfile(
        methods_of_mine="""
        from dataclasses import replace
        from lightweight.methods import LORA
        MINE = replace(LORA, name="mine", training_arguments={"per_device_train_batch_size": 4})
        """
    )
    project.makepyfile(
        """
        def test_cell(train, model, method):
            assert train(model, method).kind == "completed"

        def test_of_somebody_else(model):
            assert model == "theirs"
        """
    )
    project.makeconftest(
        """
        import pytest
        pytest_plugins = ["lightweight.plugin"]

        @pytest.fixture
        def model():
            return "theirs"
        """
    )
    project.syspathinsert()
    arguments = (f"--model={micro.location}", "--method=baseline", "--method=methods_of_mine:MINE")
    result, document = run_json(project, *arguments)
    result.assert_outcomes(passed=3)
    assert [(e["method"], e["weights"]) for e in document["outcomes"]] == [
        ("baseline", "pretrained"),
        ("mine", "pretrained"),
    ]
    assert document["outcomes"][1]["steps"] == 9  # ten pairs in batches of four, three epochs
    assert document["benchmarks"][0]["params"] == {"model": micro.location, "method": "baseline"}


def test_only_models_that_are_going_to_be_trained_are_looked_for(project):
    """Which may download them: neither the defaults of the command line nor what was deselected."""
    project.makepyfile(
        f"""
        import pytest
        from lightweight import models

        MICRO = models.Model(name="micro", architecture={MICRO.architecture!r})

        @pytest.mark.parametrize("model", [MICRO, models.Model(name="far", source="./far")], ids=["micro", "far"])
        def test_cell(train, laboratory, model):
            assert train(model, "baseline").kind == "completed"
            assert list(laboratory._models) == ["micro"]
        """
    )
    project.runpytest("-k", "micro", "--epochs=1").assert_outcomes(passed=1, deselected=1)
    result = project.runpytest("-k", "far", "--epochs=1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: model far: no such folder; *"])


def test_what_is_of_another_model_than_those_named_is_left_out(project):
    project.makepyfile(
        test_cells="""
        import pytest

        @pytest.mark.parametrize("model", ["opt-350m", "gpt-neo-1.3b"])
        def test_its_argument_says(train, model): ...

        @pytest.mark.model("gpt-neo-1.3b")
        def test_its_mark_says(forecast_of): ...

        @pytest.mark.model("opt-350m")
        @pytest.mark.parametrize("model", ["gpt-neo-1.3b"])
        def test_its_mark_goes_before(train, model): ...

        def test_nothing_says(train): ...

        @pytest.mark.parametrize("model", ["gpt-neo-1.3b"])
        def test_of_somebody_else(model): ...
        """
    )

    def collected(*arguments):
        lines = project.runpytest("--collect-only", "-q", *arguments).outlines
        return {line.partition("::")[2] for line in lines if "::" in line}

    everything = collected()
    assert len(everything) == 6
    assert collected("--model=opt-350m") == everything - {"test_its_argument_says[gpt-neo-1.3b]", "test_its_mark_says"}


def test_what_is_set_is_trained_shown_and_recorded(project):
    """The suite's own methods, by name or as objects, and where it says nothing a test's own; one that says otherwise
    is not run."""
    project.makepyfile(
        CELLS.replace('["baseline", "lora"]', '["baseline", "lora", LORA, OWN, OTHERWISE]').replace(
            "    @pytest",
            """
    from dataclasses import replace
    from lightweight.methods import LORA, Method

    OWN = Method(name="own")
    OTHERWISE = Method(name="otherwise", training_arguments={"learning_rate": 1e-4})

    def test_inside(outcome_of):
        outcome_of(MICRO, OTHERWISE)

    @pytest""",
            1,
        )
    )
    options = "--learning-rate=1e-3 --lora-rank=4 --lora-layers=fc1 --batch-size=5 --max-length=32 --warmup=1"
    result, document = run_json(project, *options.split())
    result.assert_outcomes(passed=4, skipped=2)
    baseline, lora, again, own = document["outcomes"]
    of_all = {"learning_rate": 1e-3, "batch_size": 5, "warmup": 1}
    assert baseline["changed"] == own["changed"] == of_all
    assert lora["changed"] == of_all | {"lora_rank": 4, "lora_layers": ["fc1"]}
    assert again["method_digest"] == lora["method_digest"]
    for entry in (baseline, lora, own):
        assert entry["steps"] == 6  # ten pairs in batches of five, three epochs
        assert (entry["max_length"], entry["tokens_per_step"]) == (32, 160)
        assert entry["training_arguments"]["learning_rate"] == 1e-3
    assert (lora["adapter"]["r"], lora["adapted_layers"]) == (4, ["fc1"])
    result.stdout.fnmatch_lines(
        [
            "Set from outside the method: baseline (--batch-size 5 --learning-rate 0.001 --warmup 1), lora *rank 4*",
            "Rows of at most 32 tokens.",
            "not run: method otherwise says learning_rate=0.0001, and the command line --learning-rate 0.001: *",
        ]
    )


def test_what_is_set_of_rows_is_trained_shown_and_recorded(project):
    project.makepyfile(CELLS)
    roles = ("user", "assistant") * 2
    talks = [{"messages": [{"role": role, "content": f"{n} is it"} for role in roles]} for n in range(24)]
    (project.path / "talks.json").write_text(json.dumps(talks), "utf-8")
    options = "--corpus=talks.json --max-length=128 --loss-on=last --long=drop --padding=max"
    result, document = run_json(project, *options.split(), "-k", "lora")
    result.assert_outcomes(passed=1, deselected=1)
    (entry,) = document["outcomes"]
    assert [entry[key] for key in ("max_length", "loss_on", "long", "padding")] == [128, "last", "drop", "max"]
    assert entry["step_padded_tokens"][0] == 8 * 128
    assert "changed" not in entry
    result.stdout.fnmatch_lines(["Rows of at most 128 tokens.", "Conversations: --loss-on last --long drop."])


def test_parametrising_a_test_oneself_goes_before_the_command_line(project):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("model, method", [("opt-tiny", "lora")])
        def test_cell(train, model, method):
            pass

        @pytest.mark.parametrize("method", ["qlora"])
        def test_method(train, model, method):
            pass
        """
    )
    result = project.runpytest("--collect-only", "-q")
    result.stdout.fnmatch_lines(
        [
            "*::test_cell[[]opt-tiny-lora[]]",
            "*::test_method[[]opt-tiny-qlora[]]",
            "*::test_method[[]gpt-neo-tiny-qlora[]]",
            "3 tests collected*",
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--corpus=nowhere.json"], "corpus nowhere.json: does not exist: give the path of a file"),
        (["--corpus=test_cells.py"], "corpus test_cells.py: is not JSON at line *"),
        (["--model=./nowhere"], "model ./nowhere: no such folder; give a folder with *"),
        (["--method=lorra"], "--method: unknown method 'lorra': choose one of baseline, lora, qlora, *-captured, or *"),
        (["--target=t4"], "--target t4: a target caps a GPU's memory, and CUDA finds no GPU here; *"),
        (["--weights=pretrained"], "model opt-tiny: exists with random weights only*"),
        (["--epochs=0"], "--epochs 0: *"),
        (["--trial-timeout=0"], "--trial-timeout 0: *"),
        (["--gpus-per-trial=0"], "--gpus-per-trial 0: give more than 0"),
        (["--gpus-per-trial=9"], "method baseline trains 8 sequences a step, which 9 ranks cannot share*"),
        (["--seed=-1"], "--seed -1: give a number from 0 to *"),
        (["--seeds=0"], "--seeds 0: give more than 0"),
        (["--seed=4294967295", "--seeds=2"], "--seed 4294967296 of the last of --seeds 2: give a number from 0 to *"),
        (["--report=nowhere/report.html"], "--report nowhere/report.html: cannot be written (there is no folder *"),
        (["--lora-rank=0"], "--lora-rank 0: give at least 1"),
        (["--schedule=cosin"], "--schedule cosin: choose one of linear, cosine, *; did you mean cosine*"),
        (["--method=baseline", "--lora-rank=4"], "--lora-rank 4: method baseline has no LoRA adapter: leave it out, *"),
        (["--batch-size=1", "--gpus-per-trial=2"], "method baseline trains 1 sequences a step, which 2 ranks *"),
        (["--pairs=7"], "--pairs: 7 pairs: give a multiple of 4 from 8 on, at most 65536"),
        (["--speedup-fail=10%"], "--speedup-fail: there is no stored run to compare with: add --benchmark-compare"),
        (["--memory-fail=ten", "--benchmark-compare"], "--memory-fail 'ten': give a percentage *"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_built(project, arguments, expected):
    project.makepyfile(test_cells="def test_cell(train, model, method):\n    assert not train(model, method)\n")
    result = project.runpytest(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in result.stderr.lines if line.strip()]
    assert len(lines) == 1
    result.stderr.fnmatch_lines([f"ERROR: {expected}"])
    assert "writing" not in result.stdout.str()


def test_layers_that_one_model_does_not_have_fail_its_cells_in_a_line_without_a_child(project, monkeypatch):
    project.makepyfile(
        test_cells="def test_cell(train, model, method):\n    assert train(model, method).kind == 'completed'\n"
    )
    models = ["--model=opt-tiny", "--model=llama-tiny"]
    result = project.runpytest(*models, "--method=lora", "--lora-layers=fc1", "--epochs=1", "--max-length=32")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["llama-tiny x lora: --lora-layers: there is no layer called fc1: name some of down_proj, gate_proj, *"]
    )
    assert "llama-tiny: writing its weights" not in result.stdout.str()
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize("name", ["opt_tiny", "./nowhere"])
def test_a_tests_own_model_that_nothing_has_is_one_line(project, name):
    project.makepyfile(
        f"""
        import pytest

        @pytest.mark.parametrize("model", ["{name}"])
        def test_cell(train, model):
            train(model, "lora")
        """
    )
    result = project.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: model {name}: no such folder; *"])


OF_THE_COMMAND_LINE = """
    def test_cell(train, model, method):
        assert train(model, method).kind == "completed"

    def test_again(outcome_of, model, method):
        assert outcome_of(model, method).kind == "completed"
"""


def test_cells_are_repeated_over_seeds_each_as_if_it_were_alone(project, micro):
    project.makepyfile(OF_THE_COMMAND_LINE)
    of_cells = (f"--model={micro.location}", "--method=baseline", "--method=lora")
    result, document = run_json(project, *of_cells, "--seed=3", "--seeds=2")
    result.assert_outcomes(passed=8)
    found = [(e["method"], e["seed"], e["test"].rpartition("-")[2]) for e in document["outcomes"]]
    assert found == [(method, seed, f"seed{seed}]") for method in ("baseline", "lora") for seed in (3, 4)]
    result.stdout.fnmatch_lines(["*method*seeds*held-out loss*over baseline*", "* lora * 2 *"])
    alone, other = run_json(project, *of_cells, "--seed=4", "--seeds=1")
    alone.assert_outcomes(passed=4)
    assert [e["test"].rpartition("-")[2] for e in other["outcomes"]] == ["baseline]", "lora]"]  # as without the option
    losses = {e["method"]: e["train_loss"] for e in document["outcomes"] if e["seed"] == 4}
    assert losses == {e["method"]: e["train_loss"] for e in other["outcomes"]}


def test_random_weights_are_of_each_seed_and_a_test_without_a_cell_runs_once(project):
    project.makepyfile(
        CELLS.replace("def test_cell(train, method)", "def test_cell(train, model, method)")
        .replace(
            '@pytest.mark.parametrize("method", ["baseline", "lora"])',
            '@pytest.mark.parametrize("model", [MICRO])\n    @pytest.mark.parametrize("method", ["baseline"])',
        )
        .replace("train(MICRO", "train(model")
        + """
    def test_alone(train):
        assert train(MICRO, "lora").kind == "completed"
    """
    )
    result, document = run_json(project, "--seeds=2")
    result.assert_outcomes(passed=3)
    of = {(e["method"], e["seed"]): e for e in document["outcomes"]}
    assert set(of) == {("baseline", 0), ("baseline", 1), ("lora", 0)}
    _, single = run_json(project, "--seed=1", "-k", "cell")
    assert of["baseline", 1]["heldout_loss_before"] == single["outcomes"][0]["heldout_loss_before"]
    assert of["baseline", 1]["heldout_loss_before"] != of["baseline", 0]["heldout_loss_before"]


def test_a_test_that_trains_twice_is_told_so_before_the_second_trial(project):
    project.makepyfile(
        CELLS.partition("    @pytest.mark.parametrize")[0]
        + """
    def test_two(train):
        assert train(MICRO, "baseline").kind == "completed"
        train(MICRO, "lora")
    """
    )
    result, document = run_json(project)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["train: pytest-benchmark times one cell per test: use outcome_of for the others"])
    assert [(entry["method"], entry["outcome"]) for entry in document["outcomes"]] == [("baseline", "completed")]
    assert len(document["benchmarks"]) == 1


def test_a_stored_seed_that_nobody_asked_for_now_is_not_missed(project, micro):
    project.makepyfile("def test_cell(train, model, method):\n    train(model, method)\n")
    cell = (f"--model={micro.location}", "--method=lora", "--epochs=1")
    project.runpytest(*cell, "--seeds=3", "--benchmark-autosave").assert_outcomes(passed=3)
    fewer = project.runpytest(*cell, "--seeds=2", "--benchmark-compare", "--loss-fail")
    assert fewer.ret == pytest.ExitCode.OK
    fewer.stdout.no_fnmatch_line("*missing*")


def test_a_task_is_asked_before_and_after_and_recorded(project, micro):
    project.makepyfile("def test_cell(train, model, method):\n    train(model, method)\n")
    (project.path / "task.jsonl").write_text('{"prompt": "Now?", "answer": "no"}\n{"prompt": "So?", "answer": "no"}\n')
    cell = (f"--model={micro.location}", "--method=lora", "--task=task.jsonl")
    result, document = run_json(project, *cell, "--seeds=2", "--max-length=48")
    result.assert_outcomes(passed=2)
    found = [(e["task_questions"], e["task_matches_before"], e["task_matches_after"]) for e in document["outcomes"]]
    assert found == [(2, 0, 0)] * 2
    assert "--task=task.jsonl" in document["command"]
    result.stdout.fnmatch_lines(
        ["*questions*before*after*", "* lora * 2 *0.000 [[]0.000, 0.658] *0.000 [[]0.000, 0.658]*"]
    )
    refused = project.runpytest(*cell[:2], "--task=nowhere.jsonl")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: task nowhere.jsonl: cannot be read (*"])


def test_more_ranks_than_gpus_are_refused_before_any_model_is_built(project, monkeypatch):
    project.makepyfile(CELLS)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(helper, "call_within", lambda *_: Device(name="H100", total_bytes=2**36, capability=(9, 0)))
    result = project.runpytest("--gpus-per-trial=3")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.stderr.lines if line.strip()]
    assert line == "ERROR: --gpus-per-trial 3: CUDA finds 2 here; give no more than that"


def test_trials_on_two_ranks_are_recorded_as_such(project):
    project.makepyfile(CELLS)
    result, document = run_json(project, "--gpus-per-trial=2", "-k", "lora")
    result.assert_outcomes(passed=1, deselected=1)
    (entry,), (row,) = document["outcomes"], document["benchmarks"]
    assert (entry["world_size"], entry["outcome"], entry["steps"]) == (2, "completed", 6)
    assert len(entry["rank_peak_allocated_bytes"]) == 2
    assert row["stats"]["rounds"] == 3
    result.stdout.fnmatch_lines(["micro * lora * 2 x * completed *"])


def test_an_interrupted_run_keeps_the_record_of_what_has_finished(project):
    """In the first round of the second cell, whose row has no data yet."""
    project.makepyfile(
        CELLS
        + """
    @pytest.fixture(autouse=True)
    def impatient(monkeypatch):
        from lightweight.plugin import Laboratory

        def interrupt(laboratory, trial, step, loss):
            if trial.method.name == "lora" and step == 1:
                raise KeyboardInterrupt  # as SIGINT has Python do, unless whoever started it has it ignored

        monkeypatch.setattr(Laboratory, "_show_step", interrupt)
    """
    )
    result = project.runpytest("--benchmark-json=out.json", "--epochs=2", no_reraise_ctrlc=True)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    document = json.loads((project.path / "out.json").read_text())
    assert [(e["method"], e["outcome"], e["phase"]) for e in document["outcomes"]] == [
        ("baseline", "completed", None),
        ("lora", "crashed", "train"),
    ]
    assert document["outcomes"][1]["reason"] == "interrupted by KeyboardInterrupt"
    assert [row["params"]["method"] for row in document["benchmarks"]] == ["baseline"]
    result.stdout.fnmatch_lines(["micro * baseline * completed *", "micro * lora * interrupted in train *"])


def test_a_model_of_true_size_is_not_trained_on_a_cpu_unless_told_how_long(project, micro):
    project.makepyfile(
        test_long=f"""
        def test_long(laboratory):
            assert laboratory.takes_long("opt-350m") and not laboratory.takes_long({micro.location!r})
        """,
        test_told="def test_told(laboratory):\n    assert not laboratory.takes_long('opt-350m')\n",
    )
    project.runpytest("--weights=random", "test_long.py").assert_outcomes(passed=1)
    project.runpytest("--epochs=1", "test_told.py").assert_outcomes(passed=1)
    for name in ("test_training", "test_speedup"):
        shutil.copy(ROOT / "experiments" / f"{name}.py", project.path)
        result = project.runpytest("--model=opt-350m", "--weights=random", "--method=lora", f"{name}.py")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines("not run: many minutes a cell on a CPU; --epochs 2 trains them: *")


def test_what_needs_cuda_is_not_run_and_not_passed(project):
    project.makepyfile(
        "import pytest\n\n@pytest.mark.needs_cuda\ndef test_gpu(train):\n    train('opt-350m', 'lora')\n"
    )
    result = project.runpytest()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["not run: needs CUDA: *::test_gpu"])


def test_tests_that_train_nothing_need_no_corpus_and_get_no_table(pytester):
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    pytester.makepyfile("def test_nothing():\n    pass\n")
    result = pytester.runpytest()
    result.assert_outcomes(passed=1)
    assert "lightweight:" not in result.stdout.str()


def test_comparing_with_nothing_stored_passes_and_with_a_stored_run_compares(project):
    project.makepyfile(CELLS)
    # this repository's own filters: what pytest-benchmark warns of must not become an error
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["pytest"]
    project.makeini(
        "\n    ".join(
            ["[pytest]\naddopts = -p no:randomly\nfilterwarnings =", *settings["ini_options"]["filterwarnings"]]
        )
    )
    arguments = ("--epochs=2", "-k", "lora", "--benchmark-autosave", "--benchmark-compare")
    first = project.runpytest(*arguments)
    assert first.ret == 0
    first.assert_outcomes(passed=1, deselected=1)
    (stored,) = project.path.glob(".benchmarks/*/0001_*.json")
    document = json.loads(stored.read_text())
    assert len(document["outcomes"]) == 1
    document["machine_info"]["cpu"]["hz_actual_friendly"] = "as it was that day"
    stored.write_text(json.dumps(document))
    second = project.runpytest(*arguments, "--report=report.html")
    assert second.ret == 0
    second.stdout.fnmatch_lines_random(["test_cell*lora* (NOW) *", "test_cell*lora* (0001_*) *"])
    assert re.search(">micro x lora on .*</figcaption>", (project.path / "report.html").read_text("utf-8")), (
        "its history"
    )


SPEEDUP = (
    CELLS
    + """
    def test_speedup(speedup):
        found = speedup(MICRO, "lora")
        assert found.reason is None
        assert found.low <= found.ratio <= found.high
"""
)


def edit_stored(project: pytest.Pytester, change) -> Path:
    """Let `change` have the one stored run's JSON."""
    (stored,) = project.path.glob(".benchmarks/*/0001_*.json")
    document = json.loads(stored.read_text())
    change(document)
    stored.write_text(json.dumps(document))
    return stored


def test_a_run_on_another_gpu_is_never_compared(project):
    project.makepyfile(CELLS)
    project.runpytest("--epochs=1", "-k", "lora", "--benchmark-autosave").assert_outcomes(passed=1, deselected=1)
    edit_stored(project, lambda document: document["outcomes"][0].update(device="Tesla T4"))
    result = project.runpytest("--epochs=1", "-k", "lora", "--benchmark-compare", "--speedup-fail")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*lightweight: did it get worse*",
            "micro * lora * no stored run",
            "not compared with 0001_*.json: device is Tesla T4 there and * here",
            "NOTHING WAS COMPARED*: store this run with --benchmark-autosave, *",
        ]
    )
    assert "(0001_" not in result.stdout.str()  # nor are its times


def test_times_of_cells_under_other_conditions_are_left_out_of_the_table(project):
    project.makepyfile(CELLS)
    project.runpytest("--epochs=1", "--benchmark-autosave").assert_outcomes(passed=2)
    edit_stored(project, lambda document: document["outcomes"][1].update(precision="bf16"))
    result = project.runpytest("--epochs=1", "--benchmark-compare")
    result.stdout.fnmatch_lines_random(["test_cell*baseline* (0001_*", "not compared with 0001_*precision is bf16*"])
    result.stdout.no_fnmatch_line("test_cell*lora* (0001_*")


def test_a_speedup_is_measured_in_alternation_recorded_and_shown(project):
    project.makepyfile(SPEEDUP)
    # --benchmark-json makes it a run that others are held against: as many pairs as precision takes, here all
    result, document = run_json(project, "--pairs=12")
    result.assert_outcomes(passed=3)
    baseline, lora = document["outcomes"]
    assert "speedup" not in baseline
    found = lora["speedup"]
    assert 8 <= len(found["log_ratios"]) <= 12
    pairing = "sharing a core" if CAN_PIN else "alternating"
    assert (found["pairing"], found["cap"], found["verdict"]) == (pairing, 12, None)
    assert found["low"] < found["ratio"] < found["high"]
    result.stdout.fnmatch_lines(
        ["micro x lora: 8 pairs of rounds, *", f"micro * lora * {found['ratio']:.2f}x [[]*, *[]] *"]
    )


def test_a_lost_speedup_fails_the_session_and_noise_does_not(project):
    project.makepyfile(SPEEDUP)
    project.runpytest("--epochs=1", "--pairs=8", "--benchmark-autosave").assert_outcomes(passed=3)
    arguments = ("--epochs=1", "--pairs=8", "--benchmark-compare", "--speedup-fail=40%", "--memory-fail")
    same = project.runpytest(*arguments)
    same.assert_outcomes(passed=3)
    assert same.ret == 0

    def far_faster(document):
        entry = document["outcomes"][1]
        # by more than what the noise of eight short pairs, on cores that are busy otherwise, leaves open
        found = entry["speedup"]
        found["log_ratios"] = [log + 5.0 for log in found["log_ratios"]]
        found |= {key: found[key] * math.exp(5.0) for key in ("ratio", "low", "high")}
        entry["versions"]["peft"] = "0.1"

    edit_stored(project, far_faster)
    lost = project.runpytest(*arguments, "--benchmark-json=out.json")
    lost.assert_outcomes(passed=3)
    assert lost.ret == pytest.ExitCode.TESTS_FAILED
    lost.stdout.fnmatch_lines(
        [
            "*benchmark 'micro on *",
            "*lightweight: did it get worse*",
            "micro * lora * FAIL",
            "FAILED micro x lora: speedup * now, * in 0001_*; now / stored is *, the floor 0.600. "
            "Changed since: peft 0.1 -> *",
        ]
    )
    (found,) = [e["speedup"] for e in json.loads((project.path / "out.json").read_text())["outcomes"] if "speedup" in e]
    assert (found["verdict"], found["floor"]) == ("fail", 0.6)


def test_a_higher_loss_a_cell_that_is_gone_and_nothing_to_compare_with_fail_the_session(project):
    cells = project.makepyfile(CELLS)
    project.runpytest("--epochs=1", "--benchmark-autosave").assert_outcomes(passed=2)
    compare = ("--epochs=1", "--benchmark-compare", "--loss-fail")
    assert project.runpytest(*compare).ret == 0

    def better(document):
        for entry in document["outcomes"]:
            entry["heldout_loss_after"] -= 1.0

    edit_stored(project, better)
    worse = project.runpytest(*compare)
    assert worse.ret == pytest.ExitCode.TESTS_FAILED
    worse.stdout.fnmatch_lines(["FAILED micro x baseline: held-out loss * nats a token now*"])
    cells.write_text(cells.read_text().replace('"baseline", ', ""))  # the suite has lost a cell
    gone = project.runpytest(*compare, "--loss-fail=5")
    assert gone.ret == pytest.ExitCode.TESTS_FAILED
    gone.stdout.fnmatch_lines(["FAILED micro x baseline: missing now, completed in 0001_*"])
    assert project.runpytest(*compare, "--loss-fail=5", "--missing=pass").ret == 0
    edit_stored(project, lambda document: [entry.update(corpus_digest="e") for entry in document["outcomes"]])
    assert project.runpytest(*compare).ret == 0
    unmatched = project.runpytest(*compare, "--require-match")
    assert unmatched.ret == pytest.ExitCode.TESTS_FAILED
    unmatched.stdout.fnmatch_lines(["FAILED NOTHING WAS COMPARED*"])


CHEAP_CELLS = """
    import pytest
    from lightweight import trial
    from lightweight.session import laboratory

    @pytest.mark.shown_as("ladder")
    @pytest.mark.parametrize("model", ["opt-tiny", "gpt-neo-tiny"])
    @pytest.mark.parametrize("method", ["baseline", "lora"])
    def test_cell(train, benchmark, model, method):
        if method == "lora" and FAIL:
            pytest.fail("no")
        benchmark.pedantic(list)
        train(model, method)

    FAIL = False

    @pytest.fixture(autouse=True)
    def no_training(monkeypatch):
        def run(lab, item, of, rounds=None):
            ended = trial.Completed(measured=trial.Measurements(train_loss=(3.0,), step_seconds=(0.1,)))
            lab._record(item, of, ended)
            return ended

        monkeypatch.setattr(laboratory.Laboratory, "run", run)
"""


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ((), 0),
        (("--model=opt-tiny",), 0),
        (("-k", "lora"), 0),
        (("--deselect=test_cells.py::test_cell[baseline-opt-tiny]",), 0),
        (("test_cells.py::test_cell[lora-opt-tiny]",), 0),
        (("other",), 0),
        (("test_cells.py", "--method=lora", "-k", "lora"), 0),
        (("-x",), 1),  # cut short: they had been asked for
    ],
)
def test_a_stored_cell_that_nobody_asked_for_now_is_not_missing(project, arguments, missing):
    cells = project.makepyfile(test_cells=CHEAP_CELLS)
    project.mkdir("other").joinpath("test_other.py").write_text("def test_one(train):\n    pass\n", "utf-8")
    stored = ("-o", "addopts=", "--benchmark-json=0001_old.json", "test_cells.py")
    project.runpytest(*stored, "-p", "no:randomly").assert_outcomes(passed=4)
    document = json.loads((project.path / "0001_old.json").read_text())
    assert [entry["shown_as"] for entry in document["outcomes"]] == ["ladder"] * 4
    folder = project.path / ".benchmarks" / "here"
    folder.mkdir(parents=True)
    (folder / "0001_old.json").write_text(json.dumps(document))
    if "-x" in arguments:
        cells.write_text(cells.read_text().replace("FAIL = False", "FAIL = True"))
    result = project.runpytest("--benchmark-compare", "--memory-fail=5%", *arguments)
    lines = [line for line in result.outlines if "missing now" in line]
    assert bool(lines) == missing, result.stdout.str()
    assert all(line.startswith("FAILED") for line in lines)
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if missing else pytest.ExitCode.OK)


def test_what_is_no_record_in_the_store_costs_one_line(project):
    project.makepyfile(CELLS)
    folder = project.path / ".benchmarks" / "elsewhere"
    folder.mkdir(parents=True)
    (folder / "0007_broken.json").write_text("{")
    (folder / "0008_foreign.json").write_text('{"benchmarks": []}')
    result = project.runpytest("--epochs=1", "-k", "lora", "--benchmark-compare")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["left out: record *0007_broken.json: is not JSON *", "left out: record *0008_foreign.json: has no 'outcomes'*"]
    )
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_a_baseline_out_of_memory_has_no_speedup_over_it(project):
    project.makepyfile(children=OUT_OF_MEMORY)
    project.makepyfile(
        SPEEDUP.replace("assert found.reason is None", 'assert found.reason == "baseline out of memory"').replace(
            "assert found.low <= found.ratio <= found.high", "assert found.ratio is None"
        )
        + """
    @pytest.fixture(autouse=True)
    def child(monkeypatch, request):
        import children
        from lightweight.child import owner, worker
        enter = owner.Child.__enter__

        def choose(child):
            with monkeypatch.context() as patch:
                if child.trial.method.name == "baseline":
                    patch.setattr(worker, "run", children.run)
                return enter(child)

        monkeypatch.setattr(owner.Child, "__enter__", choose)
    """
    )
    project.syspathinsert()
    result, document = run_json(project)
    result.assert_outcomes(passed=2, failed=1)
    baseline, lora = document["outcomes"]
    assert (baseline["outcome"], lora["outcome"]) == ("out_of_memory", "completed")
    assert (lora["speedup"]["ratio"], lora["speedup"]["log_ratios"]) == (None, [])
    result.stdout.fnmatch_lines(["micro * lora * completed * baseline out of memory *"])


def test_whatever_a_forecast_raises_the_completed_outcome_is_recorded(project):
    project.makepyfile(
        CELLS
        + """
    @pytest.fixture(autouse=True)
    def no_forecast(monkeypatch):
        from lightweight.plugin import Laboratory
        monkeypatch.setattr(Laboratory, "forecast", lambda *_: 1 / 0)
    """
    )
    result, document = run_json(project, "-k", "lora")
    result.assert_outcomes(passed=1, deselected=1)
    (entry,) = document["outcomes"]
    assert (entry["outcome"], entry["forecast_allocated_bytes"]) == ("completed", None)
    result.stdout.fnmatch_lines(["*no forecast: micro x lora: ZeroDivisionError: division by zero"])


OWN_METHODS = """
    from dataclasses import replace
    from lightweight.methods import LORA
    from lightweight.preload import peft

    NAMESAKE = replace(LORA, adapter=peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    SAME = replace(LORA)
    ADAPTER = peft.LoraConfig(task_type="CAUSAL_LM", rank_pattern={"by": lambda: 4})
    CLOSURE = replace(LORA, name="closure", adapter=ADAPTER)
"""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("NAMESAKE", "--method: two different methods are called 'lora' (their adapter differ): give one another *"),
        (
            "CLOSURE",
            "method closure: its adapter.rank_pattern cannot be sent to a child process *",
        ),
    ],
)
def test_methods_that_cannot_be_trained_beside_others_are_one_line_before_any_is(project, method, expected):
    project.makepyfile(methods_of_mine=OWN_METHODS)
    project.makepyfile(test_cell="def test_cell(train, model, method):\n    assert not train(model, method)\n")
    project.syspathinsert()
    result = project.runpytest("--method=lora", f"--method=methods_of_mine:{method}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.stderr.lines if line.strip()]
    assert fnmatch.fnmatchcase(line, f"ERROR: {expected}".replace("[", "[[]"))
    same = project.runpytest("--method=lora", "--method=methods_of_mine:SAME", "--collect-only")
    assert same.ret == 0


def test_two_models_of_one_name_are_refused(project):
    project.makepyfile(
        CELLS
        + """
    from dataclasses import replace

    @pytest.mark.parametrize("model", [MICRO, replace(MICRO, architecture={**MICRO.architecture, "ffn_dim": 8})])
    def test_two(outcome_of, model): ...
    """
    )
    result = project.runpytest()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: two different models are called 'micro' (their architecture differ): *"])


RERUNS = """
    # as plugins do that run a failed test again
    pytest_plugins = ["lightweight.plugin"]

    def pytest_runtest_protocol(item, nextitem):
        from _pytest.runner import runtestprotocol
        for is_last in (False, True):
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            done = is_last or all(report.passed for report in reports)
            for report in reports:
                if report.failed and not done:
                    report.outcome = "rerun"
                item.ihook.pytest_runtest_logreport(report=report)
            if done:
                return True
"""


@pytest.mark.parametrize("fixture", ["train", "outcome_of"])
def test_a_test_that_is_run_again_is_trained_again_and_has_the_row_of_the_last_time(project, fixture):
    project.makeconftest(RERUNS)
    project.makepyfile(
        CELLS.replace("train", fixture).replace('"baseline", ', "")
        + """
    @pytest.fixture(autouse=True)
    def kill_the_first(monkeypatch, request):
        import os, signal
        from lightweight.child import handle
        from lightweight.session import laboratory
        from lightweight.plugin import Laboratory

        def kill(laboratory, trial, step, loss):
            if step == 3 and not hasattr(request.config, "killed"):
                request.config.killed = True
                os.kill(next(iter(handle._living)).pid, signal.SIGKILL)

        monkeypatch.setattr(Laboratory, "_show_step", kill)
    """
    )
    result, document = run_json(project)
    assert result.ret == 0
    assert [(entry["method"], entry["outcome"]) for entry in document["outcomes"]] == [("lora", "completed")]
    assert [row["stats"]["rounds"] for row in document["benchmarks"]] == ([3] if fixture == "train" else [])


def test_pairs_are_added_for_a_bounded_time(project, monkeypatch):
    project.makepyfile(SPEEDUP)
    monkeypatch.setattr(speedups, "PAIRS_SECONDS", 0.0)
    monkeypatch.setattr(speedups, "precision_wanted", lambda ratio: 0.0)  # which nothing reaches
    result, document = run_json(project)
    result.assert_outcomes(passed=3)
    (found,) = [entry["speedup"] for entry in document["outcomes"] if "speedup" in entry]
    assert len(found["log_ratios"]) == 8  # of at most 128
    assert found["ended_after_seconds"] == 0.0
    result.stdout.fnmatch_lines(
        ["micro x lora: 8 pairs of rounds, * times as fast, known to *%, 0.0% wanted within 0 s"]
    )
