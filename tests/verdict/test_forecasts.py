"""The gate on plans: forecasts held against forecasts, from files alone."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import samples
import yaml

from lightweight.__main__ import main, parser
from lightweight.record import NoForecast, Run, as_json
from lightweight.verdict import forecasts
from lightweight.verdict.limits import Limits

MiB = 2**20
LIMITS = Limits(memory_fail=0.02)
OF_5_17 = {"transformers": "5.17.0", "torch": "2.13.0"}
OF_5_23 = {"transformers": "5.23.0", "torch": "2.13.0"}


def row(allocated=1000, reserved=1200, causes=None, **changes):
    """A forecast of so many MiB."""
    known = {"batch_size": 8, "passes": 1, "gpus": 1, "method_digest": "a", "paged_bytes": 0, "versions": OF_5_23}
    of_causes = causes or {"weights": 400, "activations": allocated - 400}
    return replace(
        samples.forecast(method="lora"),
        forecast_allocated_bytes=allocated * MiB,
        forecast_reserved_bytes=reserved * MiB,
        bytes_by_cause={cause: count * MiB for cause, count in of_causes.items()},
        **known | changes,
    )


def plan(*rows, name="before.json", unforecast=()):
    return Run(path=Path(name), ended="", entries=(), forecasts=rows, unforecast=unforecast)


def held(now, then, limits=LIMITS, **more):
    return forecasts.compare(plan(*now, name="after.json", **more), [plan(*then)], limits)


THEN = row(versions=OF_5_17)


def test_growth_within_the_limit_passes_and_one_byte_more_fails():
    assert held([row(1020)], [THEN]).failures == []
    more = replace(row(1020), forecast_allocated_bytes=1020 * MiB + 1)
    (line,) = held([more], [THEN]).failures
    assert line == (
        "opt-350m x lora on t4: peak allocated 1020 MiB now, 1000 MiB in before.json: +2.00%, more than +2.00%: what "
        "grew is activations by 20 MiB to 620 MiB. Changed since: transformers 5.17.0 -> 5.23.0"
    )


def test_what_grew_most_comes_first_and_what_hardly_grew_is_left_out():
    then = row(causes={"weights": 400, "activations": 500, "logits": 60, "workspace": 40})
    now = row(1400, 1600, causes={"weights": 400, "activations": 602, "logits": 357, "workspace": 41})
    assert [cause for cause, _, _ in forecasts.grown(now, then)] == ["logits", "activations"]
    (line,) = held([now], [then]).failures
    assert "what grew is logits by 297 MiB to 357 MiB, activations by 102 MiB to 602 MiB." in line
    assert line.endswith("No version has changed since")


def test_the_allocator_alone_may_take_more():
    (line,) = held([row(reserved=1300)], [THEN]).failures
    assert "peak reserved 1.27 GiB now, 1.17 GiB in before.json: +8.33%" in line
    assert "nothing grew that is held at the peak of allocated memory" in line


def test_paged_state_is_in_no_peak_and_compared():
    (line,) = held([row(paged_bytes=300 * MiB)], [replace(THEN, paged_bytes=200 * MiB)]).failures
    assert "paged optimizer state 300 MiB now, 200 MiB in before.json" in line


def test_where_the_peak_has_moved_and_the_network_is_another_this_is_told():
    then = replace(THEN, parameters=1000, longest_row=512)
    (line,) = held([row(1100, phase="optimizer", parameters=1200, longest_row=530)], [then]).failures
    assert "the peak is in optimizer, and was in backward; parameters 1,000 to 1,200; longest row 512 to 530" in line


@pytest.mark.parametrize("verdict", ["does_not_fit", "too_close_to_call"])
def test_what_fitted_and_does_not_any_more_fails_whatever_the_limit(verdict):
    (line,) = held([row(1001, verdict=verdict)], [THEN], Limits(memory_fail=0.5)).failures
    assert f"fits in before.json, {verdict.replace('_', ' ')} now: 1.17 GiB reserved of 14.00 GiB" in line
    assert held([THEN], [row(verdict=verdict)]).failures == []


def test_smaller_passes_hide_no_growth():
    smaller = row(700, 800, batch_size=4, passes=2)
    (line,) = held([smaller], [THEN]).failures
    assert "1 x 8 rows a step fitted in before.json, and 2 x 4 do now" in line
    found = held([THEN], [smaller])
    assert found.failures == []
    assert (
        "1 x 8 rows a step fit now, 2 x 4 did in before.json: peaks of other passes are not compared" in found.notes[0]
    )


def test_peaks_compare_where_a_step_has_as_many_passes_of_as_many_rows():
    assert held([row(1100, batch_size=16)], [THEN]).failures == []
    (line,) = held([row(1100, passes=2)], [THEN]).failures
    assert "1 x 8 rows a step fitted in before.json, and 2 x 8 do now" in line
    assert "peak" not in line


def test_a_missing_cell_fails_unless_it_may_be_missing():
    (line,) = held([row()], [THEN, replace(THEN, model="other")]).failures
    assert line == "other x lora on t4: missing now, 1000 MiB in before.json"
    found = held([row()], [THEN, replace(THEN, model="other")], replace(LIMITS, missing="pass"))
    assert (found.failures, found.notes) == ([], [line])


def test_a_method_that_cannot_be_forecast_any_more_fails_with_its_reason():
    gone = NoForecast(model="opt-350m", method="lora", target="t4", reason="model.layers.0 cannot be traced: why")
    (line,) = held([row(model="other")], [THEN], unforecast=[gone]).failures
    assert line == (
        "opt-350m x lora on t4: 1000 MiB in before.json, cannot be forecast now: model.layers.0 cannot be traced: why"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 512}, "max_length is 256 there and 512 here"),
        ({"corpus_digest": "c"}, "corpus_digest is None there and c here"),
        ({"gpus": 2}, "gpus is 1 there and 2 here"),
        ({"budget_bytes": 15 * 2**30}, "budget_bytes is 15032385536 there and 16106127360 here"),
        (
            {"method_digest": "b", "settings": {"training_arguments": {"optim": "sgd"}, "library": "peft"}},
            "optim is None there and sgd here",
        ),
    ],
)
def test_what_is_unlike_is_not_compared_and_told_as_unlike(changes, words):
    then = replace(THEN, settings={"training_arguments": {}, "library": "peft"})
    found = held([row(5000, **changes)], [then])
    assert found.cells[0].then is None
    (line,) = found.failures
    assert line == f"opt-350m x lora on t4: missing now, 1000 MiB in before.json; unlike: {words}"


def test_a_plan_of_before_there_were_digests_is_compared_and_this_is_told():
    old = replace(THEN, method_digest=None, passes=None, versions=None)
    found = held([row(1100)], [old])
    assert "+10.00%" in found.failures[0] and "Which versions changed is not known" in found.failures[0]
    assert found.notes == [
        "before.json does not say its methods' settings: whether methods of one name are the same is not known"
    ]


def test_the_first_plan_that_has_the_cell_is_taken():
    older, oldest = plan(row()), plan(row(500), name="oldest.json")
    assert forecasts.compare(plan(row()), [older, oldest], LIMITS).cells[0].run is older
    other = plan(row(max_length=512))
    assert forecasts.compare(plan(row()), [other, oldest], LIMITS).cells[0].run is oldest


@pytest.mark.parametrize("of", ["new", "stored"])
def test_a_plan_that_has_a_cell_twice_is_refused_whichever_comes_first(of):
    for twice in ([THEN, row(2000)], [row(2000), THEN], [THEN, replace(THEN, gpus=None, method_digest=None)]):
        now, then, name = (twice, [THEN], "after") if of == "new" else ([THEN], twice, "before")
        with pytest.raises(ValueError, match=rf"^record {name}\.json: has opt-350m x lora on t4 twice, .* keep one"):
            held(now, then)
    assert held([THEN, row(2000, target="l4")], [THEN, row(2000, gpus=2)], replace(LIMITS, missing="pass")).cells


def test_where_nothing_is_compared_this_is_told_and_may_fail():
    limits = replace(LIMITS, missing="pass")
    found = held([row(model="new")], [THEN], limits)
    assert found.failures == [] and found.notes[-1].startswith("NOTHING WAS COMPARED")
    assert held([row(model="new")], [THEN], replace(limits, require_match=True)).failures[0].startswith("NOTHING")


def test_without_a_limit_there_is_no_verdict():
    found = held([row(9000, verdict="does_not_fit")], [THEN, replace(THEN, model="other")], Limits())
    assert found.failures == []


@pytest.fixture
def files(tmp_path):
    """A plan before and one after, of 5 % more."""
    for name, forecast in (("before", THEN), ("after", row(1050))):
        (tmp_path / f"{name}.json").write_text(json.dumps([as_json(forecast)]))
    return str(tmp_path / "before.json"), str(tmp_path / "after.json")


def test_two_files_are_an_older_and_a_newer_one(files, capsys):
    before, after = files
    for arguments in ([before, after], [after, "--against", before]):
        assert main(["gate", *arguments, "--memory-fail", "2%"]) == 1
        said = capsys.readouterr().out
        assert "FAILED opt-350m x lora on t4: peak allocated 1.03 GiB now, 1000 MiB in before.json: +5.00%" in said
        assert said.splitlines()[2].split()[-2:] == ["activations", "FAIL"]
    assert main(["gate", before, after, "--memory-fail", "6%"]) == 0
    assert main(["gate", after, before, "--memory-fail", "2%"]) == 0


def test_a_file_that_has_a_cell_twice_is_told_in_one_line(files, capsys):
    before, after = files
    content = json.loads(Path(before).read_text())
    Path(before).write_text(json.dumps(content * 2))
    assert main(["gate", before, after, "--memory-fail", "2%"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "before.json: has opt-350m x lora on t4 twice" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{before}"], "give the new record and --against older ones, or an older one and the new one"),
        (["{before}", "{after}", "--against", "{before}"], "give the new record and --against older ones"),
        (["{after}", "--against", "{trials}"], "h200-t4.json: holds no forecast, so nothing can be compared with it"),
        (["{trials}", "--against", "{before}"], "before.json: holds no trial, so nothing can be compared with it"),
        (["{before}", "{after}", "--memory-fail", "2"], "--memory-fail '2': give a percentage"),
    ],
)
def test_what_cannot_be_compared_is_one_line(files, arguments, words, capsys):
    trials = str(Path(__file__).parents[2] / "experiments" / "records" / "h200-t4.json")
    given = [argument.format(before=files[0], after=files[1], trials=trials) for argument in arguments]
    assert main(["gate", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_plan_that_is_damaged_is_one_line(files, tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([as_json(THEN) | {"verdict": "cannot_be_forecast", "reason": 7}]))
    assert main(["gate", files[0], str(broken)]) == 2
    assert "forecast 0 has 7 as 'reason'" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gate.md").read_text("utf-8")


def test_the_docs_show_what_two_releases_of_transformers_give(capsys, monkeypatch):
    """From the committed plans, each made in an environment of its release."""
    monkeypatch.chdir(ROOT)
    command, shown = PAGE.split("    lightweight gate experiments/records/plan-transf", 1)[1].split("```", 2)[:2]
    given = ["gate", *f"experiments/records/plan-transf{command}".split()]
    assert main(given) == 1
    assert capsys.readouterr().out.strip() == shown.strip()
    old, new = (json.loads(Path(path).read_text("utf-8")) for path in given[1:3])
    released = [{row["versions"]["transformers"] for row in rows} for rows in (old, new)]
    assert released == [{"5.17.0"}, {"5.23.0"}]
    others = [[row["versions"] | {"transformers": None} for row in rows] for rows in (old, new)]
    assert others[0] == others[1]
    assert main([*given[:-1], "2%"]) == 0


def test_the_workflow_of_the_docs_plans_and_gates(files, tmp_path):
    """Its last two steps as they stand there, with plans that were made before in the place of `plan`."""
    (workflow,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    steps = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    cells = yaml.safe_load(workflow)["env"]["CELLS"]
    parser().parse_args(["plan", *cells.split(), "--format", "json"])
    place = tmp_path / "runner"
    for side, file in zip(("before", "after"), files, strict=True):
        command = place / side / "bin" / "lightweight"
        command.parent.mkdir(parents=True)
        command.write_text(
            f'#!/bin/sh\nif [ "$1" = plan ]; then [ "$2" = smollm2-135m ] && cat "{file}"; exit 1; fi\n'
            f'exec "{sys.executable}" -m lightweight "$@"\n'
        )
        command.chmod(0o755)

    def step(name):
        command = ["bash", "-eo", "pipefail", "-c", steps[name]]
        return subprocess.run(command, cwd=place, env={**os.environ, "CELLS": cells}, capture_output=True, text=True)

    assert step("Plan").returncode == 0
    assert "before.txt" in steps["Install"] and "requirements.txt" in steps["Install"]
    failed = step("Gate")
    assert failed.returncode == 1, failed.stderr
    assert "FAILED opt-350m x lora on t4" in failed.stdout
    (place / "after.json").write_text((place / "before.json").read_text())
    assert step("Gate").returncode == 0
