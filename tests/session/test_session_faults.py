"""Whatever ends a session: its record holds what had completed and where the trial at hand was, and no process and no
folder of it stays. Real sessions in processes of their own, and real signals."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from conftest import MICRO, turns
from lightweight import record
from lightweight.child import reaper
from lightweight.session.interruption import Interruption
from lightweight.session.ledger import Ledger

ROOT = Path(__file__).parents[2]

CELLS = f"""
import os, signal, time
import pytest
from lightweight.internals.multiprocessing import forkserver_pid
from lightweight.models import Model
from lightweight.plugin import Laboratory

MICRO = Model(name="micro", architecture={MICRO.architecture!r})

@pytest.fixture(autouse=True)
def stop_the_second(monkeypatch):
    def stop(laboratory, trial, step, loss):
        if trial.method.name == "{{method}}" and step == 3:
            from lightweight.child import handle
            child = max(handle._living, key=lambda each: each.pid)
            {{act}}

    monkeypatch.setattr(Laboratory, "_show_step", stop)

@pytest.mark.parametrize("method", ["baseline", "lora"])
def test_cell(train, method):
    outcome = train(MICRO, method)
    assert outcome.kind == "completed", outcome.reason
"""

STOPPED = "os.kill(child.pid, signal.SIGSTOP); open('stopped', 'w').close()"


@pytest.fixture
def project(tmp_path):
    """Somebody's project, its temporary files in a folder of their own; the processes of its sessions are known by an
    environment variable."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["lightweight.plugin"]')
    (tmp_path / "corpus.json").write_text(json.dumps(turns(12)))
    (tmp_path / "scratch").mkdir()
    return tmp_path


