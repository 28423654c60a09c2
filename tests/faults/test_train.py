"""`lightweight train` is asked to stop, started again, or given what is not its own, at other points than in a step."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import harness
from faults.harness import outcome_of, result, steers
from faults.mutants import STEERING
from lightweight.__main__ import main
from lightweight.child import forkserver, worker
from lightweight.cli import checkpoints
from lightweight.cli import train as job
from lightweight.cli.callbacks import Checkpoints
from lightweight.cli.output import Output


@pytest.fixture
def interrupt(monkeypatch):
    """Have this process sent a signal when optimizer step `step` ends."""

    def arrange(step: int, number: int = signal.SIGTERM) -> None:
        done: list[int] = []

        def step_ended(self: job.Unattended) -> None:
            done.append(1)
            if len(done) == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(job.Unattended, "step_ended", step_ended)

    return arrange


def told(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith(("lightweight: ", "SIG", "training had"))]


@pytest.mark.parametrize("number", checkpoints.SIGNALS, ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_a_signal_after_training_promises_the_result_and_saves_it(
    given, tmp_path, monkeypatch, capfd, tried, method, number
):
    """At the held-out loss that comes after the last step."""
    evaluate, calls = worker.evaluate, []

    def evaluate_and_signal(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        evaluate(*arguments)

    monkeypatch.setattr(worker, "evaluate", evaluate_and_signal)
    status = main(given(tmp_path / "a", method=method))
    (line,) = told(capfd.readouterr().err)
    survived = status == 0 and (tmp_path / "a" / "record.json").is_file() and not (tmp_path / "a.partial").exists()
    tried("signals to `train`", survived=survived)
    assert survived
    assert line.endswith("the result is saved first; once more stops at once") and "checkpoint" not in line


@pytest.mark.parametrize("number", checkpoints.SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_in_the_last_step_stops_with_a_checkpoint_from_which_nothing_is_trained(
    given, tmp_path, interrupt, monkeypatch, tried, number
):
    assert main(given(tmp_path / "whole")) == 0
    interrupt(7, number)
    status = main(given(tmp_path / "a"))
    monkeypatch.setattr(job.Unattended, "step_ended", lambda self: pytest.fail("a step was trained"))
    if status == 130:
        assert Output(tmp_path / "a").checkpoint == tmp_path / "a.partial" / "checkpoint-7"
        status = main(given(tmp_path / "a", "--resume"))
    survived = status == 0 and result(tmp_path / "a") == result(tmp_path / "whole")
    tried("signals to `train`", survived=survived)
    assert survived


@pytest.mark.parametrize("where", ["in its place", "beside it"])
@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_resuming_a_finished_job_finishes_it_and_trains_nothing(given, tmp_path, monkeypatch, capfd, where, method):
    command = given(tmp_path / "a", method=method)
    if where == "beside it":
        with monkeypatch.context() as patched:
            patched.setattr(Output, "publish", lambda self: os.kill(os.getpid(), signal.SIGINT))
            patched.setattr(checkpoints.StopRequest, "receive", signal.default_int_handler)
            assert main(command) == 130
        assert not (tmp_path / "a").exists()
        folder = tmp_path / "a.partial" / "result"
    else:
        assert main(command) == 0
        folder = tmp_path / "a"
    before = result(folder)
    monkeypatch.setattr(worker, "set_up", lambda *_, **__: pytest.fail("something was trained"))
    capfd.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "nothing is left to train" in capfd.readouterr().out
    assert result(tmp_path / "a") == before
    assert not (tmp_path / "a.partial").exists()


def test_a_job_of_ones_own_method_that_is_resumed_without_it_is_one_line(given, tmp_path, interrupt, capfd):
    """A method's name does not say where it is imported from."""
    interrupt(4)
    command = given(tmp_path / "a")
    assert main(command) == 130
    at = command.index("--method")
    found = outcome_of([*command[:at], *command[at + 2 :], "--resume"], capfd)
    assert (
        found.is_a_line and "of method constant-baseline, which is none of the suite's: give it with --m" in found.err
    )
    assert Output(tmp_path / "a").checkpoint is not None


def test_resuming_a_finished_job_with_other_options_is_one_line_and_leaves_it_alone(given, tmp_path, capfd):
    command = given(tmp_path / "a")
    assert main(command) == 0
    before = result(tmp_path / "a")
    capfd.readouterr()
    assert main([*command, "--resume", "--seed", "3"]) == 2
    (line,) = told(capfd.readouterr().err)
    assert "seed was 0 and is 3" in line
    assert result(tmp_path / "a") == before


