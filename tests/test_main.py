import json
import subprocess
import sys

import pytest
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