def start(
    project: Path, act: str, *arguments: str, method: str = "lora", inside: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """A session whose `method` does `act` in its third step; `inside` is a command that runs it."""
    (project / "test_cells.py").write_text(CELLS.replace("{act}", act).replace("{method}", method))
    environment = {**os.environ, "TMPDIR": str(project / "scratch"), "MARK": str(project)}
    command = [*inside, sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "--epochs=3"]
    return subprocess.Popen(
        [*command, "--benchmark-json=out.json", *arguments],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(is_true, seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(is_true())


FOLDERS = (reaper.PREFIX, "pymp-")
"""How ours, and multiprocessing's, are called."""


def left(project: Path) -> list[str]:
    """Processes of the project's sessions that are there, stopped ones too, and folders."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = f"MARK={project}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if is_ours and reaper.is_running(int(folder.name), reaper.started(int(folder.name))):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found + [path.name for path in (project / "scratch").iterdir() if path.name.startswith(FOLDERS)]


def outcomes(project: Path) -> list[tuple[str, str, str | None, str | None]]:
    document = json.loads((project / "out.json").read_text())
    return [(each["method"], each["outcome"], each["phase"], each.get("reason")) for each in document["outcomes"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_pytest_ends_it_with_its_record(project, number):
    session = start(project, STOPPED)
    assert wait_for((project / "stopped").exists)
    session.send_signal(number)
    output, _ = session.communicate(timeout=60)
    assert session.returncode == (2 if number == signal.SIGINT else 128 + number), output
    by = "KeyboardInterrupt" if number == signal.SIGINT else number.name
    assert outcomes(project) == [
        ("baseline", "completed", None, None),
        ("lora", "crashed", "train", f"interrupted by {by}"),
    ]
    assert wait_for(lambda: not left(project), 15), left(project)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_each_signal_that_ends_a_session_interrupts_it_once_and_is_named(pytester, monkeypatch, number):
    """A second one would interrupt the writing of the record."""
    cleanups: list[Callable[[], None]] = []
    config = pytester.parseconfig()
    monkeypatch.setattr(config, "add_cleanup", cleanups.append)
    signal.signal(number, signal.SIG_DFL)
    interruption = Interruption(config, Ledger(config))
    interruption.heed_signals()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    signal.raise_signal(number)
    assert interruption.reason(KeyboardInterrupt()) == f"interrupted by {number.name}"
    for cleanup in cleanups:
        cleanup()
    assert signal.getsignal(number) == signal.SIG_DFL


FIRST = """
from test_cells import MICRO

def test_first(train):
    assert train(MICRO, "baseline", seed=1).kind == "completed"
"""


@pytest.mark.parametrize("whom", ["pytest", "its group"])
def test_a_session_that_is_killed_leaves_every_completed_trial_and_no_process_and_no_folder(project, whom):
    """Not even a child that is stopped, which could not end itself."""
    (project / "test_before.py").write_text(FIRST)
    session = start(project, STOPPED)
    assert wait_for((project / "stopped").exists)
    assert left(project)
    (session.kill if whom == "pytest" else lambda: os.killpg(session.pid, signal.SIGKILL))()
    session.communicate(timeout=60)
    assert wait_for(lambda: not left(project), 15), left(project)
    died = ("lora", "crashed", "train", "the process that ran it died")
    assert outcomes(project) == [("baseline", "completed", None, None)] * 2 + [died]
    assert [path.name for path in project.iterdir() if path.name.startswith(".writing-")] == []
    assert record.load(project / "out.json").command


def test_a_second_session_into_the_same_file_is_refused_before_it_trains_and_one_after_the_first_is_not(project):
    """Whatever has ended the first, whose record the second leaves as it is."""
    first = start(project, STOPPED)
    assert wait_for((project / "stopped").exists)
    before = (project / "out.json").read_bytes()
    second = start(project, "open('trained', 'w').close()")
    output, _ = second.communicate(timeout=240)
    assert second.returncode == pytest.ExitCode.USAGE_ERROR, output
    problem = f"--benchmark-json out.json: process {first.pid} writes there: wait for it, or name another file"
    assert f"ERROR: {problem}" in output.splitlines()
    assert (project / "out.json").read_bytes() == before and not (project / "trained").exists()
    first.kill()
    first.communicate(timeout=60)
    third = start(project, "pass", "-k", "baseline")
    output, _ = third.communicate(timeout=240)
    assert third.returncode == 0, output
    assert [each[:2] for each in outcomes(project)] == [("baseline", "completed")]
    assert not (project / ".out.json.lock").exists()


TIMED = '''
import threading

@pytest.mark.parametrize("seed", [
    pytest.param(1, marks=pytest.mark.timeout(222, method="signal")),
    pytest.param(2, marks=pytest.mark.timeout(222, method="thread")),
])
def test_its_time_is_up(train, seed):
    train(MICRO, "lora", seed=seed)
    assert seed == 2  # whose test goes on, its children having been killed

def test_afterwards(train):
    assert train(MICRO, "baseline", seed=1).kind == "completed"

def let_time_be_up():
    """What pytest-timeout waits for comes now."""
    if signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    for timer in threading.enumerate():
        if getattr(timer, "interval", None) == 222:
            threading.Thread(target=timer.function).start()
'''


def test_pytest_timeout_is_an_outcome_and_the_next_cell_runs(project):
    pytest.importorskip("pytest_timeout")
    session = start(project, f"{STOPPED}; let_time_be_up()", "-k", "baseline or its or afterwards")
    with (project / "test_cells.py").open("a") as cells:
        cells.write(TIMED)
    output, _ = session.communicate(timeout=240)
    assert session.returncode == 1, output
    timed_out = ("lora", "timed_out", "train", "Timeout (>222.0s) from pytest-timeout.")
    completed = ("baseline", "completed", None, None)
    assert outcomes(project) == [completed, timed_out, timed_out, completed]
    assert "2 failed, 2 passed" in output
    assert wait_for(lambda: not left(project), 15), left(project)


def test_a_stopped_forkserver_and_a_lost_scratch_folder_cost_no_cell(project):
    lost = "import shutil; os.kill(forkserver_pid(), signal.SIGSTOP); "
    lost += "[shutil.rmtree(os.path.join('scratch', each)) for each in os.listdir('scratch') if 'lightweight' in each]"
    session = start(project, lost, "--trial-timeout=20", method="baseline")
    output, _ = session.communicate(timeout=240)
    assert session.returncode == 0, output
    assert [each[:2] for each in outcomes(project)] == [("baseline", "completed"), ("lora", "completed")]
    assert wait_for(lambda: not left(project), 15), left(project)


SMALL_DISK = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=24m none scratch && exec "$@"', "sh")
"""Runs a command with 24 MiB for its temporary files."""

FILL = """
            with open("scratch/filler", "wb", buffering=0) as filler:
                try:
                    while True:
                        filler.write(bytes(4096))
                except OSError:
                    pass"""


def test_a_disk_that_fills_up_is_an_outcome_that_names_disk_and_folder_and_the_next_cell_runs(project):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount of one's own here")
    again = "\n\n@pytest.fixture(autouse=True)\ndef room():\n    yield\n    if os.path.exists('scratch/filler'): "
    session = start(project, FILL, method="baseline", inside=SMALL_DISK)
    with (project / "test_cells.py").open("a") as cells:
        cells.write(again + "os.remove('scratch/filler')\n")
    output, _ = session.communicate(timeout=240)
    assert session.returncode == 1, output
    (first, kind, phase, reason), second = outcomes(project)
    assert (first, kind) == ("baseline", "crashed") and phase in ("train", "evaluate", "save"), output
    assert reason is not None and f"is on a disk that is full, {project / 'scratch'} with 0 MiB of 24 free" in reason
    assert second[:2] == ("lora", "completed"), output
    assert wait_for(lambda: not left(project), 15), left(project)


# A torch for GPUs takes more memory before anything is built.
LIMIT_BYTES, WIDTH = (1200 * 2**20, 1024) if torch.version.cuda is None else (3 * 2**30, 2048)
HEAVY = f"""
from lightweight.models import Model

ARCHITECTURE = {MICRO.architecture!r} | {{"hidden_size": {WIDTH}, "num_hidden_layers": 8, "ffn_dim": {4 * WIDTH}}}
HEAVY = Model(name="heavy", architecture=ARCHITECTURE)

def test_heavy(train):
    outcome = train(HEAVY, "baseline")
    assert outcome.kind == "completed", outcome.reason

def test_cell_afterwards(train):
    from test_cells import MICRO
    assert train(MICRO, "lora").kind == "completed"
"""


@pytest.fixture
def memory_cgroup():
    """A cgroup of one's own for memory, and the file with its limit: version 1 or 2."""
    limits = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}
    found = [(top / f"lightweight-{os.getpid()}", limit) for top, limit in limits.items() if os.access(top, os.W_OK)]
    if not found:
        pytest.skip("no cgroup of one's own here")
    folder, limit = found[0]
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no cgroup of one's own here")
    try:
        if not (folder / limit).exists():
            pytest.skip("no limit of memory in a cgroup of one's own")
        yield folder, folder / limit
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), 10)
    finally:
        folder.rmdir()


