import json
import subprocess
import sys

import pytest
from test_gate import cell, speedup
from test_report import entry

from lightweight import __version__, record, report
from lightweight.__main__ import main


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.json"
    filler = dict.fromkeys(record.KEYS)
    path.write_text(json.dumps({"outcomes": [filler | entry(), filler | entry(method="lora")]}))
    return path


def test_report_prints_the_table(run, capsys):
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "opt-350m" in printed
    assert "lora" in printed
    assert main(["report", str(run), "--format", "markdown"]) == 0
    assert capsys.readouterr().out.startswith("| model")


def test_report_prints_whether_a_method_is_no_worse(tmp_path, capsys):
    cells = [(method, seed) for method in ("baseline", "lora") for seed in (0, 1)]
    outcomes = [dict.fromkeys(record.KEYS) | entry(method=method, seed=seed) for method, seed in cells]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"outcomes": outcomes}))
    assert main(["report", str(path), "--format", "markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| model")
    assert "| no worse  " in printed
    assert printed.rstrip().endswith(report.NO_WORSE_NOTE)


def test_report_into_a_file(run, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}{report.END}")
    assert main(["report", str(run), "--into", str(readme)]) == 0
    assert capsys.readouterr().out == ""
    assert "| opt-350m" in readme.read_text()


@pytest.mark.parametrize("arguments", [["report", "nowhere.json"], ["report", "{run}", "--into", "nowhere.md"]])
def test_bad_input_is_one_line_and_status_2(run, arguments, capsys):
    assert main([argument.format(run=run) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightweight: ")
    assert captured.err.count("\n") == 1


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lightweight", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == __version__
    assert done.returncode == 0


def test_reading_records_needs_no_gpu_library(run):
    program = (
        f"import sys; from lightweight.__main__ import main; main(['report', {str(run)!r}])\n"
        "assert not {'torch', 'transformers', 'pytest'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def records(tmp_path):
    """A new run that lost a tenth of its speedup, and the old one."""
    for name, center in (("new.json", 1.53), ("old.json", 1.7)):
        entries = [dict.fromkeys(record.KEYS) | cell(speedup=speedup(center))]
        (tmp_path / name).write_text(json.dumps({"datetime": "2026", "outcomes": entries}))
    return tmp_path / "new.json", tmp_path / "old.json"


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 1), (["--speedup-fail", "20%"], 0), (["--speedup-fail", "8%"], 1)]
)
def test_the_gate_answers_from_saved_files_with_its_status(records, arguments, status, capsys):
    new, old = map(str, records)
    assert main(["gate", new, "--against", old, *arguments]) == status
    printed = capsys.readouterr().out
    assert "now / stored" in printed
    assert ("FAILED opt-350m x lora: speedup 1.5" in printed) == bool(status)
    assert main(["gate", new, "--against", new]) == 0


def test_the_gate_tells_bad_input_in_one_line(records, tmp_path, capsys):
    new, old = map(str, records)
    for arguments in (["nowhere.json", "--against", old], [new, "--against", old, "--speedup-fail", "ten"]):
        assert main(["gate", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("lightweight: ") and captured.err.count("\n") == 1
    (tmp_path / "broken.json").write_text("{")
    assert main(["gate", new, "--against", str(tmp_path / "broken.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "is not JSON" in lines[0]
    assert "store it with --benchmark-autosave" in lines[-1]
