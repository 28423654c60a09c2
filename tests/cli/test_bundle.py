"""A bundle repeats the run that it is of: in a folder of its own, by its own script, with the lightweight in it."""

import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import turns
from lightweight import corpus
from lightweight.__main__ import main

pytestmark = pytest.mark.usefixtures("without_gpu")

MINE = """
from dataclasses import replace

from lightweight.methods import LORA
from rates import RATE

MINE = replace(LORA, name="mine", training_arguments={**LORA.training_arguments, "learning_rate": RATE})
"""

RATES = """
from pathlib import Path

RATE = 1e-3 * float((Path(__file__).parent / "data/factor.txt").read_text())
SECRETS = ".env", "../secret.json", "/etc/passwd"
"""

CELLS = """
from pathlib import Path

WORDS = Path(__file__).parent / "words.txt"


def test_cell(train, model, method):
    assert WORDS.read_text() == "here"
    assert train(model, method).kind == "completed"
"""

COMMAND = ("cells", "--model=llama-tiny", "--method=mine.py:MINE", "--seed=2", "--epochs=1", "--max-length=48")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's project in which a cell was trained: a method that imports a module, a test that reads a file."""
    root = tmp_path_factory.mktemp("project")
    (root / "cells").mkdir()
    (root / "data").mkdir()
    for name, text in (
        ("conftest.py", 'pytest_plugins = ["lightweight.plugin"]\n'),
        ("mine.py", MINE),
        ("rates.py", RATES),
        ("data/factor.txt", "2"),
        (".env", "SECRET"),
        ("unused.py", ""),
        ("corpus.json", json.dumps(turns(12))),
        ("cells/test_cells.py", CELLS),
        ("cells/words.txt", "here"),
    ):
        (root / name).write_text(text, "utf-8")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *COMMAND, "--benchmark-json=run.json"]
    subprocess.run(command, cwd=root, env=environment, check=True)
    return root