@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_two_whole_checkpoints_are_kept_at_every_step(given, tmp_path, monkeypatch, method):
    partial, kept, original = tmp_path / "a.partial", [], job.Unattended.step_ended

    def look(self: job.Unattended) -> None:
        found = checkpoints.all_in(partial)
        assert all(checkpoints.problem(path) is None for path in found)
        kept.append([checkpoints.step_of(path) for path in found])
        original(self)

    monkeypatch.setattr(job.Unattended, "step_ended", look)
    assert main([*given(tmp_path / "a", method=method), "--save-steps", "1"]) == 0
    assert kept == [[], [1], [2, 1], [3, 2], [4, 3], [5, 4], [6, 5]]


@pytest.mark.parametrize("other", ["constant:CAPTURED", "constant:STOCK"])
def test_a_job_is_not_resumed_with_the_other_kind_of_step(given, tmp_path, interrupt, monkeypatch, capfd, other):
    """The method's digest and its captured step are in the checkpoint's manifest."""
    method = ({"constant:CAPTURED", "constant:STOCK"} - {other}).pop()
    with monkeypatch.context():
        interrupt(4)
        assert main(given(tmp_path / "a", method=method)) == 130
    capfd.readouterr()
    assert main(given(tmp_path / "a", "--resume", method=other)) == 2
    (line,) = told(capfd.readouterr().err)
    assert "captured_step was" in line and "the job in" in line
    assert Output(tmp_path / "a").checkpoint is not None


@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_what_has_diverged_is_neither_a_checkpoint_nor_a_result(given, tmp_path, monkeypatch, capfd, tried, method):
    """Its first losses are finite: the checkpoint of step 3 stays, and the one of step 6 does not become one."""
    assert main(given(tmp_path / "whole", method=method)) == 0
    original = Checkpoints.on_step_end

    def diverge(self, args, state, control, **given) -> None:
        original(self, args, state, control, **given)
        if state.global_step == 6:
            with torch.no_grad():
                next(weight for weight in given["model"].parameters() if weight.requires_grad)[-1] = float("nan")

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_step_end", diverge)
        found = outcome_of(given(tmp_path / "a", method=method), capfd)
    kept = checkpoints.all_in(tmp_path / "a.partial")
    status = main(given(tmp_path / "a", "--resume", method=method))
    survived = status == 0 and result(tmp_path / "a") == result(tmp_path / "whole")
    tried("diverged jobs", survived=survived and found.status == 1)
    assert survived
    assert found.status == 1 and "a trained weight is not finite at step 6: take a smaller" in found.err, found
    assert [path.name for path in kept] == ["checkpoint-3"]


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_a_learning_rate_that_is_too_large_is_one_line_and_leaves_nothing(given, tmp_path, capfd, tried, method, steps):
    """Also where it shows in the held-out loss alone, after the last step."""
    words = given(tmp_path / "a", "--learning-rate", "1e38", "--max-steps", str(steps), method=method)
    at = words.index("--save-steps")
    found = outcome_of(words[:at] + words[at + 2 :], capfd)
    survived = found.status == 1 and found.err.count("\n") == 1 and not list(tmp_path.glob("a*"))
    tried("diverged jobs", survived=survived)
    assert survived, found
    what = "held-out loss is nan at step 1" if steps == 1 else "training loss is nan at step 2"
    assert f"{what}: take a smaller --learning-rate" in found.err, found


@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_working_files_that_somebody_removes_are_made_again(given, tmp_path, monkeypatch, tried, method):
    """A cleaner of old files, say. What had been saved is gone; the result is not."""
    assert main(given(tmp_path / "whole", method=method)) == 0

    def step_ended(self) -> None:
        shutil.rmtree(tmp_path / "a.partial", ignore_errors=True)

    monkeypatch.setattr(job.Unattended, "step_ended", step_ended)
    survived = main(given(tmp_path / "a", method=method)) == 0 and result(tmp_path / "a") == result(tmp_path / "whole")
    survived = survived and not (tmp_path / "a.partial").exists()
    tried("working files removed or replaced", survived=survived)
    assert survived


@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_working_files_that_somebody_replaces_are_one_line(given, tmp_path, monkeypatch, capfd, tried, method):
    def step_ended(self) -> None:
        if (tmp_path / "a.partial" / "checkpoint-3").exists():
            checkpoints.remove(tmp_path / "a.partial" / "unfinished")
            (tmp_path / "a.partial" / "unfinished").touch()

    assert main(given(tmp_path / "whole", method=method)) == 0
    with monkeypatch.context() as patched:
        patched.setattr(job.Unattended, "step_ended", step_ended)
        found = outcome_of(given(tmp_path / "a", method=method), capfd)
    status = main(given(tmp_path / "a", "--resume", method=method))
    survived = found.is_a_line and status == 0 and result(tmp_path / "a") == result(tmp_path / "whole")
    tried("working files removed or replaced", survived=survived)
    assert survived, found
    assert "leave the files there alone while it trains; --resume then goes on after step 3" in found.err


