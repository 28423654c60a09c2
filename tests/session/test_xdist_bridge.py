"""End to end on two workers: every cell in one JSON and one table, once, and a worker's death costs one cell."""

import json
import os
from types import SimpleNamespace

import pytest

from conftest import MICRO, turns
from lightweight import files
from lightweight.session import xdist_bridge
from session.test_session_faults import left, wait_for

pytestmark = pytest.mark.usefixtures("without_gpu")

CELLS = f"""
    import os
    import pytest
    from dataclasses import replace
    from lightweight.models import Model

    MICRO = Model(name="micro", architecture={MICRO.architecture!r})
    MODELS = [MICRO, replace(MICRO, name="other")]

    @pytest.mark.parametrize("model", MODELS, ids=["micro", "other"])
    @pytest.mark.parametrize("method", ["baseline", "lora"])
    def test_cell(train, model, method):
        outcome = train(model, method)
        assert outcome.kind == "completed", outcome.reason
"""

SPEEDUP = """
    @pytest.mark.parametrize("model", MODELS, ids=["micro", "other"])
    def test_speedup(speedup, model):
        assert speedup(model, "lora").reason is None
"""

KILLER = """
    @pytest.fixture(autouse=True)
    def killer(monkeypatch, request):
        import os, signal
        from lightweight.child import handle
        from lightweight.plugin import Laboratory

        def kill(laboratory, trial, step, loss):
            if trial.name == "micro x baseline" and trial.seed == 1 and step == 3:
                for child in handle._living:
                    os.kill(child.pid, signal.SIGSTOP)  # it cannot end itself then
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Laboratory, "_show_step", kill)
"""

ALL = {(model, method) for model in ("micro", "other") for method in ("baseline", "lora")}


NO_BENCHMARK = """
    def test_no_benchmark():
        assert False
"""

TWO_IN_ONE = """
    def test_two(train, outcome_of):
        train(MICRO, "lora", seed=1)
        outcome_of(MICRO, "baseline", seed=1)
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest('pytest_plugins = ["lightweight.plugin"]')
    pytester.makeini("[pytest]\naddopts = -p no:randomly\n")
    (pytester.path / "corpus.json").write_text(json.dumps(turns(12)), "utf-8")
    return pytester


def run_json(run, project: pytest.Pytester, *arguments: str, **options):
    result = run("--benchmark-json=out.json", "--epochs=2", *arguments, **options)
    return result, json.loads((project.path / "out.json").read_text())


def found_in(document):
    return sorted((entry["model"], entry["method"], entry["outcome"]) for entry in document["outcomes"])


def test_on_two_gateways_cells_are_all_there_once_and_a_models_together(project):
    """`--tx` as for other hosts."""
    project.makepyfile(test_cells=CELLS + SPEEDUP)
    options = ("--pairs=8", "--benchmark-autosave", "--report=report.md")
    result, document = run_json(project.runpytest, project, "--tx", "2*popen", *options)
    result.assert_outcomes(passed=6)
    assert "- 4 cells: 4 completed." in (project.path / "report.md").read_text("utf-8")
    entries, rows = document["outcomes"], document["benchmarks"]
    assert len(entries) == len(rows) == 4
    assert {(entry["model"], entry["method"]) for entry in entries} == ALL
    assert {row["fullname"] for row in rows} == {f"test_cells.py::test_cell[{meth}-{mod}]" for mod, meth in ALL}
    worker_of = {entry["model"]: entry["worker"] for entry in entries}
    assert set(worker_of.values()) == {"gw0", "gw1"}
    assert all(entry["worker"] == worker_of[entry["model"]] for entry in entries)
    for row in rows:
        told = row["extra_info"]
        assert (told["worker"], told["visible_gpu"]) == (worker_of[told["model"]], None)
        assert row["stats"]["rounds"] == len(row["stats"]["data"]) == len(told["device_seconds"]) == 2
        assert row["group"] == f"{told['model']} on cpu"
    assert [len(entry["speedup"]["log_ratios"]) for entry in entries if "speedup" in entry] == [8, 8]
    result.stdout.fnmatch_lines_random(
        [
            "*benchmark 'micro on cpu': 2 tests*",
            f"test_cell*lora-micro* [[]{worker_of['micro']}, CPU[]] *",
            f"other * lora * completed * {worker_of['other']}*",
        ]
    )
    assert "automatically disabled" not in result.stdout.str() + result.stderr.str()
    (stored,) = project.path.glob(".benchmarks/*/*.json")  # the controller's alone
    assert len(json.loads(stored.read_text())["outcomes"]) == 4


LOCKED = """
    from pathlib import Path
    from lightweight import files

    def test_locked(train):
        train(MICRO, "lora")
        with pytest.raises(files.LockedError, match=f"process {os.getppid()} holds it"), files.alone(Path("out.json")):
            pass
"""


def test_the_controller_holds_the_record_and_no_worker_trains_where_it_cannot(project):
    """Without an option of lightweight's, by which the controller would know of its tests."""
    project.makepyfile(test_cells=CELLS + LOCKED)
    arguments = ("-n", "1", "-k", "locked", "--benchmark-json=out.json")
    with files.alone(project.path / "out.json"):
        refused = project.runpytest(*arguments)
        problem = f"process {os.getpid()} writes there: wait for it, or name another file"
        assert list(filter(None, refused.errlines)) == [f"ERROR: --benchmark-json out.json: {problem}"]
        assert refused.ret == pytest.ExitCode.USAGE_ERROR and not (project.path / "out.json").exists()
    project.runpytest(*arguments).assert_outcomes(passed=1)
    assert not (project.path / ".out.json.lock").exists()


