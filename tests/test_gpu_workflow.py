"""The gate of gpu.yml, run as it stands there, on the records that it names and on copies that something is wrong with.

A workflow that only a GPU runs is tested by nobody; its verdict is a pure function of two files, so it can be.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightweight import record

ROOT = Path(__file__).parent.parent
STEPS = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text("utf-8"))["jobs"]["gate"]["steps"]
COMMAND = next(step["run"] for step in STEPS if step.get("name") == "Gate")
NAMED = sorted((ROOT / "experiments" / "records").glob("*-t4.json"))


def place(command):
    """The number of the step that runs `command`."""
    return next(number for number, step in enumerate(STEPS) if command in step.get("run", ""))


def test_the_tests_run_before_the_experiments_and_the_gate_can_fail_the_job():
    assert place("pytest tests") < place("pytest experiments") < place("lightweight gate")
    assert "--require-match" in COMMAND and "experiments/records/*-t4.json" in COMMAND
    assert "|| true" not in COMMAND and "continue-on-error" not in STEPS[place("lightweight gate")]
    assert NAMED


def test_a_record_that_the_workflow_names_has_pairs_of_rounds_and_a_captured_step():
    """Without them the gate cannot see a slowdown."""
    entries = [entry for path in NAMED for entry in record.load(path).entries]
    assert any(entry.speedup and entry.speedup.log_ratios for entry in entries)
    assert any(entry.captured for entry in entries)


@pytest.fixture
def workplace(tmp_path):
    """A checkout as the workflow has it: the records that it names, and `lightweight` on the PATH."""
    records = tmp_path / "experiments" / "records"
    records.mkdir(parents=True)
    for path in NAMED:
        shutil.copy(path, records)
    command = tmp_path / "bin" / "lightweight"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lightweight "$@"\n')
    command.chmod(0o755)
    return tmp_path


@pytest.fixture
def document():
    """One run that measured all that the records have: each cell once, with the pairs that one of them has."""
    measured = [entry for path in NAMED for entry in record.load(path).entries]
    cells: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in record.document(measured)["outcomes"]:
        known = cells.setdefault(tuple(entry[key] for key in ("model", "method", "target", "device")), entry)
        known |= {"speedup": known.get("speedup") or entry.get("speedup")}
    return {"schema": record.SCHEMA, "outcomes": list(cells.values())}


def gate(workplace, document):
    """The exit status of the workflow's own command where `document` is what the run measured, and what it said."""
    (workplace / "run.json").write_text(json.dumps(document), "utf-8")
    path = f"{workplace / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", COMMAND]  # what `shell: bash` means there
    ended = subprocess.run(shell, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def slower(entry):
    if (speedup := entry.get("speedup")) and speedup["log_ratios"]:
        speedup["log_ratios"] = [log - math.log(1.25) for log in speedup["log_ratios"]]
        speedup |= {key: speedup[key] / 1.25 for key in ("ratio", "low", "high")}


def all_times_doubled(entry):
    if entry["steady_step_seconds"]:
        entry["steady_step_seconds"] *= 2


def more_memory(entry):
    if entry["peak_allocated_bytes"] and entry["method"] != "baseline":
        entry["peak_allocated_bytes"] = entry["peak_allocated_bytes"] * 11 // 10


def a_higher_loss(entry):
    if entry["heldout_loss_after"] and entry["adapter"]:
        entry["heldout_loss_after"] += 0.1


def dropped(document):
    document["outcomes"] = [entry for entry in document["outcomes"] if entry["method"] != "lora-captured"]


def its_baseline_dropped(document):
    document["outcomes"] = [entry for entry in document["outcomes"] if entry["method"] != "baseline"]


def of_every_outcome(change):
    def doctor(document):
        for entry in document["outcomes"]:
            change(entry)

    return doctor


DOCTORED = {
    "slower": of_every_outcome(slower),
    "all times doubled": of_every_outcome(all_times_doubled),
    "more memory": of_every_outcome(more_memory),
    "a higher loss": of_every_outcome(a_higher_loss),
    "a cell dropped": dropped,
    "its baseline dropped": its_baseline_dropped,
    "another device": of_every_outcome(lambda entry: entry.update(device="Tesla T4")),
    "no outcomes": lambda document: document.update(outcomes=[]),
}


def test_the_workflows_own_command_passes_what_it_stored(workplace, document):
    status, said = gate(workplace, document)
    assert status == 0, said
    assert "pass" in said


@pytest.mark.parametrize("doctor", DOCTORED.values(), ids=DOCTORED)
def test_the_workflows_own_command_fails_a_doctored_copy(workplace, document, doctor):
    before = copy.deepcopy(document)
    doctor(document)
    assert document != before
    status, said = gate(workplace, document)
    assert status == 1, said
    assert "FAILED" in said