def test_a_child_that_the_kernel_kills_for_memory_has_run_out_of_what_its_cgroup_grants(project, memory_cgroup):
    folder, limit = memory_cgroup
    limit.write_text(str(LIMIT_BYTES))
    (project / "test_heavy.py").write_text(HEAVY)
    join = ("sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh")
    session = start(project, "pass", "test_heavy.py", inside=join)
    output, _ = session.communicate(timeout=240)
    assert session.returncode == 1, output
    (_, kind, _, reason), afterwards = outcomes(project)
    assert kind == "out_of_memory", output
    assert reason is not None
    assert reason.startswith("killed by the kernel; the host's memory: the memory limit of its cgroup is ")
    assert reason.endswith(f" {LIMIT_BYTES / 2**30:.2f} GiB")
    assert afterwards[:2] == ("lora", "completed"), output
    assert wait_for(lambda: not left(project), 15), left(project)


def test_folders_of_owners_that_are_gone_are_removed_and_others_are_not(tmp_path):
    mine = reaper.Reaper()
    living = mine.make_folder(tmp_path)
    dead = tmp_path / f"{reaper.PREFIX}dead"
    somebodys = tmp_path / f"{reaper.PREFIX}without-an-owner"
    for folder in (dead, somebodys):
        folder.mkdir()
    (dead / reaper.OWNER).touch()
    reaper.remove_left_behind(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, somebodys.name])
    mine.remove_folder(living)
    mine.close()
    assert not living.exists()


def test_a_reaper_that_was_killed_is_replaced_and_told_all():
    mine = reaper.Reaper()
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    mine.adopt(child.pid)
    assert mine.pid is not None
    os.kill(mine.pid, signal.SIGKILL)
    assert wait_for(lambda: not reaper.is_running(mine.pid, reaper.started(mine.pid)), 5)
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    mine.adopt(other.pid)
    mine.close()
    assert {child.wait(timeout=10), other.wait(timeout=10)} == {-signal.SIGKILL}


def test_a_process_that_has_taken_an_ended_ones_number_is_let_be():
    bystander = subprocess.Popen(["sleep", "60"])
    reaper.kill(bystander.pid, since="1")
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_temporary_folder_is_removed_whatever_ends_its_process(tmp_path):
    inside = "from lightweight.child.reaper import Reaper\nwith Reaper().temporary_folder() as folder: {act}"
    for act, status in (("assert folder.is_dir()", 0), ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL)):
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", inside.format(act=act)], env=environment, check=False)
        assert done.returncode == status
        assert wait_for(lambda: not list(tmp_path.iterdir()), 15), list(tmp_path.iterdir())


FULL = """
import os, resource, tempfile
from pathlib import Path
from lightweight.child.reaper import Reaper

mine = Reaper()
folder, empty = mine.make_folder(), mine.make_folder()
(folder / "trial" / "saved").mkdir(parents=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    mine.make_folder(Path(tempfile.gettempdir()))
except OSError:
    pass
mine.remove_folder(folder)
mine.remove_folder(empty)
"""


def test_folders_of_a_process_that_has_opened_all_the_files_it_may_are_removed(tmp_path):
    """Two levels deep, where one descriptor does not do, and one that it could no longer lock."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", FULL], env=environment, check=True)
    assert wait_for(lambda: not list(tmp_path.iterdir()), 15), list(tmp_path.rglob("*"))


def test_a_reaper_that_nobody_holds_any_more_is_nothing_to_warn_of(recwarn):
    """As when pytester unloads the module that started it."""
    process = reaper._start()
    assert process.poll() is None
    del process
    gc.collect()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]
