"""The plugin in other people's suites: what is not used is not there. Each run is a process of its own where what has
been imported matters."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MICRO, turns
from lightweight import files
from lightweight.session import options
from lightweight.verdict import ratio

ROOT = Path(__file__).parent.parent

LOADS = 'pytest_plugins = ["lightweight.plugin"]\n'

CELL = f"""
from lightweight.models import Model

MICRO = Model(name="micro", architecture={MICRO.architecture!r})

def test_cell(train):
    assert train(MICRO, "lora", epochs=1).kind == "completed"
"""


@pytest.fixture
def run(tmp_path):
    """Run pytest in somebody's project of the given files."""

    def run(*arguments: str, conftest: str = LOADS, **files: str) -> subprocess.CompletedProcess[str]:
        for name, text in {"conftest": conftest, **files}.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture
def run_here(pytester):
    """`run`, in this process, where what takes seconds has been imported; a project without a corpus."""

    def run(*arguments: str, conftest: str = LOADS, **files: str) -> pytest.RunResult:
        pytester.makeconftest(conftest)
        pytester.makepyfile(**files)
        return pytester.runpytest("-p", "no:randomly", *arguments)

    return run


def test_an_unrelated_test_imports_nothing_that_takes_long(run, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins import what they like
    done = run(
        *("-p", "pytest_benchmark.plugin", "-p", "xdist.plugin"),
        test_other="""
def test_other():
    import sys
    heavy = {"torch", "transformers", "peft", "numpy", "scipy", "matplotlib", "lightweight.session.laboratory"}
    assert not heavy & set(sys.modules)
""",
    )
    assert done.returncode == 0, done.stdout


def test_a_projects_own_options_and_fixtures_go_before(run):
    """Theirs in the same conftest, and in one that is loaded later; no corpus is looked for."""
    done = run(
        "--model=theirs",
        "--seed=abc",
        "--report",
        "tests",
        conftest=LOADS
        + """
import pytest

def pytest_addoption(parser):
    parser.addoption("--model", default="none")
    parser.getgroup("theirs").addoption("--seed", default="none")

@pytest.fixture
def train():
    return "their train"

@pytest.fixture
def model(request):
    return request.config.getoption("--model")
""",
        tests__conftest="""
def pytest_addoption(parser):
    parser.addoption("--report", action="store_true")
""",
        tests__test_theirs="""
def test_theirs(train, model, request):
    assert (train, model) == ("their train", "theirs")
    assert request.config.getoption("--seed") == "abc" and request.config.getoption("report") is True
""",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lightweight:" not in done.stdout


def test_a_cell_of_somebodys_is_trained_and_leaves_theirs_as_it_was(run, tmp_path):
    """An option whose short name is taken has its long one, nobody needs pytest-xdist, and the environment is what it
    was."""
    (tmp_path / "corpus.json").write_text(json.dumps(turns(12)))
    theirs = "\ndef pytest_addoption(parser):\n    parser.addoption('--seed', default='theirs')\n"
    done = run(
        *("-p", "no:xdist", "-W", "error::pytest.PytestUnknownMarkWarning"),
        *("--lightweight-seed=3", "--benchmark-json=out.json"),
        conftest=LOADS + theirs,
        test_cell=CELL + "    import os\n    assert 'GLIBC_TUNABLES' not in os.environ\n",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PytestUnknownMarkWarning" not in done.stdout
    (entry,) = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert entry["seed"] == 3


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_a_record_without_a_test_of_ours_is_written_as_ever_whoever_holds_its_file(run_here, workers):
    theirs = "def test_theirs(benchmark):\n    benchmark(int)"
    with files.alone(Path("out.json")):
        done = run_here("--benchmark-json=out.json", *workers, test_theirs=theirs)
    assert done.ret == 0
    assert workers or json.loads(Path("out.json").read_text())["benchmarks"]  # under pytest-xdist, nothing is timed


def test_a_look_at_the_tests_claims_no_record(run_here):
    Path("corpus.json").write_text(json.dumps(turns(12)))
    with files.alone(Path("out.json")):
        assert run_here("--benchmark-json=out.json", "--collect-only", test_cell=CELL).ret == 0
        refused = run_here("--benchmark-json=out.json", test_cell=CELL)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR


def test_a_fixture_that_asks_for_ours_is_ours(run_here):
    wraps = LOADS + "import pytest\n\n@pytest.fixture\ndef train(train):\n    return train\n"
    done = run_here(conftest=wraps, test_cell=CELL)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, done.errlines)
    assert "corpus.json: does not exist" in line


@pytest.mark.parametrize("theirs", ["", "\ndef pytest_addoption(parser):\n    parser.addoption('--model')\n"])
def test_every_help_text_is_printed(run, theirs):
    done = run("--help", conftest=LOADS + theirs)
    assert done.returncode == 0, done.stderr
    for option in options.OPTIONS:
        assert re.search(rf"--lightweight-{option.name}\b", done.stdout)
    assert "(5% if no number is given)" in " ".join(done.stdout.split())


def test_pytests_help_is_printed_in_this_repository():
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--gpus-per-trial" in done.stdout


@pytest.mark.parametrize("command", ["", "plan", "train", "chat", "report", "gate"])
def test_the_help_of_every_command_is_printed(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightweight", *command.split(), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: lightweight {command}".strip())


def test_what_help_says_of_other_modules_is_so():
    assert ratio.CAP == options.CAP


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest 8 refuses it only as it parses")
def test_an_option_that_others_register_late_is_not_lost(run_here, monkeypatch):
    """pytest keeps what is registered to itself; where it could not be seen, the long name is still there."""
    monkeypatch.setattr(options, "taken_names", lambda parser: set())
    theirs = "\ndef pytest_addoption(parser):\n    parser.addoption('--seed', default='theirs')\n"
    done = run_here("--lightweight-seed=3", conftest=LOADS + theirs, test_other="def test_other(): pass\n")
    assert done.ret == 0


@pytest.mark.parametrize("without", ["xdist", "benchmark"])
def test_other_tests_need_neither_xdist_nor_benchmark(run, without):
    done = run("-p", f"no:{without}", test_other="def test_other(): pass\n")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cell_needs_benchmark_which_is_one_line(run_here):
    done = run_here("-p", "no:benchmark", test_cell=CELL)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, done.errlines)
    assert line == "ERROR: lightweight's tests are timed by pytest-benchmark: leave out -p no:benchmark"
    assert "INTERNALERROR" not in done.stdout.str()


@pytest.mark.parametrize("only", ["--collect-only", "--fixtures", "--fixtures-per-test", "--setup-plan"])
def test_what_only_shows_tests_looks_for_no_corpus(run_here, only):
    assert run_here(only, test_cell=CELL).ret == 0


@pytest.mark.parametrize("name", ["--model=opt_tiny", "--method=LoRA", "--target=T4x"])
def test_a_name_that_nothing_has_is_refused_before_torch_is_imported(run, name):
    without_torch = LOADS + "import sys\nsys.modules['torch'] = None  # which makes importing it an error\n"
    done = run(name, conftest=without_torch, test_cell=CELL)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = filter(None, done.stderr.splitlines())
    assert line.startswith("ERROR: ") and "did you mean" in line


def test_a_projects_own_benchmarks_keep_their_machine_and_get_no_outcomes(run, tmp_path):
    done = run("--benchmark-json=out.json", test_own="def test_own(benchmark):\n    benchmark(lambda: None)\n")
    assert done.returncode == 0, done.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert "outcomes" not in document and "gpu" not in document["machine_info"] and "node" in document["machine_info"]


def test_under_xdist_a_projects_own_benchmarks_are_off_as_they_are_without_us(run):
    own = "def test_own(benchmark):\n    assert benchmark.disabled\n    benchmark(lambda: None)\n"
    done = run("-n", "1", test_own=own)
    assert done.returncode == 0, done.stdout


TORCHAO = """
import importlib.abc, importlib.machinery, sys

class Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    # has every submodule and every name that transformers may ask for

    def find_spec(self, name, path, target=None):
        if name.startswith("torchao.") and name != "torchao.device":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def anything(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = anything

sys.meta_path.insert(0, Anything())
__version__ = "0.18.0"
from torchao import device
"""


def test_a_package_that_touches_cuda_is_named_and_children_start_anew(run, tmp_path, micro):
    """As torchao asks for the device's properties, which transformers imports where it is installed. This one pretends,
    in the forkserver alone."""
    (tmp_path / "corpus.json").write_text(json.dumps(turns(12)))
    told = tmp_path / "torchao-0.18.0.dist-info"
    for folder in (tmp_path / "torchao", told):
        folder.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.18.0\n")
    (tmp_path / "torchao" / "__init__.py").write_text(TORCHAO)
    (tmp_path / "torchao" / "device.py").write_text(
        "import sys, torch\nif 'lightweight.child.nursery' in sys.modules:\n    torch.cuda._initialized = True\n"
    )
    written = f"name='micro', source={str(micro.location)!r}"  # a child less
    done = run("-s", test_cell=re.sub(r'name="micro", architecture=[^)]*', written, CELL))
    assert done.returncode == 0, done.stdout + done.stderr
    line = "torchao.device initialises CUDA when it is imported: children start in fresh interpreters"
    assert done.stdout.count(line) == 1
    assert "micro x lora: completed" in done.stdout