def run_limited(given: list[str], log: Path, limit: int) -> None:
    """`given` where no file may be larger than `limit` bytes, as after `ulimit -f`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    harness.run_here(given, log, {}, None)


@pytest.mark.parametrize("limit", [60_000, 130_000])
@pytest.mark.parametrize("method", ["constant:STOCK", "constant:CAPTURED"])
def test_a_file_that_may_not_be_as_large_is_one_line_and_the_job_goes_on_without_the_limit(
    given, tmp_path, tried, method, limit
):
    """`limit` bytes are too few for the weights, or for the optimizer's moments."""
    assert main(given(tmp_path / "whole", method=method)) == 0
    command, log = given(tmp_path / "a", method=method), tmp_path / "log"
    process = forkserver.context.Process(target=run_limited, args=(command, log, limit))
    assert forkserver.start(process, 60) is None
    process.join(120)
    said = told(log.read_text())
    status = main([*command, "--resume"])
    survived = status == 0 and result(tmp_path / "a") == result(tmp_path / "whole")
    tried("files limited", survived=survived and process.exitcode in (0, 2))
    assert survived
    if process.exitcode != 0:  # an adapter is small
        assert process.exitcode == 2 and len(said) == 1 and "larger than ulimit -f allows" in said[0], log.read_text()
    assert process.exitcode == 2 or method == "constant:CAPTURED"


def test_a_method_that_names_a_folder_of_its_own_is_refused_before_anything_is_written(given, tmp_path, capfd):
    (tmp_path / "own.py").write_text(
        "from dataclasses import replace\nfrom lightweight.methods import BASELINE\n"
        f"OWN = replace(BASELINE, name='own', training_arguments={{'output_dir': {str(tmp_path / 'mine')!r}}})\n"
    )
    assert main(given(tmp_path / "a", method="own:OWN")) == 2
    (line,) = told(capfd.readouterr().err)
    assert "output_dir" in line and "--output" in line
    assert not {path.name for path in tmp_path.iterdir()} & {"a", "a.partial", "mine"}


def with_a_tensor(base, folder, change) -> None:
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("fc1.weight"))
    save_file(tensors | {name: change(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [torch.bool, torch.int8, torch.float8_e4m3fn], ids=str)
def test_weights_of_a_type_that_needs_a_quantization_to_be_numbers_are_one_line(given, base, tmp_path, capfd, kind):
    """transformers casts them, and would train what nobody had trained before."""
    with_a_tensor(base, tmp_path / "model", lambda tensor: tensor.to(kind))
    found = outcome_of([*given(tmp_path / "a"), "--model", str(tmp_path / "model")], capfd)
    assert found.is_a_line and "fc1.weight is stored as" in found.err, found


def test_weights_that_are_no_numbers_are_told_as_such_and_not_as_a_learning_rate(given, base, tmp_path, capfd):
    with_a_tensor(base, tmp_path / "model", lambda tensor: tensor * float("nan"))
    found = outcome_of([*given(tmp_path / "a"), "--model", str(tmp_path / "model")], capfd)
    assert found.status == 1 and "the model's weights hold NaN or infinity" in found.err, found
    assert main(given(tmp_path / "b")) == 0
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "b")
    found = outcome_of(["chat", str(tmp_path / "b"), "--prompt", "x"], capfd)
    assert found.is_a_line and "fc1.weight holds NaN" in found.err, found


def test_settings_of_answers_that_cannot_be_used_are_one_line(given, tmp_path, capfd):
    assert main(given(tmp_path / "a")) == 0
    (tmp_path / "a" / "generation_config.json").write_text('{"num_beams": "x"}')
    found = outcome_of(["chat", str(tmp_path / "a"), "--prompt", "x"], capfd)
    assert found.is_a_line and "generation_config.json" in found.err, found


def test_what_steers_a_terminal_is_shown_as_text_in_results_and_refusals(given, tmp_path, capfd):
    output = f"{tmp_path}/{STEERING}".replace("\n", " ").replace(" ", "")
    found = outcome_of(given(output), capfd)
    assert found.status == 0 and "saved in" in found.out and not steers(found.out), found
    for words in (["report", STEERING], ["report", "x", f"--bogus={STEERING}"], ["gate", "x", "--undecided", STEERING]):
        found = outcome_of(words, capfd)
        assert found.is_a_line, (words, found)