def test_a_worker_dies_and_loses_the_cell_it_ran_and_nothing_else(project, monkeypatch):
    """Not what the test that it died in had found before; and it leaves no process and no folder. Under
    --benchmark-only, which pytest-benchmark refuses under pytest-xdist."""
    (project.path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(project.path / "scratch"))
    monkeypatch.setenv("MARK", str(project.path))
    project.makepyfile(test_cells=CELLS + NO_BENCHMARK + TWO_IN_ONE + KILLER)
    arguments = ("-n", "2", "--benchmark-only")
    result, document = run_json(project.runpytest, project, *arguments)
    result.assert_outcomes(passed=4, failed=1, skipped=1)
    assert found_in(document) == [
        ("micro", "baseline", "completed"),
        ("micro", "baseline", "crashed"),
        ("micro", "lora", "completed"),
        ("micro", "lora", "completed"),
        ("other", "baseline", "completed"),
        ("other", "lora", "completed"),
    ]
    assert sorted(entry["seed"] for entry in document["outcomes"] if entry["model"] == "micro") == [0, 0, 1, 1]
    (crashed,) = [entry for entry in document["outcomes"] if entry["outcome"] == "crashed"]
    assert (crashed["reason"], crashed["seed"]) == ("the process that ran it died", 1)
    assert len(document["benchmarks"]) == 4
    result.stdout.fnmatch_lines_random(["micro * baseline * crashed in train *", "micro * lora * completed *"])
    assert wait_for(lambda: not left(project.path), 15), left(project.path)


def test_a_wrong_command_line_is_one_line_from_the_workers_too(project):
    project.makepyfile("def test_cell(train, model, method):\n    assert not train(model, method)\n")
    result = project.runpytest("-n", "2", "--model=./nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: model ./nowhere: no such folder; give a folder with *"])
    assert "INTERNALERROR" not in result.stdout.str()


def test_auto_is_one_worker_for_the_gpus_of_a_trial_and_one_on_a_cpu(project, monkeypatch):
    config = project.parseconfig("-n", "auto")
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    for gpus, each, workers in ((0, 1, 1), (1, 1, 1), (4, 1, 4), (4, 2, 2), (5, 2, 2), (1, 2, 1)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        config.option.gpus_per_trial = each
        assert config.hook.pytest_xdist_auto_num_workers(config=config) == workers
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")  # asked for
    assert config.hook.pytest_xdist_auto_num_workers(config=config) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-n", "2"], "loadgroup"),
        (["--tx", "2*popen"], "loadgroup"),
        (["-n", "2", "--dist", "load"], "load"),
        (["-n", "2", "-d"], "no"),  # which pytest-xdist turns into load
        ([], "no"),
    ],
)
def test_a_models_cells_stay_together_unless_another_way_was_named(project, arguments, expected):
    config = project.parseconfig(*arguments)
    xdist_bridge.pytest_cmdline_main(config)
    assert config.getoption("dist") == expected


@pytest.mark.parametrize(
    ("visible", "slot", "each", "gpus", "cores"),
    [
        (None, 1, 1, "1", {2, 3}),
        ("2,5", 1, 1, "5", {4, 5, 6, 7}),
        ("2,5", 2, 1, "2", {0, 1, 2, 3}),
        ("GPU-a,GPU-b", 0, 1, "GPU-a", {0, 1, 2, 3}),
        (None, 1, 2, "2,3", {4, 5, 6, 7}),
        ("7,1,4,2,0", 1, 2, "4,2", {4, 5, 6, 7}),
        ("7,1,4,2,0", 2, 2, "7,1", {0, 1, 2, 3}),
        ("0,1,2,3,4,5,6,7,8", 0, 1, "0", set(range(8))),
    ],
)
def test_a_worker_has_the_gpus_of_its_trials_and_a_share_of_the_cores_alone(
    monkeypatch, visible, slot, each, gpus, cores
):
    had = set(range(8))
    monkeypatch.setattr(xdist_bridge, "CAN_PIN", True)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(had), raising=False)
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, given: had.intersection_update(given), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(visible.split(",")) if visible else 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    xdist_bridge._take_place(slot, each)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpus
    assert had == cores
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_replacement_gets_the_dead_workers_gpu_and_each_machine_counts_its_own(project):
    controller = xdist_bridge._Controller(project.parseconfig("--dist", "loadgroup"))

    def node(**where):
        spec = SimpleNamespace(**{"popen": None, "ssh": None, "socket": None} | where)
        made = SimpleNamespace(gateway=SimpleNamespace(spec=spec), workerinput={})
        controller.pytest_configure_node(made)
        return made

    here = [node(popen=True) for _ in range(3)]
    there = [node(ssh="far") for _ in range(2)]
    assert [made.workerinput["lightweight_slot"] for made in here + there] == [0, 1, 2, 0, 1]
    controller.pytest_testnodedown(here[1])
    assert node(popen=True).workerinput["lightweight_slot"] == 1
    assert here[0].workerinput["lightweight_loadgroup"]