def files(folder: Path) -> set[str]:
    """What is in a bundle, lightweight's own files left out."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return {name for name in names if not name.startswith("lightweight/")}


def test_a_record_says_by_which_command_it_was_made(project):
    assert json.loads((project / "run.json").read_text("utf-8"))["command"] == list(COMMAND)


def test_a_bundle_repeats_its_run_in_a_fresh_process(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    assert main(["report", "run.json", "--bundle", str(tmp_path / "b.zip")]) == 0
    told = capsys.readouterr().err
    assert "sh repeat.sh repeats it" in told
    assert "cells/words.txt, data/factor.txt: as now, since a record does not say what was in files that the" in told
    with zipfile.ZipFile(tmp_path / "b.zip") as file:
        file.extractall(tmp_path)
    bundle = tmp_path / "b"
    assert files(bundle) == {
        *("README.md", "repeat.sh", "requirements.txt", "pytest.ini", "conftest.py", "corpus.json", "mine.py"),
        *("rates.py", "data/factor.txt", "cells/test_cells.py", "cells/words.txt", "records/run.json"),
    }
    assert "What the code reads from elsewhere is not in here" in (bundle / "README.md").read_text("utf-8")
    (bundle / "cells" / "test_whose.py").write_text(
        f"import lightweight\n\n\ndef test_whose():\n    assert lightweight.__file__.startswith({str(bundle)!r})\n"
    )
    # a test that fails, as it may have then, makes nothing worse
    (bundle / "cells" / "test_fails.py").write_text("def test_fails():\n    raise AssertionError\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": "-p no:randomly"}
    command = ["sh", str(bundle / "repeat.sh"), "--here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 failed, 2 passed" in done.stdout
    now = json.loads((bundle / "repeated-run.json").read_text("utf-8"))["outcomes"]
    then = json.loads((project / "run.json").read_text("utf-8"))["outcomes"]
    assert [entry["train_loss"] for entry in now] == [entry["train_loss"] for entry in then]
    of_gate = done.stdout.rpartition("verdict\n")[2].splitlines()
    (cell,) = [line for line in of_gate if line.startswith("llama-tiny")]
    assert "no stored run" not in cell
    # and a cell that got worse fails: the gate is really asked
    stored = bundle / "records" / "run.json"
    document = json.loads(stored.read_text("utf-8"))
    document["outcomes"][0]["heldout_loss_after"] -= 1
    stored.write_text(json.dumps(document), "utf-8")
    (bundle / "cells" / "test_whose.py").unlink()
    worse = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert worse.returncode == 1 and "FAILED llama-tiny x mine in rows of 48: held-out loss" in worse.stdout


def test_code_of_ones_own_is_found_by_a_command_that_has_not_its_folder_on_the_path(project, tmp_path):
    """As the script `lightweight` has not, and `python -m lightweight` has."""
    root = tmp_path / "root"
    shutil.copytree(project, root)
    of_ours = "\n\ndef loss(outputs, labels, num_items_in_batch): return outputs.loss\n"
    changed = MINE.replace("MINE = replace(LORA,", f"{of_ours}\nMINE = replace(LORA, compute_loss=loss,")
    (root / "mine.py").write_text(changed, "utf-8")
    script = "import sys; from lightweight.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", script, "report", "run.json", "--bundle", "b"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "method mine has changed since record run.json: its digest differs" in done.stderr


def test_requirements_are_exact_and_name_where_torchs_builds_are(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    document = json.loads(Path("run.json").read_text("utf-8"))
    document["outcomes"][0]["versions"] |= {"torch": "2.11.0+cu130", "unsloth": None}
    (other,) = json.loads(Path("run.json").read_text("utf-8"))["outcomes"]
    other["versions"] |= {"schedulefree": "1.4.1"}  # which only the second method needs
    document["outcomes"].append(other)
    (tmp_path / "gpu.json").write_text(json.dumps(document), "utf-8")
    assert main(["report", str(tmp_path / "gpu.json"), "--bundle", str(tmp_path / "b")]) == 0
    lines = (tmp_path / "b" / "requirements.txt").read_text("utf-8").splitlines()
    assert "torch==2.11.0+cu130" in lines and "schedulefree==1.4.1" in lines
    first = "pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cu130 torch==2.11.0+cu130"
    assert f"# install this first: {first}" in lines
    script = (tmp_path / "b" / "repeat.sh").read_text("utf-8")
    assert script.index(f'    "$PYTHON" -m {first}\n') < script.index(
        '    "$PYTHON" -m pip install -r requirements.txt'
    )
    packages = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in packages)
    names = [line.partition("==")[0].lower() for line in packages]
    assert len(names) == len(set(names)) and {"numpy", "scipy", "transformers", "peft", "pytest-benchmark"} <= set(
        names
    )
    assert not {"unsloth", "cuda", "lightweight", "lightweight-llm"} & set(names)


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("rates.py", "RATE = 1e-3\n", "method mine has changed since record *: its digest differs"),
        ("corpus.json", json.dumps(turns(13)), "corpus corpus.json has changed since record"),
        ("cells/test_cells.py", None, "cells/test_cells.py is not here: run this in the folder in which pytest ran"),
        (
            "mine.py",
            None,
            "method mine.py:MINE: its file mine.py is not here: run this in the folder in which pytest ran",
        ),
    ],
)
def test_what_has_changed_since_is_refused(project, tmp_path, file, text, problem):
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    (copy / file).unlink() if text is None else (copy / file).write_text(text, "utf-8")
    command = [sys.executable, "-m", "lightweight", "report", "run.json", "--bundle", "b"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("lightweight: --bundle: ") and problem.partition("*")[0] in line
    assert not (copy / "b").exists() and not list(copy.glob("lightweight-*"))


@pytest.fixture
def elsewhere(project, tmp_path, monkeypatch):
    """The project, whose corpus, method and task lay in other folders, as records say it: by their names alone."""
    root, away = tmp_path / "root", tmp_path / "away"
    shutil.copytree(project, root)
    (away / "code").mkdir(parents=True)
    for name in ("mine.py", "rates.py", "data"):
        (root / name).rename(away / "code" / name)
    (root / "corpus.json").rename(away / "talks.json")
    (away / "task.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4"}\n', "utf-8")
    document = json.loads((root / "run.json").read_text("utf-8"))
    document["command"] += ["--corpus=talks.json", "--task=task.jsonl"]
    read = corpus.load(away / "talks.json")
    document["outcomes"][0]["task_digest"] = corpus.load_task(away / "task.jsonl", read).digest
    (root / "run.json").write_text(json.dumps(document), "utf-8")
    monkeypatch.chdir(root)
    return away


def test_what_lay_elsewhere_goes_in_by_its_name_where_its_folder_is_given(elsewhere, tmp_path, capsys):
    asked = ["report", "run.json", "--bundle", str(tmp_path / "b")]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "mine.py is not here: run this in the folder in which pytest ran, and give the folder of a file" in told
    assert main([*asked, "--files", str(elsewhere / "code")]) == 2
    assert "corpus talks.json is not here" in capsys.readouterr().err
    asked += ["--files", str(elsewhere / "code"), "--files", str(elsewhere)]
    assert main(asked) == 0
    assert {"mine.py", "rates.py", "talks.json", "task.jsonl", "cells/test_cells.py"} <= files(tmp_path / "b")


def test_another_task_is_refused(elsewhere, tmp_path, capsys):
    (elsewhere / "task.jsonl").write_text('{"prompt": "2 + 2?", "answer": "5"}\n', "utf-8")
    asked = ["report", "run.json", "--bundle", str(tmp_path / "b"), "--files", str(elsewhere)]
    assert main([*asked, "--files", str(elsewhere / "code")]) == 2
    assert "task task.jsonl has changed since record run.json" in capsys.readouterr().err


def test_a_record_without_its_command_and_a_name_that_is_taken_are_refused(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    document = json.loads(Path("run.json").read_text("utf-8"))
    del document["command"]
    (tmp_path / "old.json").write_text(json.dumps(document), "utf-8")
    assert main(["report", str(tmp_path / "old.json"), "--bundle", str(tmp_path / "b")]) == 2
    assert "does not say by which command it was made" in capsys.readouterr().err
    assert main(["report", "run.json", "--bundle", str(tmp_path / "old.json")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_version_that_would_have_pip_do_something_else_is_refused(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    document = json.loads(Path("run.json").read_text("utf-8"))
    for name, number in (("torch", "2.11.0\n--index-url=https://x"), ("torch @ https://x", "1")):
        versions = {**document["outcomes"][0]["versions"], name: number}
        outcomes = [{**document["outcomes"][0], "versions": versions}]
        (tmp_path / "run.json").write_text(json.dumps(document | {"outcomes": outcomes}), "utf-8")
        assert main(["report", str(tmp_path / "run.json"), "--bundle", str(tmp_path / "b")]) == 2
        assert "cannot be installed" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["b", "b.zip"])
def test_a_bundle_that_has_no_room_is_one_line_and_leaves_nothing(project, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(project)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        status = main(["report", "run.json", "--bundle", str(tmp_path / name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and "cannot be" in line and "(File too large)" in line
    assert not list(tmp_path.iterdir())


def test_a_link_or_what_cannot_be_written_is_no_place_for_a_bundle(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    (tmp_path / "link").symlink_to("nothing")
    for name, problem in (("link", "already exists"), ("nowhere/b", "there is no folder"), ("x" * 300, "too long")):
        assert main(["report", "run.json", "--bundle", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert problem in line
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("option", ["--corpus", "--task", "--learning-rate", "--held-out"])
@pytest.mark.parametrize("name", ["../secret.json", "cells/../../project/corpus.json", "/etc/passwd"])
def test_no_record_leads_out_of_the_folder(project, tmp_path, monkeypatch, capsys, option, name):
    """A bundle is published: what else lies on the disk is nobody's business, and nothing is written beside it."""
    monkeypatch.chdir(project)
    document = json.loads(Path("run.json").read_text("utf-8"))
    name += ".json" * (option == "--learning-rate" and not name.endswith(".json"))
    document["command"] += [f"{option}={name}"]
    (tmp_path / "run.json").write_text(json.dumps(document), "utf-8")
    (project.parent / "secret.json").write_text("{}")
    assert main(["report", str(tmp_path / "run.json"), "--bundle", str(tmp_path / "b")]) == 2
    assert f"{name} is not here: run this in the folder in which pytest ran" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
