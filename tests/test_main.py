import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from samples import entry, forecast
from verdict.test_gate import cell, speedup

from lightweight import __version__, record
from lightweight.__main__ import main
from lightweight.report import tables, write


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record.document([entry(), entry(method="lora")])))
    return path


def test_report_prints_the_table(run, capsys):
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "opt-350m" in printed
    assert "lora" in printed
    assert main(["report", str(run), "--format", "markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("- 2 cells: 2 completed.")
    assert "\n| model" in printed


def test_report_prints_whether_a_method_is_no_worse(tmp_path, capsys):
    cells = [(method, seed) for method in ("baseline", "lora") for seed in (0, 1)]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(record.document(entry(method=method, seed=seed) for method, seed in cells)))
    assert main(["report", str(path), "--format", "markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| no worse  " in printed
    assert tables.NO_WORSE_NOTE.format(0.05) in printed


def test_report_into_a_file(run, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("".join(write.marks("results")))
    assert main(["report", str(run), "--into", str(readme)]) == 0
    assert capsys.readouterr().out == ""
    assert "| opt-350m" in readme.read_text()


@pytest.mark.parametrize(
    ("output", "starts"), [("report.html", "<!doctype html>"), ("report.md", "- 2 cells"), ("report.txt", "- 2 cells")]
)
def test_report_writes_a_page_or_what_the_name_says(run, tmp_path, capsys, output, starts):
    form = ["--format", "terminal"] if output.endswith(".txt") else []
    assert main(["report", str(run), "-o", str(tmp_path / output), *form]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / output).read_text("utf-8").startswith(starts)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run.json", output])


def test_report_reads_a_plan_beside_a_run(run, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([record.as_json(forecast(target="l4"))]))
    assert main(["report", str(run), str(plan)]) == 0
    assert "fits (forecast)" in capsys.readouterr().out
    assert main(["report", str(plan)]) == 0
    assert "opt-350m, forecast: baseline fits l4." in capsys.readouterr().out


def test_report_draws_every_picture_into_a_folder(run, tmp_path, capsys):
    assert main(["report", str(run), "--figures", str(tmp_path / "figures")]) == 0
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["frontier-0.svg", "loss-0-0.svg", "memory-0.svg", "speedup-0.svg"]
    assert main(["report", str(run), "--figures", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"lightweight: report {run}: is not a folder that can be written")


FOREIGN = [
    "[]x",
    "[1]",
    '{"outcomes": 3}',
    '{"outcomes": [], "forecasts": [{}]}',
    *(
        json.dumps({"outcomes": [record.as_json(entry()) | changes]})
        for changes in (
            {"train_loss": ["<script>"]},
            {"steady_step_seconds": 0},
            {"budget_bytes": "14"},
            {"peak_allocated_bytes": float("nan")},
            {"forecast_bytes_by_cause": {"weights": "much"}},
        )
    ),
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_one_line_and_status_2_and_no_report(tmp_path, content, capsys):
    (tmp_path / "foreign.json").write_text(content)
    assert main(["report", str(tmp_path / "foreign.json"), "-o", str(tmp_path / "report.html")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lightweight: record") and captured.err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "nowhere.json"],
        ["report", "{run}", "--into", "nowhere.md"],
        ["report", "{run}", "-o", "nowhere/report.html"],
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, capsys):
    assert main([argument.format(run=run) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightweight: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "a.jsonl", "--corpus-format", "WRONG"], ["--corpus-format: invalid choice: 'WRONG'", "alpaca"]),
        (["data", "a.jsonl", "--skip-bad=X"], ["--skip-bad: takes no value, not 'X'"]),
        (["data", "a.jsonl", "--skip-bda"], ["unrecognized arguments: --skip-bda"]),
        (["data", "a.jsonl", "--held-out"], ["--held-out: expected one argument"]),
        (["data"], ["required: FILE"]),
        (
            ["train", "--model", "x", "--output", "y", "--epochs", "three\x1b[2J"],
            ["--epochs: invalid int value: 'three"],
        ),
        (["train", "--m", "x"], ["--m could match --model, --method"]),
        (["gate", "run.json", "--missing", "perhaps"], ["--missing: invalid choice: 'perhaps'", "pass", "fail"]),
        (["dta"], ["command: invalid choice: 'dta'", "data"]),
        ([], ["required: command"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_the_help_to_ask_for(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("lightweight: ") and told.count("\n") == 1 and "\x1b" not in told
    assert all(word in told for word in words)
    command = " ".join(["lightweight", *arguments[:1]]) if arguments and arguments[0] != "dta" else "lightweight"
    assert told.endswith(f"; see `{command} --help`\n")


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lightweight", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == __version__
    assert done.returncode == 0


def test_reading_records_needs_no_gpu_library(run):
    program = (
        f"import sys; from lightweight.__main__ import main; main(['report', {str(run)!r}])\n"
        "assert not {'torch', 'transformers', 'pytest', 'matplotlib'} & set(sys.modules)\n"
        f"main(['report', {str(run)!r}, '-o', {str(run.with_suffix('.html'))!r}])\n"
        "assert not {'torch', 'transformers', 'pytest'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def records(tmp_path):
    """A new run that lost a tenth of its speedup, and the old one."""
    for name, center in (("new.json", 1.53), ("old.json", 1.7)):
        document = record.document([cell(speedup=speedup(center))]) | {"datetime": "2026"}
        (tmp_path / name).write_text(json.dumps(document))
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
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert main(["gate", new, "--against", str(broken)]) == 2
    captured = capsys.readouterr()
    assert "is not JSON" in captured.err and captured.err.count("\n") == 1
    assert main(["gate", new, "--against", str(broken), new]) == 0  # one of them can be read
    assert "is not JSON" in capsys.readouterr().out.splitlines()[0]


def test_who_reads_the_first_lines_alone_gets_no_traceback(tmp_path):
    """As `lightweight data corpus.json | head` does."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "lightweight", "data", str(Path(__file__).parents[1] / "corpus.json")]
    with os.fdopen(write, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


SIGNALLED = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), {number})
            except BaseException:  # as code that is imported may
                pass

sys.meta_path.insert(0, Sender())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
from lightweight.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("module", ["argparse", "lightweight.settings", "torch", "lightweight.cli.result"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_train_is_imported_ends_it_without_a_traceback(tmp_path, module, number):
    """Also one whose KeyboardInterrupt is swallowed: nothing is trained by what was asked to end."""
    (tmp_path / "corpus.json").write_text("[]")
    command = [sys.executable, "-c", SIGNALLED.format(module=module, number=int(number)), "train"]
    command += ["--model", "opt-tiny", "--corpus", "corpus.json", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if module in ("torch", "lightweight.cli.result"):
        line = "lightweight: interrupted before the first checkpoint: nothing is left to resume\n"
        assert (done.returncode, done.stdout, done.stderr) == (130, "", line)
    else:
        assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


@pytest.mark.parametrize("module", ["torch", "lightweight.forecast.plan_row"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_whatever_asks_a_command_to_end_has_it_say_so_in_a_line(module, number):
    """Also one whose KeyboardInterrupt is swallowed by what is imported."""
    command = [sys.executable, "-c", SIGNALLED.format(module=module, number=int(number)), "plan", "opt-tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lightweight: interrupted\n")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, "x"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_memory_that_runs_out_is_one_line_with_the_limit_in_force(run, monkeypatch, capsys, error):
    def fail(path):
        raise error

    monkeypatch.setattr(record, "load", fail)
    assert main(["report", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightweight: the host is out of memory: ") and " GiB: raise it, or ask for less" in line


@pytest.mark.parametrize("words", [["data", "corpus.json"], ["report", "RUN"], ["gate", "RUN", "--against", "RUN"]])
def test_what_is_printed_onto_a_full_disk_is_one_line(run, words):
    words = [str(run) if word == "RUN" else word for word in words]
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "lightweight", *words]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    line = "lightweight: the output cannot be written (No space left on device): free some space, or print it else"
    assert done.returncode == 2 and done.stderr == f"{line}where\n"


def test_a_process_that_may_open_no_more_files_is_told_in_a_line(run, monkeypatch, capsys):
    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(record, "load", fail)
    assert main(["report", str(run)]) == 2
    line = "this process has opened all the files it may by the limit of ulimit -n: raise it"
    assert capsys.readouterr().err == f"lightweight: {line}\n"


def test_a_place_that_no_command_looked_at_before_is_one_line(capsys):
    assert main(["chat", "x" * 5000, "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    problem = "cannot be read or written (File name too long)"
    if sys.version_info >= (3, 14):  # where nothing asked of a path is an error
        problem = "no such folder: give one that `lightweight train` wrote"
    assert "xxx" in line and line.endswith(f"x: {problem}")


def test_a_folder_that_is_gone_is_no_place_to_be_called_in(tmp_path):
    command = f"mkdir gone; cd gone; rmdir ../gone; exec {sys.executable} -m lightweight data corpus.json"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("lightweight: ") and done.stderr.count("\n") == 1


def test_memory_that_ulimit_does_not_grant_is_one_line(tmp_path):
    turn = json.loads((Path(__file__).parents[1] / "corpus.json").read_text("utf-8"))
    (tmp_path / "corpus.json").write_text(json.dumps(turn * (10**8 // len(json.dumps(turn)))), "utf-8")
    # where numpy is imported, OpenBLAS takes memory for each thread, and ends the process itself where it gets none
    command = f"ulimit -v {2**17}; OPENBLAS_NUM_THREADS=1 exec {sys.executable} -m lightweight data corpus.json"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    line = "lightweight: the host is out of memory: the limit of ulimit -v is 128 MiB: raise it, or ask for less\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_is_started_with_a_closed_output_does_its_work(run, tmp_path, closed):
    """The page is the next file to be opened: it does not become the standard output."""
    words = f"{sys.executable} -m lightweight report {run} -o {tmp_path / 'page.html'} {closed}"
    done = subprocess.run(["sh", "-c", f"exec {words}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "page.html").read_text("utf-8").startswith("<!doctype html>")


def test_what_a_terminal_has_no_characters_for_is_spelled(tmp_path):
    (tmp_path / "한.json").write_text("[]")
    for encoding, name in (("ascii", "\\ud55c"), ("utf-8", "한")):
        command = [sys.executable, "-m", "lightweight", "report", "한.json", "--into", "x.md"]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 2 and f"record {name}.json".encode() in done.stderr, done.stderr


PRINTED = """
import sys
from lightweight.cli.streams import make_usable
make_usable()
from lightweight.cli.terminal import end_output, fail, say, show
for text in ("한", "more"):
    say(text); fail(text); show(text)
sys.stdin.readline()
print("done", file=open("done", "w"))
end_output()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("full", [">", "2>"])
def test_a_log_on_a_full_disk_ends_nothing_before_its_time(tmp_path, full, unbuffered):
    """What was said is missed as the process ends, which then fails; progress and errors are not."""
    command = ["sh", "-c", f'exec "$@" {full}/dev/full', "sh", sys.executable, "-c", PRINTED]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=tmp_path, env=environment, input=b"\xff\n", capture_output=True, check=False)
    assert (tmp_path / "done").exists() and bool(done.returncode) == (full == ">"), done.stderr
    assert done.stdout == (b"\\ud55c\nmore\n" if full == "2>" else b"")
    assert full == "2>" or done.stderr.startswith(b"lightweight: \\ud55c\n")
